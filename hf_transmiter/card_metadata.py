"""[`Card`]: what the cards have in common; and what is kept of the card that is there already."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .card_facts import (
    ACCURACIES,
    METRIC_NAMES,
    Measured,
    NamedDataset,
    NamedModel,
    Weights,
    is_hub_id,
    measured,
)
from .card_text import fill, one_line
from .scores import THIS, Score


MARKER = "<!-- hf_transmiter writes this card again with every save; delete this line to write it yourself. -->"
KEPT = ("license", "license_name", "license_link", "datasets", "language", "tags", "new_version")
"""Metadata that people give, and that a card takes over from the one before."""
_LISTS = ("datasets", "language", "tags")
_TASK = "zero-shot-image-classification"


@dataclass
class Card:
    """What the cards have in common.

    Args:
        name (`str`): Hub id, or the folder's name.
        base (`NamedModel`): the model it belongs on.
        weights (`Weights`, *optional*): size of the weights.
        versions (`dict[str, str]`): of the libraries it was made with, as far as they were noted.
        scores (`list[Score]`): ``scores.json``; rows of the method [`THIS`] are about it.
        given (`dict`): metadata that people gave, see `KEPT`.
    """

    name: str
    base: NamedModel
    weights: Weights | None
    versions: dict[str, str]
    scores: list[Score]
    given: dict

    def __post_init__(self):
        if self.is_scored and len({score.method for score in self.scores}) == 1:
            self.scores = [replace(score, method=THIS) for score in self.scores]  # about what else would they be?

    tags: ClassVar[tuple[str, ...]]
    template: ClassVar[str]
    pipeline_tag: ClassVar[str | None] = _TASK
    is_scored: ClassVar[bool] = True
    library_name: ClassVar[str] = "hf-transmiter"

    def metadata(self) -> ModelCardData:
        """The metadata, as the Hub reads it. The base model is named only if it is on the Hub, and only the one the
        weights belong on: of a list the Hub would conclude that models were merged."""
        given, results = self.given, self.results()
        base = self.base.hub_id
        datasets = [data.name for data in self.training_data() if is_hub_id(data.name)]
        entries = {
            "base_model": base,
            "base_model_relation": "adapter" if base else None,
            "library_name": self.library_name,
            "pipeline_tag": self.pipeline_tag,
            "tags": list(dict.fromkeys([*self.tags, *given.get("tags", ())])),
            "datasets": list(dict.fromkeys([*given.get("datasets", ()), *datasets])) or None,
            "metrics": ["accuracy"] if results else None,
        }
        others = {key: value for key, value in given.items() if key not in entries}
        index = {"model_name": self.name, "eval_results": results} if results else {}
        return ModelCardData(**entries, **others, **index)

    def results(self) -> list[EvalResult]:
        """The card's own scores for the Hub's model index. It wants to know the data set: rows without are left out,
        and stand in the card's tables only."""
        found = []
        for score in self.scores:
            data = NamedDataset.of(score.dataset)
            if score.method != THIS or data is None or score.value != score.value:
                continue
            arguments = {"seeds": score.seeds, "num_images": score.num_images}
            arguments |= {"std": round(score.std, 2)} if score.seeds > 1 and score.std == score.std else {}
            found.append(
                EvalResult(
                    task_type=_TASK,
                    dataset_type=data.name,
                    dataset_name=data.name,
                    dataset_split=one_line(score.split),
                    dataset_revision=data.revision,
                    metric_type="accuracy" if score.metric in ACCURACIES else one_line(score.metric),
                    metric_name=METRIC_NAMES.get(score.metric, one_line(score.metric)),
                    metric_value=round(score.value, 2),
                    metric_args={key: value for key, value in arguments.items() if value is not None},
                )
            )
        return found

    def training_data(self) -> list[NamedDataset]:
        """Data sets that went into it, as far as they were noted."""
        return []

    def tables(self) -> list[Measured]:
        """The scores, one table per data set."""
        return measured(self.scores)

    def own(self, metric: str) -> bool:
        """Whether this was measured."""
        return any(s.method == THIS and s.metric == metric and s.value == s.value for s in self.scores)

    def gaps(self) -> list[str]:
        """What was not measured."""
        kinds = {"accuracy": "accuracy", "novel": "accuracy on classes that the tuning did not see"}
        found = [words for metric, words in kinds.items() if not self.own(metric)]
        if len({score.dataset for score in self.scores if score.method == THIS}) < 2:
            found.append("accuracy on images of another kind (other cameras, styles or places)")
        return [
            *found,
            "calibration: whether 0.8 means right in 8 of 10 cases",
            "differences between groups of people, where images show some",
        ]

    def body(self) -> str:
        """The text below the metadata."""
        return fill(self.template, card=self)

    def render(self) -> str:
        """The whole ``README.md``."""
        return str(ModelCard(f"---\n{self.metadata().to_yaml()}\n---\n\n{self.body()}\n{MARKER}\n"))


def given_metadata(path: Path, facts: dict) -> tuple[str | None, dict]:
    """Name and metadata (`KEPT`) of the card at `path`, if there is one, with new `facts`, which go first."""
    data = {} if not path.is_file() else ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    index = data.get("model-index")
    named = index[0].get("name") if isinstance(index, list) and index and isinstance(index[0], dict) else None
    given = {}
    for key in KEPT:
        old, new = data.get(key), facts.get(key)
        if key in _LISTS:
            value = list(dict.fromkeys([*_texts(old), *_texts(new)]))
        else:
            value = next(iter([*_texts(new), *_texts(old)]), None)
        if key == "tags":  # PEFT notes paths, the Hub makes such tags by itself
            value = [tag for tag in value if not tag.startswith("base_model:")]
        if value:
            given[key] = value
    return next(iter(_texts(named)), None), given


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [one_line(text) for text in values if isinstance(text, str) and one_line(text)]


def by_people(path: Path) -> ModelCard | None:
    """The card at `path` if people wrote it: it is neither ours nor the form that PEFT leaves to be filled in."""
    if not path.is_file():
        return None
    card = ModelCard.load(path, ignore_metadata_errors=True)
    blank = "# Model Card for Model ID" in card.text and card.text.count("[More Information Needed]") > 10
    return None if MARKER in card.text or blank or not card.text.strip() else card


def completed(written: ModelCard, ours: ModelCardData) -> str:
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
