"""Published protocols as plain facts: which images train, which are unlabelled, which are scored, and how scores of
seeds and datasets become one number.

Few-shot and base-to-base tune on all classes and score all of them. Base-to-novel (CoCoOp, arXiv 2203.05557) tunes on
the first half of the classes, with unlabelled images of that half only, and scores either half among its own names.
Cross-dataset and domain generalisation (CoOp, arXiv 2109.01134) tune on one dataset and ask the tuned model about the
names of another.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from datasets import ClassLabel, Dataset

from ..data.catalogue import DatasetSpec
from ..data.splits import base_names, few_shot
from ..evaluation.evaluate import harmonic_mean


PROTOCOLS = ("base-to-base", "base-to-novel", "few-shot", "cross-dataset", "domain-generalisation")
ELSEWHERE = ("cross-dataset", "domain-generalisation")
"""Protocols that tune on another dataset than the one that is scored."""


class Part(NamedTuple):
    """Some images of a protocol; `role` is `"train"`, `"unlabelled"` or `"test"`."""

    spec: DatasetSpec
    role: str
    base_only: bool = False


class Parts(NamedTuple):
    """All images of one cell: labelled ones the few shots are drawn from, what is transferred on, what is scored."""

    train: Part
    unlabelled: Part
    test: Part

    @property
    def elsewhere(self) -> bool:
        """Whether the tuning saw other classes than those that are scored."""
        return self.train.spec != self.test.spec


def parts(protocol: str, target: DatasetSpec, source: DatasetSpec | None = None) -> Parts:
    """Which images a protocol takes from where.

    Args:
        target: what is scored.
        source: what is tuned on in the protocols `ELSEWHERE`; in the others only for targets without a train split.

    Raises:
        ValueError: an unknown protocol, no dataset to tune on, a target without a test split, or without a train split
            of its own in base-to-novel.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}.")
    if target.test is None:
        raise ValueError(f"the dataset {target.name!r} has no test split, so that nothing can be scored on it.")
    tuned_on = source if protocol in ELSEWHERE or (target.train is None and source is not None) else target
    if tuned_on is None:
        raise ValueError(f"{protocol} tunes on another dataset: name it with train_on.")
    if tuned_on.train is None:
        raise ValueError(f"{tuned_on.name!r} has no train split: name a dataset that has one with train_on.")
    base_only = protocol == "base-to-novel"
    if base_only and tuned_on is not target:
        raise ValueError(f"{target.name!r} has no train split, so that its base classes cannot be tuned on.")
    unlabelled = target if target.train is not None else tuned_on
    return Parts(Part(tuned_on, "train", base_only), Part(unlabelled, "unlabelled", base_only), Part(target, "test"))


def only_base(images: Dataset) -> Dataset:
    """The images of the base classes; their labels keep their numbers.

    Args:
        images: with a `ClassLabel` column `label` in the order of the published halves.

    Raises:
        ValueError: no labels, or no image of a base class.
    """
    if "label" not in images.features:
        raise ValueError("images without labels: those of the base classes cannot be told from the others.")
    base = base_names(images.features["label"].names)
    rows = [row for row, label in enumerate(images["label"][:]) if 0 <= label < len(base)]
    if not rows:
        raise ValueError("there is no image of a base class.")
    return images.select(rows).cast_column("label", ClassLabel(names=list(base)))


def draw(images: Dataset, shots: int, seed: int, *, allow_fewer: bool = False) -> Dataset:
    """The few shots of every class, and what [`few_shot`] raises: draws among the base classes are part of the draws
    among all, so cells of different protocols share them, as published."""
    count = len(images.features["label"].names)
    return images.select(few_shot(images["label"][:], shots, seed, count, allow_fewer=allow_fewer))


@dataclass(frozen=True)
class Summary:
    """One method's score, as papers print it: percent, and the same of single seeds, those that all datasets have."""

    value: float
    by_seed: dict[int, float]

    @property
    def seeds(self) -> list[float]:
        """Scores of the single seeds; the score itself where the datasets share none."""
        return list(self.by_seed.values()) or [self.value]

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds, 0 with fewer than two."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else 0.0


def summarise(measured: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, Summary]:
    """The published aggregation: mean over seeds per dataset, then mean over datasets.

    ``A = 1/D Σ_d 1/S_d Σ_s a_ds`` with a_ds the score of seed s on dataset d. Of `hm` (base and novel classes) and `h`
    (old and upgraded model) the harmonic mean of the two averages, never an average of harmonic means. The spread is
    that of the averages over datasets of single seeds, over seeds all datasets have.

    Args:
        measured: scores by dataset, seed and metric.

    Returns:
        `dict[str, Summary]`: by metric, in the order of first appearance, without those that some dataset lacks.
    """
    every = [metrics for seeds in measured.values() for metrics in seeds.values()]
    names = [metric for metric in (every[0] if every else ()) if all(metric in metrics for metrics in every)]
    shared = sorted(set.intersection(*map(set, measured.values()))) if every else []
    seeds = {name: {seed: _average(measured, name, [seed]) for seed in shared} for name in names}
    return {name: Summary(_average(measured, name), seeds[name]) for name in names}


def _average(measured: Mapping, metric: str, seeds: Sequence[int] | None = None) -> float:
    if metric == "h":
        return harmonic_mean(*(_average(measured, model, seeds) for model in ("old", "upgraded")))
    if metric.endswith("hm"):  # of classes; also "old hm" and so on
        return harmonic_mean(*(_average(measured, metric[:-2] + half, seeds) for half in ("base", "novel")))
    by_dataset = [statistics.fmean(found[seed][metric] for seed in seeds or found) for found in measured.values()]
    return statistics.fmean(by_dataset)
