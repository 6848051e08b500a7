"""The real thing: processes that are killed, and processes that a launcher starts. Minutes, so only with --slow."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_transmiter.bench.cells import CELLS, TUNED, cells, read_cell
from hf_transmiter.bench.config import BenchConfig


pytestmark = pytest.mark.slow

CONFIG = """
title: Interrupted
models: [{weak: "sandbox:weak", strong: "sandbox:strong"}]
datasets: ["sandbox:print", "sandbox:jargon"]
protocol: base-to-novel
shots: [4]
seeds: [1, 2]
max_images: 400
tunings:
  - {name: tuned, method: lora, lr: 0.01, epochs: 8, batch_size: 16,
     per_dataset: {"sandbox:jargon": {method: coop, optimizer: adamw, schedule: cosine, lr: 0.01, epochs: 20}}}
vocabulary: sandbox
num_anchors: 100
variants:
  - zero-shot strong
  - tuned weak
  - EFT
  - {TransMiter: {basis: fixed, epochs: 3}, name: TransMiter}
  - bridge from text
  - refit
  - linear probe
  - label tuning
"""
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}


def start(folder: Path, launcher: list[str] = ()) -> subprocess.Popen:
    """The command, in a process group of its own."""
    words = [
        "-m",
        "hf_transmiter",
        "bench",
        "--config",
        str(folder / "bench.yaml"),
        "--output-dir",
        str(folder / "out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, *launcher, *words, "--cache-dir", str(folder / "cache"), "--quiet"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def folder(path: Path) -> Path:
    path.mkdir()
    (path / "bench.yaml").write_text(CONFIG)
    return path


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, out + err
    return out


def measured(output: Path) -> list[dict]:
    """Everything in the cells."""
    return [read_cell(output, cell) for cell in cells(BenchConfig.read(output.parent / "bench.yaml"))]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run in one process."""
    path = folder(tmp_path_factory.mktemp("reference") / "run")
    assert "4 of 4 cells are done, 4 of them now." in finish(start(path))
    return path / "out"


def written(path: Path) -> set:
    """What is in the folder, down to when it was written."""
    found = set()
    for each in path.rglob("*"):
        try:
            found.add((each, each.stat().st_mtime_ns))
        except FileNotFoundError:  # a temporary file
            continue
    return found


def test_killed_five_times(reference, tmp_path):
    output = reference
    path, draws, seen = folder(tmp_path / "run"), random.Random(0), []
    for _ in range(5):
        process, before, wanted = start(path), written(path), draws.randrange(1, 12)
        while process.poll() is None and len(written(path) - before) < wanted:
            time.sleep(0.01)
        time.sleep(draws.random())
        assert process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        seen.append({name: len(list((path / "out" / name).glob("[!.]*"))) for name in (CELLS, TUNED)})
    print(f"after each of five kills: {seen}")
    finish(start(path))
    assert measured(path / "out") == measured(output)
    assert (path / "out" / "report.md").read_bytes() == (output / "report.md").read_bytes()
    assert not [p.name for p in (path / "out").rglob("*") if "checkpoint" in p.name]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(reference, tmp_path, launcher):
    output = reference
    path = folder(tmp_path / "run")
    said = finish(start(path, LAUNCHERS[launcher]))
    assert said.count("4 of 4 cells are done") == 1  # the main process speaks
    assert measured(path / "out") == measured(output)
    assert (path / "out" / "report.md").read_bytes() == (output / "report.md").read_bytes()
    figures = {p.name: p.read_bytes() for p in (output / "figures").iterdir()}
    assert {p.name: p.read_bytes() for p in (path / "out" / "figures").iterdir()} == figures


def test_two_processes_killed(reference, tmp_path):
    """The launcher and both of its processes, and one process finishes it."""
    output, path = reference, folder(tmp_path / "run")
    process = start(path, LAUNCHERS["torchrun"])
    while process.poll() is None and not list((path / "out" / TUNED).glob("*")):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    for pid in [process.pid, *map(int, children.stdout.split())]:  # workers have sessions of their own
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    finish(start(path))
    assert measured(path / "out") == measured(output)
    assert (path / "out" / "report.md").read_bytes() == (output / "report.md").read_bytes()


def test_one_bad_cell_under_two_processes(tmp_path):
    path = folder(tmp_path / "run")
    text = CONFIG.replace("seeds: [1, 2]", "seeds: [1]").replace("shots: [4]", "shots: [4, 65]")
    (path / "bench.yaml").write_text(text)
    process = start(path, ["-m", "torch.distributed.run", "--nproc-per-node", "2"])
    process.communicate(timeout=1200)
    assert process.returncode == 1
    found = list(cells(BenchConfig.read(path / "bench.yaml")))
    assert [read_cell(path / "out", cell) is not None for cell in found] == [cell.shots == 4 for cell in found]
    notes = [json.loads(note.read_text())["message"] for note in (path / "out" / "failed").iterdir()]
    assert len(notes) == 2 and all("65 images per class are wanted, but class 0 has 64" in note for note in notes)
