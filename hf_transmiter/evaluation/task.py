"""[`Task`]: the models, images and names of one comparison; what several methods share is made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from datasets import ClassLabel, Dataset
from peft import get_peft_model_state_dict
from torch import Tensor

from ..data.anchors import DEFAULT_TEMPLATES, PROMPTED, Anchors
from ..data.embeddings import embed_dataset
from ..data.images import guess_columns
from ..data.table import FeatureTable, align_labels
from ..data.vocabulary import COMMON_NOUNS, NUM_ANCHORS, load_vocabulary
from ..encoders.dual_encoder import DualEncoder
from ..hub.checks import as_list
from ..method.bridge import Bridge
from ..method.classifier import AnchorClassifier
from ..method.extract import extract
from ..method.teacher import Teacher, as_classifier, check_weak, teacher_class_vectors, teacher_logits
from ..method.tune import starting_templates, tune
from ..settings import ExtractionConfig, TuningConfig, split_tuning
from ..tuners.prompts import prompt_layer
from .evaluate import measured


SAME = 1e-6  # two embeddings whose cosine is closer to 1 are of one picture; batches differ by about 1e-7
SPREAD_IMAGES = 2048  # so many, evenly spaced, tell which names spread most; their logits stay in memory
_ANY_TUNING = ("optimizer", "schedule", "warmup", "lr", "weight_decay", "batch_size", "seed", "precision")
_MISSING = {
    "unlabelled": "it needs unlabelled images of the task: pass `unlabelled`",
    "labelled": "it needs labelled images: pass `labelled`",
    "general": "it needs images of any kind: pass `general`",
    "bridge": "it needs a finished bridge: pass `bridge`",
}
T = TypeVar("T")


class Impossible(ValueError):
    """A task does not allow a method; the message says why."""


@dataclass
class Answer:
    """What a method ends with.

    Args:
        logits (`Tensor`): (N, C) on the test images.
        size (`int`, *optional*): bytes to be stored for it beside the pre-trained models, see [`stored_bytes`].
        classifier (`AnchorClassifier`, *optional*): what gives those logits, where that is one model.
        given (`bool`, *optional*, defaults to `False`): made before the comparison, at a cost that nobody saw here.
    """

    logits: Tensor
    size: int | None
    classifier: AnchorClassifier | None = None
    given: bool = False


@dataclass(eq=False)
class Task:
    """One comparison before anything is compared; arguments as of `comparison.compare`.

    Images are embedded at once, so that no method is charged for what all of them share.

    Raises:
        ValueError: a class of the test or labelled images that is not among the names, or a name in `seen_classes`.
    """

    weak: DualEncoder
    strong: DualEncoder
    teacher: Teacher
    test: Dataset
    names: tuple[str, ...]
    unlabelled: Dataset | None = None
    labelled: Dataset | None = None
    general: Dataset | None = None
    tuned_strong: Teacher | None = None
    bridge: Bridge | None = None
    seen_classes: Sequence[str] | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    vocabulary: str | Sequence[str] | None = None
    num_anchors: int = NUM_ANCHORS
    gradient: ExtractionConfig = field(default_factory=lambda: ExtractionConfig(solver="gradient"))
    tuning: Mapping | None = None
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        unknown = [name for name in as_list(self.seen_classes or (), "seen_classes") if name not in self.names]
        if unknown:
            known = f"the {len(self.names)} class names"
            raise ValueError(f"seen_classes holds {unknown[0]!r}, which is not among {known}.")
        check_weak(self.weak, self.teacher)
        self._made: dict[str, tuple] = {}
        self._tables: dict[tuple, FeatureTable] = {}
        self._reused: dict[str, dict] = {}
        for model in (self.weak, self.strong):
            for name in ("test", "unlabelled", "labelled", "general"):
                if getattr(self, name) is not None and (model is self.strong or name != "labelled"):
                    self.table(model, name, tower=model is self.strong and name != "general")
        self.text = {model: model.embed_names(self.names, self.templates).cpu() for model in (self.weak, self.strong)}
        test = self.table(self.strong, "test")
        self.labels = None if test.labels is None else self._aligned(test, "test")
        if self.labelled is not None:
            _ = self.labelled_table  # says what is wrong with the labels
        vectors = teacher_class_vectors(self.teacher, self.weak, self.names, self.templates)
        self.own_class_vectors = vectors is not None
        self.tuned = self.said_by(self.teacher, "test", self.weak)
        if self.unlabelled is not None:
            _ = self.teacher_soft

    def _aligned(self, table: FeatureTable, name: str) -> Tensor:
        try:
            return align_labels(table, self.names)
        except ValueError as error:
            raise ValueError(f"the {name} images: {error}") from error

    def need(self, name: str) -> Dataset:
        """One of the sets of images, or the given bridge.

        Raises:
            Impossible: it is not there.
        """
        if getattr(self, name) is None:
            raise Impossible(_MISSING[name])
        return getattr(self, name)

    def table(self, model: DualEncoder, name: str, tower: bool = False) -> FeatureTable:
        """Embeddings of one of the sets of images, with or without tower features."""
        key, read = (model, name, tower), {**self.options, "labels": name in ("test", "labelled")}
        if key not in self._tables:
            self._tables[key] = embed_dataset(model, self.need(name), tower=tower, **read)
        return self._tables[key]

    def said_by(self, teacher: Teacher, name: str, base: DualEncoder) -> Tensor:
        """Task logits (N, C) on one of the sets of images; `base` is the model that was tuned."""
        options = {"templates": self.templates, "weak": base, "table": self.table(base, name), **self.options}
        return teacher_logits(teacher, self.need(name), self.names, **options)

    def answer(self, found: AnchorClassifier | Answer) -> Answer:
        """What a classifier says about the test images, and what it takes to keep it."""
        if isinstance(found, Answer):
            return found
        return Answer(self.said_by(found, "test", self.strong), stored_bytes(found), found)

    # What methods cost

    @contextmanager
    def charged(self) -> Iterator[dict[str, float]]:
        """Seconds of a method, in the dictionary it yields; what an earlier method has made already is charged again,
        as if this one were alone."""
        self._reused = {}
        with measured() as cost:
            yield cost
        cost["seconds"] += sum(one["seconds"] for one in self._reused.values())

    def once(self, key: str, make: Callable[[], T]) -> T:
        """Made when first asked for."""
        if key in self._made:
            value, self._reused[key] = self._made[key]
            return value
        with measured() as cost:
            value = make()
        self._made[key] = (value, cost)
        return value

    # What methods share

    @cached_property
    def labelled_table(self) -> FeatureTable:
        """Embeddings of the labelled images, labels as positions in the names."""
        return self.labelled_rows()

    def labelled_rows(self, tower: bool = False) -> FeatureTable:
        """The same, with or without tower features."""
        table = self.table(self.strong, "labelled", tower)
        return FeatureTable(table.embeds, self._aligned(table, "labelled"), self.names)

    @cached_property
    def seen_in_test(self) -> int:
        """Labelled images that are among the test images: what learns from them is scored on what it saw."""
        if self.labelled is None:
            return 0
        test = self.table(self.strong, "test").embeds
        nearest = [(x @ test.T).amax(1) for x in self.labelled_table.batches(256)]
        return int((torch.cat(nearest) > 1 - SAME).sum())

    @cached_property
    def teacher_soft(self) -> Tensor:
        """The tuned model's probabilities (N, C) on the unlabelled images."""
        return self.said_by(self.teacher, "unlabelled", self.weak).softmax(1)

    @cached_property
    def zero_shot_weak(self) -> Tensor:
        return self.weak.logits(self.table(self.weak, "test").embeds, self.text[self.weak])

    @cached_property
    def zero_shot_strong(self) -> Tensor:
        return self.strong.logits(self.table(self.strong, "test").embeds, self.text[self.strong])

    @cached_property
    def tuned_model(self) -> DualEncoder | None:
        """The model with tuned prompts or layers; `None` where several were tuned, class vectors, or it is not at
        hand."""
        several = isinstance(self.teacher, (list, tuple))
        classifier = None if several else as_classifier(self.teacher, self.names, self.templates)
        return None if classifier is None or classifier.adapter_config else classifier.encoder

    @property
    def prompted(self) -> DualEncoder:
        """The tuned model.

        Raises:
            Impossible: what was tuned is no prompt.
        """
        if self.tuned_model is None or prompt_layer(self.tuned_model.model) is None:
            raise Impossible("no prompt was tuned")
        return self.tuned_model

    @property
    def untuned(self) -> Teacher:
        """The zero-shot weak model as a teacher of the tuned model's kind: with class vectors, or by what it says."""
        if self.own_class_vectors:
            return AnchorClassifier(self.weak, Anchors(self.names, (), self.templates), self.text[self.weak])
        return self.weak.logits(self.table(self.weak, "unlabelled").embeds, self.text[self.weak])

    def prompting(self, prompted: DualEncoder) -> AnchorClassifier:
        """The strong model with prompts in it."""
        return AnchorClassifier(prompted, Anchors(self.names, (), PROMPTED))

    def anchors_for(
        self, num_anchors: int | None = None, num_auxiliary: int | None = None, strategy: str = "random"
    ) -> Anchors:
        """Names of the published adapter; what a row leaves open is the comparison's."""
        build = {"vocabulary": self.vocabulary or COMMON_NOUNS, "templates": self.templates}
        pool, count = Anchors.build(self.names, strategy="all", **build), num_anchors
        if count is None:
            auxiliary = num_auxiliary is not None
            count = len(self.names) + num_auxiliary if auxiliary else min(self.num_anchors, len(pool))

        def chosen() -> Anchors:
            known = {}
            if "spread" in strategy or "farthest" in strategy:
                known["embeds"] = self.weak.embed_names(pool.names, pool.templates).cpu()
            if "spread" in strategy:
                table = self.table(self.weak, "unlabelled")
                rows = torch.linspace(0, len(table) - 1, min(len(table), SPREAD_IMAGES)).long()
                known["logits"] = self.weak.logits(table.select(rows).embeds, known["embeds"])
            return Anchors.build(self.names, num_anchors=count, strategy=strategy, **build, **known)

        return self.once(f"anchors {strategy} {count}", chosen)

    def extract(
        self, config: ExtractionConfig, anchors: Anchors | None = None, *, untuned: bool = False
    ) -> AnchorClassifier:
        """The weak model's adapter, or one of its zero-shot answers; not to be changed, other methods use it.

        Raises:
            Impossible: there are neither class vectors nor images to extract some from.
        """
        if anchors is not None:
            self.need("unlabelled")
        elif self.unlabelled is None and not self.own_class_vectors:
            raise Impossible(f"the tuned model has no class vectors of its own, so {_MISSING['unlabelled']}")

        def make() -> AnchorClassifier:
            options = {"anchors": anchors, "templates": self.templates, "config": config, **self.options}
            options |= {"class_names": self.names, "seen_classes": self.seen_classes}
            teacher = self.untuned if untuned else self.teacher
            return extract(self.weak, teacher, self.unlabelled, **options)

        key = f"adapter {json.dumps(asdict(config))} {anchors and anchors.fingerprint} {untuned}"
        return self.once(key, make)

    def embedding_bridge(self, source: str) -> Bridge:
        """From `"text"`, one of the sets of images, or the given one (`"bridge"`)."""
        given, names = None if source == "text" else self.need(source), None
        if self.vocabulary is not None and given is None:
            names = Anchors((), tuple(load_vocabulary(self.vocabulary)), self.templates)

        def make() -> Bridge:
            pair = self.weak, self.strong
            made = given if source == "bridge" else Bridge.build(*pair, given, anchors=names, **self.options)
            if made.source == "text" and made.space == "embedding":  # images tell more, and there are some
                made = replace(made)
                made.measure(*pair, self.test if self.unlabelled is None else self.unlabelled, **self.options)
            return made

        return self.once(f"bridge {source}", make)

    def tune_strong(self, own: Mapping) -> AnchorClassifier:
        """The strong model tuned on all the labelled images; `own` are settings in place of the comparison's."""
        labels = self.labelled_table.labels
        seen = labels.unique().tolist()
        shots = {"shots": int(labels.bincount().max())}
        given = {"method": "lora", **(self.tuning or {})}
        kept = given if own.get("method", given["method"]) == given["method"] else {}
        how = split_tuning({**kept, **shots, **own})
        columns = {key: self.options.get(key) for key in ("image_column", "label_column")}
        options = {key: self.options[key] for key in ("accelerator", "progress", "cache_dir") if key in self.options}
        images = self.labelled.with_format(None)
        _, column = guess_columns(images, **columns)
        names = [self.names[i] for i in seen]
        feature = images.features[column]
        if not isinstance(feature, ClassLabel) or feature.names != names:
            positions = {label: i for i, label in enumerate(seen)}
            images = images.remove_columns(column)
            images = images.add_column(column, [positions[label] for label in labels.tolist()])
            images = images.cast_column(column, ClassLabel(names=names))
        templates = starting_templates(how["adapter"]["method"], self.templates)
        tuned = tune(self.strong, images, **how, templates=templates, **columns, **options)
        return AnchorClassifier(tuned.encoder, Anchors(self.names, (), tuned.anchors.templates))

    def tune_on_experts(self, own: Mapping) -> AnchorClassifier:
        """The strong model tuned on the unlabelled images without labels; `own` are settings in place of the
        comparison's, of which only those of the optimiser serve here: the others are for labels, or for a method."""
        training = {k: v for k, v in (self.tuning or {}).items() if k in _ANY_TUNING}
        how = split_tuning(training | dict(own))
        adapter = how["adapter"] if set(own) - set(TuningConfig.__dataclass_fields__) else None
        options = {key: self.options[key] for key in ("accelerator", "progress", "cache_dir") if key in self.options}
        about = {"teacher": self.teacher, "weak": self.weak, "class_names": self.seen_classes or self.names}
        column = self.options.get("image_column")
        images = self.need("unlabelled")
        templates = self.templates if adapter is None else starting_templates(adapter["method"], self.templates)
        about |= {"templates": templates, "image_column": column}
        tuned = tune(self.strong, images, adapter, config=how["config"], **about, **options)
        return AnchorClassifier(tuned.encoder, Anchors(self.names, (), tuned.anchors.templates))


def stored_bytes(model: Teacher) -> int | None:
    """Bytes to be kept for a tuned model beside the pre-trained one, as its tensors are: an adapter's, or all
    parameters where there is no adapter; several models add up. `None` for a file, whose size says it."""
    if isinstance(model, (list, tuple)):
        sizes = [stored_bytes(one) for one in model]
        return None if None in sizes else sum(sizes)
    if isinstance(model, AnchorClassifier):
        if model.adapter_config is not None:
            return _bytes(model.adapter_tensors()[1].values())
        model = model.encoder
    if isinstance(model, DualEncoder):
        model = model.model
    if not isinstance(model, torch.nn.Module):
        return None
    if getattr(model, "peft_config", None):
        name = next(iter(model.peft_config))
        # Without the flag PEFT looks on the Hub whether the vocabulary grew.
        return _bytes(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).values())
    return _bytes(model.parameters())


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
