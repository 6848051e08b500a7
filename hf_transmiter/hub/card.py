"""Model cards: [`write_card`] writes the ``README.md`` of an adapter, bridge or tuned model from the files beside it.

A card says what its repository holds, what was measured and what was not. It is made again with every save, from the
other files and from the metadata that people added to it (licence, data sets, language, tags, newer version), and
nothing in it is guessed: of a file that is missing or damaged (which is logged) the facts are not known. A README that
people wrote keeps its text; only its metadata is completed.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..settings import TuningConfig
from .card_text import METHOD_NAMES, NamedDataset, NamedModel, Noted, Raw, Step, escape, fill, one_line, texts_in
from .checks import load_json, read_header
from .files import read_metadata_json, replace_file
from .repo import is_hub_id
from .scores import THIS, Score, markdown_table, read_scores


logger = logging.getLogger(__name__)

README = "README.md"
MARKER = "<!-- hf_transmiter writes this card again with every save; delete this line to write it yourself. -->"
KEPT = ("license", "license_name", "license_link", "datasets", "language", "tags", "new_version")
"""Metadata that people give, and that a card takes over from the one before."""
_TAGS = {
    "adapter": ["peft", "clip", "transmiter", "weak-to-strong"],
    "bridge": ["clip", "transmiter", "weak-to-strong", "bridge"],
}
_LISTS = ("datasets", "language", "tags")
_TASK = "zero-shot-image-classification"
_CLASS_VECTORS = ("COOP", "KGCOOP", "CONTCOOP")
_PROMPTS = (*_CLASS_VECTORS, "COCOOP", "IVLP", "MAPLE", "PROMPTSRC")
_ACCURACIES = {
    **{"accuracy": "accuracy, %", "base": "accuracy on base classes, %", "novel": "accuracy on novel classes, %"},
    **{"hm": "harmonic mean of base and novel accuracy, %", "joint": "accuracy over all classes, %"},
}
METRIC_NAMES = {**_ACCURACIES, "ece": "expected calibration error, %"}
_MAX_STEPS = 8


def _optional(path: Path, read: Callable):
    """`read(path)`; `None` where there is no such file, or (logged) a damaged one."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except (ValueError, OSError) as error:
        logger.warning("%s is left out of the card: %s", path.name, error)
        return None


# ---- cards ----------------------------------------------------------------------------------------------------------


@dataclass
class Card:
    """What the templates of ``assets/cards`` read.

    Args:
        kind (`str`): `"adapter"` (TransMiter's), `"bridge"` or `"tuned"` (a LoRA or a learnt prompt, as `tune` makes
            them, or any other PEFT adapter). The template is called so.
        name (`str`): Hub id, or the folder's name.
        facts (`Noted`): ``adapter_config.json``, or what ``bridge.safetensors`` says of itself, see `Bridge`.
        teacher (`Noted`): ``teacher.json``; empty where `tune` did not make it.
        scores (`list[Score]`): ``scores.json``; rows of the method [`scores.THIS`] are about it.
        given (`dict`): metadata that people gave, see `KEPT`.
    """

    kind: str
    name: str
    facts: Noted
    teacher: Noted
    scores: list[Score]
    given: dict

    def __post_init__(self):
        if self.is_scored and len({score.method for score in self.scores}) == 1:
            self.scores = [replace(score, method=THIS) for score in self.scores]  # about what else would they be?

    @property
    def is_scored(self) -> bool:
        """Whether its scores are its own: those of a bridge are of adapters that crossed it, not for leaderboards."""
        return self.kind != "bridge"

    @property
    def own(self) -> list[Score]:
        """The scores of the artefact itself, as far as they are known."""
        return [score for score in self.scores if score.method == THIS and not math.isnan(score.value)]

    @property
    def base(self) -> NamedModel:
        """The model it belongs on; the strong one of a bridge."""
        if self.kind == "bridge":
            return NamedModel.of(self.facts.inner("strong"))
        if self.teacher:
            return NamedModel.of(self.teacher, "weak")
        return NamedModel(*map(self.facts.get, ("base_model_name_or_path", "revision", "base_fingerprint")))

    @property
    def noted(self) -> Noted:
        """What was noted when it was made."""
        return self.facts if self.kind == "bridge" else self.facts.inner("provenance")

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries it was made with."""
        return self.noted.inner("versions").texts() or Noted(peft=self.facts.get("peft_version")).texts()

    @property
    def dataset(self) -> NamedDataset | None:
        """The images (or names) it was made with in its last step."""
        return NamedDataset.of(self.noted.get("dataset"))

    # ---- of TransMiter adapters

    @property
    def steps(self) -> list[Step]:
        """The steps it went through, the first one first."""
        found, provenance = [], self.facts.get("provenance")
        while isinstance(provenance, dict) and "step" in provenance and len(found) < _MAX_STEPS:
            found.insert(0, Step(provenance))
            provenance = provenance.get("extracted", provenance.get("before"))
        return found

    def step(self, kind: str) -> Step | None:
        """The first of this kind."""
        return next((step for step in self.steps if step.kind == kind), None)

    @property
    def has_image_side(self) -> bool:
        """Whether it changes how pictures are seen."""
        return self.facts.get("form") == "linear" and bool(self.facts.known("image_side"))

    @property
    def has_open_names(self) -> bool:
        """Whether it can be asked for any names."""
        return self.has_image_side and self.facts.get("open_names") is not False

    @property
    def has_text_side(self) -> bool:
        """Whether its class names have vectors of their own."""
        return self.facts.get("form") == "linear" and bool(self.facts.known("text_side") or not self.has_image_side)

    # ---- of bridges

    @property
    def weak(self) -> NamedModel:
        """Where it begins."""
        return NamedModel.of(self.facts.inner("weak"))

    @property
    def through(self) -> list[NamedModel]:
        """Models between the two, where it is composed."""
        return [NamedModel(name) for name in self.facts.get("through", ())]

    # ---- of tuned models

    @property
    def weak_of_teacher(self) -> NamedModel:
        """What the teacher was before its tuning, where one took the place of labels."""
        return NamedModel.of(self.teacher.inner("taught_by").inner("weak"))

    @property
    def settings(self) -> Noted:
        """What was tuned, and how."""
        return self.teacher.inner("settings") or self.noted.inner("settings")

    @property
    def options(self) -> list[tuple[str, str]]:
        """Of `hf-transmiter tune`, to do it again."""
        found = []
        for key, value in self.settings.items():
            if key == "method" or (key in TuningConfig.__dataclass_fields__ and self.settings.known(key) is not None):
                found.append((key, str(value)))
            elif key not in TuningConfig.__dataclass_fields__:
                found.append(("adapter", f"{key}={value if isinstance(value, str) else json.dumps(value)}"))
            elif value is True:
                found.append(("set", f"{key}=true"))
        return found

    @property
    def method(self) -> str | None:
        """Of `tune`, in words."""
        name = METHOD_NAMES.get(self.settings.known("method"))
        # Layers that somebody chose may lie in either tower.
        return "LoRA" if self.settings.known("method") == "lora" and "target_modules" in self.settings else name

    @property
    def class_names(self) -> list[str]:
        """What it was tuned on; empty where that is not noted."""
        return self.teacher.lines("class_names") or self.facts.lines("class_names")

    @property
    def is_prompt(self) -> bool:
        return self.facts["peft_type"] in _PROMPTS

    @property
    def has_class_vectors(self) -> bool:
        """Whether `extract` needs no image of the task: a prompt that leaves images alone and does not read them."""
        return self.facts["peft_type"] in _CLASS_VECTORS

    # ---- what is made of it

    def metadata(self) -> ModelCardData:
        """The metadata, as the Hub reads it. The base model is named only if it is on the Hub, and only the one the
        weights belong on: of a list the Hub would conclude that models were merged."""
        if self.kind == "tuned":
            tags = ["peft", "clip", *(["prompt-learning"] if self.is_prompt else []), self.facts["peft_type"].lower()]
        else:
            tags = _TAGS[self.kind]
        made_with = {"adapter": [step.dataset for step in self.steps], "tuned": [self.dataset]}.get(self.kind, ())
        datasets = [data.name for data in made_with if data is not None and data.kind == "hub"]
        results, base = self.results(), self.base.name if self.base.kind == "hub" else None
        entries = {
            **self.given,
            "base_model": base,
            "base_model_relation": "adapter" if base else None,
            "library_name": "hf-transmiter",
            "pipeline_tag": _TASK if self.is_scored else None,
            "tags": list(dict.fromkeys([*tags, *self.given.get("tags", ())])),
            "datasets": list(dict.fromkeys([*self.given.get("datasets", ()), *datasets])) or None,
            "metrics": ["accuracy"] if results else None,
        }
        return ModelCardData(**entries, **({"model_name": self.name, "eval_results": results} if results else {}))

    def results(self) -> list[EvalResult]:
        """The card's own scores for the Hub's model index. It wants to know the data set: rows without are left out,
        and stand in the card's tables only."""
        found = []
        for score in self.own:
            data = NamedDataset.of(score.dataset)
            if data is None:
                continue
            arguments = {"seeds": score.seeds, "num_images": score.num_images}
            arguments |= {"std": round(score.std, 2)} if score.seeds > 1 and not math.isnan(score.std) else {}
            found.append(
                EvalResult(
                    task_type=_TASK,
                    dataset_type=data.name,
                    dataset_name=data.name,
                    dataset_split=one_line(score.split),
                    dataset_revision=data.revision,
                    metric_type="accuracy" if score.metric in _ACCURACIES else one_line(score.metric),
                    metric_name=METRIC_NAMES.get(score.metric, one_line(score.metric)),
                    metric_value=round(score.value, 2),
                    metric_args={key: value for key, value in arguments.items() if value is not None},
                )
            )
        return found

    def against_plain(self) -> list[tuple[Score, Score]]:
        """Own accuracies, each with one of a plain model on the same images."""
        plain = [score for score in self.scores if score.method.startswith("zero-shot")]
        return [
            (own, other)
            for own, other in itertools.product(self.own, plain)
            if (own.dataset, own.split, own.metric) == (other.dataset, other.split, other.metric)
            and own.metric in _ACCURACIES
        ]

    def warnings(self) -> list[str]:
        """Where a plain model was measured to be better, or as good over all classes."""
        found = []
        for own, other in self.against_plain():
            gain = round(own.value, 1) - round(other.value, 1)
            if gain < 0 or (gain == 0 and own.metric == "accuracy"):
                how = "worse" if gain < 0 else "no better"
                values = f"{own.metric} {own.value:.1f} % against {other.value:.1f} %"
                found.append(f"This model is {how} than {other.method} on {own.split}: {values}.")
        return found

    def gain(self) -> str:
        """What an upgraded adapter is worth, as far as it was measured: a gain is told only with its scores."""
        pairs = [(a, b) for a, b in self.against_plain() if a.metric == "accuracy" and "weak" not in b.method]
        if not pairs:
            return "Whether it is better than its base model as it is was not measured."
        told = (
            f"{own.value:.1f} % on {own.split}, against {other.value:.1f} % of its base model as it is "
            f"({own.value - other.value:+.1f} points)"
            for own, other in pairs
        )
        return f"It scores {'; '.join(told)}."

    def tables(self) -> Iterator[dict]:
        """The scores, one table per data set, and what it was measured on."""
        for name, images in dict.fromkeys((score.dataset, score.num_images) for score in self.scores):
            rows = [score for score in self.scores if (score.dataset, score.num_images) == (name, images)]
            methods = {row.method for row in rows}
            baseline = next((method for method in ("zero-shot strong", "zero-shot") if method in methods), None)
            texts = ("method", "split", "metric")
            shown = [replace(row, **{key: escape(getattr(row, key)) for key in texts}) for row in rows]
            try:
                table = Raw(markdown_table(shown, baseline=baseline))
            except ValueError as error:  # a row that is there twice
                logger.warning("scores are left out of the card: %s", error)
                continue
            yield {
                "dataset": NamedDataset.of(name),
                "splits": dict.fromkeys(row.split for row in rows),
                "num_images": images,
                "one_run": all(row.seeds == 1 for row in rows),
                "table": table,
            }

    def render(self) -> str:
        """The whole ``README.md``.

        Raises:
            jinja2.TemplateError: the template asks for a fact that the card does not have.
        """
        body = fill(f"{self.kind}.md.jinja", card=self)
        return str(ModelCard(f"---\n{self.metadata().to_yaml()}\n---\n\n{body}\n\n{MARKER}\n"))


def read_card(folder: str | os.PathLike, *, name: str | None = None, **facts) -> Card:
    """The card of a folder, of the kind its files say. See [`write_card`].

    Raises:
        FileNotFoundError: no adapter, no bridge and no tuned model in there.
        ValueError: a damaged file, or an unknown fact.
    """
    folder = Path(folder)
    config, bridge = folder / "adapter_config.json", folder / "bridge.safetensors"
    teacher = None
    if config.is_file():
        content = load_json(config, "adapter_config")
        kind = "adapter" if content["peft_type"] == "TRANSMITER" else "tuned"
        if kind == "tuned":
            teacher = _optional(folder / "teacher.json", lambda path: load_json(path, "teacher"))
    elif bridge.is_file():
        kind, (metadata, _) = "bridge", read_header(bridge, "bridge", "write one with Bridge.save_pretrained")
        content = read_metadata_json(bridge, metadata, kind, kind)
    else:
        raise FileNotFoundError(f"{folder} holds neither {config.name} nor {bridge.name}: no card to write.")
    named, given = given_metadata(folder / README, facts)
    scores = _optional(folder / "scores.json", read_scores) or []
    return Card(kind, name or named or folder.resolve().name, Noted(content), Noted(teacher or {}), scores, given)


def write_card(folder: str | os.PathLike, *, name: str | None = None, **facts) -> Path:
    """Writes the ``README.md`` of an adapter, bridge or tuned model, atomically, and gives back its path.

    It never costs the artefact: where a card cannot be made, that is logged, and a README that is there stays, else a
    short one says so.

    Args:
        folder (`str` or `os.PathLike`): of its files.
        name (`str`, *optional*): Hub id, if it has one: for the title, the snippets and the model index.
        **facts: metadata that people give: `license`, `license_name`, `license_link`, `datasets`, `language`, `tags`,
            `new_version` (Hub id of the model that takes this one's place). What an existing card says of these is
            kept unless given here; lists are joined.

    Raises:
        FileNotFoundError: nothing in the folder that has a card.
        TypeError: an unknown fact.
    """
    unknown = sorted(set(facts) - set(KEPT))
    if unknown:
        raise TypeError(f"write_card knows no fact {unknown[0]!r}; it knows {', '.join(KEPT)}.")
    folder, path = Path(folder), Path(folder) / README
    try:
        card = read_card(folder, name=name, **facts)
        written = by_people(path)
        text = card.render() if written is None else _completed(written, card.metadata())
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever it is: what was trained matters more than what is said about it
        logger.warning("the card of %s could not be written: %s: %s", folder, type(error).__name__, error)
        if path.exists():
            return path
        data = ModelCardData(library_name="hf-transmiter", tags=["transmiter"])
        said = f"Made with hf_transmiter. Its card could not be written: {escape(error)}"
        text = f"---\n{data.to_yaml()}\n---\n\n# {escape(name or folder.resolve().name)}\n\n{said}\n\n{MARKER}\n"
    replace_file(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))
    return path


# ---- what people wrote ----------------------------------------------------------------------------------------------


def given_metadata(path: Path, facts: dict) -> tuple[str | None, dict]:
    """Name and metadata (`KEPT`) of the card at `path`, if there is one, with new `facts`, which go first."""
    data = {} if not path.is_file() else ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    index = data.get("model-index")
    named = index[0].get("name") if isinstance(index, list) and index and isinstance(index[0], dict) else None
    given = {}
    for key in KEPT:
        old, new = texts_in(data.get(key)), texts_in(facts.get(key))
        value = list(dict.fromkeys([*old, *new])) if key in _LISTS else next(iter([*new, *old]), None)
        if key == "tags":  # PEFT notes paths, the Hub makes such tags by itself
            value = [tag for tag in value if not tag.startswith("base_model:")]
        if value:
            given[key] = value
    return next(iter(texts_in(named)), None), given


def by_people(path: Path) -> ModelCard | None:
    """The card at `path` if people wrote it: it is neither ours nor the form that PEFT leaves to be filled in."""
    if not path.is_file():
        return None
    card = ModelCard.load(path, ignore_metadata_errors=True)
    blank = "# Model Card for Model ID" in card.text and card.text.count("[More Information Needed]") > 10
    return None if MARKER in card.text or blank or not card.text.strip() else card


def _completed(written: ModelCard, ours: ModelCardData) -> str:
    """A README of people with the metadata it lacks. What they state stays, except where PEFT wrote it."""
    data = written.data
    results = ours.eval_results or []
    kept = [r for r in data.eval_results or [] if not any(r.is_equal_except_value(own) for own in results)]
    for key, value in ours.__dict__.items():
        odd = key == "library_name" and data.get(key) == "peft" or key == "base_model" and not is_hub_id(data.get(key))
        if value is not None and (data.get(key) in (None, []) or odd or key in _LISTS):
            data[key] = value
    if results or kept:
        data.model_name, data.eval_results = data.model_name or ours.model_name, [*results, *kept]
    return str(written)
