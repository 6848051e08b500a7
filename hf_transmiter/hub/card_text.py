"""What goes into a card as text: escaped by default, since names come from anybody's repository.

Every value that a template of ``assets/cards`` prints passes [`escape`], unless it is [`Raw`]; what is not known
(`None`) prints as "not stated", so a template need not ask. (`ModelCard.from_template` of huggingface_hub does not
escape.)
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .checks import printable
from .repo import SANDBOX, is_hub_id, is_public_open_clip, split_revision


METHOD_NAMES = {
    **{"lora": "LoRA in the image tower", "coop": "a CoOp prompt", "kgcoop": "a KgCoOp prompt"},
    **{"prograd": "a ProGrad prompt", "cocoop": "a CoCoOp prompt", "contcoop": "a ContCoOp prompt"},
    **{"ivlp": "IVLP prompts", "maple": "MaPLe prompts", "promptsrc": "PromptSRC prompts"},
}
# What markdown, HTML and the Hub's formulas would read as more than a letter. Underscores inside a word are harmless.
_SPECIAL = re.compile(r"[&<>|\\`*\[\]~#$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)")
# Control characters, line and paragraph ends of every kind, and marks that turn the direction of what follows.
_UNPRINTABLE = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]+"
)


class Raw(str):
    """Markdown that stays as it is."""


def one_line(value) -> str:
    """`value` as text on one line, without what cannot be printed or encoded."""
    return _printable(value).strip()


def _printable(value) -> str:
    return _UNPRINTABLE.sub(" ", str(value).encode("utf-8", "replace").decode("utf-8"))


def escape(value) -> str:
    """`value` as markdown that shows it and does nothing else; [`Raw`] as it is, numbers with thousands separated."""
    if isinstance(value, Raw):
        return str(value)
    if value is None:
        return "not stated"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", _printable(value))


def span(value, length: int | None = None) -> Raw:
    """The first letters as inline code, "not stated" for `None`."""
    if value is None:
        return Raw(escape(None))
    text = one_line(value)[:length]
    if not text or "`" in text or "|" in text:  # fences of several backticks do not survive tables
        return Raw(escape(text))
    return Raw(f"`{text}`")


def literal(value) -> Raw:
    """A text as a Python literal on one line, for code blocks."""
    return Raw(printable(json.dumps(str(value).encode("utf-8", "replace").decode("utf-8"), ensure_ascii=False)))


def argument(value) -> Raw:
    """A text as one argument of a shell command, for code blocks."""
    return Raw(shlex.quote(one_line(value)))


def listed(values, limit: int = 8) -> Raw:
    """The first values, escaped, and how many more there are."""
    values = list(values)
    shown = ", ".join(escape(one_line(value)) for value in values[:limit])
    return Raw(shown + (f" and {len(values) - limit:,} more" if len(values) > limit else ""))


def decimals(value) -> Raw:
    """A fraction with three of them."""
    return Raw(f"{value:.3f}" if isinstance(value, float) else escape(value))


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parents[1] / "assets" / "cards"),
    undefined=StrictUndefined,
    finalize=escape,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_environment.filters |= {each.__name__: each for each in (span, decimals, literal, argument, listed)}


def fill(template: str, **facts) -> str:
    """A template of ``assets/cards`` with its facts; blank lines are never doubled.

    Raises:
        jinja2.TemplateError: no such template, or one that asks for a fact that was not passed.
    """
    return re.sub(r"\n{3,}", "\n\n", _environment.get_template(template).render(**facts)).strip()


# ---- facts ----------------------------------------------------------------------------------------------------------


def texts_in(value: object) -> list[str]:
    """A text, or those in a list, on one line each; what is empty or no text is left out."""
    values = value if isinstance(value, list | tuple) else [value]
    return [one_line(text) for text in values if isinstance(text, str) and one_line(text)]


class Noted(dict):
    """An object in a JSON file, whatever its writer put there."""

    def inner(self, key: str) -> Noted:
        """An object inside it, an empty one where there is none."""
        value = self.get(key)
        return Noted(value if isinstance(value, dict) else {})

    def known(self, key: str) -> str | int | float | None:
        """A text or number inside it, `None` for anything else."""
        value = self.get(key)
        fine = isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip()
        return value if fine else None

    def lines(self, key: str) -> list[str]:
        """The texts in a list inside it."""
        return texts_in(self.get(key))

    def texts(self) -> dict[str, str]:
        """All texts and numbers inside it, as texts."""
        return {key: str(self[key]) for key in self if self.known(key) is not None}


@dataclass(frozen=True)
class Named:
    """A model or data set as a card names it: a Hub id, ``sandbox:NAME``, a name of open_clip or a path, of which only
    the last part is told. Revision and fingerprint are those of `identity.ModelId`."""

    name: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    page: ClassVar[str] = "https://huggingface.co/"
    local: ClassVar[str] = "the local model "

    @property
    def kind(self) -> str | None:
        """Where others find it: `"hub"`, `"sandbox"`, `"open_clip"`; `None` for what is not stated or a path."""
        name = self.name or ""
        known = {"sandbox": name.startswith(SANDBOX), "open_clip": is_public_open_clip(name), "hub": is_hub_id(name)}
        return next((kind for kind, fits in known.items() if fits), None)

    @property
    def last_part(self) -> str:
        """Of a path."""
        return one_line(re.split(r"[/\\]", self.name.rstrip("/\\"))[-1]) or "model"

    @property
    def source(self) -> str:
        """What to pass to `from_pretrained`."""
        if self.kind:
            return self.name
        return "path/to/base-model" if self.name is None else f"path/to/{self.last_part}"

    @property
    def label(self) -> Raw:
        """Markdown: a link, or what kind of thing it is."""
        if self.kind == "hub":
            at = f" at {span(self.revision, 12)}" if self.revision else ""
            return Raw(f"[{escape(self.name)}]({self.page}{self.name}){at}")
        if self.kind:
            return span(self.name)
        return Raw("a model that is not stated" if self.name is None else f"{self.local}{span(self.last_part)}")


class NamedModel(Named):
    """The model something belongs on."""

    @classmethod
    def of(cls, noted: Noted, name: str = "name") -> NamedModel:
        """From what was noted of it; its name stands under the key `name`."""
        values = (noted.get(key) for key in (name, "revision", "fingerprint"))
        return cls(*(value if isinstance(value, str) and value.strip() else None for value in values))

    @property
    def arguments(self) -> Raw:
        """Of `from_pretrained`, in Python."""
        pinned = self.revision and self.kind in ("hub", "open_clip")
        return Raw(literal(self.source) + (f", revision={literal(self.revision)}" if pinned else ""))


class NamedDataset(Named):
    """Images."""

    page: ClassVar[str] = "https://huggingface.co/datasets/"
    local: ClassVar[str] = ""

    @classmethod
    def of(cls, source: object) -> NamedDataset | None:
        """From what people passed as a source of images, ``id@revision`` or ``id (split)`` too."""
        if not isinstance(source, str) or not source.strip():
            return None
        text = re.sub(r" \([^()]*\)$", "", source)
        name, revision = split_revision(text)
        return cls(name, revision) if is_hub_id(name) or name.startswith(SANDBOX) else cls(cls(text).last_part)

    @property
    def source(self) -> str:
        """What to pass to `hf-transmiter --dataset`."""
        return super().source + (f"@{self.revision}" if self.revision else "")


class Step(Noted):
    """A step that an adapter went through: an entry of its `provenance`, as `extract` and `transfer` write them."""

    @property
    def kind(self) -> str:
        return str(self.known("step") or "unknown")

    @property
    def model(self) -> NamedModel:
        """On which it ended."""
        return NamedModel.of(self.inner("strong" if self.kind == "transfer" else "weak"))

    @property
    def dataset(self) -> NamedDataset | None:
        return NamedDataset.of(self.get("dataset"))

    @property
    def num_images(self) -> str | int | float | None:
        return self.known("refit_on" if self.kind == "transfer" else "num_images")

    @property
    def teacher(self) -> str:
        """How the tuned model was made, as far as an extraction noted it."""
        noted = self.inner("teacher")
        method = self.known("teacher") or METHOD_NAMES.get(noted.known("method"), noted.known("method"))
        if method is None:
            own = self.get("own_class_vectors") is True
            return "a learnt prompt or class vectors" if own else "a fine-tuning that is not stated"
        dataset = NamedDataset.of(noted.get("dataset"))
        images = f"{noted['shots']} labelled images per class" if noted.known("shots") else ""
        images += f" of {dataset.name}" if dataset else ""
        seed = "" if noted.known("seed") is None else f"seed {noted['seed']}"
        more = ", ".join(filter(None, (images.strip(), seed)))
        return one_line(method) + (f" ({more})" if more else "")
