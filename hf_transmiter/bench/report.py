"""[`write_bench_report`]: tables and figures of a bench, from its finished cells alone: two runs write the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..evaluation import figures
from ..evaluation.drift import LayerDrift, drift_table
from ..evaluation.methods import LABELS, WEAK
from ..evaluation.report import Section, write_report
from ..evaluation.upgrade import MODELS, ZERO_SHOT
from ..hub.repo import public_name
from ..hub.scores import Score, cell_text, column, shown, table
from .cells import Cell, cells, read_cell, read_failure, slug
from .config import BenchConfig, Pair, published_table
from .protocols import Summary, summarise


_HALVES = tuple(f"{model} {metric}" for model in ("old", "upgraded") for metric in ("base", "novel", "hm"))
_COLUMNS = ("base", "novel", "hm", "joint", "accuracy", "ece", "old", "upgraded", "h", "retrained", *_HALVES)
_TITLES = {"hm": "HM", "h": "H (old, upgraded)", "ece": "ECE"}
_PARTIAL = "†"
_MAIN = ("hm", "h", "accuracy")
"""The metric of figures and of the first table per dataset: the first of these there is."""
_DRIFT = (
    "What the upgrade changed in the text tower, as it says 200 common nouns: mean distance of hidden states at the "
    "pooled token, the same as a share of the old size, and similarity (linear CKA)."
)


@dataclass
class Row:
    """A method over all seeds and datasets of a group: its scores by dataset, seed and metric, some of [`NEEDS`], and
    datasets by the reason why it could not be scored on them, or by remarks."""

    name: str
    measured: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)
    reasons: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(self, found: Mapping, cell: Cell) -> None:
        """What a cell says about it."""
        for text in filter(None, map(found.get, ("skipped", "failed", "remark"))):
            self.reasons.setdefault(text, {})[cell.spec.name] = None
        if found.get("metrics"):
            self.measured.setdefault(cell.spec.name, {})[cell.seed] = found["metrics"]
            self.needs = list(found.get("needs", ()))

    @property
    def metrics(self) -> set[str]:
        return {metric for seeds in self.measured.values() for scores in seeds.values() for metric in scores}

    def summary(self, datasets: Iterable[str]) -> dict[str, Summary]:
        """Averages over those of the datasets it was scored on."""
        return summarise({name: self.measured[name] for name in datasets if name in self.measured})


@dataclass
class Group:
    """What is compared in one table: the same models, tuning and shots (of an upgrade: the same models and shots)."""

    pair: Pair
    tuning: str | None
    shots: int
    rows: dict[str, Row] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    drift: list[LayerDrift] = field(default_factory=list)

    def title(self, config: BenchConfig) -> str:
        """What sets it apart from the others."""
        words = [str(self.pair)]
        words += [self.tuning] if self.tuning and len(config.tunings) > 1 else []
        words += [f"{self.shots} shots"] if len(config.shots) > 1 else []
        return ", ".join(words)

    @property
    def metrics(self) -> list[str]:
        """Metrics that are shown, in their order."""
        known = {metric for row in self.rows.values() for metric in row.metrics}
        return [m for m in _COLUMNS if m in known and not (m == "accuracy" and "joint" in known)]

    @property
    def main(self) -> str:
        return next(metric for metric in _MAIN if metric in self.metrics)

    def whole(self, row: Row) -> bool:
        """Whether a row was scored on all of its datasets."""
        return all(name in row.measured for name in self.datasets)


def gather(config: BenchConfig, output_dir: Path) -> list[Group]:
    """Rows of all finished cells, by what is compared with each other."""
    upgrade, groups = config.experiment == "upgrade", {}
    for cell in cells(config):
        content = read_cell(output_dir, cell)
        if content is None:
            continue
        key = (cell.pair, None if upgrade else cell.tuning.name, cell.shots)
        group = groups.setdefault(key, Group(*key))
        group.datasets = tuple(dict.fromkeys((*group.datasets, cell.spec.name)))
        group.drift = [LayerDrift(**row) for row in content.get("drift", ())]
        for name, found in content["rows"].items():
            group.rows.setdefault(name, Row(name)).add(found, cell)
    return [group for group in groups.values() if any(row.measured for row in group.rows.values())]


def write_bench_report(config: BenchConfig, output_dir: str | os.PathLike) -> Path:
    """Writes `report.md`, whose path it returns, and `figures/` from the finished cells of a configuration.

    Raises:
        FileNotFoundError: no cell is finished.
    """
    output = Path(output_dir)
    groups = gather(config, output)
    if not groups:
        raise FileNotFoundError(f"there is no finished cell of this configuration in {output}: run it first.")
    folder, sections = output / "figures", []
    for stale in folder.glob("*.png"):
        stale.unlink()
    for number, group in enumerate(groups, 1):
        title = group.title(config)
        # Numbered, since what sets long titles apart may be at their end.
        drawn = list(_draw(group, config, folder / f"{number}-{slug(title)}"))
        sections.append(Section(title, "\n\n".join(_tables(group, config)), figures=drawn))
    sections.append(Section("Over the number of shots", figures=list(_draw_over_shots(groups, config, folder))))
    intro = "\n\n".join([config.notes.strip(), *_progress(config, output)])
    return write_report(output, sections, title=config.title, intro=intro)


def _progress(config: BenchConfig, output: Path) -> Iterator[str]:
    every = list(cells(config))
    missing = [cell for cell in every if read_cell(output, cell) is None]
    yield (
        f"{len(every) - len(missing)} of {len(every)} cells ({config.protocol}; {config.experiment}). Values in "
        "percent: mean over seeds per dataset, then over datasets; harmonic means are of the averages; ± standard "
        "deviation over seeds. Bold: best of the methods that need neither labels nor the weak model at run time."
    )
    failed = [f"- {cell}: {cell_text(message)}" for cell in missing if (message := read_failure(output, cell))]
    if failed:
        yield "\n".join(["Failed:", "", *failed])


def _tables(group: Group, config: BenchConfig) -> Iterator[str]:
    published = published_table(config.published) if config.published else {}
    if published and published["shots"] != group.shots:
        yield f"Published scores are of {published['shots']} shots, and left out here."
        published = {}
    yield _averages(group, config, published.get("average", {}))
    if published:
        known = [name for name in published["datasets"] if name in group.datasets]
        yield (
            f"Published: {published['title']} ({published['source']}), average of {len(published['datasets'])} "
            f"datasets. What was measured here goes over {len(group.datasets)}, {len(known)} of them among those."
        )
        yield from published.get("remarks", ())
    reasons = [
        f"- {row.name}: {cell_text(text)} ({', '.join(map(public_name, names))})"
        for row in group.rows.values()
        for text, names in row.reasons.items()
    ]
    if reasons:
        yield "\n".join(["Remarks:", "", *reasons])
    if len(group.datasets) > 1 or "per_dataset" in published:
        for metric in sorted(group.metrics, key=lambda metric: metric != group.main):
            yield f"### {_title(metric)}, by dataset"
            yield _by_dataset(group, metric, published.get("per_dataset", {}))
    if group.drift:
        yield from ("### The text tower", _DRIFT, drift_table(group.drift).strip())


def _averages(group: Group, config: BenchConfig, stated: Mapping[str, Mapping[str, float]]) -> str:
    rows = {name: row for name, row in group.rows.items() if row.measured}
    names = list(dict.fromkeys([*rows, *stated]))
    partial = [row for row in rows.values() if not group.whole(row)]
    columns = {"method": [cell_text(name) + f" {_PARTIAL}" * (rows.get(name) in partial) for name in names]}
    columns |= {_title(metric): _column(group, names, metric) for metric in group.metrics}
    for metric in group.metrics:
        if any(metric in values for values in stated.values()):
            columns[f"published {_title(metric)}"] = [shown(stated.get(name, {}).get(metric), ".2f") for name in names]
    if config.experiment == "transfer":
        needs = {name: ", ".join(row.needs) for name, row in rows.items()}
        columns["needs"] = [needs.get(name, "") for name in names]
    if not partial:
        return _table(columns)
    shares = ", ".join(f"{row.name}: {len(row.measured)} of {len(group.datasets)}" for row in partial)
    note = f"{_PARTIAL} Averaged over fewer datasets, not to be compared with the others ({shares})."
    return f"{_table(columns)}\n\n{note}"


def _column(group: Group, names: Sequence[str], metric: str) -> list[str]:
    """Averages over the datasets of a group, the best of what can be compared in bold."""
    rows = [group.rows.get(name, Row(name)) for name in names]
    scores = dict.fromkeys(names)
    for row in rows:
        if one := row.summary(group.datasets).get(metric):
            scores[row.name] = Score(row.name, "", metric, one.value, one.std, seeds=len(one.by_seed))
    apart = [row.name for row in rows if not group.whole(row) or {LABELS, WEAK} & {*row.needs}]
    return column(scores, None, apart, metric, digits=2)


def _by_dataset(group: Group, metric: str, stated: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    names = [row.name for row in group.rows.values() if metric in row.metrics]
    told = {name: found for name, found in stated.items() if any(metric in values for values in found.values())}
    columns = {"method": [*map(cell_text, names), *(f"{name}, published" for name in told)]}
    for dataset in group.datasets:
        published = [shown(found.get(dataset, {}).get(metric), ".2f") for found in told.values()]
        columns[public_name(dataset)] = _column(replace(group, datasets=(dataset,)), names, metric) + published
    return _table(columns)


def _draw(group: Group, config: BenchConfig, stem: Path) -> Iterator[Path | None]:
    """The figures of a group; their names begin with `stem`."""
    title, count = f"{config.title}: {group.title(config)}", len(group.datasets)
    what = _title(group.main) + (f", mean of {count} datasets" if count > 1 else "")
    whole = {row.name: row.summary(group.datasets) for row in group.rows.values() if group.whole(row)}
    main = {name: found[group.main] for name, found in whole.items() if group.main in found}
    references = (ZERO_SHOT,) if config.experiment == "upgrade" else ("zero-shot strong", "tuned weak")
    lines = {name: main[name].value for name in references if name in main}
    if config.experiment == "upgrade":
        yield _upgrade_bars(group, Path(f"{stem}-upgrade.png"), title)
    else:
        by_seed = {name: found.seeds for name, found in main.items()}
        yield figures.bars(by_seed, Path(f"{stem}-methods.png"), title=f"{title} ({what})", reference=lines)
    series = _swept(config, main) if config.sweep else {}
    if series:
        path, xlabel = Path(f"{stem}-{slug(config.sweep)}.png"), config.sweep.split(".")[-1].replace("_", " ")
        options = {"xlabel": xlabel, "ylabel": f"{what} (%)", "reference": lines}
        scale = "linear" if any(x == 0 for points in series.values() for x, *_ in points) else "log"
        yield figures.curves(series, path, title=title, xscale=scale, **options)


def _swept(config: BenchConfig, main: Mapping[str, Summary]) -> dict[str, list[tuple]]:
    """Points (x, mean, std) of the rows that have the swept setting, by method; infinity is left to the table."""
    part, setting = config.sweep.split(".")
    if part == "tuning":
        swept = [(tuning.name, tuning.settings) for tuning in config.tunings]
    else:
        swept = [(each.name, {"method": each.method, **each.settings}) for each in config.variants]
    known = [(each, main[name]) for name, each in swept if name in main]
    return _lines(
        (str(each.get("method", "lora")), each[setting], found)
        for each, found in known
        if isinstance(each.get(setting), (int, float)) and each[setting] < float("inf")
    )


def _lines(points: Iterable[tuple[str, float, Summary]]) -> dict[str, list[tuple[float, float, float]]]:
    """Points (x, mean, std) by the name of their line; one point alone makes none."""
    series: dict[str, list[tuple[float, float, float]]] = {}
    for name, x, found in points:
        series.setdefault(name, []).append((float(x), found.value, found.std))
    return {name: line for name, line in series.items() if len(line) > 1}


def _upgrade_bars(group: Group, path: Path, title: str) -> Path | None:
    rows, floors = {}, {}
    for row in group.rows.values():
        found = {name: one for name, one in row.summary(group.datasets).items() if name in MODELS}
        if row.name == ZERO_SHOT:
            floors = {f"zero-shot, {MODELS[name]}": one.value for name, one in found.items()}
        elif found:
            rows[row.name] = {name: one.seeds for name, one in found.items()}
    return figures.compatibility_figure(rows, path, floors, title=title) if rows else None


def _draw_over_shots(groups: Sequence[Group], config: BenchConfig, folder: Path) -> Iterator[Path | None]:
    alike = dict.fromkeys((group.pair, group.tuning) for group in groups)
    for number, (pair, tuning) in enumerate(alike if len(config.shots) > 1 else (), 1):
        same = [group for group in groups if (group.pair, group.tuning) == (pair, tuning)]
        series = _lines(
            (row.name, group.shots, found)
            for group in same
            for row in group.rows.values()
            if (found := row.summary(group.datasets).get(group.main)) is not None
        )
        if series:
            title = f"{config.title}: {', '.join(filter(None, [str(pair), tuning]))}"
            options = {"xlabel": "shots per class", "ylabel": f"{_title(same[0].main)} (%)"}
            yield figures.curves(series, folder / f"shots-{number}.png", title=title, **options)


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    return table(list(columns), zip(*columns.values(), strict=True))


def _title(metric: str) -> str:
    return _TITLES.get(metric, metric)
