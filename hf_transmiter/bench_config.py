"""[`BenchConfig`]: a grid of experiments in one YAML file, checked before anything runs."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path

import yaml

from .dataset_specs import DatasetSpec, find_spec
from .hub import public_name
from .methods import METHODS, Variant
from .protocols import ELSEWHERE, PROTOCOLS, parts
from .settings import TuningConfig, check_choice


EXPERIMENTS = {"transfer": ("weak", "strong"), "upgrade": ("old", "new")}
"""What is measured, by what the two models of a pair are called."""
_READY = Path(__file__).parent / "assets" / "bench"
_PUBLISHED = Path(__file__).parent / "assets" / "published.yaml"


@dataclass(frozen=True)
class Pair:
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
        settings (`Mapping`): fields of [`TuningConfig`].
        per_dataset (`Mapping[str, Mapping]`, *optional*): other settings on single datasets, by name.
    """

    name: str
    settings: Mapping
    per_dataset: Mapping[str, Mapping] = field(default_factory=dict)

    def config(self, dataset: str, shots: int, seed: int) -> TuningConfig:
        """
        Raises:
            ValueError: an unknown field or value.
        """
        settings = {**self.settings, **self.per_dataset.get(dataset, {}), "shots": shots, "seed": seed}
        known = [item.name for item in fields(TuningConfig)]
        _check_names(settings, known, f"setting of the tuning {self.name!r}")
        if isinstance(settings.get("adapter"), list):
            settings["adapter"] = tuple(settings["adapter"])
        try:
            return TuningConfig(**settings)
        except TypeError as error:
            raise ValueError(f"the settings of the tuning {self.name!r} are of the wrong kind: {error}.") from error


@dataclass(frozen=True)
class BenchConfig:
    """What a bench measures: the grid of model pairs, datasets, tunings, shots and seeds, and the rows of each cell.

    Args:
        title (`str`): of the report.
        models (`list[Pair]`): in YAML ``{weak: ..., strong: ...}``, or ``{old: ..., new: ...}`` of an upgrade.
        datasets (`list[DatasetSpec]`): in YAML what [`find_spec`] takes: a row of the catalogue, a mapping, a source.
        tunings (`list[Tuning]`):
            In YAML the fields of [`TuningConfig`] but `shots` and `seed`, a `name`, and under `per_dataset` other
            values on single datasets.
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
            Setting to draw curves over, such as ``"transfer.beta"`` (of variants) or ``"tuning.n_ctx"``.
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
        for name in ("models", "datasets", "tunings", "shots", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one.")
        for name, kind in _KINDS.items():
            if getattr(self, name) is not None and not isinstance(getattr(self, name), kind):
                wanted = "true or false" if kind is bool else "a text"
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}.")
        if self.sweep is not None and not re.fullmatch(rf"({'|'.join(_SWEPT)})\.\w+", self.sweep):
            raise ValueError(f"sweep must be PART.SETTING with one of {', '.join(_SWEPT)}, got {self.sweep!r}.")
        for name in ("shots", "seeds"):
            _check_numbers(name, getattr(self, name), least=name == "shots")
        for name in ("max_images", "num_anchors"):
            if getattr(self, name) is not None:
                _check_numbers(name, (getattr(self, name),), least=1)
        for name, values in {
            "models": [f"{pair.weak} → {pair.strong}" for pair in self.models],
            "datasets": [spec.name for spec in self.datasets],
            "tunings": [tuning.name for tuning in self.tunings],
            "variants": [variant.name for variant in self.variants],
            **{name: getattr(self, name) for name in ("shots", "seeds")},
        }.items():
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"{name} has {twice!r} twice: remove it, or give it another name.")
        if self.protocol in ELSEWHERE and self.train_on is None:
            raise ValueError(f"{self.protocol} tunes on another dataset: name it with train_on.")
        for spec in self.datasets:
            parts(self.protocol, spec, self.train_on)
            for tuning in self.tunings:
                tuning.config(spec.name, self.shots[0], self.seeds[0])
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
                near = nearest(os.fspath(source), ready_configs())
                raise FileNotFoundError(
                    f"there is no file {os.fspath(source)!r} and no ready configuration of that name{near}."
                )
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
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
        _check_names(values, [item.name for item in fields(cls)], "key")
        for item in fields(cls):
            if item.default is MISSING and not values.get(item.name):
                raise ValueError(f"{item.name!r} is missing{_HINTS.get(item.name, '')}.")
        for name in ("models", "datasets", "tunings", "variants", "shots", "seeds"):
            if name in values and not isinstance(values[name], (list, tuple)):
                raise ValueError(f"{name} must be a list, got {values[name]!r}.")
        experiment = values.get("experiment", "transfer")
        check_choice("experiment", experiment, tuple(EXPERIMENTS))
        values["models"] = tuple(_pair(entry, EXPERIMENTS[experiment]) for entry in values["models"])
        values["datasets"] = tuple(find_spec(entry) for entry in values["datasets"])
        if values.get("train_on") is not None:
            values["train_on"] = find_spec(values["train_on"])
        values["tunings"] = tuple(map(_tuning, values["tunings"]))
        if experiment == "transfer":
            values["variants"] = tuple(map(Variant.of, values.get("variants") or _USUAL))
        elif values.get("variants"):
            raise ValueError("variants are rows of a transfer; an upgrade has one row per tuning.")
        values["shots"], values["seeds"] = (tuple(values.get(k, getattr(cls, k))) for k in ("shots", "seeds"))
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
        changed = {
            "datasets": tuple(own[name] if name in own else find_spec(name) for name in datasets or ()),
            "seeds": tuple(seeds or ()),
            "shots": tuple(shots or ()),
        }
        return replace(self, **{name: value for name, value in changed.items() if value})

    def encoders(self) -> tuple[str, ...]:
        """Names of all models, each once."""
        return tuple(dict.fromkeys(name for pair in self.models for name in (pair.weak, pair.strong)))

    def specs(self) -> tuple[DatasetSpec, ...]:
        """All datasets, each once: those that are scored, and what is tuned on."""
        every = {spec.name: spec for spec in self.datasets}
        if self.train_on is not None:
            every.setdefault(self.train_on.name, self.train_on)
        return tuple(every.values())

    @cached_property
    def spec_facts(self) -> dict[str, dict]:
        """By dataset: where it is, and a digest of all that its images and labels depend on."""
        found = {}
        for spec in self.specs():
            facts = {key: value for key, value in asdict(spec).items() if key not in _SAID_ONLY}
            found[spec.name] = {"source": spec.source, "revision": spec.revision, "digest": digest(facts)}
        return found

    @cached_property
    def roles(self) -> tuple[str, str]:
        """What the two models of a pair are called."""
        return EXPERIMENTS[self.experiment]


_USUAL = tuple(name for name in METHODS if name != "given bridge")
_KINDS = dict.fromkeys(("allow_fewer", "skip_unreadable", "retrain"), bool)
_KINDS |= dict.fromkeys(("title", "notes", "general", "vocabulary", "sweep"), str)
_SWEPT = ("tuning", "extraction", "transfer", "anchors", "label_tuning")
_SAID_ONLY = ("name", "title", "counts", "rows", "notes")
_HINTS = {
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
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def published_table(key: str) -> dict:
    """Published scores, in percent: `title`, `source`, `datasets`, `shots`, `average` (by row and metric) and, where
    they are known, `per_dataset`.

    Raises:
        ValueError: no such table; the message names the nearest.
    """
    tables = _load_yaml(_PUBLISHED)
    if key not in tables:
        raise ValueError(f"there are no published scores {key!r}{nearest(key, tables)}.")
    return tables[key]


def digest(facts) -> str:
    """Twelve hex digits of anything JSON can write."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=dict).encode()).hexdigest()[:12]


def nearest(name: object, known: Collection[str]) -> str:
    """``"; did you mean ...?"``, or all there are."""
    found = difflib.get_close_matches(str(name), list(known), 3, 0.5)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else f"; there are {', '.join(known)}"


def _check_names(given: Collection[str], known: Collection[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}{nearest(name, known)}.")


def _check_numbers(name: str, values: Sequence, least: int) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be whole numbers of at least {int(least)}, got {value!r}.")


def _pair(entry, roles: tuple[str, str]) -> Pair:
    if not isinstance(entry, Mapping) or set(entry) != set(roles):
        raise ValueError(f"a pair of models is {{{roles[0]}: ..., {roles[1]}: ...}}, got {entry!r}.")
    return Pair(*(os.path.expandvars(str(entry[role])) for role in roles))


def _tuning(entry) -> Tuning:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("per_dataset") or {}, Mapping):
        raise ValueError(f"a tuning is a mapping such as {{name: CoOp, method: coop}}, got {entry!r}.")
    settings = dict(entry)
    own = settings.pop("per_dataset", None) or {}
    name = str(settings.pop("name", settings.get("method", "lora")))
    for key in ("shots", "seed"):
        if any(key in values for values in (settings, *own.values())):
            raise ValueError(f"{key} of the tuning {name!r}: list values under {'seeds' if key == 'seed' else key}.")
    return Tuning(name, settings, own)
