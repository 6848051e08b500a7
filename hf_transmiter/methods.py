"""[`METHODS`]: every way to upgrade a task and every cheap alternative, as functions of one [`Task`].

A row of a comparison is a [`Variant`]: one of these methods, with settings of its own where it takes any.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import get_args, get_origin, get_type_hints

from torch import Tensor

from . import attaching, baselines
from .anchors import Anchors
from .bridge import Bridge
from .classifier import AnchorClassifier
from .comparison_task import Answer, Task, stored_bytes
from .label_tuning import label_tune
from .settings import ExtractionConfig, LabelTuningConfig, TransferConfig, TuningConfig, check_choice
from .transferring import transfer
from .trust import did_you_mean
from .tuners import TransMiterConfig
from .vocabulary import STRATEGIES


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: a method, with settings of its own where it takes any. What is not given stays as the
    comparison has it.

    Args:
        method (`str`): a key of [`METHODS`].
        name (`str`, *optional*): of the row; the method when omitted.
        extraction (`Mapping`, *optional*): fields of [`ExtractionConfig`], but `solver`.
        transfer (`Mapping`, *optional*):
            Fields of [`TransferConfig`], but `refit`. ``{"beta": float("inf")}`` (YAML: ``.inf``) is no basis change.
        anchors (`Mapping`, *optional*):
            Of the published adapter: `num_anchors` (K, task names included) or `num_auxiliary` (0 leaves the task
            names), `strategy` and `seed` of `Anchors.build`.
        label_tuning (`Mapping`, *optional*): fields of [`LabelTuningConfig`].
        tuning (`Mapping`, *optional*): fields of [`TuningConfig`], of ``"tuned strong"``.

    Raises:
        ValueError: an unknown method or setting (with the nearest names), one that the method does not read or that
            is part of the method, or a value of the wrong kind.
    """

    method: str
    name: str | None = None
    extraction: Mapping = field(default_factory=dict)
    transfer: Mapping = field(default_factory=dict)
    anchors: Mapping = field(default_factory=dict)
    label_tuning: Mapping = field(default_factory=dict)
    tuning: Mapping = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"there is no method {self.method!r}; {did_you_mean(self.method, METHODS)}")
        object.__setattr__(self, "name", self.name or self.method)
        takes = METHODS[self.method].takes
        for part, kind in _PARTS.items():
            given = getattr(self, part)
            if not isinstance(given, Mapping):
                raise ValueError(f"{part} of the row {self.name!r} must hold settings by name, got {given!r}.")
            if given and part not in takes:
                known = f"it takes {', '.join(takes)}" if takes else "it takes none"
                raise ValueError(f"{self.method!r} has no settings of {part!r}; {known}.")
            where = f"{part} of the row {self.name!r}"
            values = {key: _value(kind, key, value, where) for key, value in given.items()}
            object.__setattr__(self, part, values)
            try:
                kind(**values)  # says what is wrong now and not after hours
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error

    @classmethod
    def of(cls, value: Variant | str | Mapping) -> Variant:
        """A row from what people write: a method's name, or the fields by name.

        Raises:
            ValueError: an unknown field, no method, or what [`Variant`] refuses.
        """
        if isinstance(value, Variant):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping) or not isinstance(value.get("method"), str):
            raise ValueError(f"a row is the name of a method, or settings with a 'method', got {value!r}.")
        unknown = [key for key in value if key not in _FIELDS]
        if unknown:
            raise ValueError(f"a row has no setting {unknown[0]!r}; {did_you_mean(str(unknown[0]), _FIELDS)}")
        return cls(**value)


@dataclass(frozen=True)
class AnchorSettings:
    """What `anchors` of a [`Variant`] may hold.

    Raises:
        ValueError: an unknown strategy, or the number of names given twice.
    """

    num_anchors: int | None = None
    num_auxiliary: int | None = None
    strategy: str = "random"
    seed: int = 0

    def __post_init__(self):
        check_choice("strategy", self.strategy, STRATEGIES)
        if None not in (self.num_anchors, self.num_auxiliary):
            raise ValueError("num_anchors or num_auxiliary, not both.")


_PARTS = {
    "extraction": ExtractionConfig,
    "transfer": TransferConfig,
    "anchors": AnchorSettings,
    "label_tuning": LabelTuningConfig,
    "tuning": TuningConfig,
}
_FIELDS = tuple(item.name for item in fields(Variant))
_DECIDED = ("solver", "refit")  # by the choice of the method


def _value(kind: type, key: str, value, where: str):
    """A setting as its field wants it: numbers that YAML reads as words (``1e-3``) and lists included."""
    if key in _DECIDED:
        raise ValueError(f"{where}: {key!r} is not a setting, it is what makes the method: choose another method.")
    hints = get_type_hints(kind)
    if key not in hints:
        raise ValueError(f"{where} has no setting {key!r}; {did_you_mean(key, hints)}")
    wanted = tuple(getattr(one, "__origin__", one) for one in get_args(hints[key]) or (hints[key],))
    wanted = (tuple,) if get_origin(hints[key]) is tuple else wanted
    try:
        if float in wanted and isinstance(value, (int, str)) and not isinstance(value, bool):
            return float(value)
        if tuple in wanted and isinstance(value, (list, dict)):
            return value if isinstance(value, dict) else tuple(value)
    except ValueError:
        pass
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        kinds = " or ".join("nothing" if one is NoneType else one.__name__ for one in wanted)
        raise ValueError(f"{where}: {key} must be {kinds}, got {value!r}.")
    return value


@dataclass(frozen=True)
class Needs:
    """What a method asks for beyond the two models and the tuned one.

    Args:
        labels (`bool`): labelled images.
        task_images (`bool`): unlabelled images of the task.
        backprop (`bool`): steps of gradient descent, be it only on a head or an adapter.
        weak_at_run_time (`bool`): every prediction runs the weak model, tuned or not.
    """

    labels: bool = False
    task_images: bool = False
    backprop: bool = False
    weak_at_run_time: bool = False


@dataclass(frozen=True)
class Method:
    """One entry of [`METHODS`].

    Args:
        run: makes it; what it returns is scored by [`Task.answer`].
        needs ([`Needs`]): what it asks for.
        possible: why a task does not allow it, `None` where it does.
        takes (`tuple[str, ...]`): the parts of a [`Variant`] that change it.
        default (`bool`): whether a comparison runs it without being asked.
    """

    run: Callable[[Task, Variant], AnchorClassifier | Answer]
    needs: Needs = Needs()
    possible: Callable[[Task], str | None] = lambda task: None
    takes: tuple[str, ...] = ()
    default: bool = True


def _having(*conditions: str | Callable[[Task], str | None]) -> Callable[[Task], str | None]:
    """The first reason against a method: sets of images that are not there, or what a function says."""

    def possible(task: Task) -> str | None:
        reasons = (task.missing(one) if isinstance(one, str) else one(task) for one in conditions)
        return next((reason for reason in reasons if reason is not None), None)

    return possible


# Baselines


def _emulated(task: Task) -> Tensor:
    return baselines.emulated_fine_tuning(task.zero_shot_strong, task.tuned, task.zero_shot_weak)


def _of_both(logits: Callable[[Task], Tensor]) -> Callable[[Task, Variant], Answer]:
    """A mixture of the answers of strong, tuned and weak."""
    return lambda task, variant: Answer(logits(task), stored_bytes(task.teacher))


def _reattachable(task: Task) -> str | None:
    return "no prompt was tuned" if task.prompted is None else attaching.why_not_reattached(task.prompted, task.strong)


def _reattached(task: Task, variant: Variant) -> AnchorClassifier:
    return task.prompting(attaching.reattach_prompt(task.prompted, task.strong))


def _context_transferable(task: Task) -> str | None:
    if task.prompted is None:
        return "no prompt was tuned"
    return baselines.why_no_prompt_transfer(task.prompted, task.strong)


def _prompt_transfer(task: Task, variant: Variant) -> AnchorClassifier:
    options = {key: task.options[key] for key in ("accelerator", "progress") if key in task.options}
    x = task.table(task.strong, "unlabelled").embeds
    return task.prompting(
        baselines.prompt_transfer(task.prompted, task.strong, x, task.teacher_soft, task.names, **options)
    )


def _head(task: Task, name: str, target: Tensor, learnt: Tensor | slice = slice(None)) -> Answer:
    """Class vectors trained on one of the sets of images; those of the other classes stay zero-shot."""
    strong, vectors = task.strong, task.text[task.strong].clone()
    x, scale, progress = task.table(strong, name).embeds, float(strong.logit_scale), task.options.get("progress", True)
    vectors[learnt] = baselines.linear_head(x, target, vectors[learnt], scale, progress=progress)
    return Answer(strong.logits(task.table(strong, "test").embeds, vectors), 4 * vectors.numel())


def _linear_probe(task: Task, variant: Variant) -> Answer:
    """Among the labelled classes only, as all that is tuned here: others would be pushed away as never right."""
    labelled, target = task.labelled_table.labels.unique(return_inverse=True)
    return _head(task, "labelled", target, labelled)


def _tuned_strong(task: Task, variant: Variant) -> AnchorClassifier | Answer:
    if task.tuned_strong is None or variant.tuning:
        if task.labelled is None:
            raise ValueError(f"with settings of its own {task.missing('labelled')}.")
        return task.tune_strong(variant)
    said = task.said_by(task.tuned_strong, "test", task.strong)
    return Answer(said, stored_bytes(task.tuned_strong), given=True)


def _tunable(task: Task) -> str | None:
    return None if task.tuned_strong is not None else task.missing("labelled")


# Upgrades


def _transfer(task: Task, variant: Variant, adapter: AnchorClassifier, images=None, refit=False, **options):
    config = TransferConfig(refit=refit, **variant.transfer)
    options |= {"seen_classes": task.seen_classes, "config": config, **task.options}
    return transfer(adapter, task.strong, images, **options)


def _published(task: Task, variant: Variant, over: str = "unlabelled") -> AnchorClassifier:
    """The published adapter with the published basis change, computed on one of the sets of images."""
    return _transfer(task, variant, task.extract("gradient", variant), task.sets[over])


def _bridged(over: str, solver: str = "discriminant") -> Callable[[Task, Variant], AnchorClassifier]:
    """Class vectors over a bridge in embedding space."""

    def run(task: Task, variant: Variant) -> AnchorClassifier:
        return _transfer(task, variant, task.extract(solver, variant), bridge=task.embedding_bridge(over))

    return run


def _logit_bridged(task: Task, variant: Variant) -> AnchorClassifier:
    config = TransferConfig(**variant.transfer)
    beta = {"beta": config.beta, "beta_per_image": config.beta_per_image}
    options = {"space": "logit", "anchors": task.anchors_for(variant), **beta, **task.options}
    bridge = Bridge.build(task.weak, task.strong, task.sets["unlabelled"], **options)
    return _transfer(task, variant, task.extract("discriminant", variant), bridge=bridge)


def _refit(task: Task, variant: Variant, solver: str = "discriminant", packed: bool = True) -> AnchorClassifier:
    adapter = task.extract(solver, variant)
    if not packed:
        adapter = copy.copy(adapter)  # the one that others use keeps its pack
        adapter.calibration = None
    return _transfer(task, variant, adapter, task.sets["unlabelled"], refit=True)


# TransMiter+


def _label_tuned(start: Callable[[Task, Variant], AnchorClassifier]) -> Callable[[Task, Variant], AnchorClassifier]:
    def run(task: Task, variant: Variant) -> AnchorClassifier:
        config = LabelTuningConfig(**variant.label_tuning)
        options = {"seen_classes": task.seen_classes, "config": config, **task.options}
        return label_tune(start(task, variant), task.labelled_table, **options)

    return run


def _identity(task: Task, variant: Variant) -> AnchorClassifier:
    """Class vectors that are the strong model's own."""
    config = TransMiterConfig(class_names=list(task.names), templates=list(task.templates), form="class_vectors")
    text = task.text[task.strong].to(task.strong.device)
    return AnchorClassifier(task.strong, Anchors(task.names, (), task.templates), text).add_adapter(config)


def _published_identity(task: Task, variant: Variant) -> AnchorClassifier:
    """The published adapter before any training, which changes nothing."""
    anchors = task.anchors_for(variant)
    config = TransMiterConfig.for_anchors(anchors, form="mlp", seed=task.gradient.seed)
    return AnchorClassifier(task.strong, anchors).add_adapter(config)


_WEAK = Needs(weak_at_run_time=True)
_IMAGES = Needs(task_images=True)
_FITTED = Needs(task_images=True, backprop=True)
_LABELS = Needs(labels=True, backprop=True)
_BOTH = Needs(labels=True, task_images=True, backprop=True)
_CLOSED, _GRADIENT = ("extraction", "transfer"), ("extraction", "transfer", "anchors")
_vectors = Task.why_no_vectors  # own class vectors, or images to extract some from


METHODS: dict[str, Method] = {
    "zero-shot weak": Method(lambda task, _: Answer(task.zero_shot_weak, 0), _WEAK),
    "zero-shot strong": Method(lambda task, _: Answer(task.zero_shot_strong, 0)),
    "tuned weak": Method(_of_both(lambda task: task.tuned), _WEAK),
    "EFT": Method(_of_both(_emulated), _WEAK),
    "EFT averaged with tuned weak": Method(_of_both(lambda task: (_emulated(task) + task.tuned) / 2), _WEAK),
    "logit ensemble": Method(
        _of_both(lambda task: baselines.logit_ensemble(task.zero_shot_strong, task.tuned)), _WEAK
    ),
    "re-attached prompt": Method(_reattached, possible=_reattachable),
    "prompt transfer": Method(_prompt_transfer, _FITTED, _having("unlabelled", _context_transferable)),
    "distilled head": Method(
        lambda task, _: _head(task, "unlabelled", task.teacher_soft), _FITTED, _having("unlabelled")
    ),
    "linear probe": Method(_linear_probe, _LABELS, _having("labelled")),
    # The published adapter.
    "TransMiter (gradient)": Method(_published, _FITTED, _having("unlabelled"), _GRADIENT),
    "TransMiter (gradient), general bridge": Method(
        lambda task, variant: _published(task, variant, "general"),
        _FITTED,
        _having("unlabelled", "general"),
        _GRADIENT,
    ),
    # Class vectors in closed form; "ridge, ..." solves for the teacher's logits instead of a discriminant.
    "logit bridge from task images": Method(_logit_bridged, _IMAGES, _having("unlabelled"), _GRADIENT),
    "ridge, bridge from text": Method(_bridged("text", "ridge"), Needs(), _vectors, _CLOSED, default=False),
    "ridge, bridge from general images": Method(
        _bridged("general", "ridge"), Needs(), _having("general", _vectors), _CLOSED, default=False
    ),
    "ridge, bridge from task images": Method(
        _bridged("unlabelled", "ridge"), _IMAGES, _having("unlabelled"), _CLOSED, default=False
    ),
    "ridge, given bridge": Method(
        _bridged("given", "ridge"), Needs(), _having("given", _vectors), _CLOSED, default=False
    ),
    "ridge, refit": Method(lambda t, v: _refit(t, v, "ridge"), _IMAGES, _having("unlabelled"), _CLOSED),
    "bridge from text": Method(_bridged("text"), Needs(), _vectors, _CLOSED),
    "bridge from general images": Method(_bridged("general"), Needs(), _having("general", _vectors), _CLOSED),
    "given bridge": Method(_bridged("given"), Needs(), _having("given", _vectors), _CLOSED),
    "bridge from task images": Method(_bridged("unlabelled"), _IMAGES, _having("unlabelled"), _CLOSED),
    "refit without teacher logits": Method(
        lambda task, variant: _refit(task, variant, packed=False), _IMAGES, _having("unlabelled"), _CLOSED
    ),
    "refit": Method(_refit, _IMAGES, _having("unlabelled"), _CLOSED),
    # A few labelled steps on an adapter.
    "TransMiter+ from identity": Method(_label_tuned(_identity), _LABELS, _having("labelled"), ("label_tuning",)),
    "TransMiter+ from zero-shot": Method(
        _label_tuned(_published_identity), _LABELS, _having("labelled"), ("label_tuning", "anchors"), default=False
    ),
    "TransMiter+ from gradient transfer": Method(
        _label_tuned(_published),
        _BOTH,
        _having("labelled", "unlabelled"),
        ("label_tuning", *_GRADIENT),
        default=False,
    ),
    "TransMiter+ from refit": Method(
        _label_tuned(_refit), _BOTH, _having("labelled", "unlabelled"), ("label_tuning", *_CLOSED)
    ),
    # The ceiling: the strong model tuned on labels, as given or here.
    "tuned strong": Method(_tuned_strong, _LABELS, _tunable, ("tuning",)),
}
"""Every method by the name of its row, in the order of a table. Those that need labels have an advantage over those
that do not, and those that need the weak model at run time cost its time in every prediction."""
