"""What the sandbox's models read in pre-training: phrases, sentences, and which classes none of them shows."""

import random
from typing import NamedTuple

from hf_transmiter.sandbox.words import CLASSES, class_name, vocabulary


# Terms the captions drop in at random: known tokens without any visual meaning.
TRADE_NAMES = ("acme", "zenith", "nimbus", "vertex", "orbit", "lumen", "quanta", "delta")

TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "an image of one {}.", "a {}.", "{}")


class Description(NamedTuple):
    """What one caption says: an index per attribute, or `None` where it says nothing."""

    texture: int | None = None
    colour: int | None = None
    shape: int | None = None


def phrase(said: Description, trade_name: str = "") -> str:
    """The noun phrase for `said`, e.g. ``"acme striped red heart"``."""
    return f"{trade_name} {class_name(*said)}".strip()


def held_out_classes() -> frozenset[tuple[int, int, int]]:
    """The 144 combinations (20 %) that no pre-training picture or caption shows; the same in every model."""
    return frozenset(random.Random(7).sample(CLASSES, len(CLASSES) // 5))


def all_words() -> list[str]:
    """Every word that a caption can hold, sorted: each becomes one token."""
    known = " ".join([*TEMPLATES, *vocabulary(), *TRADE_NAMES])
    return sorted(set(known.replace("{}", " ").replace(".", " ").split()))
