"""Pictures that cannot be decoded: found by decoding every one, and left out."""

from __future__ import annotations

import logging
from pathlib import PurePath

from datasets import Dataset, Image


logger = logging.getLogger(__name__)


def readable(dataset: Dataset, image_column: str = "image") -> tuple[Dataset, list[str]]:
    """The rows whose picture can be decoded, and the names of the others.

    Every picture is decoded once; datasets caches the outcome with data from files, so a second look costs nothing.

    Args:
        dataset (`datasets.Dataset`): one split.
        image_column (`str`, *optional*, defaults to `"image"`): a column of type `datasets.Image`.

    Returns:
        `datasets.Dataset` and `list[str]`: the dataset itself where all is well; and, with a warning in the log,
        ``"row 3 (cats/7.jpg): cannot identify image file"`` for each picture that is left out.

    Raises:
        ValueError: no such column, one of another type, or not one picture can be read.
    """
    kind = dataset.features.get(image_column)
    if not isinstance(kind, Image):
        raise ValueError(f"column {image_column!r} holds {kind}, not pictures; there are {dataset.column_names}.")
    if not len(dataset):
        return dataset, []
    # In the default format nothing but the stored bytes and paths is read.
    stored = dataset.with_format(None).select_columns([image_column])
    stored = stored.cast_column(image_column, Image(mode=kind.mode, decode=False))
    decoder = Image(mode=kind.mode)
    faults = stored.map(
        lambda picture: {"fault": _fault(decoder, picture)},
        input_columns=[image_column],
        remove_columns=[image_column],
        desc="Decoding every picture",
    )["fault"][:]
    bad = [row for row, fault in enumerate(faults) if fault is not None]
    if not bad:
        return dataset, []
    names = [f"row {row}{_name(stored[row][image_column])}: {faults[row]}" for row in bad]
    if len(bad) == len(dataset):
        raise ValueError(f"none of the {len(bad)} pictures can be read: {names[0]}")
    more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
    logger.warning(
        "%d of %d pictures cannot be read and are left out:\n  %s%s",
        *(len(bad), len(dataset), "\n  ".join(names[:20]), more),
    )
    return dataset.select([row for row, fault in enumerate(faults) if fault is None]), names


def _fault(decoder: Image, picture: dict | None) -> str | None:
    """What decoding says, `None` if it succeeds."""
    if picture is None:
        return "there is no picture"
    try:
        decoder.decode_example(picture).convert("RGB")
    except Exception as error:  # decoders raise whatever they like
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _name(picture: dict | None) -> str:
    """The last parts of the file's path, if it has one: enough to find it, and nothing of this machine."""
    path = (picture or {}).get("path")
    return f" ({'/'.join(PurePath(path).parts[-2:])})" if path else ""
