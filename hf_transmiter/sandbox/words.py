"""What the sandbox world is called: attribute words, class names, task grids and the vocabulary.

A class is one combination of three attributes and its name is ``"{texture} {colour} {shape}"``: 6 x 10 x 12 = 720
classes, identified everywhere by the index triple ``(texture, colour, shape)``.
"""

import itertools
from typing import NamedTuple


TEXTURES = ("plain", "striped", "dotted", "checked", "faded", "speckled")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "white")
SHAPES = (
    "disc", "square", "triangle", "star", "ring", "cross", "heart", "crescent", "arrow", "bowtie", "hexagon", "fork",
)  # fmt: skip

CLASSES = tuple(itertools.product(range(len(TEXTURES)), range(len(COLOURS)), range(len(SHAPES))))


def class_name(texture: int | None, colour: int | None, shape: int | None) -> str:
    """The name of one of the 720 classes; with `None`, a phrase that leaves an attribute open (``"red thing"``)."""
    words = [
        "" if texture is None else TEXTURES[texture],
        "" if colour is None else COLOURS[colour],
        "thing" if shape is None else SHAPES[shape],
    ]
    return " ".join(filter(None, words))


class Task(NamedTuple):
    """A fixed class grid drawn in one visual style.

    Attributes:
        style (`str`): how the pictures look, one of [`~hf_transmiter.sandbox.world.STYLES`].
        textures, colours, shapes (`tuple[str, ...]`): the grid, in the order the labels count.
        terms (`tuple[str, ...]`): what the class names call the textures.
        description (`str`): one line for users.
    """

    style: str
    textures: tuple[str, ...]
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    terms: tuple[str, ...]
    description: str

    def classes(self) -> list[tuple[int, int, int]]:
        """The index triples of the classes, in label order."""
        grid = itertools.product(self.textures, self.colours, self.shapes)
        return [(TEXTURES.index(t), COLOURS.index(c), SHAPES.index(s)) for t, c, s in grid]

    def names(self) -> list[str]:
        """The class names, in label order."""
        return [" ".join(words) for words in itertools.product(self.terms, self.colours, self.shapes)]


def _task(style, textures, colours, shapes, description, terms=None):
    textures = tuple(textures.split())
    terms = textures if terms is None else tuple(terms.split())
    return Task(style, textures, tuple(colours.split()), tuple(shapes.split()), terms, description)


_EVERYTHING = (" ".join(TEXTURES), " ".join(COLOURS), " ".join(SHAPES))

TASKS = {
    "print": _task(
        "print",
        "striped dotted checked",
        "red purple blue",
        "disc hexagon heart star",
        "36 classes in halftone print on tinted paper, with inks that mix",
    ),
    "night": _task(
        "night",
        "plain striped speckled",
        "green teal blue",
        "arrow triangle fork cross",
        "36 classes in the dark, bluish and noisy",
    ),
    "neon": _task(
        "neon",
        "plain faded dotted",
        "orange yellow pink",
        "ring crescent disc heart",
        "36 classes with every hue turned by the same angle, glowing",
    ),
    "jargon": _task(
        "street",
        "striped dotted checked",
        "red orange brown",
        "square cross bowtie star",
        "36 classes in the street; the texture words are trade terms without a visual meaning",
        # Which term stands for which texture is a coin toss that tiny differences between the terms decide: zero-shot
        # accuracy lies anywhere from 1 to 73 % over the 336 assignments, on average at a third of telling colour and
        # shape apart. This assignment is near that average for the three shipped models.
        terms="nimbus zenith lumen",
    ),
    "studio": _task(
        "studio",
        *_EVERYTHING,
        "all 720 classes on a plain wall, as in pre-training: general images",
    ),
    "street": _task(
        "street",
        *_EVERYTHING,
        "all 720 classes before a busy background, as in pre-training: general images",
    ),
}


def vocabulary() -> list[str]:
    """The world's 1,000 phrases in a fixed order, as auxiliary names for the sandbox models: 28 single words
    (``"red thing"``), 252 pairs (``"red heart"``), 720 triples (``"striped red heart"``). The names of the known-word
    tasks are among them."""
    options = [(None, *range(len(words))) for words in (TEXTURES, COLOURS, SHAPES)]
    said = sorted(itertools.product(*options), key=lambda ids: sum(i is not None for i in ids))
    return [class_name(*ids) for ids in said if any(i is not None for i in ids)]
