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

from hf_transmiter.bench_config import BenchConfig
from hf_transmiter.bench_plan import CELLS, TUNED, cells, read_cell


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
  - {method: "TransMiter (gradient)", name: TransMiter, extraction: {basis: fixed, epochs: 3}}
  - bridge from text
  - refit
  - linear probe
  - TransMiter+ from refit
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
    """Everything in the cells but what it cost."""
    found = []
    for cell in cells(BenchConfig.read(output.parent / "bench.yaml")):
        made = read_cell(output, cell)
        for row in made["rows"].values():
            row.pop("seconds", None), row.pop("peak_mb", None)
        found.append(made)
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run in one process, and how long it took."""
    path, since = folder(tmp_path_factory.mktemp("reference") / "run"), time.monotonic()
    assert "4 of 4 cells are done, 4 of them now." in finish(start(path))
    return path / "out", time.monotonic() - since


def test_killed_five_times(reference, tmp_path):
    output, seconds = reference
    path, draws, kills, seen = folder(tmp_path / "run"), random.Random(0), 0, []
    while kills < 5:
        process = start(path)
        # Somewhere between the imports and the end of what is left.
        try:
            process.wait(draws.uniform(0.15, 0.75) * seconds)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        out = path / "out"
        seen.append({name: sorted(p.name for p in (out / name).glob("*")) for name in (CELLS, TUNED)})
    print(f"killed {kills} times, after {[{k: len(v) for k, v in one.items()} for one in seen]} files")
    assert kills >= 3  # it got to the end between the others
    finish(start(path))
    assert measured(path / "out") == measured(output)
    assert (path / "out" / "report.md").read_bytes() == (output / "report.md").read_bytes()
    left = [p.name for p in (path / "out").rglob("*") if "checkpoint" in p.name]
    assert not left


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(reference, tmp_path, launcher):
    output, _ = reference
    path = folder(tmp_path / "run")
    said = finish(start(path, LAUNCHERS[launcher]))
    assert said.count("4 of 4 cells are done") == 1  # the main process speaks
    assert measured(path / "out") == measured(output)
    assert (path / "out" / "report.md").read_bytes() == (output / "report.md").read_bytes()
    figures = {p.name: p.read_bytes() for p in (output / "figures").iterdir()}
    assert {p.name: p.read_bytes() for p in (path / "out" / "figures").iterdir()} == figures


def test_two_processes_killed(reference, tmp_path):
    """The launcher and both of its processes, and one process finishes it."""
    output, seconds = reference
    path = folder(tmp_path / "run")
    process = start(path, LAUNCHERS["torchrun"])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5 * seconds)
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
