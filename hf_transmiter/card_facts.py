"""What a card tells, read from the files of a repository: models, weights, steps, scores. Nothing is loaded.

A file that is missing or damaged is a fact that is not known (`None`, an empty list), never an error; what is damaged
is logged. Only the file that makes the folder what it is must be good.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card_text import Raw, escape, one_line, span
from .hub import OPEN_CLIP, SANDBOX, is_public_open_clip, split_revision
from .scores import Score, markdown_table
from .trust import load_json, read_header


logger = logging.getLogger(__name__)

METHOD_NAMES = {
    **{"lora": "LoRA in the image tower", "coop": "a CoOp prompt", "kgcoop": "a KgCoOp prompt"},
    **{"prograd": "a ProGrad prompt", "cocoop": "a CoCoOp prompt", "contcoop": "a ContCoOp prompt"},
    **{"ivlp": "IVLP prompts", "maple": "MaPLe prompts", "promptsrc": "PromptSRC prompts"},
}
ACCURACIES = {
    **{"accuracy": "accuracy, %", "base": "accuracy on base classes, %", "novel": "accuracy on novel classes, %"},
    **{"hm": "harmonic mean of base and novel accuracy, %", "joint": "accuracy over all classes, %"},
}
METRIC_NAMES = {**ACCURACIES, "ece": "expected calibration error, %"}
_MAX_STEPS = 8


def is_hub_id(name: object) -> bool:
    """Whether `name` can be ``user/name`` on the Hub: not a path that exists, not ``sandbox:weak``."""
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((SANDBOX, OPEN_CLIP, ".", "~", "/")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


@dataclass(frozen=True)
class NamedModel:
    """A base model as a card names it; a path of somebody's machine is cut to its last part.

    Args:
        name, revision, fingerprint (`str`, *optional*): as in `fingerprint.ModelId`.
    """

    name: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    @classmethod
    def of(cls, content: object) -> NamedModel:
        """From an object in a JSON file; what is not a text is not known."""
        content = content if isinstance(content, dict) else {}
        return cls(*(_text(content.get(key)) for key in ("name", "revision", "fingerprint")))

    @property
    def hub_id(self) -> str | None:
        """Its id on the Hub, `None` for any other model."""
        return self.name if is_hub_id(self.name) else None

    @property
    def in_sandbox(self) -> bool:
        return self.name is not None and self.name.startswith(SANDBOX)

    @property
    def in_open_clip(self) -> bool:
        return self.name is not None and is_public_open_clip(self.name)

    @property
    def source(self) -> str:
        """What to pass to `from_pretrained`."""
        if self.hub_id or self.in_sandbox or self.in_open_clip:
            return self.name
        return "path/to/base-model" if self.name is None else f"path/to/{_last_part(self.name)}"

    @property
    def label(self) -> Raw:
        """Markdown: a link, or what kind of model it is."""
        if self.hub_id:
            at = f" at {span(self.revision[:12])}" if self.revision else ""
            return Raw(f"[{escape(self.name)}](https://huggingface.co/{self.name}){at}")
        if self.in_sandbox or self.in_open_clip:
            return span(self.name)
        return Raw(
            "a model that is not stated" if self.name is None else f"the local model {span(_last_part(self.name))}"
        )


def _last_part(path: str) -> str:
    return one_line(re.split(r"[/\\]", path.rstrip("/\\"))[-1]) or "model"


@dataclass(frozen=True)
class NamedDataset:
    """A data set as a card names it: Hub id with revision, ``sandbox:NAME``, or the last part of a local path."""

    name: str
    revision: str | None = None

    @classmethod
    def of(cls, source: object) -> NamedDataset | None:
        """From what people passed as a source of images, ``id@revision`` or ``id (split)`` too."""
        text = _text(source)
        if text is None:
            return None
        text = re.sub(r" \([^()]*\)$", "", text)
        name, revision = split_revision(text)
        if not (is_hub_id(name) or name.startswith(SANDBOX)):
            return cls(_last_part(text))
        return cls(name, revision)

    @property
    def source(self) -> str:
        """What to pass to `hf-transmiter --dataset`."""
        if is_hub_id(self.name):
            return self.name + (f"@{self.revision}" if self.revision else "")
        return self.name if self.name.startswith(SANDBOX) else f"path/to/{self.name}"

    @property
    def label(self) -> Raw:
        at = f" at {span(self.revision)}" if self.revision else ""
        if is_hub_id(self.name):
            return Raw(f"[{escape(self.name)}](https://huggingface.co/datasets/{self.name}){at}")
        return Raw(f"{span(self.name)}{at}")


@dataclass(frozen=True)
class Weights:
    """Size and number format of a safetensors file."""

    parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, path: Path) -> Weights:
        _, shapes = read_header(path)
        count = sum(math.prod(shape) for _, shape in shapes.values())
        return cls(count, path.stat().st_size, tuple(sorted({dtype for dtype, _ in shapes.values()})))


def optional(path: Path, read: Callable):
    """`read(path)`; `None` where there is no such file, or (logged) a damaged one."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except (ValueError, OSError) as error:
        logger.warning("%s is left out of the card: %s", path.name, error)
        return None


def required(folder: Path, file: str, schema: str) -> dict:
    """
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged one.
    """
    return load_json(folder / file, schema)


@dataclass(frozen=True)
class Step:
    """One step an adapter went through, from its `provenance`; what was not noted is `None`.

    Args:
        kind (`str`): `"extract"`, `"transfer"`, `"label_tune"`, `"prompt transfer"` or another name.
        model (`NamedModel`): the model the step ended on.
        num_images (`int`, *optional*), dataset (`NamedDataset`, *optional*), dataset_fingerprint (`str`, *optional*):
            The images that were used.
        teacher (`str`), own_class_vectors (`bool`): extract: how the tuned model was made, and whether it had some.
        solver (`str`, *optional*), seed (`int`, *optional*): extract.
        bridge_space, bridge_source (`str`, *optional*), bridge_pairs (`int`, *optional*), alignment, held_out
            (`float`, *optional*), composed (`bool`): transfer: the bridge.
        zero_shot_weight (`float`, *optional*), teacher_logits (`bool`): transfer.
    """

    kind: str
    model: NamedModel
    num_images: int | None
    dataset: NamedDataset | None
    dataset_fingerprint: str | None
    teacher: str
    own_class_vectors: bool
    solver: str | None
    seed: int | None
    bridge_space: str | None
    bridge_source: str | None
    bridge_pairs: int | None
    alignment: float | None
    held_out: float | None
    composed: bool
    zero_shot_weight: float | None
    teacher_logits: bool

    @classmethod
    def of(cls, facts: dict) -> Step:
        kind = _text(facts.get("step")) or "unknown"
        bridge = facts["bridge"] if isinstance(facts.get("bridge"), dict) else {}
        settings = facts["settings"] if isinstance(facts.get("settings"), dict) else {}
        return cls(
            kind=kind,
            model=NamedModel.of(facts.get("strong" if kind == "transfer" else "weak")),
            num_images=whole(facts.get("refit_on" if kind == "transfer" else "num_images")),
            dataset=NamedDataset.of(facts.get("dataset")),
            dataset_fingerprint=_text(facts.get("dataset_fingerprint")),
            teacher=_teacher(facts),
            own_class_vectors=facts.get("own_class_vectors") is True,
            solver=_text(facts.get("solver")),
            seed=whole(settings.get("seed")),
            bridge_space=_text(bridge.get("space")),
            bridge_source=_text(bridge.get("source")),
            bridge_pairs=whole(bridge.get("num_pairs")),
            alignment=number(bridge.get("alignment")),
            held_out=number(bridge.get("held_out")),
            composed=bool(bridge.get("derived")),
            zero_shot_weight=number(facts.get("zero_shot_weight")),
            teacher_logits=facts.get("teacher_logits") is True,
        )


def history(provenance: object) -> list[Step]:
    """The steps an adapter went through, the first one first."""
    found = []
    while isinstance(provenance, dict) and "step" in provenance and len(found) < _MAX_STEPS:
        found.insert(0, Step.of(provenance))
        provenance = provenance.get("extracted", provenance.get("before"))
    return found


def _teacher(facts: dict) -> str:
    """How the tuned model was made, as far as an extraction noted it."""
    teacher = facts.get("teacher")
    if _text(teacher):
        return one_line(teacher)
    teacher = teacher if isinstance(teacher, dict) else {}
    learnt = "a learnt prompt or class vectors" if facts.get("own_class_vectors") is True else None
    method = _text(teacher.get("method"))
    method = METHOD_NAMES.get(method, method) or learnt
    if method is None:
        return "a fine-tuning that is not stated"
    shots, seed, dataset = (
        whole(teacher.get("shots")),
        whole(teacher.get("seed")),
        NamedDataset.of(teacher.get("dataset")),
    )
    more = [f"{shots} labelled images per class"] if shots else []
    more += [f"of {dataset.name}"] if dataset else []
    more = [" ".join(more)] if more else []
    more += [] if seed is None else [f"seed {seed}"]
    return method + (f" ({', '.join(more)})" if more else "")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def number(value: object) -> float | None:
    """A finite number out of a JSON file, `None` for anything else."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if fine else None


def whole(value: object) -> int | None:
    """A whole number of at least 0 out of a JSON file, `None` for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def rounding(saved_as: object) -> str | None:
    """What storing the weights in another number format changed; `None` where they are as they were made."""
    facts = saved_as if isinstance(saved_as, dict) else {}
    if _text(facts.get("dtype")) is None:
        return None
    images, same = whole(facts.get("num_images")), number(facts.get("agreement"))
    if images is None or same is None:
        return f"{facts['dtype']}; what that changes: not measured"
    before, after = number(facts.get("accuracy")), number(facts.get("rounded_accuracy"))
    change = "" if before is None or after is None else f", accuracy {before:.1f} % before and {after:.1f} % after"
    return f"{facts['dtype']}; on {images:,} images {same:.1f} % of the predictions stay as they were{change}"


def text_map(value: object) -> dict[str, str]:
    """The texts and numbers of an object in a JSON file."""
    content = value if isinstance(value, dict) else {}
    return {str(k): str(v) for k, v in content.items() if isinstance(v, str | int | float) and not isinstance(v, bool)}


@dataclass(frozen=True)
class Measured:
    """The scores on one split of one data set."""

    dataset: NamedDataset | None
    splits: tuple[str, ...]
    num_images: int | None
    table: Raw
    one_run: bool


def measured(scores: Sequence[Score]) -> list[Measured]:
    """Tables of all rows, one per data set."""
    found = []
    for name, images in dict.fromkeys((score.dataset, score.num_images) for score in scores):
        rows = [score for score in scores if (score.dataset, score.num_images) == (name, images)]
        shown = [
            replace(row, method=escape(row.method), split=escape(row.split), metric=escape(row.metric)) for row in rows
        ]
        methods = {row.method for row in rows}
        baseline = next((method for method in ("zero-shot strong", "zero-shot") if method in methods), None)
        try:
            table = Raw(markdown_table(shown, baseline=baseline))
        except ValueError as error:  # a row that is there twice
            logger.warning("scores are left out of the card: %s", error)
            continue
        splits = tuple(dict.fromkeys(row.split for row in rows))
        found.append(Measured(NamedDataset.of(name), splits, images, table, all(row.seeds == 1 for row in rows)))
    return found
