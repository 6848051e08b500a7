"""[`read_folder`]: a folder of pictures as people have them: which splits it has, which classes.

The rule: **the folders at the top are the classes**, whatever they are called and however deep pictures lie in them.
Only where every folder at the top is called as a split is (`SPLIT_WORDS`) are they splits, and the folders in each
are the classes. A single folder around everything else is looked through. Pictures that lie beside class folders leave
all without labels. Hidden files and folders are passed over, links are followed, other files are left alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, NamedSplit

from .class_names import listed


logger = logging.getLogger(__name__)

# How people call their splits, best first.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "unlabelled": ("unlabelled", "unlabeled"),
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of ImageFolder: their columns are the labels
DATA_FILES = {".parquet": "parquet", ".arrow": "arrow"}
PICTURES = frozenset(
    ".apng .avif .bmp .dib .gif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .jpx .pbm .pcx .pgm .png .pnm .ppm .sgi .tga "
    ".tif .tiff .webp".split()
)
_PASSED_OVER = ("__MACOSX", "__pycache__")
_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}

Parts = tuple[str, ...]


@dataclass
class Folder:
    """A folder of pictures.

    Args:
        path: of the folder.
        pictures: {split: the pictures in it, as parts of their paths below the split's folder}.
        places: {split: that folder}.
        class_names: of all splits.
        has_metadata: whether files beside the pictures say what they are.
    """

    path: Path
    pictures: dict[str, list[Parts]]
    places: dict[str, Path]
    class_names: list[str] = field(default_factory=list)
    has_metadata: bool = False

    def load(self, split: str) -> Dataset:
        """Columns `image` and, where every picture lies in a class folder and there are several, `label`. The
        fingerprint is of names, sizes and times of change."""
        place, pictures = self.places[split], self.pictures[split]
        columns = {"image": [os.path.abspath(place.joinpath(*parts)) for parts in pictures]}
        features = Features(image=Image())
        if len(self.class_names) > 1 and all(len(parts) > 1 for parts in pictures):
            columns["label"] = [_class_name(parts) for parts in pictures]
            features["label"] = ClassLabel(names=self.class_names)
        facts = [split, self.class_names, [[*parts, *_stat(place.joinpath(*parts))] for parts in pictures]]
        made = Dataset.from_dict(columns, features=features, split=NamedSplit(split))
        fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return Dataset(made.data, info=made.info, split=made.split, fingerprint=fingerprint)


def read_folder(path: Path) -> Folder | None:
    """What is in a folder, by the rule above; `None` where there are no pictures, or they are in files of a data set.
    What could be read in another way is said.

    Raises:
        ValueError: folders that are called as splits are, with the same folders in them, beside others; class folders
            whose names differ in blanks at their ends or in how accents are written; a name that is not UTF-8.
        OSError: a folder that cannot be read.
    """
    files, folders = _walk(path)
    kinds = {parts: Path(parts[-1]).suffix.lower() for parts in files}
    pictures = [parts for parts in files if kinds[parts] in PICTURES]
    metadata = [parts for parts in files if parts[-1] in METADATA]
    data_files = sum(kind in DATA_FILES for parts, kind in kinds.items() if parts not in metadata)
    if len(pictures) <= data_files or _has_configs(path / "README.md"):
        return None
    others = Counter(kind or "no extension" for kind in kinds.values() if kind not in PICTURES)
    if others and not metadata:
        counted = listed(f"{count} ({kind})" for kind, count in others.most_common())
        _say(logging.INFO, f"{path}: files that are no pictures are left alone: {counted}.")
    root = path
    while len(top := _top(pictures)) == 1 and None not in top and not _split(*top):
        root /= top[0]
        pictures, folders = _below(pictures, top[0]), _below(folders, top[0])
    words = [name for name in top if name is not None and _split(name)]
    found = Folder(path, {"train": pictures}, {"train": root}, has_metadata=bool(metadata))
    if words and len(words) == len(top):
        twice = [[name for name in words if _split(name) == split] for split in SPLIT_WORDS]
        for names in twice:
            if len(names) > 1:
                raise ValueError(f"{root}: {listed(names)} are both the split {_split(names[0])!r}: keep one of them.")
        words.sort(key=lambda name: list(SPLIT_WORDS).index(_split(name)))
        found.pictures = {_split(name): _below(pictures, name) for name in words}
        found.places = {_split(name): root / name for name in words}
        folders = [parts for name in words for parts in _below(folders, name)]
        if len(words) > 1 and all(_top(inside) == [None] for inside in found.pictures.values()):
            _say(logging.WARNING, f"{root}: {listed(words)} are read as splits without labels, not as classes.")
    elif len(words) > 1 and set.intersection(*(set(_top(_below(pictures, name))) - {None} for name in words)):
        beside = ["pictures" if name is None else repr(name) for name in top if name not in words]
        raise ValueError(
            f"{root}: {listed(words)} look like splits, and {listed(beside)} lie beside them, so they may be classes: "
            "pass the folder of one split, or move the others away."
        )
    if not metadata:
        _find_classes(found, root, folders)
    _compare_splits(found)
    return found


def _walk(path: Path) -> tuple[list[Parts], list[Parts]]:
    """Parts of the paths of all files and folders below a folder, but for hidden ones; sorted."""

    def fail(error: OSError) -> None:
        raise error

    files, folders = [], []
    for root, inside, names in os.walk(path, onerror=fail, followlinks=True):
        real, below = os.path.realpath(root), Path(root).relative_to(path).parts
        kept = [name for name in inside if not name.startswith(".") and name not in _PASSED_OVER]
        # A link to a folder around it has no end.
        inside[:] = [n for n in kept if not f"{real}/".startswith(f"{os.path.realpath(os.path.join(root, n))}/")]
        folders += [(*below, name) for name in inside]
        files += [(*below, name) for name in names if not name.startswith(".")]
    try:
        "".join(part for parts in files for part in parts).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{str(path)!r}: a name in it is not UTF-8, at {error.object[error.start - 9 :][:20]!r}."
        ) from None
    return sorted(files), sorted(folders)


def _has_configs(card: Path) -> bool:
    """Whether a copy of a repository says itself where its splits are."""
    return card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")


def _split(name: str) -> str | None:
    return _SPLIT_OF.get(name.strip().lower())


def _top(files: list[Parts]) -> list[str | None]:
    """The folders at the top; `None` is among them where files lie there, too."""
    return list(dict.fromkeys(parts[0] if len(parts) > 1 else None for parts in files))


def _below(files: list[Parts], name: str) -> list[Parts]:
    return [parts[1:] for parts in files if parts[0] == name and len(parts) > 1]


def _class_name(parts: Parts) -> str:
    """Without blanks at the ends, accents written as one character: systems differ in that."""
    return unicodedata.normalize("NFC", parts[0]).strip()


def _find_classes(found: Folder, root: Path, folders: list[Parts]) -> None:
    spelt: dict[str, str] = {}
    for parts in (parts for pictures in found.pictures.values() for parts in pictures if len(parts) > 1):
        if spelt.setdefault(_class_name(parts), parts[0]) != parts[0]:
            raise ValueError(
                f"{root}: the folders {spelt[_class_name(parts)]!r} and {parts[0]!r} are one class: join them."
            )
    found.class_names = sorted(spelt)
    empty = {parts[0] for parts in folders if len(parts) == 1} - set(spelt.values())
    loose = {split: sum(len(parts) == 1 for parts in pictures) for split, pictures in found.pictures.items()}
    for split, count in loose.items():
        if 0 < count < len(found.pictures[split]):
            place = found.places[split]
            _say(
                logging.WARNING, f"{place}: no labels, since {count} pictures lie beside the class folders: move them."
            )
    if empty:
        _say(logging.WARNING, f"{root}: folders without pictures are no classes: {listed(sorted(empty))}.")
    if any(len(parts) > 2 for pictures in found.pictures.values() for parts in pictures):
        names = listed(found.class_names, 5)
        _say(logging.WARNING, f"{root}: the classes are the folders at the top ({names}), not the folders in them.")
    folded = Counter(name.casefold() for name in found.class_names)
    alike = [name for name in found.class_names if folded[name.casefold()] > 1]
    if alike:
        _say(
            logging.WARNING,
            f"{root}: classes that differ in case alone, which most models do not read: {listed(alike)}.",
        )


def _compare_splits(found: Folder) -> None:
    """Says which pictures are in two splits. Only files of the same size are read."""
    sizes = {
        split: {parts: _stat(found.places[split].joinpath(*parts)) for parts in pictures}
        for split, pictures in found.pictures.items()
    }
    for first, second in combinations(sizes, 2):
        shared = {size for size, _ in sizes[first].values()} & {size for size, _ in sizes[second].values()} - {0}
        inside = [
            {
                _digest(found.places[split].joinpath(*parts), facts)
                for parts, facts in sizes[split].items()
                if facts[0] in shared
            }
            for split in (first, second)
        ]
        both = len(inside[0] & inside[1])
        if both:
            said = f"{found.path}: {both} pictures are in both splits, {first} and {second}"
            _say(logging.WARNING, f"{said}: what learns from one of them has seen what it is scored on in the other.")


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # a link to nothing: an error when the picture is read
        return 0, 0
    return found.st_size, found.st_mtime_ns


@cache
def _digest(path: Path, facts: tuple[int, int]) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


@cache
def _say(level: int, remark: str) -> None:
    """Once: a folder is read for each of its splits."""
    logger.log(level, remark)
