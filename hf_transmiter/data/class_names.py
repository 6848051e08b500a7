"""Class names: files of them, and whose name in the data is whose among the names of a task.

Datasets carry the same classes in different orders and spellings (``ApplyEyeMakeup``, ``apply_eye_makeup``). Names
are therefore matched one by one, never by their position.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..hub.checks import nearest, read_text, simplified


def read_class_file(path: str | os.PathLike) -> tuple[tuple[str, ...], dict[str, str]]:
    """C names of a text file, one class a line in label order; after tabs, how datasets spell the same class: {other
    spelling: name}.

    ```text
    # a comment
    indoor church	/c/church/indoor
    ```

    Raises:
        FileNotFoundError: no such file.
        ValueError: a name or spelling that occurs twice, or no name at all.
    """
    names, aliases = [], {}
    for line in read_text(path).splitlines():
        name, *spellings = (part.strip() for part in line.split("\t"))
        if not name or name.startswith("#"):
            continue
        names.append(name)
        for spelling in spellings:
            if aliases.setdefault(spelling, name) != name:
                raise ValueError(f"{path}: {spelling!r} stands beside {aliases[spelling]!r} and {name!r}.")
    check_names(names, str(path))
    return tuple(names), aliases


def read_names(values: Sequence[str] | None) -> tuple[str, ...] | None:
    """Class names as people write them: several values, one value with commas, or a text file with a name per line."""
    if not values:
        return None
    if len(values) > 1:
        return tuple(values)
    try:
        listed = Path(values[0]).is_file()
    except OSError:  # a long list of names is no file name
        listed = False
    if listed:
        lines = read_text(values[0]).splitlines()
    else:
        lines = values[0].split(",")
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ValueError(f"there is no class name in {values[0]!r}.")
    return names


def check_names(names: Sequence[str], where: str) -> None:
    """
    Raises:
        ValueError: one string, no name, an empty one, or one that occurs twice; the message begins with `where`.
    """
    if isinstance(names, str):
        raise ValueError(f"{where}: class names must be a list of names, got one string, {names!r}.")
    if not len(names):
        raise ValueError(f"{where}: there is no class name.")
    odd = [name for name in names if not isinstance(name, str) or not name.strip()]
    if odd:
        raise ValueError(f"{where}: class names must be words, got {odd[0]!r}.")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{where}: class names must differ, but {', '.join(map(repr, twice[:5]))} occur twice.")


def listed(texts: Iterable[str], limit: int = 8) -> str:
    """The first of the texts, and how many more there are."""
    texts = list(texts)
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


def label_places(found: Sequence[str] | None, labels: Sequence[int], names: Sequence[str]) -> list[int]:
    """For each label the position in `names` of its name among the data's, `found`; the label itself without those.

    Raises:
        ValueError: classes of the labels that match none of `names`, or two that match the same one (see
            [`match_names`]).
    """
    if found is None:
        return list(labels)
    used = sorted(set(labels))
    try:
        places = match_names([found[label] for label in used], names)
    except ValueError as error:
        known = set(map(simplified, names))
        missing = [repr(found[label]) for label in used if simplified(found[label]) not in known]
        if not missing:
            raise
        which = f"class {missing[0]} is" if len(missing) == 1 else f"classes {listed(missing)} are"
        raise ValueError(
            f"the dataset's {which} not among the classifier's names ({listed(names, 5)}): pass names that cover the "
            "data's, or leave such images out."
        ) from error
    places = dict(zip(used, places, strict=True))
    return [places[label] for label in labels]


def match_names(
    found: Sequence[str],
    names: Sequence[str],
    aliases: Mapping[str, str] | None = None,
    left_out: Sequence[str] = (),
) -> list[int]:
    """For each name in the data, the position of its class among the names of the task.

    A name matches when it is spelt the same, is an alias ({spelling in the data: name of the task}), or differs only
    in case, spaces and signs. Where no name matches and all are whole numbers, they are positions: ``"10"`` is 10,
    however the names are sorted. Names in the data that are `left_out` have the position -1.

    Raises:
        ValueError: names that match nothing (listed, with the nearest), two that match the same, or a number that
            is no position.
    """
    position = {name: i for i, name in enumerate(names)}
    exact = {**{spelling: position[name] for spelling, name in (aliases or {}).items()}, **position}
    exact.update({name: -1 for name in left_out if name not in position})
    loose: dict[str, set[int]] = {}
    for spelling, i in exact.items():
        loose.setdefault(simplified(spelling), set()).add(i)
    matched = []
    for name in found:
        candidates = {exact[name]} if name in exact else loose.get(simplified(name), set())
        matched.append(next(iter(candidates)) if len(candidates) == 1 else None)
    if found and not any(i is not None for i in matched) and all(re.fullmatch(r"\d+", name) for name in found):
        for name in found:  # int(), because sorting such names puts "10" before "2"
            if int(name) >= len(names):
                known = f"{len(names)} names (0 to {len(names) - 1})"
                raise ValueError(f"the class {name!r} of the data is no position among {known}.")
        return [int(name) for name in found]
    unknown = [name for name, i in zip(found, matched, strict=True) if i is None]
    if unknown:
        near = [nearest(name, list(exact), 1) for name in unknown[:5]]
        said = [f"{a!r} (nearest: {b[0]!r})" if b else repr(a) for a, b in zip(unknown, near, strict=False)]
        raise ValueError(
            f"no name among the {len(names)} of the task matches the data's {listed([*said, *unknown[5:]], 5)}: give "
            "class_names that cover them, or leave them out with left_out."
        )
    by_class: dict[int, list[str]] = {}
    for name, i in zip(found, matched, strict=True):
        by_class.setdefault(i, []).append(name)
    for i, group in by_class.items():
        if i >= 0 and len(group) > 1:
            raise ValueError(f"the data's classes {', '.join(map(repr, group))} all match {names[i]!r}.")
    return matched
