"""Datasets as rows of data: where they are, their columns and splits, their class names in the published order.

The rows of the two papers' datasets are in ``assets/datasets/datasets.yaml``; any other source of
[`load_images`] works without one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset

from ..hub.checks import did_you_mean, read_yaml, simplified
from ..settings import shortened
from .anchors import DEFAULT_TEMPLATES, read_templates
from .class_names import check_names, match_names, read_class_file
from .folders import SPLIT_WORDS
from .images import draw, guess_columns, list_splits, open_split


ROLES = ("train", "validation", "test", "unlabelled")
_FOLDER = Path(__file__).parents[1] / "assets" / "datasets"


_KINDS = {
    "str": (str, "a word"),
    "tuple[str, ...]": (tuple, "a list of words"),
    "Mapping[str, str]": (Mapping, "pairs 'name: name'"),
}


@dataclass(frozen=True)
class DatasetSpec:
    """What has to be known of a dataset to ask a model about it.

    Args:
        name (`str`): key of the row.
        title (`str`): as people write it.
        source (`str`): Hub id, folder, files or ``sandbox:DOMAIN``, as in [`load_images`].
        revision (`str`, *optional*): full commit of the Hub repository.
        subset (`str`, *optional*): configuration of a Hub dataset that has several.
        image_column, label_column (`str`, *optional*): guessed when omitted.
        train, validation, test, unlabelled (`str`, *optional*):
            Split (or slice of one, ``"train[:80%]"``) for each role; `None` where the dataset has none.
        class_names (`tuple[str, ...]`, *optional*):
            C names in the order of the published base and novel halves; those of the data, in their order, if omitted.
        templates (`tuple[str, ...]`, *optional*): prompts, each with ``{}`` for the name.
        aliases (`Mapping[str, str]`, *optional*): {a class as the data spell it: the name it has here}.
        label_names (`tuple[str, ...]`, *optional*):
            How the data would spell the classes 0, 1, ... if their label column, which holds numbers only, named them;
            without these, such numbers are positions in `class_names`.
        left_out (`tuple[str, ...]`, *optional*): classes of the data that are none here; their pictures are dropped.
        clip_columns (`tuple[str, ...]`, *optional*): columns that together tell the video a frame belongs to.
        frame_column (`str`, *optional*): number of the frame; of each video only the middle one is taken.
        notes (`str`, *optional*): what to beware of, and what is not known.

    Raises:
        ValueError: a field of the wrong kind, a revision that is no full commit, or names that are no names.
    """

    name: str
    title: str
    source: str
    revision: str | None = None
    subset: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    unlabelled: str | None = None
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    aliases: Mapping[str, str] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    clip_columns: tuple[str, ...] = ()
    frame_column: str | None = None
    notes: str = ""

    def __post_init__(self):
        where = f"dataset {self.name!r}"
        for item in fields(self):
            value, (kind, words) = getattr(self, item.name), _KINDS[item.type.removesuffix(" | None")]
            optional = item.type.endswith("| None")
            if not (optional and value is None or _holds_words(value, kind)) or optional and value == "":
                raise ValueError(f"{where}: {item.name} must be {words}, got {shortened(value)}.")
        if self.revision is not None and not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(f"{where}: revision must be a full commit of 40 hex digits, got {self.revision!r}.")
        if self.class_names is not None:
            check_names(self.class_names, where)
        odd = [prompt for prompt in self.templates if prompt.count("{}") != 1]
        if odd or not self.templates:
            raise ValueError(f"{where}: templates are prompts with one {{}} for the name, got {list(self.templates)}.")
        if bool(self.clip_columns) != bool(self.frame_column):
            raise ValueError(f"{where}: clip_columns and frame_column belong together.")

    @property
    def location(self) -> str:
        """The source with its revision, as [`load_images`] takes it."""
        return self.source if self.revision is None else f"{self.source}@{self.revision}"

    @property
    def splits(self) -> dict[str, str]:
        """{role: split} of the roles there are."""
        return {role: getattr(self, role) for role in ROLES if getattr(self, role) is not None}

    def split_of(self, role: str) -> str:
        """The split that has this role; ``"unlabelled"`` falls back to the training pictures.

        Raises:
            ValueError: there is none; those that are there are named.
        """
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}.")
        split = getattr(self, role) or (self.train if role == "unlabelled" else None)
        if split is None:
            known = ", ".join(f"{key}: {value}" for key, value in self.splits.items()) or "none"
            raise ValueError(
                f"dataset {self.name!r} has no {role} pictures (splits: {known}); a row of your own may take a slice, "
                f"such as '{role}: train[80%:]'."
            )
        return split


def _holds_words(value, kind: type) -> bool:
    if not isinstance(value, kind):
        return False
    held = chain(*value.items()) if kind is Mapping else [value] if kind is str else value
    return all(isinstance(one, str) for one in held)


@cache
def catalogue() -> Mapping[str, DatasetSpec]:
    """The datasets of the two papers: {name: row}."""
    content = read_yaml(_FOLDER / "datasets.yaml")
    return {name: _from_mapping({"name": name, **row}, _FOLDER) for name, row in content.items()}


def find_row(source: str) -> DatasetSpec | None:
    """The row of the catalogue that has this name or title, however it is spelt; a folder of that name goes first.

    Returns:
        [`DatasetSpec`]: or `None` for a path, a Hub id or ``sandbox:DOMAIN``.

    Raises:
        ValueError: a bare word that is no row, and nothing here has that name; the nearest rows are given.
    """
    # Anything else ("./dtd", "me/dtd") is a place, never a row.
    if os.path.exists(source) or not re.fullmatch(r"[\w. -]+", source):
        return None
    for row in catalogue().values():
        if simplified(source) in (simplified(row.name), simplified(row.title)):
            return row
    # A bare word is no id of the Hub, and asking it takes long where there is no network.
    raise ValueError(
        f"there is no dataset {source!r}, neither a row of the catalogue nor a folder or file (Hub ids are "
        f"user/name); {did_you_mean(source, catalogue())}"
    )


def usual_templates(source: str | None) -> tuple[str, ...]:
    """Prompts for pictures from there: the published ones of a row of the catalogue, the default for any others."""
    row = None if source is None else find_row(source)
    return DEFAULT_TEMPLATES if row is None else row.templates


def find_spec(source: str | Mapping) -> DatasetSpec:
    """A row for whatever names a dataset.

    Args:
        source (`str` or `Mapping`):
            A row's name or title (``"dtd"``, ``"ImageNet-V2"``); any source of [`load_images`], whose splits
            are then looked up; or the fields of a [`DatasetSpec`] by name, where ``row: dtd`` stands for the fields
            of that row (a copy on disk, say), ``$VARIABLES`` in `source` are filled in, `class_names` may be a text
            file, and `templates` names of shipped ones.

    Raises:
        ValueError: an unknown dataset (the nearest names are given) or field.
        FileNotFoundError: no such folder, file or Hub dataset.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source)
    return find_row(source) or _with_splits(DatasetSpec(name=source, title=source, source=source))


def _from_mapping(values: Mapping, folder: Path | None = None) -> DatasetSpec:
    """A row from what a YAML file says; file names are relative to `folder`."""
    values = dict(values)
    label = values.get("name") or values.get("source") or values.get("row")
    names = ["row", *(item.name for item in fields(DatasetSpec))]
    unknown = [str(key) for key in values if key not in names]
    if unknown:
        raise ValueError(f"dataset {label!r} has no field {unknown[0]!r}; {did_you_mean(unknown[0], names)}")
    row = values.pop("row", None)
    if isinstance(values.get("source"), str):
        values["source"] = _expanded(values["source"])
    if isinstance(values.get("class_names"), str):
        path = Path(folder or "", _expanded(values["class_names"]))
        values["class_names"], aliases = read_class_file(path)
        values["aliases"] = {**aliases, **values.get("aliases", {})}
    if values.get("templates") is not None:
        given = values["templates"]
        values["templates"] = read_templates([given] if isinstance(given, str) else given)
    for item in fields(DatasetSpec):
        if str(item.type).startswith("tuple") and isinstance(values.get(item.name), list):
            values[item.name] = tuple(values[item.name])
    if row is not None:
        spec = find_spec(row)
        if values.get("source", spec.source) != spec.source:
            values = {"revision": None, **values}  # nothing is known of another place
        return replace(spec, **values)
    if "source" not in values:
        raise ValueError(f"dataset {label!r} needs a source (Hub id, folder, files), or the row it is a copy of.")
    values.setdefault("name", str(values["source"]))
    values.setdefault("title", values["name"])
    spec = DatasetSpec(**values)
    return spec if spec.splits else _with_splits(spec)


def _expanded(text: str) -> str:
    expanded = os.path.expanduser(os.path.expandvars(text))
    missing = re.search(r"\$\{?(\w+)", expanded)
    if missing:
        raise ValueError(f"{text!r} needs the environment variable {missing[1]}, which is not set.")
    return expanded


def _with_splits(spec: DatasetSpec) -> DatasetSpec:
    """With the usual roles for the splits that the source has; one under an unusual name is for testing."""
    splits = list_splits(spec.location, spec.subset)
    found = {role: next((name for name in usual if name in splits), None) for role, usual in SPLIT_WORDS.items()}
    if found["test"] is None and found["train"] is not None:
        found["test"], found["validation"] = found["validation"], None  # the only labelled pictures held out
    if len(splits) == 1 and not any(found.values()):
        found["test"] = splits[0]
    return replace(spec, **found)


def load_split(
    spec: DatasetSpec,
    role: str,
    *,
    max_images: int | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """The pictures of one role, with labels over the row's names in their order, matched by name.

    `role` is one of `ROLES`; `max_images` and `skip_unreadable` are as in [`load_images`].

    Returns:
        `datasets.Dataset`: columns `image` and `label` (`ClassLabel` over C names); without `label` where unlabelled
        pictures have none.

    Raises:
        ValueError: no such role, an empty split, a missing column (those present are listed), a label out of range,
            or a class of the data that no name matches.
    """
    split = spec.split_of(role)
    dataset = open_split(spec.location, split, subset=spec.subset)
    where = f"dataset {spec.name!r}, split {split!r}"
    try:
        wanted = None if role == "unlabelled" else True
        image, label = guess_columns(dataset, spec.image_column, spec.label_column, labels=wanted)
        rows = _middle_frames(dataset, spec) if spec.frame_column else None
        labels, names = _labels(dataset, label, spec, role)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    pictures = dataset.select_columns([image]).rename_columns({image: "image"} if image != "image" else {})
    if labels is not None:
        # Before any selection: a column is added to the stored rows without copying a picture.
        pictures = pictures.add_column("label", labels, feature=ClassLabel(names=list(names)))
        rows = np.flatnonzero(labels >= 0) if rows is None else rows[labels[rows] >= 0]
    if rows is not None and len(rows) < len(pictures):
        if not len(rows):
            raise ValueError(f"{where}: no picture is of one of the {len(names)} classes.")
        pictures = pictures.select(rows)
    return draw(pictures, "image", max_images, skip_unreadable)


def _labels(
    dataset: Dataset, column: str | None, spec: DatasetSpec, role: str
) -> tuple[np.ndarray | None, Sequence[str]]:
    """(N,) positions in the names, -1 for what is left out; and the names. `None`: there are no labels."""
    # No picture is read.
    values = [] if column is None else dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    without = sum(value is None or value == -1 for value in values)
    if column is None or without:
        if role == "unlabelled":
            return None, ()
        why = f"{without} of {len(values)} pictures have no label." if without else "there is no label column"
        raise ValueError(why if without else f"{why} among {', '.join(dataset.column_names)}: name it (label_column).")
    kind = dataset.features[column]
    names = kind.names if isinstance(kind, ClassLabel) else spec.label_names or None
    if all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        order = {name: i for i, name in enumerate(names)}
        labels = np.array([order[value] for value in values])
    elif all(isinstance(value, int) for value in values):
        labels = np.array(values)
    elif role == "unlabelled":
        return None, ()
    else:
        raise ValueError(f"column {column!r} holds {kind}, neither whole numbers nor words.")
    if names is None and spec.class_names is None:
        raise ValueError(f"column {column!r} holds numbers without names: give class_names, in their order.")
    count = len(names or spec.class_names)
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    if len(outside):
        row = outside[0]
        where = f"in row {row}, outside 0 to {count - 1} ({count} names)"
        raise ValueError(f"column {column!r} has the label {labels[row]} {where}.")
    if spec.class_names is None:
        return labels, names
    if names is not None:
        labels = np.array(match_names(names, spec.class_names, spec.aliases, spec.left_out))[labels]
    return labels, spec.class_names


def _middle_frames(dataset: Dataset, spec: DatasetSpec) -> np.ndarray:
    """Rows of the middle frame of every video, in the order of the data."""
    columns = [*spec.clip_columns, spec.frame_column]
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        raise ValueError(f"there is no column {missing[0]!r}; the columns are {', '.join(dataset.column_names)}.")
    frames = dataset.select_columns(columns).with_format("arrow")[:].to_pandas()
    groups = frames.sort_values(spec.frame_column, kind="stable").groupby(list(spec.clip_columns), sort=False)
    middle = groups.cumcount() == groups[spec.frame_column].transform("size") // 2
    return np.sort(middle[middle].index.to_numpy())
