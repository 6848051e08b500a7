"""Every command that writes, killed at random, again and again: nothing is lost, and the next run makes it whole.

A killed run is a fork of this process, which has imported everything. One half is killed at a random time, the other
at a random step that changes files. ``HF_TRANSMITER_KILLS=200 pytest --slow -s tests/test_kills.py`` kills that often;
the seed is fixed.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import bench_folder
import pytest
import torch
import yaml
from commands import app
from safetensors.torch import load_file
from typer.testing import CliRunner

import hf_transmiter
from hf_transmiter.bench.cells import cells, read_cell
from hf_transmiter.bench.config import BenchConfig


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")]

KILLS = int(os.environ.get("HF_TRANSMITER_KILLS", 28))
STEPS = ("mkdir", "replace", "unlink", "rmdir", "open")  # of the module os
COUNTED = Counter()


@dataclass
class Case:
    """A command, the option of its place, and what it needs."""

    words: list[str]
    option: str = "--output-dir"
    place: str = "out"
    before: list[str] = field(default_factory=list)  # other words for what is overwritten
    in_place: bool = False
    of: str | None = None  # what is there to begin with


DATA = ["--dataset", "{root}/pictures"]
SHORT = ["--shots", "4", "--augment", "none"]
TUNE = ["tune", "--model", "{root}/weak", *DATA, *SHORT, "--epochs", "6"]
EXTRACT = ["extract", "--weak", "{root}/weak", "--teacher", "{root}/tuned", *DATA]
BRIDGE = ["bridge", "--weak", "{root}/weak", "--strong", "{root}/strong", *DATA]
TRANSFER = ["transfer", "{root}/adapter", "--strong", "{root}/strong", *DATA]
COMPARE = ["compare", "--weak", "{root}/weak", "--strong", "{root}/strong", "--teacher", "{root}/tuned", *DATA]
CASES = {
    "tune": Case(TUNE, before=["--epochs", "1"]),
    "tune a prompt": Case([*TUNE, "--method", "coop", "--adapter", "init_phrase=null", "--adapter", "n_ctx=2"]),
    "tune by a teacher": Case(
        ["tune", "--model", "{root}/strong", "--teacher", "{root}/tuned", *DATA, "--augment", "none", "--epochs", "5"],
        before=["--epochs", "1"],
    ),
    "extract": Case(EXTRACT, before=["--solver", "ridge"]),
    "extract by gradient": Case([*EXTRACT, "--solver", "gradient", "--epochs", "4"], before=["--epochs", "1"]),
    "transfer": Case(TRANSFER),
    "transfer several": Case(
        ["transfer", "{root}/adapter", "{root}/second", "--strong", "{root}/strong", "--bridge", "{root}/bridge"],
        in_place=True,
    ),
    "bridge, a folder": Case(BRIDGE, "--output", before=["--max-images", "9"]),
    "bridge, a file": Case(BRIDGE, "--output", "out.safetensors", before=["--max-images", "9"]),
    "compare": Case([*COMPARE, "--methods", "EFT", "--methods", "bridge from task images"]),
    "evaluate --analyse": Case(["evaluate", "{root}/adapter", *DATA, "--split", "train", "--analyse"]),
    "evaluate --record": Case(
        ["evaluate", *DATA, "--split", "train", "--record"], option="--", in_place=True, of="adapter"
    ),
    "bench": Case(["bench", "--config", "{root}/bench.yaml"], in_place=True),
}
# What holds cells that are kept has no --overwrite.
RUNS = [(name, over) for name, case in CASES.items() for over in ((False,) if case.in_place else (False, True))]


def forked(words: list[str], said: Path, die_at: int | None = None, late: bool = False) -> tuple[int, list[int]]:
    """Starts a command in a child; its process id, and a pipe that tells how many steps it made.

    With `die_at` it kills itself at that step, before or after it.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, [reader]
    code = 1
    try:  # nothing of this may come back to the tests
        steps = 0

        def counting(real):
            def counted(*args, **kwargs):
                nonlocal steps
                if real is os_open and not args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                    return real(*args, **kwargs)
                steps += 1
                if steps == die_at and not late:
                    os.kill(os.getpid(), signal.SIGKILL)
                done = real(*args, **kwargs)
                if steps == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return done

            return counted

        os_open = os.open
        for name in STEPS:
            setattr(os, name, counting(getattr(os, name)))
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, words)
        code = result.exit_code
        said.write_text(result.output + (repr(result.exception) if result.exception else ""))
        os.write(writer, str(steps).encode())
    finally:
        os._exit(code)


def ended(child: tuple[int, list[int]]) -> tuple[int, int]:
    """Exit status (negative: a signal) and steps."""
    pid, (reader,) = child
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    steps = os.read(reader, 64)
    os.close(reader)
    return status, int(steps or 0)


def finished(words: list[str], said: Path) -> tuple[float, int]:
    """Runs a command to its end; its seconds and steps."""
    since = time.perf_counter()
    status, steps = ended(forked(words, said))
    assert status == 0, (words, said.read_text())
    return time.perf_counter() - since, steps


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_dataset):
    """Models, pictures, and what the first commands of a chain make of them."""
    folder = tmp_path_factory.mktemp("killed")
    content = bench_folder.write(folder, make_dataset)
    (folder / "bench.yaml").write_text(yaml.safe_dump({**content, "seeds": [1]}))
    make_dataset(24, bench_folder.NAMES).save_to_disk(folder / "pictures")
    for name in hf_transmiter.__all__:  # everything is imported once
        getattr(hf_transmiter, name)
    torch.set_num_threads(1)
    cache = ["--cache-dir", str(folder / "cache")]
    for name, words in {"tuned": TUNE, "adapter": EXTRACT, "second": [*EXTRACT, "--solver", "ridge"]}.items():
        finished([*filled(words, folder), "--output-dir", str(folder / name), *cache], folder / "said")
    finished([*filled(BRIDGE, folder), "--output", str(folder / "bridge"), *cache], folder / "said")
    return folder


def filled(words: list[str], root: Path) -> list[str]:
    return [word.format(root=root) for word in words]


def contents(place: Path) -> dict | None:
    """Names of all files at a place, with the tensors and the JSON that are in them."""
    if not place.exists():
        return None
    found = {}
    for path in [place] if place.is_file() else sorted(place.rglob("*")):
        if path.is_file():
            name = path.name if place.is_file() else str(path.relative_to(place))
            found[name] = load_file(path) if path.suffix == ".safetensors" else None
            if path.suffix == ".json":
                value = json.loads(path.read_text())
                found[name] = (
                    {"scores": torch.tensor([score["value"] for score in value])} if "scores" in name else None
                )
    return found


def equal(left: dict | None, right: dict | None) -> bool:
    if left is None or right is None or left.keys() != right.keys():
        return left is right
    return all(
        tensors is None
        or tensors.keys() == right[name].keys()
        and all(torch.equal(tensor, right[name][key]) for key, tensor in tensors.items())
        for name, tensors in left.items()
    )


def measured(root: Path, output: Path) -> list:
    """Scores of a bench."""
    found = [read_cell(output, cell) for cell in cells(BenchConfig.read(str(root / "bench.yaml")))]
    return [cell and {name: row.get("metrics") for name, row in cell["rows"].items()} for cell in found]


def hidden(folder: Path, cache: Path) -> list[str]:
    """What nobody asked for: all but the place itself, and unfinished parts of the cache."""
    parts = (path for path in cache.rglob("*") if path.suffix != ".npy")
    return sorted(map(str, [*folder.rglob(".*"), *parts]))


@pytest.mark.parametrize(("name", "over"), RUNS, ids=[f"{name}{' again' if over else ''}" for name, over in RUNS])
def test_killed_anywhere(root, tmp_path, name, over):
    case, said = CASES[name], tmp_path / "said"
    draws = random.Random(f"{name} {over}")

    def command(folder: Path, *more: str) -> list[str]:
        cache = ["--cache-dir", str(folder.parent / f"{folder.name}-cache")]
        return [*filled(case.words, root), *more, *cache, case.option, str(folder / case.place)]

    def begin(folder: Path) -> None:
        folder.mkdir()
        if case.of:
            shutil.copytree(root / case.of, folder / case.place)

    whole = tmp_path / "whole"
    begin(whole)
    seconds, steps = finished(command(whole), said)
    reference, old = contents(whole / case.place), None
    again = ["--overwrite"] if over else []
    if over:
        (tmp_path / "old").mkdir()
        finished(command(tmp_path / "old", *case.before), said)
        old = contents(tmp_path / "old" / case.place)
    for number in range(round(KILLS / len(RUNS)) or 1):
        folder = tmp_path / f"run-{number}"
        begin(folder)
        if over:
            source, target = tmp_path / "old" / case.place, folder / case.place
            shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
        if draws.random() < 0.5:
            child = forked(command(folder, *again), said)
            time.sleep(draws.random() * seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child[0], signal.SIGKILL)
        else:
            child = forked(command(folder, *again), said, draws.randrange(1, steps + 1), draws.random() < 0.5)
        status, _ = ended(child)
        COUNTED["kills" if status == -signal.SIGKILL else "ended before"] += 1
        there = contents(folder / case.place)
        COUNTED["left something to clear"] += bool(hidden(folder, folder.with_name(f"{folder.name}-cache")))
        if not case.in_place:
            assert equal(there, old) or equal(there, reference), (number, there and there.keys())
            visible = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
            assert visible == [case.place] * (there is not None)
        # The same command once more.
        done = not over and not case.in_place and there is not None
        status, _ = ended(forked(command(folder, *again), said))
        assert status == int(done), (number, said.read_text())
        if done:
            assert "--overwrite" in said.read_text()
        found = contents(folder / case.place)
        if name == "bench":
            same = measured(root, folder / case.place) == measured(root, whole / case.place)
            same = same and found.keys() == reference.keys()
        else:
            same = equal(found, reference)
        COUNTED["ended as a run that was not killed"] += same
        assert same, (number, found.keys() ^ reference.keys())
        cache = folder.with_name(f"{folder.name}-cache")
        if not done:  # a run that has nothing to do does not open the cache
            assert hidden(folder, cache) == []
        assert [path.name for path in folder.iterdir()] == [case.place]
    print(f"{name}{' again' if over else ''}: {dict(COUNTED)}", file=sys.stderr)


def test_two_runs_into_one_place(root, tmp_path):
    """One of them is told at once, and the other's result is there."""
    words = [*filled(TUNE, root), "--output-dir", str(tmp_path / "out"), "--cache-dir", str(root / "cache")]
    children = [forked(words, tmp_path / f"said-{number}") for number in range(2)]
    codes = [ended(child)[0] for child in children]
    assert sorted(codes) == [0, 1]
    assert "another run is writing to" in (tmp_path / f"said-{codes.index(1)}").read_text()
    assert contents(tmp_path / "out") and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
