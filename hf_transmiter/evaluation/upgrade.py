"""[`score_upgrade`]: what a saved prompt is worth before and after an upgrade of the base model it was learnt on.

Old and upgraded are models, base and novel are classes; the two pairs are never mixed. The ceiling is the same method
trained again on the upgraded model, the floor zero-shot. Source of the protocol: ContCoOp (arXiv 2412.20895), which
sums a method up by the harmonic mean of its accuracies on the old and on the upgraded model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from ..data.anchors import PROMPTED, Anchors
from ..data.embeddings import embed_dataset
from ..data.table import align_labels
from ..encoders.dual_encoder import DualEncoder
from ..encoders.identity import ModelId
from ..hub.adapter_files import TEACHER_FILE, TeacherFacts
from ..method.attach import Incompatible, attach, read_config
from ..method.classifier import AnchorClassifier
from ..method.teacher import teacher_logits
from ..method.tune import adapter_settings
from ..settings import split_tuning
from .evaluate import harmonic_mean, score_logits


logger = logging.getLogger(__name__)

MODELS = {"old": "old model", "upgraded": "upgraded model", "retrained": "re-trained"}
ZERO_SHOT = "zero-shot"


def tuning_of(source: str) -> dict:
    """The settings that a saved model (folder or Hub id) was tuned with, which [`split_tuning`] turns into arguments
    of [`tune`].

    Raises:
        FileNotFoundError, OSError: nothing there.
        ValueError: the settings were not saved with it, or by a version with other ones.
    """
    facts = TeacherFacts.read(source)
    if facts is None:
        raise ValueError(f"the settings of {source!r} were not saved with it: there is no {TEACHER_FILE}.")
    try:
        adapter_settings(split_tuning(facts.settings)["adapter"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"the settings of {source!r} are of another version: {error}") from error
    return facts.settings


@dataclass(frozen=True)
class UpgradeScore:
    """What [`score_upgrade`] found, in percent. What could not be scored is left out.

    Args:
        zero_shot, prompt (`dict[str, float]`):
            Accuracies over all classes by model: `"old"`, `"upgraded"` (prompts unchanged) and `"retrained"` (the
            upgraded model with prompts learnt anew); with seen classes, of each model also among the base ones
            (`"old base"`), among the novel ones (`"old novel"`), and the harmonic mean of these two (`"old hm"`).
            `"h"` is the harmonic mean of old and upgraded, ``H = 2ab / (a + b)``.
        refused (`str`, *optional*): why a model does not take the prompts.
    """

    zero_shot: dict[str, float]
    prompt: dict[str, float]
    refused: str | None = None


def score_upgrade(
    adapter: str | os.PathLike,
    old: DualEncoder,
    new: DualEncoder,
    dataset: Dataset,
    *,
    retrained: str | os.PathLike | None = None,
    seen_classes: Sequence[str] | None = None,
    **embedding,
) -> UpgradeScore:
    """Scores saved prompts on the model they were learnt on, on its upgrade, and re-trained there.

    Zero-shot is with the templates the tuning started from. Images are embedded once per image tower.

    Args:
        adapter (`str` or `os.PathLike`): folder that `tune(...).save_pretrained` wrote, or Hub id.
        old ([`DualEncoder`]): the model it was learnt on.
        new ([`DualEncoder`]): its upgrade.
        dataset (`datasets.Dataset`): labelled test images.
        retrained (`str` or `os.PathLike`, *optional*): an adapter tuned alike on the upgraded model: the ceiling.
        seen_classes (`Sequence[str]`, *optional*):
            The base classes, which the tuning saw: adds accuracies among them and among the others (novel), two
            separate problems, and their harmonic mean.
        **embedding: passed to [`embed_dataset`].

    Raises:
        ValueError: an adapter that was not tuned from the model it should be, no labels or no class names, seen
            classes that leave no base or no novel image.
        FileNotFoundError, OSError: an adapter that is not there.
    """
    source = os.fspath(adapter)
    for encoder in (old, new):
        if getattr(encoder.model, "peft_config", None):
            raise ValueError(f"{encoder.name_or_path!r} has adapters already: pass the model without them.")
    facts, runs = _facts(source, old, "old"), [("old", source, old)]
    if retrained is not None:
        _facts(os.fspath(retrained), new, "new")
        runs.append(("retrained", os.fspath(retrained), new))
    table = embed_dataset(old, dataset, **embedding)
    if not table.class_names:
        raise ValueError("scoring needs labels with names: pass a dataset with a ClassLabel column (label_column=).")
    names, labels = tuple(table.class_names), align_labels(table, table.class_names)
    base = None if seen_classes is None else _base(names, labels, seen_classes)
    if base is not None and set(facts.class_names) != set(seen_classes):
        logger.warning("%s was tuned on other classes than the seen ones: base and novel mislead.", source)

    def accuracies(encoder: DualEncoder, model: DualEncoder, templates: Sequence[str]) -> dict[str, float]:
        """By metric, of `encoder`, which is `model` with or without an adapter in it."""
        classifier = AnchorClassifier(encoder, Anchors(names, (), tuple(templates)))
        at_hand = {"weak": model, "table": embed_dataset(model, dataset, **embedding)}
        return score_logits(teacher_logits(classifier, dataset, names, **at_hand, **embedding), labels, base)

    floors = {name: accuracies(one, one, facts.zero_shot_templates) for name, one in (("old", old), ("upgraded", new))}
    found, refused = {}, None
    try:
        for name, saved, model in (*runs, ("upgraded", source, new)):
            _check_classes(saved, names)
            found[name] = accuracies(attach(saved, model), model, PROMPTED)
    except Incompatible as error:
        refused = error.reason
    return UpgradeScore(_metrics(floors), _metrics(found), refused)


def _facts(source: str, encoder: DualEncoder, role: str) -> TeacherFacts:
    facts = TeacherFacts.read(source)
    if facts is None:
        raise ValueError(f"{source!r} holds no {TEACHER_FILE}: pass what `tune` or `tuned.save_pretrained` wrote.")
    if not ModelId(facts.weak, facts.revision, facts.fingerprint).is_of(encoder):
        name = encoder.name_or_path
        raise ValueError(f"{source!r} was not tuned from {name!r}: pass its model as the {role} one.")
    return facts


def _base(names: tuple[str, ...], labels: Tensor, seen: Sequence[str]) -> list[int]:
    """Positions of the seen classes."""
    unknown = [name for name in seen if name not in names]
    if unknown:
        raise ValueError(f"the seen class {unknown[0]!r} is not among the {len(names)} class names.")
    base = [names.index(name) for name in seen]
    is_base = torch.isin(labels, torch.tensor(base, dtype=torch.long))
    if is_base.all() or not is_base.any():
        raise ValueError("the test images must show base classes (seen) and novel ones; all are of one kind.")
    return base


def _check_classes(source: str, names: Sequence[str]) -> None:
    """Contexts that were learnt for classes of their own cannot be asked about others."""
    config = read_config(source)
    unknown = [name for name in names if name not in (config.class_names or ())]
    if getattr(config, "class_specific", False) and unknown:
        known = f"{len(config.class_names)} classes they were learnt for"
        raise Incompatible(source, f"class-specific contexts know only the {known}, not {unknown[0]!r}")


def _metrics(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """`UpgradeScore.prompt` from accuracies by model and metric."""
    metrics = {}
    for model in filter(found.get, MODELS):
        metrics[model] = found[model]["accuracy"]
        halves = [metric for metric in ("base", "novel", "hm") if metric in found[model]]
        metrics |= {f"{model} {metric}": found[model][metric] for metric in halves}
    if "old" in metrics and "upgraded" in metrics:
        metrics["h"] = harmonic_mean(metrics["old"], metrics["upgraded"])
    return metrics
