"""Figures of reports.

Each function writes the PNG file `path` (its folder is made; atomic) and returns it. They need matplotlib
(`pip install hf-transmiter[plots]`); without it each draws nothing and returns `None`, which is logged once. Where
there is a `reference`, its values in percent are dashed lines, by name. Colours are those of Okabe and Ito
(https://jfly.uni-koeln.de/color/), which stay apart for colour-blind readers.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import statistics
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..hub.checks import printable
from ..hub.files import replace_file
from .evaluate import harmonic_mean
from .reliability import check_labels, reliability_bins


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .analyse import Knowledge

logger = logging.getLogger(__name__)

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ((0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
_GAIN, _LOSS = "#2166AC", "#B2182B"  # the ends of the map RdBu
_GREY = "#555555"
_RUNNING = ("#0072B2", "#E69F00", "#D55E00")  # one, two, three models and more for a prediction
_INSTANT = 0.1  # seconds: less is as good as nothing
_GRID = {"color": "#E5E5E5", "linewidth": 0.7}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    # A dollar sign in a class name is a dollar sign, not a formula.
    "text.parse_math": False,
}


def _drawn(draw: Callable[..., Path]) -> Callable[..., Path | None]:
    """Runs `draw` in the style above, or not at all without matplotlib."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs) -> Path | None:
        try:
            import matplotlib  # of the extra `plots`
        except ImportError:
            _say_missing()
            return None
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # of other scripts there are boxes, which say enough
            return draw(*args, **kwargs)

    return wrapper


@functools.cache
def _say_missing() -> None:
    logger.warning("Figures are left out: matplotlib is missing. `pip install hf-transmiter[plots]` brings it.")


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure  # of the extra `plots`

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(textwrap.fill(printable(title), int(11 * width)), fontsize=11)
    return figure


def _save(figure: Figure, path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"figures are PNG files: {path} must end in .png.")
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def _short(name: str, length: int = 24) -> str:
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        room = int(16 * figure.get_figwidth())  # in characters
        columns = max(1, min(len(labels), room // (max(map(len, labels)) + 7)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def _references(line: Callable, values: Mapping[str, float], colors: Sequence[str] = _COLORS[1:4]) -> None:
    """Dashed lines, `line` is `axes.axvline` or `axes.axhline`."""
    for i, (name, value) in enumerate(values.items()):
        style = {"color": colors[i % len(colors)], "linestyle": _DASHES[i % 4], "linewidth": 1.4, "zorder": 2}
        line(value, label=f"{name} ({value:.1f})", **style)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


@_drawn
def bars(
    scores_by_seed: Mapping[str, Sequence[float]],
    path: str | os.PathLike,
    *,
    title: str,
    xlabel: str = "accuracy (%)",
    reference: Mapping[str, float] | None = None,
) -> Path | None:
    """Horizontal bars of the mean over seeds, with one dot per seed.

    Args:
        scores_by_seed (`Mapping[str, Sequence[float]]`): percent, by method, the first on top.

    Raises:
        ValueError: no method, or a method without values.
    """
    reference = reference or {}
    if not scores_by_seed or not all(len(values) for values in scores_by_seed.values()):
        raise ValueError("bars need at least one method, and one value per method.")
    figure = _figure(7.0, 1.2 + 0.34 * len(scores_by_seed) + 0.1 * len(reference), title)
    axes = figure.add_subplot()
    for row, values in enumerate(scores_by_seed.values()):
        axes.barh(row, statistics.fmean(values), height=0.66, color="#A6CEE8", zorder=1)
        # Spread downwards, so that equal seeds do not hide each other.
        heights = row + np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [row]
        axes.scatter(values, heights, s=13, color=_COLORS[0], edgecolors="white", linewidths=0.4, zorder=3)
        axes.text(1.01, row, _spread(values), transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    _references(axes.axvline, reference)
    axes.set_yticks(range(len(scores_by_seed)), list(scores_by_seed))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(scores_by_seed) - 0.45, -0.55)
    highest = max([*reference.values(), *(max(values) for values in scores_by_seed.values())])
    axes.set_xlim(0, 1.03 * highest or 1)
    axes.set_xlabel(xlabel)
    _legend(figure, axes)
    return _save(figure, path)


@dataclass(frozen=True)
class Way:
    """One way to upgrade, as [`ways`] draws it: `score` in percent, `seconds` to make it, how many `models` run for a
    prediction, whether its class names stay `open`."""

    score: float
    seconds: float
    models: int = 1
    open: bool = False


@_drawn
def ways(
    found: Mapping[str, Way],
    path: str | os.PathLike,
    *,
    title: str,
    ylabel: str = "accuracy (%)",
    reference: Mapping[str, float] | None = None,
    best: str | None = None,
) -> Path | None:
    """What each way to upgrade reaches, against the seconds it takes to make: a point and its name each, a full circle
    where any class names can be asked, an empty square where only the task's; colour and size say how many models run
    for a prediction. The name of `best` is bold. What takes less than `_INSTANT` seconds stands there.

    Raises:
        ValueError: no way.
    """
    if not found:
        raise ValueError("there is no way to draw.")
    figure = _figure(7.4, 5.2, title)
    axes = figure.add_subplot()
    _references(axes.axhline, reference or {}, (_GREY, _COLORS[3]))
    for way in found.values():
        color, marker = _RUNNING[min(way.models, 3) - 1], "o" if way.open else "s"
        style = {"facecolors": color if way.open else "white", "edgecolors": color, "linewidths": 1.5, "zorder": 3}
        axes.scatter(max(way.seconds, _INSTANT), way.score, marker=marker, s=30 * way.models, **style)
    for is_open in sorted({way.open for way in found.values()}, reverse=True):
        label, marker, fill = ("any class names", "o", _GREY) if is_open else ("the task's names only", "s", "white")
        axes.plot([], [], marker, color=_GREY, markerfacecolor=fill, markersize=5, label=label)
    for count in sorted({way.models for way in found.values()}):
        label = f"{count} model{'s' * (count > 1)} for a prediction"
        axes.plot([], [], "_", color=_RUNNING[min(count, 3) - 1], markersize=10, markeredgewidth=4, label=label)
    slowest = max(10 * _INSTANT, *(way.seconds for way in found.values()))
    axes.set(xscale="log", xlim=(_INSTANT / 1.5, 3 * slowest), xlabel="seconds to make it", ylabel=ylabel)
    ticks = [_INSTANT * 10**power for power in range(1 + int(math.log10(3 * slowest / _INSTANT)))]
    axes.set_xticks(ticks, [f"{_INSTANT:g} or less", *(f"{tick:g}" for tick in ticks[1:])])
    axes.set_xticks([], minor=True)
    axes.margins(y=0.12)
    axes.grid(**_GRID)
    _legend(figure, axes)
    places = {name: (max(way.seconds, _INSTANT), way.score) for name, way in found.items()}
    _name_points(axes, places, (reference or {}).values(), best)
    return _save(figure, path)


def _name_points(axes: Axes, places: Mapping[str, tuple], lines: Iterable[float], bold: str | None) -> None:
    """Writes the names of points beside them, the highest first, where nothing else stands; a thin line leads to those
    that had to go further away."""
    from matplotlib.transforms import Bbox  # of the extra `plots`

    axes.figure.draw_without_rendering()
    axes.figure.set_layout_engine("none")  # from now on places on the page are what they are
    pixels, inside = axes.figure.dpi / 72, axes.get_window_extent()
    spots = axes.transData.transform(list(places.values()))
    taken = [Bbox.from_extents(x - 5 * pixels, y - 5 * pixels, x + 5 * pixels, y + 5 * pixels) for x, y in spots]
    heights = [axes.transData.transform((1, line))[1] for line in lines]
    taken += [Bbox.from_extents(inside.x0, y - pixels, inside.x1, y + pixels) for y in heights]
    for name, place in sorted(places.items(), key=lambda item: -item[1][1]):
        style = {"fontsize": 8, "fontweight": "bold" if name == bold else "normal", "textcoords": "offset points"}
        for away, angle in itertools.product((8, 15, 24, 36, 50, 66), (0, 30, -30, 60, -60, 90, -90, 180, 150, 210)):
            x, y = away * math.cos(math.radians(angle)), away * math.sin(math.radians(angle))
            side = "center" if abs(x) < 1 else "left" if x > 0 else "right"
            style |= {"xytext": (x, y), "ha": side, "va": "center"}
            text = axes.annotate(_short(name, 40), place, **style)
            box = text.get_window_extent()
            if box.padded(2).extents[0] > inside.x0 and box.x1 < inside.x1 and not box.count_overlaps(taken):
                break
            text.remove()
        else:
            text = axes.annotate(_short(name, 40), place, **style)
        if away > 15:
            text.remove()
            line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 3}
            axes.annotate(_short(name, 40), place, **style, arrowprops=line)
        taken.append(box)


@_drawn
def curves(
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    path: str | os.PathLike,
    *,
    title: str,
    xlabel: str,
    ylabel: str = "accuracy (%)",
    xscale: str = "log",
    reference: Mapping[str, float] | None = None,
) -> Path | None:
    """Lines over one setting, such as beta or the number of unlabelled images.

    Args:
        series (`Mapping[str, Sequence[tuple]]`): points (x, y, std), the last for a band of one standard deviation.
        xscale (`str`, *optional*, defaults to `"log"`): or `"linear"`.

    Raises:
        ValueError: no series, or an x that a logarithmic axis cannot show.
    """
    if not series:
        raise ValueError("there is no series to draw.")
    ticks = sorted({point[0] for points in series.values() for point in points})
    if xscale == "log" and ticks[0] <= 0:
        raise ValueError(f"a logarithmic axis cannot show x = {ticks[0]:g}: pass xscale='linear'.")
    figure = _figure(6.4, 4.4, title)
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(series.items()):
        color, marker = _COLORS[i % 7], _MARKERS[i % 7]
        x, y, std = np.array(sorted(points), dtype=float).T
        axes.fill_between(x, y - std, y + std, color=color, alpha=0.16, linewidth=0)
        axes.plot(x, y, color=color, marker=marker, markersize=4.5, linewidth=1.6, label=name)
    _references(axes.axhline, reference or {}, [_GREY])
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale)
    axes.grid(axis="y", **_GRID)
    if xscale == "log":
        # Powers of ten say little about what was measured: ticks at the values themselves, where there is room.
        ticks = _thinned(ticks)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    elif all(float(tick).is_integer() for tick in ticks):
        axes.locator_params(axis="x", integer=True)  # there is no half layer
    _legend(figure, axes)
    return _save(figure, path)


def _thinned(ticks: list[float]) -> list[float]:
    """Positive ticks at least a twelfth of the logarithmic range apart."""
    kept, gap = ticks[:1], math.log(ticks[-1] / ticks[0]) / 12
    for tick in ticks[1:]:
        if math.log(tick / kept[-1]) >= gap:
            kept.append(tick)
    return kept


def confusion_difference(before: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """Change of the row-normalised confusion matrix, in percentage points.

    D[i, j] = 100 (|{n : label n = i, after says j}| - |{n : label n = i, before says j}|) / |{n : label n = i}|

    Args:
        before, after (`Tensor`): logits (N, C) on the same images.
        labels (`Tensor`): (N,) in [0, C).

    Returns:
        `Tensor`: (C, C) float64; rows sum to 0, the diagonal is the change of each class's accuracy, and the row of a
            class without images is NaN.

    Raises:
        ValueError: as `reliability.check_labels`, or logits of two shapes.
    """
    if before.shape != after.shape:
        raise ValueError(f"both logits must be (N, C), got {tuple(before.shape)} and {tuple(after.shape)}.")
    check_labels(before, labels)
    classes, counts = before.shape[1], []
    for logits in (before, after):
        cells = classes * labels.long().cpu() + logits.argmax(1).cpu()
        counts.append(torch.bincount(cells, minlength=classes**2).view(classes, classes).double())
    return 100 * (counts[1] - counts[0]) / counts[0].sum(1, keepdim=True)


@_drawn
def confusion_change(
    before: Tensor, after: Tensor, labels: Tensor, names: Sequence[str], path: str | os.PathLike, *, title: str
) -> Path | None:
    """Map of [`confusion_difference`] by the names of the C classes, and those whose accuracy rose and fell most.

    Raises:
        ValueError: as [`confusion_difference`], or another number of names.
    """
    difference = confusion_difference(before, after, labels)
    if len(names) != len(difference):
        raise ValueError(f"there are {len(difference)} classes and {len(names)} names.")
    names = [_short(name, 22) for name in names]
    figure = _figure(8.6, 4.8, title)
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    limit = float(difference.nan_to_num().abs().max()) or 1.0
    left.set_facecolor("#DDDDDD")
    scale = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    image = left.imshow(difference.numpy(), **scale, interpolation="nearest", aspect="auto")
    figure.colorbar(image, ax=left, pad=0.02, label="change (points)").outline.set_visible(False)
    shown = range(0, len(names), math.ceil(len(names) / 25))
    left.set_xticks(shown, [names[i] for i in shown], rotation=90, fontsize=7)
    left.set_yticks(shown, [names[i] for i in shown], fontsize=7)
    left.set(xlabel="predicted class", ylabel="true class", title="Change of the confusion matrix")
    left.spines[:].set_visible(False)
    _changed_most(right, difference.diagonal().nan_to_num().tolist(), names, 8, "{:+.0f}")
    right.set_xlabel("change of accuracy (points)")
    return _save(figure, path)


def _changed_most(axes: Axes, change: Sequence[float], names: Sequence[str], count: int, form: str) -> None:
    """Bars of the `count` largest gains and losses, if there are any."""
    order = sorted(range(len(change)), key=lambda i: -change[i])
    rows = [i for i in order if change[i] > 0][:count] + [i for i in order if change[i] < 0][-count:]
    if not rows:
        axes.set_axis_off()
        axes.set_title("No class gained or lost")
        return
    values = [change[i] for i in rows]
    drawn = axes.barh(range(len(rows)), values, height=0.66, color=[_GAIN if x > 0 else _LOSS for x in values])
    axes.bar_label(drawn, [form.format(x).replace("-", "−") for x in values], padding=3, fontsize=7)
    axes.axvline(0, color=_GREY, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [names[i] for i in rows], fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set_title("Gained and lost most")  # short: the panel is narrow where names are long


@_drawn
def shift_figure(found: Knowledge, path: str | os.PathLike) -> Path | None:
    """The classes whose mean probability rose and fell most; for images without labels, too."""
    figure = _figure(6.4, 4.8, "What the adapter prefers")
    names = [_short(change.name) for change in found.classes]
    axes = figure.add_subplot()
    _changed_most(axes, [change.probability_shift for change in found.classes], names, 12, "{:+.1f}")
    axes.set_xlabel("change of mean probability (points)")
    return _save(figure, path)


@_drawn
def reliability_figure(
    logits: Mapping[str, Tensor], labels: Tensor, path: str | os.PathLike, *, title: str
) -> Path | None:
    """Accuracy against confidence, a line per classifier, and how many images lie at which confidence.

    A bin with less than 1 % of the images is left out of the line, it says too little. Logits (N, C) are by the
    classifier's name; raises what `reliability.reliability_bins` does.
    """
    figure = _figure(5.6, 6.6, title)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 100], [0, 100], color="#999999", linewidth=1, linestyle=_DASHES[0])
    for i, (name, z) in enumerate(logits.items()):
        found = reliability_bins(z, labels)
        share = found.count / found.count.sum()
        kept = (share >= 0.01) & (share > 0)
        style = {"color": _COLORS[i % 7], "marker": _MARKERS[(i + i // 7) % 7], "markersize": 4.5, "linewidth": 1.6}
        line = 100 * found.confidence[kept], 100 * found.accuracy[kept]
        top.plot(*line, **style, label=f"{name} (calibration error {found.error:.1f} %)")
        edges, dash = np.linspace(0, 100, len(share) + 1), ("-", *_DASHES)[i % 5]
        bottom.stairs((100 * share).numpy(), edges, color=_COLORS[i % 7], linewidth=1.5, linestyle=dash)
    top.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 102))
    top.text(2, 97, "not sure enough", ha="left", va="top", color="#777777")
    top.text(98, 3, "too sure", ha="right", va="bottom", color="#777777")
    bottom.set(xlabel="confidence (%)", ylabel="images (%)")
    for axes in (top, bottom):
        axes.grid(**_GRID)
    _legend(figure, top)
    return _save(figure, path)


@_drawn
def compatibility_figure(
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | os.PathLike,
    floors: Mapping[str, float] | None = None,
    *,
    title: str = "Prompts before and after the upgrade",
) -> Path | None:
    """Three bars per method: on the old model, on the upgraded one unchanged, re-trained there. The diamond and the
    number under the name are the harmonic mean of the first two; error bars are one standard deviation over seeds.

    Args:
        rows: percent, one per seed, by method and by `"old"`, `"upgraded"` (left out where refused), `"retrained"`.
        floors: zero-shot accuracies by name, as dashed lines.
    """
    shown = {"old": ("old model", "#A6CEE8"), "upgraded": ("upgraded model, unchanged", "#4C9FD3")}
    # Where nothing was re-trained there is no bar for it, no room, and nothing in the legend.
    shown |= {"retrained": ("re-trained", "#CCCCCC")} if any("retrained" in row for row in rows.values()) else {}
    figure = _figure(max(6.4, 1.4 + 0.95 * len(rows)), 4.6, title)
    axes, apart = figure.add_subplot(), 0.27  # of the middles of two bars
    first = -apart * (len(shown) - 1) / 2
    for i, (model, (label, color)) in enumerate(shown.items()):
        known = {place + first + i * apart: row[model] for place, row in enumerate(rows.values()) if model in row}
        stds = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in known.values()]
        style = {"ecolor": "#333333", "capsize": 2, "error_kw": {"elinewidth": 0.9}, "zorder": 2}
        means = list(map(statistics.fmean, known.values()))
        axes.bar(list(known), means, 0.25, yerr=stds, label=label, color=color, **style)
    names, diamonds = [], {}
    for place, (name, row) in enumerate(rows.items()):
        names.append(textwrap.fill(name, 13))
        if "upgraded" in row:
            harmonic = list(map(harmonic_mean, row["old"], row["upgraded"]))
            diamonds[place + first + apart / 2] = statistics.fmean(harmonic)
            names[-1] += f"\n{_spread(harmonic)}"
        else:
            axes.text(place + first + apart, 0.02, "refused", rotation=90, transform=axes.get_xaxis_transform(),
                      ha="center", va="bottom", fontsize=8, color="#777777")  # fmt: skip
    axes.scatter(list(diamonds), list(diamonds.values()), s=30, marker="D", color=_COLORS[4], edgecolors="black",
                 linewidths=0.7, zorder=4, label="harmonic mean of old and upgraded")  # fmt: skip
    _references(axes.axhline, floors or {})
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.55, len(rows) - 0.45)
    axes.set_ylabel("accuracy (%)")
    _legend(figure, axes)
    return _save(figure, path)
