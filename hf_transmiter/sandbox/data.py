"""The sandbox's datasets and models, the way users meet them: `datasets.Dataset` objects and model folders."""

import io
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Image, NamedSplit
from datasets.fingerprint import Hasher
from PIL import Image as PillowImage

from ..hub.repo import SANDBOX, model_location
from .words import TASKS
from .world import STYLES, render


SPLITS = ("train", "unlabelled", "validation", "test")
# Part of every fingerprint: raise it whenever the renderer, the words or the drawing of labels change.
WORLD_VERSION = 2

_DRAWN = {"unlabelled": 1500, "validation": 500, "test": 1500}
_TRAIN_PER_CLASS = 64
_TRAIN_TOTAL = 2880  # for the 720-class domains: 4 per class
_CHUNK = 256


def model_path(name: str) -> Path:
    """The folder of a shipped model (config, float16 weights, tokenizer, processor), for plain
    `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained`.

    `name` is ``"weak"``, ``"strong"`` (larger, better, other widths) or ``"weak-upgraded"`` (the widths and vocabulary
    of weak, a text tower trained on from weak's, and a better vision tower).

    Raises:
        ValueError: if no model of that name is shipped.
    """
    return Path(model_location(SANDBOX + name))


def domains() -> dict[str, str]:
    """The available domains, each with a one-line description."""
    return {name: task.description for name, task in TASKS.items()}


def load_dataset(domain: str, split: str = "train", *, seed: int = 0, style: str | None = None) -> Dataset:
    """Draw a split of a domain: columns `image` (32 x 32 RGB) and `label` (`ClassLabel` with the class names).

    The same arguments always give the same pictures and the same fingerprint.

    Args:
        domain (`str`): one of [`domains`]: the tasks ``"print"``, ``"night"``, ``"neon"``, ``"jargon"`` (36 classes
            each), or ``"studio"`` and ``"street"`` (all 720 classes, as in pre-training).
        split (`str`, *optional*, defaults to `"train"`): ``"train"`` (a balanced labelled pool, 64 pictures per class;
            4 with 720 classes), ``"unlabelled"`` (1,500 pictures; the labels are there for checks only),
            ``"validation"`` (500) or ``"test"`` (1,500).
        seed (`int`, *optional*, defaults to 0): another seed draws other pictures of the same classes.
        style (`str`, *optional*): show the classes the way another domain shows its own (``"night"``, ...).

    Raises:
        ValueError: if the domain, the split or the style is unknown.
    """
    if domain not in TASKS:
        raise ValueError(f"There is no sandbox domain {domain!r}; there are {', '.join(TASKS)}.")
    if split not in SPLITS:
        raise ValueError(f"There is no sandbox split {split!r}; there are {', '.join(SPLITS)}.")
    task = TASKS[domain]
    if style is not None and style not in STYLES:
        raise ValueError(f"There is no sandbox style {style!r}; there are {', '.join(STYLES)}.")
    drawn = f"sandbox/{WORLD_VERSION}/{domain}/{split}/{seed}"
    identity = Hasher.hash(drawn if style is None else f"{drawn}/{style}")
    generator = torch.Generator().manual_seed(int(identity, 16) % 2**63)
    classes = torch.tensor(task.classes())
    labels = _labels(len(classes), split, generator)
    pixels = torch.cat([render(classes[part], style or task.style, generator) for part in labels.split(_CHUNK)])
    features = Features({"image": Image(), "label": ClassLabel(names=task.names())})
    columns = {"image": [_png(picture) for picture in pixels], "label": labels.tolist()}
    made = Dataset.from_dict(columns, features=features)
    return Dataset(made.data, info=made.info, split=NamedSplit(split), fingerprint=identity)


def _labels(classes: int, split: str, generator: torch.Generator) -> torch.Tensor:
    if split != "train":
        return torch.randint(classes, (_DRAWN[split],), generator=generator)
    per_class = min(_TRAIN_PER_CLASS, _TRAIN_TOTAL // classes)
    balanced = torch.arange(classes).repeat_interleave(per_class)
    return balanced[torch.randperm(len(balanced), generator=generator)]


def _png(picture: torch.Tensor) -> dict:
    buffer = io.BytesIO()
    PillowImage.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
