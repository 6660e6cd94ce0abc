"""The image files of a split: whether they can be read, their EXIF orientations, and files that are there twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PureWindowsPath

from kdcli.data.coco import Dataset
from kdcli.data.findings import Fault, Warned, image_name, warned
from kdcli.data.images import ImageSizeError, decode_image, probe_image
from kdcli.data.reading import Orientations, over_images, sort_orientations
from kdcli.errors import DataError, MissingPathError
from kdcli.options import Exif

NO_ORIENTATIONS = Orientations()
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Seen:
    """What was seen of one image file."""

    fault: Fault | None = None
    tag: int = 1  # EXIF orientation
    stored: tuple[int, int] = (0, 0)  # (height, width) in the file
    digest: bytes = b""  # sha256, of a file that was read whole


@dataclass(frozen=True)
class FileFindings:
    """What was seen of all, by position."""

    faults: tuple[Fault, ...] = ()
    orientations: Orientations = NO_ORIENTATIONS
    digests: tuple[bytes, ...] | None = None  # sha256; b"" for a faulty one; None: only headers were read


def look_at_files(dataset: Dataset, decode: bool, progress: Progress | None) -> FileFindings:
    """Read every image of ``dataset``, whole (``decode``) or its header. Raises nothing for what is wrong with one."""

    def look(i: int) -> Seen:
        kind = "bad file name"
        try:
            path = dataset.image_path(i)
            kind = "corrupt image"
            size = dataset.image_size(i)
            digest = decode_image(path, size, dataset.exif)[1] if decode else b""
            return Seen(None, *probe_image(path, size, dataset.exif), digest)
        except MissingPathError as error:
            return Seen(Fault("missing image", image_name(dataset, i), str(error), i))
        except ImageSizeError as error:
            return Seen(Fault("wrong image size", image_name(dataset, i), str(error), i))
        except DataError as error:
            return Seen(Fault(kind, image_name(dataset, i), str(error), i))

    faults, tags, digests = [], {}, []
    total = dataset.num_images
    for i, seen in enumerate(over_images(total, look)):
        if seen.fault is not None:
            faults.append(seen.fault)
        if seen.tag != 1:
            tags[i] = (seen.tag, seen.stored)
        digests.append(seen.digest)
        if progress is not None:
            progress(i + 1, total)
    return FileFindings(tuple(faults), sort_orientations(dataset, tags), tuple(digests) if decode else None)


def orientation_warnings(dataset: Dataset, found: Orientations, proven: bool | None, exif: Exif) -> list[Warned]:
    """What is done with EXIF orientations: loud where a rule decided or sizes contradict it, not where the user did."""
    mixed = bool(found.turned and found.stored)
    lines = []
    for positions, kind in (
        (found.turned, "image with an EXIF quarter turn, turned: its annotated size is that of the turned picture"),
        (found.stored, "image with an EXIF quarter turn, not turned: its annotated size is that in the file"),
    ):
        lines += warned(kind, [image_name(dataset, i) for i in positions], loud=mixed)
    if proven is None:
        why = (
            "no size in the data set shows whether boxes are of the turned pictures; say so with --exif apply or ignore"
        )
    elif proven is dataset.exif:
        why = f"as {'most' if mixed else 'the'} sizes of quarter turns in the data set say"
    else:
        why = "against what the sizes of quarter turns in the data set say"
    if exif != "auto" and proven in (None, dataset.exif):
        why = f"as --exif {exif} says"
    done = "turned" if dataset.exif else "not turned"
    kind = f"image with an EXIF half turn or mirror, or a square one with a quarter turn, {done}"
    loud = mixed or exif == "auto" or proven not in (None, dataset.exif)
    return lines + warned(f"{kind}: {why}", [image_name(dataset, i) for i in found.open], loud)


def repeated_files(dataset: Dataset) -> tuple[list[Fault], list[Warned]]:
    """Files that several image ids name: a fault where their boxes differ, since one calls background what another labels."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i in range(dataset.num_images):
        groups[plain_name(dataset.file_name(i))].append(i)
    faults, same = [], []
    for group in groups.values():
        if len(group) == 1:
            continue
        labelled = {i: _labels(dataset, i) for i in group}
        if len(set(labelled.values())) == 1:
            same += [image_name(dataset, i) for i in group]
            continue
        ids = ", ".join(f"{dataset.image_id(i)} ({len(labelled[i])} boxes)" for i in group[:5])
        message = (
            f"file {dataset.file_name(group[0])!r} has the image ids {ids}, with other boxes; make them one record"
        )
        faults += [Fault("one file, several image ids", image_name(dataset, i), message, i) for i in group]
    return faults, warned("image whose file has another image id too, with the same boxes", same, loud=True)


def repeated_pictures(dataset: Dataset, digests: tuple[bytes, ...]) -> list[Warned]:
    """Files of one content under several names."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, digest in enumerate(digests):
        if digest:
            groups[digest].append(i)
    again = [g for g in groups.values() if len({plain_name(dataset.file_name(i)) for i in g}) > 1]
    alike = [i for g in again if len({_labels(dataset, i) for i in g}) == 1 for i in g]
    other = [i for g in again if len({_labels(dataset, i) for i in g}) > 1 for i in g]
    return [
        *warned("image whose very bytes another file has too", [image_name(dataset, i) for i in sorted(alike)]),
        *warned(
            "image whose very bytes another file has too, with other boxes",
            [image_name(dataset, i) for i in sorted(other)], loud=True,
        ),
    ]  # fmt: skip


def plain_name(name: str) -> str:
    """One spelling of a file name: slashes, and no ``./``."""
    return "/".join(PureWindowsPath(name).parts) if "\\" in name or "./" in name or "//" in name else name


def _labels(dataset: Dataset, i: int) -> tuple[tuple[float, ...], ...]:
    """The boxes of an image with category and crowd, in an order of their own."""
    rows, notes = dataset.box_rows(i), dataset.annotations
    columns = zip(
        notes.category[rows].tolist(), notes.crowd[rows].tolist(), notes.boxes_xywh[rows].tolist(), strict=True
    )
    return tuple(sorted((category, crowd, *box) for category, crowd, box in columns))
