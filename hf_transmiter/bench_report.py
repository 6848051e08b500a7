"""[`write_bench_report`]: tables and figures of a bench, from its finished cells alone.

`report.md` holds what does not depend on the machine, so that two runs of one configuration write the same; what the
methods cost goes to `costs.md`.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import figures
from .bench_config import BenchConfig, Pair, published_table
from .bench_figures import base_novel_figure
from .bench_plan import Cell, cells, read_cell, read_failure, slug
from .files import replace_file
from .hub import public_name
from .protocols import Measured, Summary, summarise
from .scores import NOTHING
from .upgrade_figures import compatibility_figure, context_length_figure


_NEEDS = {
    "labels": "labels",
    "task_images": "task images",
    "backprop": "backprop",
    "weak_at_run_time": "weak model at run time",
}
_COLUMNS = ("base", "novel", "hm", "joint", "accuracy", "ece", "old", "upgraded", "h", "retrained")
_TITLES = {"hm": "HM", "h": "H (old, upgraded)", "ece": "ECE"}
_PARTIAL = "†"
_LOWER = ("ece",)
"""Metrics of which less is better."""
_MAIN = ("hm", "h", "accuracy")
"""The metric of figures and of the first table per dataset: the first of these there is."""


@dataclass
class Row:
    """A method over all seeds and datasets of a group.

    Args:
        name (`str`): of the row.
        measured (`dict`): scores by dataset, seed and metric.
        needs (`str`): what it asks for.
        costs (`list[dict]`): of every cell: seconds, peak_mb, bytes.
        reasons (`dict[str, list[str]]`): datasets by the reason why it could not be scored on them, and remarks.
    """

    name: str
    measured: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    needs: str = ""
    costs: list[dict] = field(default_factory=list)
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def summary(self, datasets: Sequence[str]) -> dict[str, Summary]:
        """Averages over those of the datasets it was scored on."""
        return average({name: self.measured[name] for name in datasets if name in self.measured})

    @property
    def fair(self) -> bool:
        """Whether it has no advantage over the others."""
        return not any(need in self.needs for need in (_NEEDS["labels"], _NEEDS["weak_at_run_time"]))


@dataclass
class Group:
    """What is compared in one table: the same models, tuning and shots (of an upgrade: the same models and shots)."""

    pair: Pair
    tuning: str | None
    shots: int
    rows: dict[str, Row]
    datasets: tuple[str, ...]

    def title(self, config: BenchConfig) -> str:
        """What sets it apart from the others."""
        words = [str(self.pair)]
        words += [self.tuning] if self.tuning and len(config.tunings) > 1 else []
        words += [f"{self.shots} shots"] if len(config.shots) > 1 else []
        return ", ".join(words)

    @property
    def metrics(self) -> list[str]:
        """Metrics that are shown, in their order."""
        known = {m for row in self.rows.values() for s in row.measured.values() for found in s.values() for m in found}
        shown = [metric for metric in _COLUMNS if metric in known]
        return [metric for metric in shown if metric != "accuracy" or "joint" not in shown]

    @property
    def main(self) -> str:
        return next(metric for metric in _MAIN if metric in self.metrics)


def average(measured: Measured) -> dict[str, Summary]:
    """[`summarise`], empty where there is nothing."""
    return summarise(measured) if measured else {}


def gather(config: BenchConfig, output_dir: str | os.PathLike) -> list[Group]:
    """Rows of all finished cells, by what is compared with each other."""
    upgrade, groups = config.experiment == "upgrade", {}
    for cell in cells(config):
        content = read_cell(output_dir, cell)
        if content is None:
            continue
        key = (cell.pair, None if upgrade else cell.tuning.name, cell.shots)
        group = groups.setdefault(key, Group(*key, {}, ()))
        group.datasets = tuple(dict.fromkeys((*group.datasets, cell.spec.name)))
        for name, digest in cell.rows.items():
            if digest in content["rows"]:
                _add(group.rows.setdefault(name, Row(name)), content["rows"][digest], cell)
    return [group for group in groups.values() if any(row.measured for row in group.rows.values())]


def _add(row: Row, found: Mapping, cell: Cell) -> None:
    for text in (found.get("skipped"), found.get("remark")):
        if text:
            row.reasons.setdefault(text, [])
            row.reasons[text] += [cell.spec.name] * (cell.spec.name not in row.reasons[text])
    if not found.get("metrics"):
        return
    row.measured.setdefault(cell.spec.name, {})[cell.seed] = found["metrics"]
    row.needs = ", ".join(text for need, text in _NEEDS.items() if (found.get("needs") or {}).get(need))
    if "seconds" in found:  # a finished model's are not known
        row.costs.append({name: found.get(name) for name in ("seconds", "peak_mb", "bytes")})


def write_bench_report(config: BenchConfig, output_dir: str | os.PathLike) -> Path:
    """Writes `report.md`, `costs.md` and `figures/` from the finished cells of a configuration.

    Returns:
        `Path`: of `report.md`.

    Raises:
        FileNotFoundError: no cell is finished.
    """
    output, groups = Path(output_dir), gather(config, output_dir)
    if not groups:
        raise FileNotFoundError(f"there is no finished cell of this configuration in {output}: run it first.")
    shutil.rmtree(output / "figures", ignore_errors=True)
    parts = [f"# {config.title}", config.notes.strip(), *_progress(config, output)]
    for number, group in enumerate(groups, 1):
        parts += [f"## {group.title(config)}", *_tables(group, config)]
        # Numbered, since what sets long titles apart may be at their end.
        stem = output / "figures" / f"{number}-{slug(group.title(config))}"
        drawn = [path for path in _draw(group, config, stem) if path is not None]
        parts += [f"![{path.stem}](figures/{path.name})" for path in drawn]
    for path in _draw_over_groups(groups, config, output / "figures"):
        if path is not None:
            parts.append(f"![{path.stem}](figures/{path.name})")
    _write(output / "report.md", parts)
    costs = [text for group in groups for text in _costs(group, config)]
    if costs:
        _write(output / "costs.md", [f"# {config.title}: what the methods cost", _COSTS, *costs])
    return output / "report.md"


_COSTS = (
    "Seconds and peak memory of making a method on the machine that made its cells, without embedding the images, "
    "which all methods share; bytes to be kept beside the pre-trained models. Means over cells."
)


def _write(path: Path, parts: Sequence[str]) -> None:
    text = "\n\n".join(part for part in parts if part) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _progress(config: BenchConfig, output: Path) -> Iterator[str]:
    every = list(cells(config))
    missing = [cell for cell in every if read_cell(output, cell) is None]
    yield (
        f"{len(every) - len(missing)} of {len(every)} cells ({config.protocol}; {config.experiment}). Values in "
        "percent: mean over seeds per dataset, then over datasets; harmonic means are of the averages; ± standard "
        "deviation over seeds. Bold: best of the methods that need neither labels nor the weak model at run time."
    )
    failed = [(cell, read_failure(output, cell)) for cell in missing]
    if any(message for _, message in failed):
        lines = [f"- {cell}: {_one_line(message)}" for cell, message in failed if message]
        yield "\n".join(["Failed:", "", *lines])


def _tables(group: Group, config: BenchConfig) -> Iterator[str]:
    published = published_table(config.published) if config.published else {}
    if published and published["shots"] != group.shots:
        yield f"Published scores are of {published['shots']} shots, and left out here."
        published = {}
    yield _averages(group, config, published)
    known = [name for name in published.get("datasets", ()) if name in group.datasets]
    if published:
        yield (
            f"Published: {published['title']} ({published['source']}), average of {len(published['datasets'])} "
            f"datasets. What was measured here goes over {len(group.datasets)}, {len(known)} of them among those."
        )
        yield from published.get("remarks", ())
    reasons = [
        f"{row.name}: {_one_line(text)} ({', '.join(map(public_name, names))})"
        for row in group.rows.values()
        for text, names in row.reasons.items()
    ]
    if reasons:
        yield "\n".join(["Remarks:", "", *(f"- {reason}" for reason in reasons)])
    if len(group.datasets) > 1 or "per_dataset" in published:
        for metric in sorted(group.metrics, key=lambda metric: metric != group.main):
            yield f"### {_TITLES.get(metric, metric)}, by dataset"
            yield _by_dataset(group, metric, published)


def _averages(group: Group, config: BenchConfig, published: Mapping) -> str:
    stated = published.get("average", {})
    names = list(dict.fromkeys([*(name for name, row in group.rows.items() if row.measured), *stated]))
    metrics = group.metrics
    told = [metric for metric in metrics if any(metric in values for values in stated.values())]
    summaries = {name: group.rows[name].summary(group.datasets) if name in group.rows else {} for name in names}
    header = ["method", *(_TITLES.get(m, m) for m in metrics), *(f"published {_TITLES.get(m, m)}" for m in told)]
    partial = [row for row in group.rows.values() if 0 < len(row.measured) < len(group.datasets)]
    marks = {row.name: f" {_PARTIAL}" for row in partial}
    columns = [[_escape(name) + marks.get(name, "") for name in names]]
    for metric in metrics:
        columns.append(_column({name: summaries[name].get(metric) for name in names}, group, metric))
    for metric in told:
        columns.append([_plain(stated.get(name, {}).get(metric)) for name in names])
    if config.experiment == "transfer":
        header.append("needs")
        columns.append([group.rows[name].needs if name in group.rows else "" for name in names])
    shares = ", ".join(f"{row.name}: {len(row.measured)} of {len(group.datasets)}" for row in partial)
    note = f"\n\n{_PARTIAL} Averaged over fewer datasets, not to be compared with the others ({shares})." * bool(
        partial
    )
    return table(header, zip(*columns, strict=True)) + note


def _column(summaries: Mapping[str, Summary | None], group: Group, metric: str) -> list[str]:
    fair = {
        name: round(found.value, 2)
        for name, found in summaries.items()
        if found is not None and group.rows[name].fair and len(found.datasets) == len(group.datasets)
    }
    choose, texts = min if metric in _LOWER else max, []
    best = choose(fair.values()) if len(fair) > 1 else None
    for name, found in summaries.items():
        text = NOTHING if found is None else _plain(found.value)
        if found is not None and found.std is not None:
            text += f" ± {found.std:.2f}"
        texts.append(f"**{text}**" if name in fair and fair[name] == best else text)
    return texts


def _by_dataset(group: Group, metric: str, published: Mapping) -> str:
    stated = {
        name: {dataset: values[metric] for dataset, values in found.items() if metric in values}
        for name, found in published.get("per_dataset", {}).items()
    }
    every = [row for row in group.rows.values() if any(metric in s for d in row.measured.values() for s in d.values())]
    columns = [[_escape(row.name) for row in every] + [f"{name}, published" for name, own in stated.items() if own]]
    for dataset in group.datasets:
        column = {row.name: row.summary((dataset,)).get(metric) for row in every}
        texts = _column(column, replace(group, datasets=(dataset,)), metric)
        columns.append(texts + [_plain(own.get(dataset)) for own in stated.values() if own])
    return table(["method", *map(public_name, group.datasets)], zip(*columns, strict=True))


def table(header: Sequence[str], rows) -> str:
    """Markdown: the first column to the left, the others to the right."""
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _costs(group: Group, config: BenchConfig) -> Iterator[str]:
    rows = [row for row in group.rows.values() if row.costs]
    if not rows:
        return

    def mean(row: Row, name: str, digits: int) -> str:
        values = [cost[name] for cost in row.costs if cost[name] is not None]
        return f"{statistics.fmean(values):,.{digits}f}" if values else NOTHING

    header = ["method", "seconds", "peak MB", "bytes"]
    digits = {"seconds": 2, "peak_mb": 0, "bytes": 0}
    yield f"## {group.title(config)}"
    yield table(header, ([_escape(row.name), *(mean(row, name, n) for name, n in digits.items())] for row in rows))


def _draw(group: Group, config: BenchConfig, stem: Path) -> Iterator[Path | None]:
    """The figures of a group; their names begin with `stem`."""
    title = f"{config.title}: {group.title(config)}"
    if config.experiment == "upgrade":
        yield _upgrade_bars(group, Path(f"{stem}-upgrade.png"), title)
        if (config.sweep or "").startswith("tuning.") and (series := _over_tunings(group, config)):
            yield context_length_figure(series, Path(f"{stem}-{slug(config.sweep)}.png"), title=title)
        return
    whole = {name: row for name, row in group.rows.items() if len(row.measured) == len(group.datasets)}
    main = {name: row.summary(group.datasets)[group.main] for name, row in whole.items()}
    by_seed = {name: list(found.by_seed.values()) or [found.value] for name, found in main.items()}
    lines = {name: main[name].value for name in ("zero-shot strong", "tuned weak") if name in main}
    count = len(group.datasets)
    what = _TITLES.get(group.main, group.main) + (f", mean of {count} datasets" if count > 1 else "")
    yield figures.bars(by_seed, Path(f"{stem}-methods.png"), title=f"{title} ({what})", reference=lines)
    if group.main == "hm":
        points = {name: row.summary(group.datasets) for name, row in whole.items()}
        points = {name: (found["base"].value, found["novel"].value) for name, found in points.items()}
        yield base_novel_figure(points, Path(f"{stem}-base-novel.png"), title=title)
    if config.sweep and not config.sweep.startswith("tuning."):
        series = _over_variants(group, config, main)
        if series:
            path, xlabel = Path(f"{stem}-{slug(config.sweep)}.png"), config.sweep.split(".")[-1].replace("_", " ")
            yield figures.curves(series, path, title=title, xlabel=xlabel, ylabel=f"{what} (%)", reference=lines)


def _over_variants(group: Group, config: BenchConfig, main: Mapping[str, Summary]) -> dict[str, list[tuple]]:
    """Points (x, mean, std) of variants that have the swept setting; what a logarithmic axis cannot show is left to
    the table."""
    setting = config.sweep.split(".")[-1]
    series: dict[str, list[tuple]] = {}
    for variant in config.variants:
        x = variant.settings.get(setting)
        if isinstance(x, (int, float)) and 0 < x < float("inf") and variant.name in main:
            found = main[variant.name]
            series.setdefault(variant.method, []).append((float(x), found.value, found.std or 0.0))
    return {name: points for name, points in series.items() if len(points) > 1}


def _upgrade_bars(group: Group, path: Path, title: str) -> Path | None:
    rows, floors = [], {}
    for row in group.rows.values():
        found = row.summary(group.datasets)
        values = {name: list(found[name].by_seed.values()) or [found[name].value] for name in found}
        if row.name == "zero-shot":
            floors = {f"zero-shot, {name} model": found[name].value for name in ("old", "upgraded") if name in found}
        elif values:
            rows.append(_Upgraded(row.name, *(values.get(name) for name in ("old", "upgraded", "retrained", "h"))))
    return compatibility_figure(rows, path, floors, title=title) if rows else None


@dataclass(frozen=True)
class _Upgraded:
    """As [`compatibility_figure`] wants it."""

    method: str
    old: list[float] | None
    upgraded: list[float] | None
    retrained: list[float] | None
    harmonic: list[float] | None


def _draw_over_groups(groups: Sequence[Group], config: BenchConfig, folder: Path) -> Iterator[Path | None]:
    """Curves over the number of shots."""
    alike = dict.fromkeys((group.pair, group.tuning) for group in groups)
    for number, (pair, tuning) in enumerate(alike if len(config.shots) > 1 else (), 1):
        same = [group for group in groups if (group.pair, group.tuning) == (pair, tuning)]
        series = _series((group.shots, group) for group in same)
        if series:
            title = f"{config.title}: {', '.join(filter(None, [str(pair), tuning]))}"
            ylabel = f"{_TITLES.get(same[0].main, same[0].main)} (%)"
            path = folder / f"shots-{number}.png"
            yield figures.curves(series, path, title=title, xlabel="shots per class", ylabel=ylabel)


def _series(groups) -> dict[str, list[tuple[float, float, float]]]:
    """Points (x, mean, std) by row."""
    series: dict[str, list[tuple]] = {}
    for x, group in groups:
        for name, row in group.rows.items():
            found = row.summary(group.datasets).get(group.main)
            if found is not None:
                series.setdefault(name, []).append((float(x), found.value, found.std or 0.0))
    return {name: points for name, points in series.items() if len(points) > 1}


def _over_tunings(group: Group, config: BenchConfig) -> dict[str, list[tuple[int, float, float]]]:
    setting, series = config.sweep.removeprefix("tuning."), {}
    for tuning in config.tunings:
        row = group.rows.get(tuning.name)
        found = row.summary(group.datasets).get(group.main) if row else None
        if found is not None and tuning.settings.get(setting) is not None:
            method = str(tuning.settings.get("method", "lora"))
            series.setdefault(method, []).append((tuning.settings[setting], found.value, found.std or 0.0))
    return {name: points for name, points in series.items() if len(points) > 1}


def _plain(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escape(text: str) -> str:
    return _one_line(text).replace("|", "\\|")
