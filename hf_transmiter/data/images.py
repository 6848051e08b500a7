"""Pictures from anywhere: a Hub id, a folder, files, or ``sandbox:DOMAIN``."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from glob import escape, glob
from os.path import isfile
from pathlib import Path

import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    DatasetBuilder,
    DatasetDict,
    Image,
    IterableDataset,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import get_data_patterns
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import LocalEntryNotFoundError

from ..encoders.pictures import UnreadablePicture, read_picture
from ..hub.checks import as_list
from ..hub.repo import SANDBOX, check_hub_id, hub_errors, split_revision
from ..settings import check_number
from .folders import DATA_FILES, Folder, read_folder
from .table import FeatureTable, holds_rows


logger = logging.getLogger(__name__)

_NO_ROWS = "corresponds to no data"  # what `datasets` says of a split or slice without rows
_SPLITS = re.compile(r"(?:^|\+)([^\[+]+)")  # the names in a slice ("train[:100]") or a sum ("train+test")
_COMMIT = re.compile("[0-9a-f]{40}")
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixels")
_LABEL_NAMES = ("label", "labels", "cls", "fine_label", "class", "target")


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
) -> Dataset:
    """One split of pictures from anywhere.

    Args:
        source (`str`):
            A Hub id (``id@revision`` pins a version); a folder with pictures (a subfolder per class names the
            labels, see `folders.py` for the rule), with the files of a data set or a ``metadata.csv`` or ``.jsonl``
            of its pictures, or written by `Dataset.save_to_disk`; a ``.parquet`` or ``.arrow`` file or a glob of such;
            ``sandbox:DOMAIN``. Embeddings of the pictures will do, see [`embed_dataset`].
        split (`str`, *optional*): name of the split, slices such as ``"train[:10%]"`` included.
        prefer (`Sequence[str]`, *optional*): splits to look for when none is named, best first; the only one is
            taken under any name.
        subset (`str`, *optional*): configuration of a Hub data set that has several.
        image_column, label_column (`str`, *optional*): guessed when omitted. Labels that are words become a
            `ClassLabel` with the words in alphabetical order.
        max_images (`int`, *optional*): take that many pictures, drawn at random, always the same ones.
        skip_unreadable (`bool`, *optional*, defaults to `False`):
            Decode every picture first and leave out those that cannot be read (of `max_images`, so many fewer remain);
            they are listed in the log. Otherwise such a picture is an error when it is embedded.

    Raises:
        FileNotFoundError: no such folder, file or Hub data set.
        ValueError: an unknown split or column, several that could be meant, a split without pictures, or files that
            cannot be read.
        ConnectionError: a Hub data set that is not in the cache while the Hub cannot be reached.
    """
    dataset = open_split(source, split, prefer=as_list(prefer, "prefer"), subset=subset)
    image, label = guess_columns(dataset, image_column, label_column, labels=None, pictures=False)
    if label is not None and dataset.features[label] in (Value("string"), Value("large_string")):
        dataset = dataset.class_encode_column(label)
    return draw(dataset, image, max_images, skip_unreadable)


def draw(dataset: Dataset, image_column: str | None, max_images: int | None, skip_unreadable: bool) -> Dataset:
    """The last steps of [`load_images`]: fewer pictures, and only those that can be read."""
    if max_images is not None:
        max_images = check_number("max_images", max_images, least=1)
        # Data from the Hub are often sorted by class.
        dataset = dataset.shuffle(seed=0, keep_in_memory=True).select(range(min(max_images, len(dataset))))
    return _readable(dataset, image_column) if skip_unreadable and image_column is not None else dataset


def _readable(dataset: Dataset, image_column: str) -> Dataset:
    """The rows whose picture can be decoded; the others are listed in the log.

    `datasets` caches the outcome with the files of a data set, so a second look costs nothing.
    """
    faults = stored_pictures(dataset, image_column).map(
        _fault, input_columns=[image_column], remove_columns=[image_column], desc="Decoding every picture"
    )["fault"][:]
    bad = [row for row, fault in enumerate(faults) if fault is not None]
    if not bad:
        return dataset
    names = [f"row {row}{faults[row]}" for row in bad]
    if len(bad) == len(dataset):
        raise ValueError(f"none of the {len(bad)} pictures can be read: {names[0]}")
    listed = "\n  ".join(names)
    logger.warning("%d of %d pictures cannot be read and are left out:\n  %s", len(bad), len(dataset), listed)
    return dataset.select([row for row, fault in enumerate(faults) if fault is None])


def _fault(picture) -> dict[str, str | None]:
    """What is wrong with a picture, after the end of its file's path, if it has one; `None` if it can be decoded."""
    try:
        read_picture(picture)
    except UnreadablePicture as error:
        return {"fault": error.fault}
    return {"fault": None}


def stored_pictures(dataset: Dataset, column: str) -> Dataset:
    """One column as it is stored, whatever format or transform is set: what [`read_picture`] reads."""
    stored = dataset.with_format(None).select_columns([column])
    encoded = isinstance(stored.features[column], Image)
    return stored.cast_column(column, Image(decode=False)) if encoded else stored


def guess_columns(
    dataset: Dataset,
    image_column: str | None = None,
    label_column: str | None = None,
    *,
    labels: bool | None = True,
    pictures: bool = True,
) -> tuple[str | None, str | None]:
    """Names of the image and the label column; a name that is given is only checked.

    The image column is the one of type `Image`, or else one with a usual name; the label column is the one with a
    usual name, or else the only `ClassLabel`. A dataset may have no label column; without `labels` none is looked for,
    and with `None` several are as none. Without `pictures` a column of embeddings will do in place of images.

    Raises:
        ValueError: not one split of a dataset, a given column is missing, no image column is found, or several columns
            could be meant.
    """
    check_dataset(dataset)
    names, types = dataset.column_names, dataset.features
    if not names:
        raise ValueError("the dataset is empty: it has no columns.")
    label_column = None if labels is False else label_column
    for given in (image_column, label_column):
        if given is not None and given not in names:
            raise ValueError(f"there is no column {given!r}; the columns are {', '.join(names)}.")
    if image_column is None:
        typed = [name for name in names if isinstance(types[name], Image)]
        candidates = _usual(typed, _IMAGE_NAMES) or typed or _usual(names, _IMAGE_NAMES)
        image_column = _only("image_column", candidates, names)
        rows = any(map(holds_rows, types.values()))
        if image_column is None and (pictures or not rows):
            how = ", or embeddings as lists of floating-point numbers" * (not pictures)
            how = " (embeddings will not do here)" if rows else how
            raise ValueError(f"no image column found among {', '.join(names)}: pass image_column={how}.")
    if label_column is None and labels is not False:
        typed = [name for name in names if isinstance(types[name], ClassLabel)]
        candidates = _usual(names, _LABEL_NAMES) or typed
        label_column = _only("label_column", candidates, names) if labels or len(candidates) == 1 else None
    return image_column, label_column


def check_dataset(dataset, name: str = "dataset") -> Dataset:
    """
    Raises:
        ValueError: something else than one split of a dataset; what to pass in its place is said.
    """
    if isinstance(dataset, Dataset):
        return dataset
    how = "load_images reads folders, files and Hub ids"
    if isinstance(dataset, dict) and dataset:  # a DatasetDict
        how = f"pass one of its splits, such as {name}[{next(iter(dataset))!r}]"
    elif isinstance(dataset, FeatureTable):
        how = "its rows are one model's, and several are asked: pass a dataset with a column for each, see to_dataset"
    elif isinstance(dataset, IterableDataset):
        how = "load it without streaming, or take some of it, Dataset.from_list(list(dataset.take(1000)))"
    found = "None" if dataset is None else f"a {type(dataset).__name__}"
    raise ValueError(f"{name} must be one split of a dataset, not {found}: {how}.")


def label_indices(dataset: Dataset, column: str) -> list[int]:
    """The labels (N,) of a column, as stored.

    Raises:
        ValueError: one that is no whole number.
    """
    values = dataset.with_format(None)[column][:]  # at once: one by one takes a minute for a million
    odd = [value for value in values if not isinstance(value, int) or isinstance(value, bool)]
    if odd:
        raise ValueError(
            f"column {column!r} holds {odd[0]!r}, not class indices: "
            f"encode it with dataset.class_encode_column({column!r}), or pass another label_column=."
        )
    return values


def _usual(names: list[str], usual: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.lower() in usual]


def _only(argument: str, candidates: list[str], names: list[str]) -> str | None:
    if len(candidates) > 1:
        found, option = " or ".join(candidates), argument.replace("_", "-")
        raise ValueError(f"{argument} could be {found} (columns: {', '.join(names)}): pass {argument}= (--{option}).")
    return candidates[0] if candidates else None


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
    except (DatasetsError, RuntimeError, pa.ArrowInvalid) as error:  # a script, which is not run; damaged files
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"cannot load the dataset {source!r}: {error.__cause__ or error}") from error


def _locate(source: str, subset: str | None) -> tuple[Sequence[str], Callable[[str], Dataset]]:
    """Names of the splits, and what loads one of them."""
    if not source.strip():
        raise FileNotFoundError("the name of the dataset is empty: pass a Hub id, a folder or files.")
    if source.startswith(SANDBOX):
        from ..sandbox.data import SPLITS, load_dataset  # the synthetic world is not needed for real pictures

        return SPLITS, partial(_sliced, partial(load_dataset, source.removeprefix(SANDBOX)))
    name, revision = split_revision(source)
    if Path(name).is_dir() and any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        saved = load_from_disk(name)
        saved = saved if isinstance(saved, DatasetDict) else {re.split(r"\W", str(saved.split or "train"))[0]: saved}
        return list(saved), partial(_sliced, saved.__getitem__)
    if Path(name).is_dir():
        where = _in_folder(Path(name), subset)
        if isinstance(where, Folder):
            return list(where.pictures), partial(_sliced, where.load)
    else:
        where = _files(name)
    builder = _hub_builder(name, subset, revision) if where is None else load_dataset_builder(**where)
    splits = [str(name) for name in builder.info.splits or builder.config.data_files or ()]
    return splits, partial(_read, builder)


def _hub_builder(name: str, subset: str | None, revision: str | None) -> DatasetBuilder:
    try:
        with hub_errors(name):
            builder = load_dataset_builder(name, subset, revision=revision)
    except (ConnectionError, LocalEntryNotFoundError):
        builder = None
    # Without a network `datasets` takes whatever version the cache got last.
    if builder is None or (revision and _COMMIT.fullmatch(revision) and builder.hash != revision):
        source = f"{name}@{revision}" if revision else name
        raise ConnectionError(
            f"the dataset {source!r} is not in the cache, and the Hub cannot be reached: load it once where it can be."
        )
    return builder


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


def _in_folder(folder: Path, subset: str | None) -> Folder | dict:
    """A folder of pictures, or what `load_dataset` needs for one with the files of a data set."""
    script = folder / f"{folder.resolve().name}.py"
    if script.is_file():
        raise ValueError(f"{str(folder)!r} holds a dataset script, {script.name}, and no data set's code is ever run.")
    found, place = read_folder(folder), escape(folder.absolute())
    if found is None and place == str(folder.absolute()):
        return {"path": str(folder), "name": subset}
    if found is None:  # `datasets` would take the path for a pattern
        kinds = [DATA_FILES[path.suffix] for path in folder.rglob("*") if path.suffix in DATA_FILES]
        if not kinds:
            raise ValueError(f"{str(folder)!r}: there are neither pictures nor .parquet or .arrow files in it.")
        patterns = get_data_patterns(place).items()
        files = {split: [f"{place}/{one}" for one in each] for split, each in patterns}
        return {"path": kinds[0], "data_files": files}
    if not found.has_metadata:
        return found
    patterns = {split: [f"{escape(place.absolute())}/**"] for split, place in found.places.items()}
    return {"path": "imagefolder", "data_files": patterns}


def _files(name: str) -> dict | None:
    """What `load_dataset` needs for files, `None` for a Hub id. A file of that very name goes before a pattern."""
    found = [name] if Path(name).is_file() else sorted(path for path in glob(name, recursive=True) if isfile(path))
    if not found:
        check_hub_id(name, "dataset")
        return None
    formats = {DATA_FILES.get(Path(path).suffix) for path in found}
    if len(formats) > 1 or None in formats:
        raise ValueError(f"{name!r} must name .parquet or .arrow files, all of one kind; it matches {found[0]!r}.")
    return {"path": formats.pop(), "data_files": [escape(path) for path in found]}


def _choose(splits: Sequence[str], split: str | None, prefer: Sequence[str], source: str) -> str:
    known = ", ".join(splits)
    if split is not None:
        if splits and not split.strip() or splits and not set(_SPLITS.findall(split)) <= set(splits):
            raise ValueError(f"{source!r} has no split {split!r}; there are {known}.")
        return split
    found = next((name for name in prefer if name in splits), splits[0] if len(splits) == 1 else None)
    if found is None:
        raise ValueError(f"{source!r} has none of the splits {', '.join(prefer)}; name one with --split: {known}.")
    return found
