"""[`METHODS`]: every way to upgrade a task and every cheap alternative, as functions of one [`Task`].

A row of a comparison is a [`Variant`]: one of these methods, with settings where it takes any.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from types import NoneType
from typing import get_args, get_origin, get_type_hints

from torch import Tensor

from ..data.anchors import Anchors
from ..data.vocabulary import STRATEGIES
from ..hub.checks import did_you_mean, parse_yaml
from ..method import attach
from ..method.classifier import AnchorClassifier
from ..method.label_tune import label_tune
from ..method.transfer import transfer
from ..method.tune import adapter_settings
from ..settings import (
    SOLVERS,
    ExtractionConfig,
    LabelTuningConfig,
    TransferConfig,
    TuningConfig,
    check_choice,
    check_fields,
    shortened,
)
from ..tuners import TransMiterConfig
from . import baselines
from .task import Answer, Impossible, Task, stored_bytes


STRONG, IMAGE_MAP = "zero-shot strong", "image map"
UNTUNED = "untuned teacher"
CONTROL = "is a control: its teacher learnt nothing"
FROM_TEXT = "bridge from text"


@dataclass(frozen=True)
class RowSettings:
    """Settings of a row that are none of a step's own.

    Args:
        solver (`str`, *optional*): of the weak model's adapter, see [`ExtractionConfig`]; chosen if omitted.
        start (`str`):
            Label tuning: `"refit"`, `"TransMiter"` (published: its transferred adapter), `"class vectors"` (the strong
            model's own) or `"untrained TransMiter"` (published: from zero-shot).
        num_anchors (`int`, *optional*): K names of the published adapter, task names included.
        num_auxiliary (`int`, *optional*): the same without the task names; 0 leaves those alone.
        strategy (`str`): how auxiliary names are chosen, see `Anchors.build`.

    Raises:
        ValueError: none of these, or the number of names given twice.
    """

    solver: str | None = None
    start: str = "refit"
    num_anchors: int | None = None
    num_auxiliary: int | None = None
    strategy: str = "random"

    def __post_init__(self):
        check_fields(self, {"num_anchors": {"least": 1}, "num_auxiliary": {"least": 0}})
        if self.solver is not None:
            check_choice("solver", self.solver, SOLVERS[:-1])
        check_choice("start", self.start, tuple(_STARTS))
        check_choice("strategy", self.strategy, STRATEGIES)
        if None not in (self.num_anchors, self.num_auxiliary):
            raise ValueError("num_anchors or num_auxiliary, not both.")


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: a method, with settings where it takes any. What is not given stays as the comparison
    has it.

    Args:
        method (`str`): a key of [`METHODS`].
        settings (`Mapping`, *optional*):
            By name, of the row itself ([`RowSettings`]) and of the steps it is made of; `Method.takes` says which.
            ``{"beta": float("inf")}`` (YAML: ``.inf``) is no basis change.
        name (`str`, *optional*): of the row; the method and its settings when omitted.

    Raises:
        ValueError: an unknown method, a setting that it does not read (with the nearest names), or a value that is
            not possible.
    """

    method: str
    settings: Mapping = field(default_factory=dict)
    name: str | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"there is no method {self.method!r}; {did_you_mean(self.method, METHODS)}")
        where, takes = f"the row {self.method!r}", METHODS[self.method].takes
        if not isinstance(self.settings, Mapping):
            raise ValueError(f"{where} must hold settings by name, got {shortened(self.settings)}.")
        kinds = {key: kind for kind, keys in takes.items() for key in keys}
        others = {key: value for key, value in self.settings.items() if key not in kinds}
        if others and not METHODS[self.method].tunes:
            key = next(iter(others))
            known = did_you_mean(str(key), kinds) if kinds else "it takes none."
            raise ValueError(f"{where} has no setting {key!r}; {known}")
        try:
            adapter_settings(others)  # of a PEFT configuration
            settings = {k: _value(kinds[k], k, value) if k in kinds else value for k, value in self.settings.items()}
            object.__setattr__(self, "settings", settings)
            solver = self.own.solver if "solver" in takes.get(RowSettings, ()) else "gradient"
            for kind in takes:  # says what is wrong now and not after hours
                kind(**({"solver": solver} if kind is ExtractionConfig else {}), **self.of_step(kind))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        said = ", ".join(f"{key}: {value}" for key, value in settings.items())
        object.__setattr__(self, "name", self.name or self.method + (f" ({said})" if said else ""))

    @classmethod
    def of(cls, value: Variant | str | Mapping) -> Variant:
        """A row from what people write, in YAML or on the command line: ``refit``, ``refit: {solver: ridge}``, or
        ``{refit: {solver: ridge}, name: mine}``.

        Raises:
            ValueError: none of these, or what [`Variant`] refuses.
        """
        if isinstance(value, Variant):
            return value
        try:
            found = parse_yaml(value, "a row") if isinstance(value, str) else value
        except ValueError:
            found = None
        found = {found: {}} if isinstance(found, str) else found
        methods = [key for key in found if key != "name"] if isinstance(found, Mapping) else []
        if len(methods) != 1:
            said = "a row is the name of a method or {method: {setting: value}}, with a name or not, got"
            raise ValueError(f"{said} {shortened(value)}.")
        return cls(methods[0], found[methods[0]] or {}, found.get("name"))

    def of_step(self, kind: type) -> dict:
        """The settings that are fields of a step's configuration, such as [`TransferConfig`]."""
        return {key: value for key, value in self.settings.items() if key in METHODS[self.method].takes.get(kind, ())}

    @property
    def own(self) -> RowSettings:
        return RowSettings(**self.of_step(RowSettings))

    @property
    def needs(self) -> set[str]:
        """What it asks for, of [`NEEDS`]."""
        return {*METHODS[self.method].needs} - ({IMAGES} if self.own.start in _UNTRAINED else set())


def _value(kind: type, key: str, value):
    """A setting as its field wants it: numbers that YAML reads as words (``1e-3``) and lists included."""
    hint = get_type_hints(kind)[key]
    wanted = tuple(getattr(one, "__origin__", one) for one in get_args(hint) or (hint,))
    wanted = (tuple,) if get_origin(hint) is tuple else wanted
    try:
        if float in wanted and isinstance(value, (int, str)) and not isinstance(value, bool):
            return float(value)
        if tuple in wanted and isinstance(value, (list, dict)):
            return value if isinstance(value, dict) else tuple(value)
    except ValueError:
        pass
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        kinds = " or ".join("nothing" if one is NoneType else one.__name__ for one in wanted)
        raise ValueError(f"{key} must be {kinds}, got {value!r}.")
    return value


LABELS, IMAGES, BACKPROP, WEAK = "labels", "task images", "backprop", "weak model at run time"
NEEDS = (LABELS, IMAGES, BACKPROP, WEAK)
"""What a method may ask for beyond the two models and the tuned one: labelled images, unlabelled images of the task,
steps of gradient descent, be it only on a head, and the weak model, tuned or not, for every prediction."""


@dataclass(frozen=True)
class Method:
    """One entry of [`METHODS`].

    Args:
        run:
            Makes it; what it returns is scored by [`Task.answer`]. Raises [`Impossible`] where a task does not allow
            it.
        needs (`Collection[str]`): what it asks for, of [`NEEDS`].
        takes (`Mapping[type, tuple[str, ...]]`): the settings it reads, by what they are fields of.
        tunes (`bool`): whether it tunes a model, so that it also takes a `method` and the options of its adapter.
        models (`int`): how many run for a prediction.
    """

    run: Callable[[Task, Variant], AnchorClassifier | Answer]
    needs: Collection[str] = ()
    takes: Mapping[type, tuple[str, ...]] = field(default_factory=dict)
    tunes: bool = False
    models: int = 1


# Baselines


def _emulated(task: Task, variant: Variant) -> Answer:
    logits = baselines.emulated_fine_tuning(task.zero_shot_strong, task.tuned, task.zero_shot_weak)
    return Answer(logits, stored_bytes(task.teacher))


def _ensemble(task: Task, variant: Variant) -> Answer:
    return Answer(baselines.logit_ensemble(task.zero_shot_strong, task.tuned), stored_bytes(task.teacher))


def _reattached(task: Task, variant: Variant) -> AnchorClassifier:
    reason = attach.why_not_reattached(task.prompted, task.strong)
    if reason is not None:
        raise Impossible(reason)
    return task.prompting(attach.reattach_prompt(task.prompted, task.strong))


def _copied(task: Task, variant: Variant) -> AnchorClassifier:
    if task.tuned_model is None:
        raise Impossible("the tuned model has no layers of LoRA or the like")
    try:
        copied = attach.copy_adapter(task.tuned_model, task.strong)
    except ValueError as error:
        raise Impossible(str(error)) from error
    return AnchorClassifier(copied, Anchors(task.names, (), task.templates))


def _prompt_transfer(task: Task, variant: Variant) -> AnchorClassifier:
    x = task.table(task.strong, "unlabelled").embeds
    reason = baselines.why_no_prompt_transfer(task.prompted, task.strong)
    if reason is not None:
        raise Impossible(reason)
    options = {key: task.options[key] for key in ("accelerator", "progress") if key in task.options}
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
    if task.tuned_strong is None or variant.settings:
        return task.tune_strong(variant.settings)
    said = task.said_by(task.tuned_strong, "test", task.strong)
    return Answer(said, stored_bytes(task.tuned_strong), given=True)


# Upgrades


def _transfer(task: Task, variant: Variant, adapter: AnchorClassifier, images=None, refit=False, **options):
    config = TransferConfig(refit=refit, **variant.of_step(TransferConfig))
    options |= {"seen_classes": task.seen_classes, "config": config, **task.options}
    return transfer(adapter, task.strong, images, **options)


def _published(task: Task, variant: Variant) -> AnchorClassifier:
    """The published adapter with the published basis change."""
    images, config = task.need("unlabelled"), replace(task.gradient, **variant.of_step(ExtractionConfig))
    own = variant.own
    adapter = task.extract(config, task.anchors_for(own.num_anchors, own.num_auxiliary, own.strategy))
    return _transfer(task, variant, adapter, images)


def _closed_form(task: Task, variant: Variant, untuned: bool = False) -> AnchorClassifier:
    config = ExtractionConfig(solver=variant.own.solver, **variant.of_step(ExtractionConfig))
    return task.extract(config, untuned=untuned)


def _bridged(over: str) -> Callable[[Task, Variant], AnchorClassifier]:
    """What was tuned, over a bridge."""

    def run(task: Task, variant: Variant) -> AnchorClassifier:
        return _transfer(task, variant, _closed_form(task, variant), bridge=task.embedding_bridge(over))

    return run


def _refit(task: Task, variant: Variant, untuned: bool = False) -> AnchorClassifier:
    images = task.need("unlabelled")
    return _transfer(task, variant, _closed_form(task, variant, untuned), images, refit=True)


def _image_map(task: Task, variant: Variant) -> AnchorClassifier:
    images, options = task.need("unlabelled"), {"seen_classes": task.seen_classes, **task.options}
    config = TransferConfig(refit=True, parts="image", **variant.of_step(TransferConfig))
    return transfer(_closed_form(task, variant), task.strong, images, config=config, **options)


# TransMiter+


def _label_tuned(task: Task, variant: Variant) -> AnchorClassifier:
    task.need("labelled")
    start, config = _STARTS[variant.own.start](task, variant), LabelTuningConfig(**variant.of_step(LabelTuningConfig))
    options = {"seen_classes": task.seen_classes, "config": config, **task.options}
    return label_tune(start, task.labelled_rows(start.reads_tower), **options)


def _own_vectors(task: Task, variant: Variant) -> AnchorClassifier:
    """Class vectors that are the strong model's own."""
    config = TransMiterConfig(class_names=list(task.names), templates=list(task.templates), form="linear")
    text = task.text[task.strong].to(task.strong.device)
    return AnchorClassifier(task.strong, Anchors(task.names, (), task.templates), text).add_adapter(config)


def _untrained(task: Task, variant: Variant) -> AnchorClassifier:
    """The published adapter before any training, which changes nothing."""
    anchors = task.anchors_for()
    config = TransMiterConfig.for_anchors(anchors, form="mlp", seed=task.gradient.seed)
    return AnchorClassifier(task.strong, anchors).add_adapter(config)


_UNTRAINED = {"class vectors": _own_vectors, "untrained TransMiter": _untrained}
_STARTS = {"refit": _refit, "TransMiter": _published, **_UNTRAINED}


def _names(kind: type, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    return tuple(item.name for item in fields(kind) if item.name not in without)


_VECTORS = {
    RowSettings: ("solver",),
    ExtractionConfig: ("shrinkage", "lambdas"),
    TransferConfig: ("zero_shot_weight",),
}
_REFIT = {
    RowSettings: ("solver",),
    ExtractionConfig: ("lambdas",),
    TransferConfig: ("zero_shot_weight", "parts", "even"),
}
_GRADIENT = {
    RowSettings: ("num_anchors", "num_auxiliary", "strategy"),
    ExtractionConfig: _names(ExtractionConfig, without=("solver", "shrinkage", "lambdas")),
    TransferConfig: ("beta", "beta_per_image"),
}


METHODS: dict[str, Method] = {
    "zero-shot weak": Method(lambda task, _: Answer(task.zero_shot_weak, 0), (WEAK,)),
    STRONG: Method(lambda task, _: Answer(task.zero_shot_strong, 0)),
    "tuned weak": Method(lambda task, _: Answer(task.tuned, stored_bytes(task.teacher)), (WEAK,)),
    "EFT": Method(_emulated, (WEAK,), models=3),
    "logit ensemble": Method(_ensemble, (WEAK,), models=2),
    "re-attached prompt": Method(_reattached),
    "copied LoRA": Method(_copied),
    "prompt transfer": Method(_prompt_transfer, (IMAGES, BACKPROP)),
    "distilled head": Method(lambda task, _: _head(task, "unlabelled", task.teacher_soft), (IMAGES, BACKPROP)),
    "linear probe": Method(_linear_probe, (LABELS, BACKPROP)),
    "TransMiter": Method(_published, (IMAGES, BACKPROP), _GRADIENT),  # as published
    # In closed form: what was tuned, over a bridge or fitted to what the models say of the task's images.
    FROM_TEXT: Method(_bridged("text"), (), _VECTORS),
    "bridge from general images": Method(_bridged("general"), (), _VECTORS),
    "given bridge": Method(_bridged("bridge"), (), _VECTORS),
    "bridge from task images": Method(_bridged("unlabelled"), (IMAGES,), _VECTORS),
    IMAGE_MAP: Method(_image_map, (IMAGES,), {**_REFIT, TransferConfig: ("zero_shot_weight", "even")}),
    "refit": Method(_refit, (IMAGES,), _REFIT),
    # The strong model tuned on what the models say of the task's images.
    "label-free tuning": Method(
        lambda task, variant: task.tune_on_experts(variant.settings),
        (IMAGES, BACKPROP),
        {TuningConfig: _names(TuningConfig, without=("shots",))},
        tunes=True,
    ),
    # A control: what the refit gains from images alone, with the zero-shot weak model in the tuned one's place.
    UNTUNED: Method(lambda task, variant: _refit(task, variant, untuned=True), (IMAGES,), _REFIT),
    # A few labelled steps on an adapter (TransMiter+).
    "label tuning": Method(
        _label_tuned,
        (LABELS, IMAGES, BACKPROP),
        {RowSettings: ("start",), LabelTuningConfig: _names(LabelTuningConfig)},
    ),
    # The ceiling: the strong model tuned on labels, as given or here.
    "tuned strong": Method(_tuned_strong, (LABELS, BACKPROP), {TuningConfig: _names(TuningConfig)}, tunes=True),
}
"""Every method by the name of its row, in the order of a table. Those that need labels have an advantage over those
that do not, and those that need the weak model at run time cost its time in every prediction."""
