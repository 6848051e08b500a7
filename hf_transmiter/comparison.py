"""[`compare`]: every way to upgrade and every cheap alternative on one task, in one table, with a recommendation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from . import baselines
from .anchors import DEFAULT_TEMPLATES, Anchors
from .backbone import DualEncoder
from .bridge import Bridge
from .classifier import AnchorClassifier
from .evaluation import Score, align_labels, measured, score_logits
from .extraction import ExtractionConfig, extract
from .features import FeatureTable, embed_dataset
from .label_tuning import label_tune
from .prompt_tuning import PROMPTED
from .teachers import Teacher, as_classifier, teacher_class_vectors, teacher_logits
from .transferring import TransferConfig, transfer
from .tuners import TransMiterConfig
from .tuners.prompts import prompt_layer


AT_RUN_TIME = "needs the weak model and its tuned version for every prediction"
LABELS = "needs labelled images"


@dataclass
class Comparison:
    """What [`compare`] found.

    Args:
        scores (`list[Score]`): one row per method and metric.
        logits (`dict[str, Tensor]`): task logits (N, C) of every method on the test images, for figures.
        labels (`Tensor`), class_names (`tuple[str, ...]`): of the test images.
        classifiers (`dict[str, AnchorClassifier]`): the upgraded classifiers, ready to be saved.
        bridges (`dict[str, Bridge]`): the embedding-space bridges by what they were built from.
        notes (`dict[str, str]`): what a method needs beyond the strong model and its adapter.
        recommended, reason (`str`): the way to upgrade to take, chosen without labels, and why.
    """

    scores: list[Score]
    logits: dict[str, Tensor]
    labels: Tensor
    class_names: tuple[str, ...]
    classifiers: dict[str, AnchorClassifier] = field(default_factory=dict)
    bridges: dict[str, Bridge] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    recommended: str = ""
    reason: str = ""

    def value(self, method: str, metric: str = "accuracy") -> float:
        """One score. Raises `KeyError` for a method that was not run."""
        for score in self.scores:
            if (score.method, score.metric) == (method, metric):
                return score.value
        raise KeyError(f"no score {metric!r} of {method!r}; methods: {list(self.logits)}.")


def recommend(*, own_class_vectors: bool, unlabelled: bool, general: bool, unseen: bool = False) -> tuple[str, str]:
    """The way to upgrade to take, from what is known without labels, and why (figures: README, "What to expect").

    Args:
        own_class_vectors (`bool`): whether prompts or class vectors were tuned, and not the image tower.
        unlabelled, general (`bool`): whether there are unlabelled images of the task, or any images.
        unseen (`bool`, *optional*, defaults to `False`): whether the tuning saw only some of the classes.
    """
    if unlabelled and unseen:
        return "bridge from task images", (
            "the tuning saw only some of the classes: the bridge carries the change to all of them, while a refit on "
            "the tuned model's labels would take accuracy from the others."
        )
    if unlabelled:
        tuned = "prompts or class vectors were" if own_class_vectors else "the image tower was"
        return "refit", (
            f"{tuned} tuned and there are unlabelled task images: the refit joins the tuned model, the strong "
            "model's own knowledge and the carried class vectors, and costs nothing at run time."
        )
    if not own_class_vectors:
        return "zero-shot strong", (
            "there is no task image, and no class vectors that a bridge could carry: pass unlabelled task images."
        )
    source = "general images" if general else "text"
    return f"bridge from {source}", (
        f"there is no task image: a bridge from {source} carries the class vectors; a few hundred unlabelled task "
        "images would allow the refit, which is better on every task measured."
    )


def compare(
    weak: DualEncoder,
    strong: DualEncoder,
    teacher: Teacher,
    test,
    *,
    unlabelled=None,
    labelled=None,
    general=None,
    tuned_strong: Teacher | None = None,
    class_names: Sequence[str] | None = None,
    seen_classes: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    anchors: Anchors | None = None,
    text_anchors: Anchors | None = None,
    gradient: ExtractionConfig | None = None,
    split: str = "test",
    accelerator=None,
    progress: bool = True,
    **embedding,
) -> Comparison:
    """Scores every method that the data at hand allows.

    Args:
        weak, strong (`DualEncoder`): the pre-trained models.
        teacher: the tuned weak model, see [`Teacher`]; must be a model, since it is scored on the test images.
        test (`datasets.Dataset`): labelled images to score on.
        unlabelled (`datasets.Dataset`, *optional*): images of the task; labels are not read.
        labelled (`datasets.Dataset`, *optional*): a few labelled images of the seen classes, for what needs labels.
        general (`datasets.Dataset`, *optional*): any images, not the task's, for a bridge without task images.
        tuned_strong (*optional*): a tuned strong model, as a ceiling.
        class_names (`Sequence[str]`, *optional*): in label order; the test set's names when omitted.
        seen_classes (`Sequence[str]`, *optional*): names the tuning saw; adds base, novel, harmonic mean and joint.
        anchors (`Anchors`, *optional*): K names of the published adapter; class names and common nouns when omitted.
        text_anchors (`Anchors`, *optional*): names for the bridge from text; the universal vocabulary when omitted.
        gradient (`ExtractionConfig`, *optional*): settings of the published solver.
        **embedding: passed to `embed_dataset`.

    Returns:
        [`Comparison`]

    Raises:
        ValueError: the test set has no labels or no names, or the teacher only has stored logits.
    """
    options = {"accelerator": accelerator, "progress": progress, **embedding}
    names = tuple(class_names or _names_of(test))
    task = _Task(
        weak, strong, teacher, test, unlabelled, labelled, general, names, seen_classes, tuple(templates), options
    )
    task.anchors, task.text_anchors = anchors, text_anchors
    task.gradient_config = gradient or ExtractionConfig(solver="gradient")
    rows: list[tuple[str, Callable[[], Tensor | AnchorClassifier], str]] = _baselines(task) + _upgrades(task)
    if tuned_strong is not None:
        rows.append(("tuned strong", lambda: task.said_by(tuned_strong, test, strong), LABELS))
    base = None if seen_classes is None else [names.index(name) for name in seen_classes]
    found = Comparison([], {}, task.labels, names)
    for method, run, note in rows:
        with measured() as cost:
            result = run()
        if isinstance(result, AnchorClassifier):
            found.classifiers[method] = result
            result = _classify(result, task.tables(strong, "test"))
        found.logits[method] = result
        if note:
            found.notes[method] = note
        for metric, value in score_logits(result, task.labels, base).items():
            found.scores.append(Score(method, split, metric, value, **cost))
    found.bridges = task.bridges
    found.recommended, found.reason = recommend(
        own_class_vectors=task.own_class_vectors,
        unlabelled=unlabelled is not None,
        general=general is not None,
        unseen=base is not None and len(base) < len(names),
    )
    found.reason += _what_beats(found)
    return found


def _what_beats(found: Comparison) -> str:
    """A sentence on the best method that scored higher on these test images than the recommended one, if any did."""
    own = found.value(found.recommended)
    better = [m for m in found.logits if m not in (found.recommended, "tuned strong") and found.value(m) > own]
    if not better:
        return ""
    best = max(better, key=found.value)
    need = found.notes.get(best)
    return f" On these test images {best} scored higher ({found.value(best):.1f} against {own:.1f})" + (
        f"; it {need}." if need else "."
    )


def _baselines(task: _Task) -> list[tuple]:
    strong, text = task.strong, task.text

    def eft() -> Tensor:
        return baselines.emulated_fine_tuning(task.zero_shot_strong, task.tuned, task.zero_shot_weak)

    rows = [
        ("zero-shot weak", lambda: task.zero_shot_weak, ""),
        ("zero-shot strong", lambda: task.zero_shot_strong, ""),
        ("tuned weak", lambda: task.tuned, ""),
        ("EFT", eft, AT_RUN_TIME),
        ("EFT averaged with tuned weak", lambda: (eft() + task.tuned) / 2, AT_RUN_TIME),
        ("logit ensemble", lambda: baselines.logit_ensemble(task.zero_shot_strong, task.tuned), AT_RUN_TIME),
    ]

    def head(x: Tensor, target: Tensor) -> Tensor:
        vectors = baselines.linear_head(
            x, target, text[strong], float(strong.logit_scale), progress=task.options["progress"]
        )
        return strong.logits(task.tables(strong, "test").embeds, vectors)

    prompted = task.prompted
    if prompted is not None and baselines.why_not_reattached(prompted, strong) is None:
        rows.append(("re-attached prompt", lambda: task.said_with(baselines.reattach_prompt(prompted, strong)), ""))
    if task.sets["unlabelled"] is not None:
        if prompted is not None and baselines.why_no_prompt_transfer(prompted, strong) is None:
            rows.append(("prompt transfer", task.prompt_transfer, ""))
        rows.append(("distilled head", lambda: head(task.tables(strong, "unlabelled").embeds, task.teacher_soft), ""))
    if task.sets["labelled"] is not None:
        table = task.tables(strong, "labelled")
        labels = align_labels(table, task.names)
        rows.append(("linear probe", lambda: head(table.embeds, labels), LABELS))
    return rows


def _upgrades(task: _Task) -> list[tuple]:
    rows = []
    has = {name: task.sets[name] is not None for name in task.sets}
    if has["unlabelled"]:
        rows.append(("TransMiter (gradient)", lambda: task.transfer(task.published, "unlabelled"), ""))
        if has["general"]:
            rows.append(
                ("TransMiter (gradient), general bridge", lambda: task.transfer(task.published, "general"), "")
            )
        rows.append(("logit bridge from task images", lambda: task.transfer(task.adapter, task.logit_bridge), ""))
        rows.append(("ridge, refit", lambda: task.refit(task.ridge), ""))
    if has["unlabelled"] or task.own_class_vectors:
        rows.append(("bridge from text", lambda: task.transfer(task.adapter, task.bridge("text")), ""))
        if has["general"]:
            rows.append(
                ("bridge from general images", lambda: task.transfer(task.adapter, task.bridge("general")), "")
            )
    if has["unlabelled"]:
        rows.append(("bridge from task images", lambda: task.transfer(task.adapter, task.bridge("unlabelled")), ""))
        rows.append(("refit without teacher logits", lambda: task.refit(task.adapter, packed=False), ""))
        rows.append(("refit", lambda: task.refit(task.adapter), ""))
    if has["labelled"]:
        rows.append(("TransMiter+ from identity", lambda: task.label_tune(task.identity), LABELS))
        if has["unlabelled"]:
            rows.append(("TransMiter+ from refit", lambda: task.label_tune(task.refit(task.adapter)), LABELS))
    return rows


class _Task:
    """The models, images and names of one comparison; what several methods share is made once."""

    anchors: Anchors | None
    text_anchors: Anchors | None
    gradient_config: ExtractionConfig

    def __init__(
        self, weak, strong, teacher, test, unlabelled, labelled, general, names, seen_classes, templates, options
    ):
        self.weak, self.strong, self.teacher = weak, strong, teacher
        self.sets = {"test": test, "unlabelled": unlabelled, "labelled": labelled, "general": general}
        self.names, self.seen_classes, self.templates, self.options = names, seen_classes, templates, options
        self.bridges: dict[str, Bridge] = {}
        self.own_class_vectors = teacher_class_vectors(teacher, weak, names, templates) is not None
        # Embedding is shared by all methods, so it is done before anything is timed.
        for model in (weak, strong):
            for name, images in self.sets.items():
                if images is not None and (model is strong or name != "labelled"):
                    self.tables(model, name)
        self.text = {model: model.embed_names(names, templates).cpu() for model in (weak, strong)}
        self.labels = align_labels(self.tables(strong, "test"), names)
        self.tuned = self.said_by(teacher, test, weak)
        if unlabelled is not None:
            self.teacher_soft = self.said_by(teacher, unlabelled, weak).softmax(1)

    def tables(self, model: DualEncoder, name: str) -> FeatureTable:
        return embed_dataset(model, self.sets[name], **self.options)

    def said_by(self, teacher: Teacher, dataset, base: DualEncoder) -> Tensor:
        table = embed_dataset(base, dataset, **self.options)
        return teacher_logits(
            teacher, dataset, self.names, templates=self.templates, weak=base, table=table, **self.options
        )

    @cached_property
    def prompted(self) -> DualEncoder | None:
        """The tuned model where what was tuned is a prompt."""
        if isinstance(self.teacher, (list, tuple)):
            return None
        classifier = as_classifier(self.teacher, self.names, self.templates)
        if classifier is None or classifier.adapter_config or prompt_layer(classifier.encoder.model) is None:
            return None
        return classifier.encoder

    def said_with(self, prompted: DualEncoder) -> Tensor:
        """Test logits of the strong model with prompts in it."""
        classifier = AnchorClassifier(prompted, Anchors(self.names, (), PROMPTED))
        return self.said_by(classifier, self.sets["test"], self.strong)

    def prompt_transfer(self) -> Tensor:
        x = self.tables(self.strong, "unlabelled").embeds
        options = {key: self.options[key] for key in ("accelerator", "progress")}
        return self.said_with(
            baselines.prompt_transfer(self.prompted, self.strong, x, self.teacher_soft, self.names, **options)
        )

    @cached_property
    def zero_shot_weak(self) -> Tensor:
        return self.weak.logits(self.tables(self.weak, "test").embeds, self.text[self.weak])

    @cached_property
    def zero_shot_strong(self) -> Tensor:
        return self.strong.logits(self.tables(self.strong, "test").embeds, self.text[self.strong])

    def extract(self, config: ExtractionConfig, anchors: Anchors | None = None) -> AnchorClassifier:
        return extract(
            self.weak,
            self.teacher,
            self.sets["unlabelled"],
            class_names=self.names,
            anchors=anchors,
            templates=self.templates,
            config=config,
            **self.options,
        )

    @property
    def published(self) -> AnchorClassifier:
        return self.extract(self.gradient_config, self.anchors)

    @property
    def ridge(self) -> AnchorClassifier:
        return self.extract(ExtractionConfig(solver="ridge"))

    @property
    def adapter(self) -> AnchorClassifier:
        return self.extract(ExtractionConfig())

    @property
    def identity(self) -> AnchorClassifier:
        config = TransMiterConfig(class_names=list(self.names), templates=list(self.templates), form="class_vectors")
        anchors = Anchors(self.names, (), self.templates)
        return AnchorClassifier(self.strong, anchors, self.text[self.strong].to(self.strong.device)).add_adapter(
            config
        )

    def bridge(self, source: str) -> Bridge:
        if source not in self.bridges:
            images = None if source == "text" else self.sets[source]
            self.bridges[source] = Bridge.build(
                self.weak, self.strong, images, anchors=self.text_anchors, **self.options
            )
        return self.bridges[source]

    @property
    def logit_bridge(self) -> Bridge:
        anchors = self.anchors or Anchors.build(self.names, templates=self.templates)
        return Bridge.build(
            self.weak, self.strong, self.sets["unlabelled"], space="logit", anchors=anchors, **self.options
        )

    def transfer(self, adapter: AnchorClassifier, over: str | Bridge) -> AnchorClassifier:
        """Without a refit: by a finished bridge, or one from the named images."""
        bridge = over if isinstance(over, Bridge) else None
        return transfer(
            adapter,
            self.strong,
            self.sets[over] if bridge is None else None,
            bridge=bridge,
            seen_classes=self.seen_classes,
            config=TransferConfig(refit=False),
            **self.options,
        )

    def refit(self, adapter: AnchorClassifier, packed: bool = True) -> AnchorClassifier:
        if not packed:
            adapter.calibration = None
        return transfer(
            adapter,
            self.strong,
            self.sets["unlabelled"],
            seen_classes=self.seen_classes,
            config=TransferConfig(refit=True),
            **self.options,
        )

    def label_tune(self, adapter: AnchorClassifier) -> AnchorClassifier:
        return label_tune(adapter, self.sets["labelled"], seen_classes=self.seen_classes, **self.options)


def _classify(classifier: AnchorClassifier, table: FeatureTable) -> Tensor:
    device = classifier.encoder.device
    with torch.no_grad():
        return torch.cat([classifier.classify(x.to(device)).float().cpu() for x in table.batches(4096)])


def _names_of(dataset) -> list[str]:
    for feature in (dataset.features or {}).values():
        if getattr(feature, "names", None):
            return feature.names
    raise ValueError("the test images have no class names: pass class_names in label order.")
