"""What every benchmark is made of: rows, interleaved repeats, cases in processes of their own, growth exponents."""

import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


HERE = Path(__file__).parent
REFERENCE = "a product of two 1024 x 1024 float32 matrices"


class Missing(Exception):
    """This version of the package has no such thing."""


@dataclass
class Row:
    """One measurement.

    Args:
        bench, case: what was measured.
        ratio: time of the case by that of what `against` names, in the same run; the median of the repeats.
        seconds: what the ratio was made of, for estimates (`imagenet.py`); never to be compared between runs.
        peak_mb: peak of resident memory on top of what there was before; mapped files do not count.
        axis, size: of a case of several sizes, which size grows ("N") and how large it is here.
        note: units other than the ratio's, or why there is no number.
    """

    bench: str
    case: str
    ratio: float | None = None
    against: str = REFERENCE
    seconds: float | None = None
    peak_mb: float | None = None
    axis: str | None = None
    size: int | None = None
    note: str = ""


def seconds(run: Callable) -> float:
    since = time.perf_counter()
    run()
    return time.perf_counter() - since


_MATRIX = []


def reference() -> None:
    """The fixed work that seconds are divided by where nothing else is at hand."""
    if not _MATRIX:
        _MATRIX.append(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))
    torch.mm(_MATRIX[0], _MATRIX[0])


def interleaved(cases: dict[str, Callable], against: str, repeats: int = 3, warm: bool = True) -> dict[str, tuple]:
    """Per case the median over repeats of its seconds per those of the case `against`, and its median seconds. All
    cases take turns, so that whatever else the machine does slows all of them."""
    if warm:
        for run in cases.values():
            run()
    rounds = []
    for _ in range(repeats):
        cases = dict([*cases.items()][1:] + [*cases.items()][:1])  # nobody always comes after the same one
        rounds.append({name: seconds(run) for name, run in cases.items()})
    middle = statistics.median
    return {name: (middle(r[name] / r[against] for r in rounds), middle(r[name] for r in rounds)) for name in cases}


def processor_seconds(run: Callable) -> float:
    since = time.process_time()
    run()
    return time.process_time() - since


def alone(run: Callable, budget: float = 5.0, repeats: int = 3) -> dict:
    """A case of one thread in units of [`reference`], which is timed before and after it, and its peak memory.

    In processor time, which other work on the machine hardly changes; `seconds` are those of the clock. Repeated,
    unless that takes longer than `budget` seconds.
    """
    from resident import measured  # of tests/studies

    reference()
    found, peak = [], 0.0
    while len(found) < repeats and sum(spent for _, spent in found) < budget:
        before = [processor_seconds(reference) for _ in range(5)]
        with measured() as cost:
            used = processor_seconds(run)
        unit = statistics.median(before + [processor_seconds(reference) for _ in range(5)])
        found.append((used / unit, cost["seconds"]))
        peak = max(peak, cost["peak_mb"])
    ratio, spent = (statistics.median(each) for each in zip(*found, strict=True))
    return {"ratio": ratio, "seconds": spent, "peak_mb": peak}


# Children of one process that has imported everything and done nothing yet: none has the memory of a case before it.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["solving"])


def in_process(run: Callable[[str, dict], dict], case: str, settings: dict) -> dict:
    """What `run` finds of a case in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=_PROCESSES) as pool:
        return pool.submit(run, case, settings).result()


def launched(case: str, settings: dict, processes: int) -> dict:
    """A case of `solving.CASES` in several processes that share the work."""
    launch = ("--nproc-per-node", str(processes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    command = [sys.executable, "-m", "torch.distributed.run", *launch, str(HERE / "run.py")]
    command += ["--case", case, "--settings", json.dumps(settings)]
    result = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or not said:
        raise RuntimeError(result.stderr[-2000:])
    return json.loads(said[-1])


def growth(bench: str, case: str, axis: str, sizes: list[int], settings: dict, measure: Callable) -> Iterator[Row]:
    """What `measure` finds of a case at every size; a size that fails says why."""
    for size in sizes:
        try:
            yield Row(bench, case, axis=axis, size=size, **measure(case, {**settings, axis: size}))
        except RuntimeError as error:  # the process was killed for its memory, say
            yield Row(bench, case, axis=axis, size=size, note=f"{type(error).__name__}: {error}"[:200])


def exponent(points: list[tuple[float, float]]) -> float | None:
    """The slope of log(y) over log(x) through the two largest x: 1 is as fast as linear."""
    points = sorted((x, y) for x, y in points if x > 0 and y and y > 0)[-2:]
    if len(points) < 2:
        return None
    (x0, y0), (x1, y1) = points
    return (math.log(y1) - math.log(y0)) / (math.log(x1) - math.log(x0))


def curves(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows of several sizes, by bench, case and axis, from small to large."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.axis is not None:
            found.setdefault((row.bench, row.case, row.axis), []).append(row)
    return {key: sorted(each, key=lambda row: row.size) for key, each in found.items()}


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(rows: list[Row], facts: dict) -> str:
    """The report: single cases, then curves with their exponents."""
    about = ", ".join(f"{key} {value}" for key, value in facts.items())
    lines = ["# Benchmarks", "", f"`python tests/benchmarks/run.py`: {about}.", ""]
    lines += [f"Ratios within one run. Where nothing else is said, the unit is {REFERENCE}, of processor time.", ""]
    single = [row for row in rows if row.axis is None]
    for bench in dict.fromkeys(row.bench for row in single):
        lines += [f"## {bench}", "", "| case | ratio | to | peak MB | |", "|:---|---:|:---|---:|:---|"]
        for row in (row for row in single if row.bench == bench):
            against = "" if row.ratio is None else row.against
            peak = number(row.peak_mb)
            lines.append(f"| {row.case} | {number(row.ratio)} | {against} | {peak} | {row.note} |")
        lines.append("")
    for bench, axis in dict.fromkeys((bench, axis) for bench, _, axis in curves(rows)):
        group = {case: each for (b, case, a), each in curves(rows).items() if (b, a) == (bench, axis)}
        sizes = sorted({row.size for each in group.values() for row in each})
        heads = [f"{axis} = {size:,}" for size in sizes]
        for what, key in (("time", "ratio"), ("peak MB", "peak_mb")):
            if not any(getattr(row, key) for each in group.values() for row in each):
                continue
            lines += [f"## {bench}: {what} over {axis}", "", f"| case | {' | '.join(heads)} | exponent |"]
            lines.append("|:---|" + "---:|" * (len(sizes) + 1))
            for case, each in group.items():
                by_size = {row.size: row for row in each}
                cells = [number(getattr(by_size[s], key)) if s in by_size else "" for s in sizes]
                slope = exponent([(row.size, getattr(row, key)) for row in each])
                slope = "" if slope is None or axis == "processes" else f"{slope:.2f}"
                lines.append(f"| {case} | {' | '.join(cells)} | {slope} |")
            lines.append("")
        lines += [
            f"{row.case}, {axis} = {row.size:,}: {row.note}\n" for each in group.values() for row in each if row.note
        ]
    return "\n".join(lines).rstrip() + "\n"


def write(folder: Path, rows: list[Row], facts: dict) -> None:
    """`benchmarks.json` and `benchmarks.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"facts": facts, "rows": [asdict(row) for row in rows]}
    (folder / "benchmarks.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "benchmarks.md").write_text(markdown(rows, facts))


def draw(folder: Path, rows: list[Row]) -> None:
    """A figure per bench and axis of its growth curves, both axes logarithmic: time left, memory right."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    found = curves(rows)
    for bench, axis in dict.fromkeys((bench, axis) for bench, _, axis in found if axis != "processes"):
        group = {case: each for (b, case, a), each in found.items() if (b, a) == (bench, axis)}
        panels = [("ratio", "matrix products"), ("peak_mb", "peak memory, MB")]
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for panel, (key, label) in zip(axes, panels, strict=True):
            for (case, each), marker in zip(group.items(), "osD^vPX*<>" * 9, strict=False):
                points = [(row.size, getattr(row, key)) for row in each if getattr(row, key)]
                if points:
                    panel.plot(*zip(*points, strict=True), marker=marker, markersize=5, label=case)
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
            panel.grid(alpha=0.3)
        low, high = axes[1].get_ylim()
        axes[1].set_ylim(min(low, 1), max(high, 10_000))  # a flat curve shall look flat
        # Linear growth, for the eye.
        sizes = sorted({row.size for each in group.values() for row in each})
        start = min((row.ratio for each in group.values() for row in each if row.ratio), default=1) / 2
        axes[0].plot(sizes, [start * size / sizes[0] for size in sizes], "--", color="grey", label="linear")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.suptitle(f"{bench}: growth with {axis}")
        figure.savefig(folder / f"{bench}_{axis}.png".replace(" ", "_"), dpi=100)
        pyplot.close(figure)
