"""Links of a page to files outside docs/ (examples, the README) lead to the repository when the page is on the site.

The Markdown keeps relative links, so that they also work where the files are read as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

LINK = re.compile(r"\]\((\.\./[^)\s#]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page with such links made absolute. Raises PluginError for one whose file does not exist."""
    docs = Path(config.docs_dir).resolve()
    root = docs.parent

    def absolute(link: re.Match[str]) -> str:
        target = (docs / page.file.src_uri).parent.joinpath(link[1]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.is_relative_to(root) or not target.exists():
            raise PluginError(f"{page.file.src_uri}: '{link[1]}' leads to no file of the repository")
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target.relative_to(root).as_posix()}{link[2] or ''})"

    return LINK.sub(absolute, markdown)
