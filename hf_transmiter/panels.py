"""The models that the demo app shows side by side, loaded from whatever sources there are, and what they answer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps

from .anchors import DEFAULT_TEMPLATES, Anchors
from .backbone import DualEncoder, load_encoder
from .catalog import load_classifier
from .classifier import AnchorClassifier
from .dataset_specs import find_row, load_split
from .hub import SANDBOX, read_json, split_revision
from .image_sources import guess_columns, load_images
from .transferring import transfer
from .transfers import TeacherFacts
from .tuners import PeftType


TITLES = {"weak": "Weak", "tuned": "Tuned", "strong": "Strong", "upgraded": "Upgraded"}
TOP_K = 5
MAX_PIXELS = 64_000_000  # a decoded picture of that size takes about 200 MB
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
NUM_EXAMPLES = 8


@dataclass
class Panel:
    """One model on the page.

    Args:
        classifier (`AnchorClassifier`): who answers.
        about (`str`): which model it is, in a few words.
    """

    classifier: AnchorClassifier
    about: str


def load_panels(
    weak: str | None = None,
    teacher: str | None = None,
    strong: str | None = None,
    adapter: str | None = None,
    upgraded: str | None = None,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> dict[str, Panel]:
    """The models to show, from any of their sources. What one source says of the others need not be given.

    Args:
        weak (`str`, *optional*): the weak model; the one `adapter` or `teacher` was made for when omitted.
        teacher (`str`, *optional*): the tuned weak model; `adapter` on the weak model is shown when omitted.
        strong (`str`, *optional*): the strong model; the one `upgraded` was made for when omitted.
        adapter (`str`, *optional*): TransMiter adapter of the weak model.
        upgraded (`str`, *optional*):
            Adapter of the strong model. When omitted, `adapter` is carried over to `strong` over a bridge from text
            alone.
        class_names (`Sequence[str]`, *optional*): needed where no source has them saved with it.
        templates (`Sequence[str]`, *optional*): prompts of zero-shot class vectors; those the tuning started from
            when omitted.
        device (`torch.device` or `str`, *optional*), dtype (`torch.dtype` or `str`, *optional*): of the models.

    Returns:
        `dict[str, Panel]`: ``"weak"``, ``"tuned"``, ``"strong"``, ``"upgraded"``, those that there are, in this order.

    Raises:
        FileNotFoundError, OSError: a source is not there.
        ValueError: no source, no class names, models that answer about different classes, or damaged files.
    """
    sources = {"weak": weak, "teacher": teacher, "strong": strong, "adapter": adapter, "upgraded": upgraded}
    if not any(sources.values()):
        raise ValueError("there is no model to show: name at least one of weak, teacher, strong, adapter, upgraded.")
    if teacher is not None and teacher.endswith(".safetensors"):
        raise ValueError(f"{teacher!r} holds logits, which say nothing about new pictures: pass the tuned model.")
    saved = [_Saved.read(source) for source in (upgraded, teacher, adapter) if source is not None]
    names = class_names or next((found.class_names for found in saved if found.class_names), None)
    if not names:
        raise ValueError("no class names are saved with these models: pass class names.")
    templates = templates or next((found.templates for found in reversed(saved) if found.templates), None)
    load = _Loader(tuple(names), tuple(templates or DEFAULT_TEMPLATES), device, dtype)
    weak = weak or _base(adapter) or _base(teacher)
    strong = strong or _base(upgraded)
    panels = {}
    if weak:
        panels["weak"] = Panel(load.zero_shot(weak), f"{_short(weak)}, zero-shot")
    if teacher or adapter:
        panels["tuned"] = Panel(load.adapted(teacher or adapter, weak), _with(teacher or adapter, weak))
    if strong:
        panels["strong"] = Panel(load.zero_shot(strong), f"{_short(strong)}, zero-shot")
    if upgraded:
        panels["upgraded"] = Panel(load.adapted(upgraded, strong), _with(upgraded, strong))
    elif adapter and strong:
        panels["upgraded"] = load.carried(adapter, weak, strong)
    _check_names(panels)
    # Class vectors are computed when first needed: now, not under the first visitor's eyes.
    predictions(Image.new("RGB", (32, 32)), [panel.classifier for panel in panels.values()], 1)
    return panels


@dataclass
class _Saved:
    """What is written beside a tuned model or adapter; empty for a plain model."""

    class_names: Sequence[str] | None = None
    templates: Sequence[str] | None = None

    @classmethod
    def read(cls, source: str) -> _Saved:
        config = _adapter_config(source)
        facts = TeacherFacts.read(source) if config and "templates" not in config else None
        if facts is not None:
            return cls(facts.class_names, facts.zero_shot_templates)
        return cls(config.get("class_names"), config.get("templates"))


@dataclass
class _Loader:
    """Loads classifiers over the same names; a base model that several of them need is loaded once."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    device: torch.device | str | None
    dtype: torch.dtype | str | None

    def __post_init__(self):
        self._encoders: dict[str, DualEncoder] = {}

    def encoder(self, source: str) -> DualEncoder:
        if source not in self._encoders:
            self._encoders[source] = load_encoder(source, device=self.device, dtype=self.dtype)
        return self._encoders[source]

    def zero_shot(self, source: str) -> AnchorClassifier:
        return AnchorClassifier(self.encoder(source), Anchors(self.names, (), self.templates))

    def adapted(self, source: str, base: str | None) -> AnchorClassifier:
        options = {"class_names": self.names, "templates": self.templates, "device": self.device, "dtype": self.dtype}
        return load_classifier(source, self.encoder(base) if base else None, **options)

    def carried(self, adapter: str, weak: str, strong: str) -> Panel:
        """The weak model's adapter on the strong model."""
        encoder = self.encoder(strong)
        made = transfer(self.adapted(adapter, weak), encoder, progress=False)
        return Panel(made, f"{_with(adapter, strong)}, over a bridge from text alone")


def _adapter_config(source: str | None) -> dict:
    return {} if source is None or source.startswith(SANDBOX) else read_json(source, "adapter_config.json") or {}


def _base(source: str | None) -> str | None:
    """The model that an adapter was made for."""
    config = _adapter_config(source)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return f"{name}@{revision}" if name and revision else name


def _short(source: str) -> str:
    """A source as the page names it: no path of this machine, no commit."""
    name = split_revision(source)[0]
    return Path(name).resolve().name if Path(name).is_dir() else name


def _with(source: str, base: str | None) -> str:
    """A tuned model in a few words."""
    config = _adapter_config(source)
    if not config or not base:
        return _short(source)
    kind = "TransMiter" if config.get("peft_type") == PeftType.TRANSMITER else config.get("peft_type")
    return f"{_short(base)} with {f'a {kind} adapter' if Path(source).is_dir() else _short(source)}"


def _check_names(panels: Mapping[str, Panel]) -> None:
    (first, known), *others = ((name, panel.classifier.class_names) for name, panel in panels.items())
    for name, names in others:
        if set(names) != set(known):
            raise ValueError(
                f"the {first} and the {name} model answer about different classes ({len(known)} and {len(names)}): "
                "their answers cannot stand side by side."
            )


def open_picture(path: str | os.PathLike) -> Image.Image:
    """A picture from a file, upright, in RGB.

    Raises:
        ValueError: not a picture, damaged, or of more than `MAX_PIXELS` pixels; the message is for visitors.
    """
    try:
        # Every other format of Pillow is code that strangers would reach; EPS even starts Ghostscript.
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(
                    f"This picture is too large: {file.width} x {file.height} pixels. "
                    f"At most {MAX_PIXELS // 1_000_000} megapixels are read."
                )
            return ImageOps.exif_transpose(file).convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError("This picture is too large.") from error
    except (OSError, SyntaxError, TypeError, AttributeError) as error:  # what Pillow raises on damaged files
        raise ValueError("This file cannot be read as a picture. PNG, JPEG and WebP work.") from error


def predictions(image, classifiers: Sequence[AnchorClassifier], top_k: int = TOP_K) -> list[list[dict]]:
    """What each model says of one picture.

    Args:
        image (`PIL.Image.Image`, path or array): the picture.
        classifiers (`Sequence[AnchorClassifier]`): the models.
        top_k (`int`, *optional*, defaults to 5): names per model.

    Returns:
        `list[list[dict]]`: per model `{"label": name, "score": probability}`, best first.
    """
    return [classifier.predict([image], top_k=top_k)[0] for classifier in classifiers]


def example_pictures(source: str, count: int = NUM_EXAMPLES) -> list[tuple[Image.Image, str | None]]:
    """Some pictures of a data set, always the same ones, with their class names where they have labels.

    Args:
        source (`str`): as in `load_images`, or a row of the catalogue; test pictures if there are such.
        count (`int`, *optional*, defaults to 8): how many.
    """
    row = find_row(source)
    if row is None:
        images = load_images(source, prefer=("test", "validation", "train"), max_images=count)
    else:
        images = load_split(row, "test", max_images=count)
    image, label = guess_columns(images)
    names = getattr(images.features.get(label), "names", None)
    return [(row[image], names[row[label]] if names and row[label] >= 0 else None) for row in images]


def demo_sources(folder: str | os.PathLike) -> tuple[dict[str, str], str]:
    """What `hf-transmiter demo` left behind, as arguments of [`load_panels`], and the source of example pictures.

    Args:
        folder (`str` or `os.PathLike`): output of the demo (its first task is taken) or a task's folder in it.

    Raises:
        FileNotFoundError: no demo there.
    """
    folder = Path(folder)
    tasks = [folder, *sorted(path for path in folder.glob("[!.]*/") if path.is_dir())]
    task = next((task for task in tasks if (task / "strong_adapter" / "adapter_config.json").is_file()), None)
    if task is None:
        raise FileNotFoundError(f"there is no demo in {folder}: run hf-transmiter demo --output-dir {folder}.")
    parts = {"teacher": "tuned", "adapter": "adapter", "upgraded": "strong_adapter"}
    there = {key: task / name for key, name in parts.items() if (task / name / "adapter_config.json").is_file()}
    return {key: str(path) for key, path in there.items()}, SANDBOX + task.resolve().name
