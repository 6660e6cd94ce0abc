"""From what the user asked for to the options of a run."""

from __future__ import annotations

import pytest

from kdcli.engine.training.run_config import from_flags
from kdcli.errors import OptionError


@pytest.mark.parametrize("field", [{"method": "ld"}, {"cache": "store"}, {"teacher": "run"}])
def test_plain_training_refuses_what_it_would_not_read(field: dict[str, str]) -> None:
    plain = {"data": "data", "model": {"name": "gfl_resnet18"}}
    assert from_flags("train", plain, {}, None, {}).options().method == ""
    with pytest.raises(OptionError, match=rf"train reads no {next(iter(field))}: .* use distill"):
        from_flags("train", {**plain, **field}, {}, None, {}).options()
