"""Whether a dataset is what its row says: compared with what the Hub serves now, or with a copy on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Features, Image, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from .class_names import match_names
from .dataset_specs import DatasetSpec
from .hub import SANDBOX, hub_errors
from .image_sources import list_splits, open_split


UNREACHABLE = "Hub"
_ABSENT = (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError)


@dataclass(frozen=True)
class Finding:
    """One thing that was compared.

    Args:
        what (`str`): such as ``"rows of test"``.
        status (`str`): ``"ok"``, ``"differs"``, or ``"unknown"`` where there was nothing to compare with.
        expected (`str`): what the row says.
        found (`str`): what there is.
    """

    what: str
    status: str
    expected: str
    found: str


@dataclass(frozen=True)
class _Facts:
    """What a source says of itself: {split: rows or `None`}, the types of its columns, its commit."""

    rows: Mapping[str, int | None]
    features: Features | None
    columns: tuple[str, ...]
    commit: str | None = None


def check_spec(spec: DatasetSpec) -> list[Finding]:
    """Compares a row with its source; nothing but descriptions is downloaded (of some, one picture).

    Args:
        spec ([`DatasetSpec`]): the row.

    Returns:
        `list[Finding]`: commit, splits, rows, columns, class names, and the classes at both ends of the base and
        novel halves. A Hub that cannot be reached is one finding, ``"unknown"``; a repository that it does not have
        is one that ``"differs"``.
    """
    try:
        facts = _of_folder(spec) if _is_local(spec.source) else _of_hub(spec)
    except (OSError, ValueError, DatasetsError) as error:
        said, cause = " ".join(str(error).split()), error.__cause__ or error
        if isinstance(cause, (*_ABSENT, FileNotFoundError)) or not isinstance(error, OSError):
            return [Finding("source", "differs", spec.location, said)]
        return [Finding(UNREACHABLE, "unknown", spec.location, f"it cannot be reached: {said}")]
    return [*_commit(spec, facts), *_splits(spec, facts), *_columns(spec, facts), *_classes(spec, facts)]


def _is_local(source: str) -> bool:
    return source.startswith(SANDBOX) or Path(source).exists() or source.endswith((".parquet", ".arrow"))


def _of_folder(spec: DatasetSpec) -> _Facts:
    splits = list_splits(spec.source, spec.subset)
    opened = {name: open_split(spec.source, name, subset=spec.subset) for name in splits}
    first = next(iter(opened.values()))
    return _Facts({name: len(rows) for name, rows in opened.items()}, first.features, tuple(first.column_names))


def _of_hub(spec: DatasetSpec) -> _Facts:
    with hub_errors(spec.source):
        commit = HfApi().dataset_info(spec.source, revision=spec.revision).sha
    where = {"path": spec.source, "name": spec.subset, "revision": spec.revision}
    builder = load_dataset_builder(**where)
    info, files = builder.info, builder.config.data_files or {}
    rows: dict[str, int | None] = {str(name): None for name in files}
    rows |= {name: part.num_examples for name, part in (info.splits or {}).items()}
    features, columns = info.features, tuple(info.features or ())
    if features is None:
        split = next((name for name in spec.splits.values() if name in rows), next(iter(rows)))
        columns = tuple(next(iter(load_dataset(**where, split=split, streaming=True))))
    return _Facts(rows, features, columns, commit)


def _finding(what: str, expected: object, found: object) -> Finding:
    status = "unknown" if found is None or expected is None else "ok" if expected == found else "differs"
    return Finding(what, status, *("not known" if value is None else str(value) for value in (expected, found)))


def _commit(spec: DatasetSpec, facts: _Facts) -> Iterator[Finding]:
    if facts.commit is not None:
        yield _finding("commit", spec.revision, facts.commit)


def _splits(spec: DatasetSpec, facts: _Facts) -> Iterator[Finding]:
    for role, split in spec.splits.items():
        name = split.split("[")[0]
        if name not in facts.rows:
            yield Finding(f"split for {role}", "differs", split, f"there are {', '.join(facts.rows)}")
        elif name == split:  # of a slice nothing is known beforehand
            yield _finding(f"rows of {role} ({split})", spec.rows.get(role), facts.rows[name])


def _columns(spec: DatasetSpec, facts: _Facts) -> Iterator[Finding]:
    wanted = [spec.image_column, spec.label_column, *spec.clip_columns, spec.frame_column]
    for name in dict.fromkeys(name for name in wanted if name is not None):
        if name not in facts.columns:
            yield Finding(f"column {name}", "differs", name, f"there are {', '.join(facts.columns)}")
        elif name == spec.image_column and facts.features and not isinstance(facts.features[name], Image):
            yield Finding(f"column {name}", "differs", "pictures", str(facts.features[name]))
        else:
            yield Finding(f"column {name}", "ok", name, name)


def _classes(spec: DatasetSpec, facts: _Facts) -> Iterator[Finding]:
    kind = (facts.features or {}).get(spec.label_column)
    if spec.class_names is None or spec.label_column not in facts.columns:
        return
    count = len(spec.class_names)
    if not isinstance(kind, ClassLabel):
        yield Finding("classes", "unknown", str(count), "the data do not list theirs beforehand")
        return
    try:
        matched = match_names(kind.names, spec.class_names, spec.aliases, spec.left_out)
    except ValueError as error:
        yield Finding("classes", "differs", str(count), str(error))
        return
    yield _finding("classes", count, len({i for i in matched if i >= 0}))
    named = dict(zip(matched, kind.names, strict=True))
    half = (count + 1) // 2
    ends = {"first base class": 0, "last base class": half - 1, "first novel class": half}
    ends["last novel class"] = count - 1
    for what, i in ends.items():
        status = "ok" if i in named else "differs"
        yield Finding(what, status, spec.class_names[i], named.get(i, "no class of the data"))
