"""[`BenchConfig`]: a grid of experiments in one YAML file, checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from ..data.catalogue import DatasetSpec, find_spec
from ..evaluation.methods import METHODS, Variant
from ..hub.checks import did_you_mean, read_yaml
from ..hub.repo import public_name
from ..method.tune import adapter_settings
from ..settings import check_choice, check_read, shortened, split_tuning
from .protocols import PROTOCOLS, parts


EXPERIMENTS = {"transfer": ("weak", "strong"), "upgrade": ("old", "new")}
"""What is measured, by what the two models of a pair are called."""
_READY = Path(__file__).parents[1] / "assets" / "bench"
_PUBLISHED = Path(__file__).parents[1] / "assets" / "published.yaml"


class Pair(NamedTuple):
    """Two models: Hub ids (``id@revision``), folders, ``sandbox:NAME`` or ``open_clip:NAME/WEIGHTS``."""

    weak: str
    strong: str

    def __str__(self) -> str:
        return f"{public_name(self.weak)} → {public_name(self.strong)}"


@dataclass(frozen=True)
class Tuning:
    """One way to tune.

    Args:
        name (`str`): of its rows.
        settings (`Mapping`): what [`split_tuning`] reads.
        per_dataset (`Mapping[str, Mapping]`, *optional*): other settings on single datasets, by name.
    """

    name: str
    settings: Mapping
    per_dataset: Mapping[str, Mapping] = field(default_factory=dict)

    def given(self, dataset: str) -> dict:
        """What is set of it on a dataset; the rest is open."""
        return {**self.settings, **self.per_dataset.get(dataset, {})}

    def on(self, dataset: str, shots: int, seed: int) -> dict:
        """Arguments of [`tune`] on a dataset, nothing left open.

        Raises:
            ValueError: an unknown setting or value.
        """
        settings = {**self.given(dataset), "shots": shots, "seed": seed}
        try:
            found = split_tuning(settings)
            adapter = adapter_settings(found["adapter"])
            return {"adapter": adapter, "config": found["config"].of(adapter["method"])}
        except (TypeError, ValueError) as error:  # a value of another kind, or an unknown one
            raise ValueError(f"the tuning {self.name!r}: {error}") from error


@dataclass(frozen=True)
class BenchConfig:
    """What a bench measures: the grid of model pairs, datasets, tunings, shots and seeds, and the rows of each cell.

    Args:
        title (`str`): of the report.
        models (`list[Pair]`): in YAML ``{weak: ..., strong: ...}``, or ``{old: ..., new: ...}`` of an upgrade.
        datasets (`list[DatasetSpec]`): in YAML what [`find_spec`] takes: a row of the catalogue, a mapping, a source.
        tunings (`list[Tuning]`):
            In YAML a `name`, the `method` with options of its PEFT configuration, the fields of [`TuningConfig`] but
            `shots` and `seed`, and under `per_dataset` other values on single datasets.
        experiment (`str`, *optional*, defaults to `"transfer"`):
            `"transfer"` tunes the weak model and scores every variant on the strong one. `"upgrade"` puts the prompts
            learnt on the old model into the new one as they are (ContCoOp, arXiv 2412.20895).
        protocol (`str`, *optional*, defaults to `"base-to-base"`): one of `PROTOCOLS`.
        train_on (`DatasetSpec`, *optional*):
            What is tuned on in the protocols that tune elsewhere, and for datasets without a train split.
        shots, seeds (`list[int]`, *optional*, defaults to `[16]` and `[1, 2, 3]`): as published.
        allow_fewer (`bool`, *optional*, defaults to `False`):
            Take all images of a class that has fewer than `shots`; without it such a dataset fails.
        skip_unreadable (`bool`, *optional*, defaults to `False`): leave out pictures that cannot be read.
        variants (`list[Variant]`, *optional*):
            Rows of a transfer: in YAML what [`Variant.of`] reads, such as ``refit`` or
            ``{refit: {solver: ridge}, name: mine}``; when omitted, all that a comparison runs without being asked.
        general (`str`, *optional*): any images, not the task's, for the bridge from general images.
        vocabulary (`str`, *optional*):
            Where auxiliary names and those of the bridge from text come from: what [`load_vocabulary`] takes, or
            ``"sandbox"``.
        num_anchors (`int`, *optional*): K of the published adapter; 1,024, or all there are, when omitted.
        retrain (`bool`, *optional*, defaults to `False`): upgrade: also tune the new model, as a ceiling.
        max_images (`int`, *optional*): of each split but `train`, drawn at random, always the same ones.
        published (`str`, *optional*): key of a table in `assets/published.yaml` to print beside what was measured.
        sweep (`str`, *optional*):
            Setting to draw curves over, such as ``"variants.beta"`` or ``"tuning.n_ctx"``.
        notes (`str`, *optional*): printed in the report.

    Raises:
        ValueError: a value that is not possible; the message names the nearest ones that are.
    """

    title: str
    models: tuple[Pair, ...]
    datasets: tuple[DatasetSpec, ...]
    tunings: tuple[Tuning, ...]
    experiment: str = "transfer"
    protocol: str = "base-to-base"
    train_on: DatasetSpec | None = None
    shots: tuple[int, ...] = (16,)
    seeds: tuple[int, ...] = (1, 2, 3)
    allow_fewer: bool = False
    skip_unreadable: bool = False
    variants: tuple[Variant, ...] = ()
    general: str | None = None
    vocabulary: str | None = None
    num_anchors: int | None = None
    retrain: bool = False
    max_images: int | None = None
    published: str | None = None
    sweep: str | None = None
    notes: str = ""

    def __post_init__(self):
        check_choice("experiment", self.experiment, tuple(EXPERIMENTS))
        check_choice("protocol", self.protocol, PROTOCOLS)
        for item in fields(self):
            value, (kind, wanted) = getattr(self, item.name), _KINDS.get(item.type, (object, ""))
            if value is not None and (not isinstance(value, kind) or kind is int and (value is True or value < 1)):
                raise ValueError(f"{item.name} must be {wanted}, got {shortened(value)}.")
        for name, least in (("shots", 1), ("seeds", 0)):
            for value in getattr(self, name):
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise ValueError(f"{name} must be whole numbers of at least {least}, got {shortened(value)}.")
        if self.experiment == "upgrade":
            check_read(self, "an upgrade", ("general", "vocabulary", "num_anchors"))
        if self.sweep is not None and not re.fullmatch(rf"({'|'.join(_SWEPT)})\.\w+", self.sweep):
            raise ValueError(f"sweep must be PART.SETTING with one of {', '.join(_SWEPT)}, got {self.sweep!r}.")
        for name in _LISTS:
            values = [getattr(value, "name", value) for value in getattr(self, name)]
            if not values and name != "variants":
                raise ValueError(f"{name} is empty: name at least one.")
            for value in values:
                if values.count(value) > 1:
                    raise ValueError(f"{name} has {value} twice: remove it, or give it another name.")
        for spec in self.datasets:
            parts(self.protocol, spec, self.train_on)
            for tuning in self.tunings:
                tuning.on(spec.name, self.shots[0], self.seeds[0])
        if self.published is not None:
            published_table(self.published)

    @classmethod
    def read(cls, source: str | os.PathLike) -> BenchConfig:
        """From a YAML file, or a ready configuration by name (see [`ready_configs`]).

        Raises:
            FileNotFoundError: neither; the message names the nearest ready ones.
            ValueError: not YAML, or not a configuration.
        """
        path = Path(source)
        if not path.is_file():
            path = _READY / f"{os.fspath(source)}.yaml"
            if path.parent != _READY or not path.is_file():
                near = did_you_mean(os.fspath(source), ready_configs())
                raise FileNotFoundError(f"there is no file and no ready configuration {os.fspath(source)!r}; {near}")
        content = read_yaml(path)
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    @classmethod
    def from_dict(cls, content: Mapping) -> BenchConfig:
        """From what a YAML file holds.

        Raises:
            ValueError: see [`BenchConfig`].
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"a configuration holds 'key: value' lines, not a {type(content).__name__}.")
        values = {key: value for key, value in content.items() if value is not None}  # a key with nothing behind it
        known = [item.name for item in fields(cls)]
        unknown = next((key for key in values if key not in known), None)
        if unknown is not None:
            raise ValueError(f"there is no key {unknown!r}; {did_you_mean(str(unknown), known)}")
        for name, hint in _REQUIRED.items():
            if not values.get(name):
                raise ValueError(f"{name!r} is missing{hint}.")
        experiment = values.get("experiment", "transfer")
        check_choice("experiment", experiment, tuple(EXPERIMENTS))
        if experiment == "transfer":
            values["variants"] = values.get("variants") or [name for name in METHODS if name != "given bridge"]
        elif values.get("variants"):
            raise ValueError("variants are rows of a transfer; an upgrade has one row per tuning.")
        if "train_on" in values:
            values["train_on"] = find_spec(values["train_on"])
        makers = {"models": partial(_pair, roles=EXPERIMENTS[experiment])}
        makers |= {"datasets": find_spec, "tunings": _tuning, "variants": Variant.of}
        for name in _LISTS:
            if not isinstance(values.get(name, ()), (list, tuple)):
                raise ValueError(f"{name} must be a list, got {shortened(values[name])}.")
            if name in values:
                values[name] = tuple(makers[name](entry) if name in makers else entry for entry in values[name])
        return cls(**values)

    def with_overrides(
        self,
        datasets: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        shots: Sequence[int] | None = None,
    ) -> BenchConfig:
        """The same on other datasets (names of the configuration's own first, then what [`find_spec`] takes), with
        other seeds or shots."""
        own = {spec.name: spec for spec in self.datasets}
        specs = [own[name] if name in own else find_spec(name) for name in datasets or ()]
        changed = {"datasets": specs, "seeds": seeds, "shots": shots}
        return replace(self, **{name: tuple(values) for name, values in changed.items() if values})


_LISTS = ("models", "datasets", "tunings", "variants", "shots", "seeds")
_KINDS = {
    "str": (str, "a text"),
    "str | None": (str, "a text"),
    "bool": (bool, "true or false"),
    "int | None": (int, "a whole number of at least 1"),
}
_SWEPT = ("tuning", "variants")
_REQUIRED = {
    "title": "",
    "models": ": list pairs such as {weak: openai/clip-vit-base-patch16, strong: openai/clip-vit-large-patch14}",
    "datasets": ": list names such as dtd, folders or Hub ids",
    "tunings": ": list settings such as {name: CoOp, method: coop}",
}


def ready_configs() -> dict[str, str]:
    """Names and titles of the configurations that come with the package."""
    return {path.stem: _load_yaml(path)["title"] for path in sorted(_READY.glob("*.yaml"))}


@lru_cache
def _load_yaml(path: Path) -> dict:
    """A file that comes with the package."""
    return read_yaml(path)


def published_table(key: str) -> dict:
    """Published scores, in percent: `title`, `source`, `datasets`, `shots`, `average` (by row and metric) and, where
    they are known, `per_dataset`.

    Raises:
        ValueError: no such table; the message names the nearest.
    """
    tables = _load_yaml(_PUBLISHED)
    if key not in tables:
        raise ValueError(f"there are no published scores {key!r}; {did_you_mean(key, tables)}")
    return tables[key]


def digest(facts) -> str:
    """Twelve hex digits of anything JSON can write."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=dict).encode()).hexdigest()[:12]


def _pair(entry, roles: tuple[str, str]) -> Pair:
    if not isinstance(entry, Mapping) or set(entry) != set(roles):
        raise ValueError(f"a pair of models is {{{roles[0]}: ..., {roles[1]}: ...}}, got {shortened(entry)}.")
    return Pair(*(os.path.expandvars(str(entry[role])) for role in roles))


def _tuning(entry) -> Tuning:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("per_dataset") or {}, Mapping):
        raise ValueError(f"a tuning is a mapping such as {{name: CoOp, method: coop}}, got {shortened(entry)}.")
    settings = dict(entry)
    own = settings.pop("per_dataset", None) or {}
    name = str(settings.pop("name", settings.get("method", "lora")))
    for key in ("shots", "seed"):
        if any(key in values for values in (settings, *own.values())):
            raise ValueError(f"{key} of the tuning {name!r}: list values under {'seeds' if key == 'seed' else key}.")
    return Tuning(name, settings, own)
