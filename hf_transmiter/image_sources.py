"""Pictures from anywhere: a Hub id, a folder, files, or ``sandbox:DOMAIN``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from glob import glob
from pathlib import Path

from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from .dataset_cache import hub_builder
from .features import guess_columns
from .hub import SANDBOX, check_hub_id, split_revision
from .readable import readable


_FILES = {".parquet": "parquet", ".arrow": "arrow"}
_NO_ROWS = "corresponds to no data"  # what `datasets` says of a split or slice without rows
_SPLITS = re.compile(r"(?:^|\+)([^\[+]+)")  # the names in a slice ("train[:100]") or a sum ("train+test")


def load_images(
    source: str,
    split: str | None = None,
    *,
    prefer: Sequence[str] = ("train",),
    subset: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_images: int | None = None,
    skip_unreadable: bool = False,
    skipped: list[str] | None = None,
) -> Dataset:
    """One split of pictures from anywhere.

    Args:
        source (`str`):
            A Hub id (``id@revision`` pins a version); a folder with pictures (a subfolder per class names the
            labels), with the files of a data set, or written by `Dataset.save_to_disk`; a ``.parquet`` or ``.arrow``
            file or a glob of such; ``sandbox:DOMAIN``.
        split (`str`, *optional*): name of the split, slices such as ``"train[:10%]"`` included.
        prefer (`Sequence[str]`, *optional*): splits to look for when none is named, best first; the only one is
            taken under any name.
        subset (`str`, *optional*): configuration of a Hub data set that has several.
        image_column, label_column (`str`, *optional*): guessed when omitted. Labels that are words become a
            `ClassLabel` with the words in alphabetical order.
        max_images (`int`, *optional*): take that many pictures, drawn at random, always the same ones.
        skip_unreadable (`bool`, *optional*, defaults to `False`):
            Decode every picture first and leave out those that cannot be read (of `max_images`, so many fewer remain).
            Otherwise such a picture is an error when it is embedded.
        skipped (`list[str]`, *optional*): the names of those left out are added to it.

    Raises:
        FileNotFoundError: no such folder, file or Hub data set.
        ValueError: an unknown split or column, several that could be meant, a split without pictures, or files that
            cannot be read.
    """
    dataset = open_split(source, split, prefer=prefer, subset=subset)
    image, label = guess_columns(dataset, image_column, label_column)
    if label is not None and dataset.features[label] in (Value("string"), Value("large_string")):
        dataset = dataset.class_encode_column(label)
    return draw(dataset, image, max_images, skip_unreadable, skipped)


def draw(
    dataset: Dataset, image_column: str, max_images: int | None, skip_unreadable: bool, skipped: list[str] | None
) -> Dataset:
    """The last steps of [`load_images`]: fewer pictures, and only those that can be read."""
    if max_images is not None:
        if max_images < 1:
            raise ValueError(f"max_images must be at least 1, got {max_images}.")
        # Data from the Hub are often sorted by class.
        dataset = dataset.shuffle(seed=0, keep_in_memory=True).select(range(min(max_images, len(dataset))))
    if skip_unreadable:
        dataset, names = readable(dataset, image_column)
        if skipped is not None:
            skipped += names
    return dataset


def open_split(
    source: str, split: str | None = None, *, prefer: Sequence[str] = ("train",), subset: str | None = None
) -> Dataset:
    """The rows of one split as they are stored; the arguments and errors are those of [`load_images`]."""
    with _dataset_errors(source):
        splits, load = _locate(source, subset)
        split = _choose(splits, split, prefer, source)
        try:
            rows = load(split)
        except ValueError as error:
            if _NO_ROWS not in str(error):
                raise
            rows = ()
        if not len(rows):
            raise ValueError(f"{source!r}, split {split!r}: there are no pictures.")
        return rows


def list_splits(source: str, subset: str | None = None) -> list[str]:
    """Names of the splits that a source of [`load_images`] has; no picture is read."""
    with _dataset_errors(source):
        return list(_locate(source, subset)[0])


@contextmanager
def _dataset_errors(source: str) -> Iterator[None]:
    try:
        yield
    except DatasetsError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"cannot load the dataset {source!r}: {error.__cause__ or error}") from error


def _locate(source: str, subset: str | None) -> tuple[Sequence[str], Callable[[str], Dataset]]:
    """Names of the splits, and what loads one of them."""
    if source.startswith(SANDBOX):
        from . import sandbox  # the synthetic world is not needed for real pictures

        splits = ("train", "unlabelled", "validation", "test")
        return splits, partial(_sliced, partial(sandbox.load_dataset, source.removeprefix(SANDBOX)))
    name, revision = split_revision(source)
    if Path(name).is_dir() and any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        saved = load_from_disk(name)
        saved = saved if isinstance(saved, DatasetDict) else {re.split(r"\W", str(saved.split or "train"))[0]: saved}
        return list(saved), partial(_sliced, saved.__getitem__)
    where = _files(name) or ({"path": name, "name": subset} if Path(name).is_dir() else None)
    builder = hub_builder(name, subset, revision) if where is None else load_dataset_builder(**where)
    splits = [str(name) for name in builder.info.splits or builder.config.data_files or ()]
    return splits, partial(_read, builder)


def _read(builder: DatasetBuilder, split: str) -> Dataset:
    builder.download_and_prepare()
    return builder.as_dataset(split)


def _sliced(load: Callable[[str], Dataset], split: str) -> Dataset:
    """What `load_dataset` makes of ``"train[:80%]+test"``, from something that knows whole splits only."""
    whole = {name: load(name) for name in _SPLITS.findall(split)}
    if split in whole:
        return whole[split]
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in whole.items()})
    return concatenate_datasets([whole[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _files(name: str) -> dict | None:
    """What `load_dataset` needs for files, `None` for a folder or a Hub id."""
    if Path(name).is_dir():
        return None
    found = sorted(path for path in glob(name, recursive=True) if Path(path).is_file())
    if not found:
        check_hub_id(name, "dataset")
        return None
    formats = {_FILES.get(Path(path).suffix) for path in found}
    if len(formats) > 1 or None in formats:
        raise ValueError(f"{name!r} must name .parquet or .arrow files, all of one kind; it matches {found[0]!r}.")
    return {"path": formats.pop(), "data_files": found}


def _choose(splits: Sequence[str], split: str | None, prefer: Sequence[str], source: str) -> str:
    known = ", ".join(splits)
    if split is not None:
        if splits and not set(_SPLITS.findall(split)) <= set(splits):
            raise ValueError(f"{source!r} has no split {split!r}; there are {known}.")
        return split
    found = next((name for name in prefer if name in splits), splits[0] if len(splits) == 1 else None)
    if found is None:
        raise ValueError(f"{source!r} has none of the splits {', '.join(prefer)}; name one with --split: {known}.")
    return found
