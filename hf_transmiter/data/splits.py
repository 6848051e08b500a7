"""Which images and which classes: pure functions from labels or names to indices, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..hub.checks import as_list
from ..settings import SEED, check_number
from .class_names import listed


def few_shot(
    labels: Sequence[int], shots: int, seed: int, num_classes: int | None = None, *, allow_fewer: bool = False
) -> list[int]:
    """`shots` images of each class, drawn uniformly without replacement.

    Each class has its own random stream, named by the seed and the class, so a draw does not depend on which other
    classes there are, and fewer shots are the beginning of more.

    Args:
        labels (`Sequence[int]`): of each of the N images, 0-based. Tensors and arrays are fine.
        shots (`int`), seed (`int`): images per class, and the name of the draw.
        num_classes (`int`, *optional*): C, if every class from 0 to C - 1 must be there.
        allow_fewer (`bool`, *optional*, defaults to `False`): take all images of a class that has less than `shots`.

    Returns:
        `list[int]`: image indices, class by class in the order of the labels, in drawn order within a class.

    Raises:
        ValueError: `shots` < 1, a label outside `[0, num_classes)`, or classes with too few images (listed).
    """
    shots, seed = check_number("shots", shots, least=1), check_number("seed", seed, **SEED)
    members = _by_class(labels, num_classes)
    short = [f"class {label} has {len(indices)}" for label, indices in members.items() if len(indices) < shots]
    if short and not allow_fewer:
        said = f"{shots} images per class are wanted, but {listed(short)}"
        raise ValueError(f"{said}; use fewer shots or allow_fewer=True.")
    for label, indices in members.items():
        # Seeding with a string goes through SHA-512, so neighbouring seeds and classes give unrelated streams.
        random.Random(f"{seed}/{label}").shuffle(indices)
    return [i for indices in members.values() for i in indices[:shots]]


def base_names(names: Sequence[str]) -> tuple[str, ...]:
    """The first ``ceil(C / 2)`` class names, which the tuning of base-to-novel sees (CoOp's split); the rest is novel.

    The halves depend on the order of the names, so keep that of the data set's published split.

    Raises:
        ValueError: fewer than two names; there would be no novel class.
    """
    names = as_list(names, "names")
    if len(names) < 2:
        raise ValueError(f"A base/novel split needs at least 2 classes, got {len(names)}.")
    return tuple(names[: (len(names) + 1) // 2])


def _by_class(labels: Sequence[int], num_classes: int | None) -> dict[int, list[int]]:
    labels = [int(label) for label in labels]
    if not labels:
        raise ValueError("There are no labels to split; the data set is empty.")
    members: dict[int, list[int]] = {
        label: [] for label in (sorted(set(labels)) if num_classes is None else range(num_classes))
    }
    outside = sorted({label for label in labels if label < 0 or label not in members})
    if outside:
        upper = "" if num_classes is None else f" and below num_classes={num_classes}"
        raise ValueError(f"Labels must be 0 or more{upper}, got {outside[:8]}; leave images without a label out.")
    for i, label in enumerate(labels):
        members[label].append(i)
    return members
