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
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, NamedSplit

from ..hub.files import file_digest, file_state
from .class_names import listed


logger = logging.getLogger(__name__)

# How people call their splits, best first.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "unlabelled": ("unlabelled", "unlabeled"),
}
DATA_FILES = {".parquet": "parquet", ".arrow": "arrow"}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of ImageFolder: their columns are the labels
_PICTURES = frozenset(
    ".apng .avif .bmp .dib .gif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .jpx .pbm .pcx .pgm .png .pnm .ppm .sgi .tga "
    ".tif .tiff .webp".split()
)
_PASSED_OVER = ("__MACOSX", "__pycache__")
_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}

Parts = tuple[str, ...]  # of a path below some folder


@dataclass
class Folder:
    """A folder of pictures: for each split its own folder and the pictures below it; the class names of all splits;
    whether files beside the pictures say what they are."""

    places: dict[str, Path]
    pictures: dict[str, list[Parts]]
    class_names: list[str] = field(default_factory=list)
    has_metadata: bool = False

    def load(self, split: str) -> Dataset:
        """Columns `image` and, where every picture lies in a class folder and there are several, `label`. The
        fingerprint is of names, sizes and times of change."""
        place, pictures = self.places[split], self.pictures[split]
        columns = {"image": [os.path.abspath(place.joinpath(*parts)) for parts in pictures]}
        features = Features(image=Image())
        if len(self.class_names) > 1 and all(len(parts) > 1 for parts in pictures):
            columns["label"] = [_class_name(parts[0]) for parts in pictures]
            features["label"] = ClassLabel(names=self.class_names)
        facts = [split, self.class_names, [[*parts, *_state(place.joinpath(*parts))] for parts in pictures]]
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
    kinds = Counter(Path(parts[-1]).suffix.lower() or "no extension" for parts in files)
    pictures = [parts for parts in files if Path(parts[-1]).suffix.lower() in _PICTURES]
    has_metadata, card = any(parts[-1] in _METADATA for parts in files), path / "README.md"
    data_files = sum(Path(parts[-1]).suffix in DATA_FILES and parts[-1] not in _METADATA for parts in files)
    others = listed(f"{count} ({kind})" for kind, count in kinds.most_common() if kind not in _PICTURES)
    if not pictures and not data_files and others:
        _say(logging.INFO, f"{path}: there are no pictures that can be read among the files: {others}.")
    # A copy of a repository may say itself where its splits are.
    if len(pictures) <= data_files or (card.is_file() and b"\nconfigs:" in card.read_bytes()):
        return None
    if others and not has_metadata:
        _say(logging.INFO, f"{path}: files that are no pictures are left alone: {others}.")
    while len(top := _top(pictures)) == 1 and None not in top and not _split(top[0]):
        path, pictures, folders = path / top[0], _below(pictures, top[0]), _below(folders, top[0])
    found = Folder({"train": path}, {"train": pictures}, has_metadata=has_metadata)
    words = [name for name in top if name is not None and _split(name)]
    if words and len(words) == len(top):
        words.sort(key=lambda name: list(SPLIT_WORDS).index(_split(name)))
        for first, second in zip(words, words[1:], strict=False):
            if _split(first) == _split(second):
                raise ValueError(f"{path}: {first}, {second} are both the split {_split(first)!r}: keep one of them.")
        found.places = {_split(name): path / name for name in words}
        found.pictures = {_split(name): _below(pictures, name) for name in words}
        folders = [parts for name in words for parts in _below(folders, name)]
        if len(words) > 1 and all(_top(inside) == [None] for inside in found.pictures.values()):
            _say(logging.WARNING, f"{path}: {listed(words)} are read as splits without labels, not as classes.")
    elif len(words) > 1 and set.intersection(*(set(_top(_below(pictures, name))) - {None} for name in words)):
        beside = listed("pictures" if name is None else repr(name) for name in top if name not in words)
        raise ValueError(
            f"{path}: {listed(words)} look like splits, and {beside} lie beside them, so they may be classes: pass "
            "the folder of one split, or move the others away."
        )
    elif all(name and _SPLIT_OF.keys() & re.split(r"[\W\d_]+", name.lower()) for name in top):
        _say(logging.WARNING, f"{path}: {listed(top)} are read as classes: splits are called {listed(SPLIT_WORDS)}.")
    if not has_metadata:
        _find_classes(found, path, {parts[0] for parts in folders if len(parts) == 1})
    for pair in combinations(found.places, 2):
        _compare(found, path, *pair)
    return found


def _walk(path: Path) -> tuple[list[Parts], list[Parts]]:
    """All files and folders below a folder, but for hidden ones; sorted."""

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
    for parts in files:
        if "".join(parts).encode(errors="replace") != "".join(parts).encode(errors="surrogatepass"):
            raise ValueError(f"{path}: the name {'/'.join(parts)!r} is not UTF-8: rename it.")
    return sorted(files), sorted(folders)


def _split(name: str) -> str | None:
    return _SPLIT_OF.get(name.strip().lower())


def _top(files: list[Parts]) -> list[str | None]:
    """The folders at the top; `None` is among them where files lie there, too."""
    return list(dict.fromkeys(parts[0] if len(parts) > 1 else None for parts in files))


def _below(files: list[Parts], name: str) -> list[Parts]:
    return [parts[1:] for parts in files if parts[0] == name and len(parts) > 1]


def _class_name(folder: str) -> str:
    """Without blanks at the ends, accents written as one character: systems differ in that."""
    return unicodedata.normalize("NFC", folder).strip()


def _find_classes(found: Folder, path: Path, folders: set[str]) -> None:
    pictures = [parts for inside in found.pictures.values() for parts in inside]
    spelt: dict[str, str] = {}
    for name in dict.fromkeys(parts[0] for parts in pictures if len(parts) > 1):
        if spelt.setdefault(_class_name(name), name) != name:
            first = spelt[_class_name(name)]
            raise ValueError(f"{path}: the folders {first!r} and {name!r} are one class: join them.")
    found.class_names = sorted(spelt)
    for split, inside in found.pictures.items():
        loose = sum(len(parts) == 1 for parts in inside)
        if 0 < loose < len(inside):
            said = f"no labels, since {loose} pictures lie beside the class folders: move them."
            _say(logging.WARNING, f"{found.places[split]}: {said}")
    if folders - set(spelt.values()):
        empty = listed(sorted(folders - set(spelt.values())))
        _say(logging.WARNING, f"{path}: folders without pictures are no classes: {empty}.")
    if any(len(parts) > 2 for parts in pictures):
        names = listed(found.class_names, 5)
        _say(logging.WARNING, f"{path}: the classes are the folders at the top ({names}), not the folders in them.")
    folded = Counter(map(str.casefold, found.class_names))
    alike = listed(name for name in found.class_names if folded[name.casefold()] > 1)
    if alike:
        _say(logging.WARNING, f"{path}: classes that differ in case alone, which most models do not read: {alike}.")


def _compare(found: Folder, path: Path, first: str, second: str) -> None:
    """Says which pictures are in two splits. Only files of the same size are read."""
    places = [[found.places[split].joinpath(*parts) for parts in found.pictures[split]] for split in (first, second)]
    sizes = [{file: _state(file)[0] for file in files} for files in places]
    shared = set.intersection(*(set(each.values()) for each in sizes)) - {0}
    same = [{file_digest(file) for file, size in each.items() if size in shared} for each in sizes]
    both = len(same[0] & same[1])
    if both:
        said = "what learns from one of them has seen what it is scored on in the other"
        _say(logging.WARNING, f"{path}: {both} pictures are in both splits, {first} and {second}: {said}.")


def _state(path: Path) -> tuple[int, ...]:
    try:
        return file_state(path)
    except OSError:  # a link to nothing: an error when the picture is read
        return (0,)


@cache
def _say(level: int, remark: str) -> None:
    """Once: a folder is read for each of its splits."""
    logger.log(level, remark)
