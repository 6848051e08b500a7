"""Two machines under `torchrun` and `accelerate launch`, over loopback: they end with the adapters of one process.

Each process imports PyTorch anew, so but for the first tests: minutes, only with --slow.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from hf_transmiter.cli.options import RunOptions


WORK = ("--dataset", "sandbox:print", "--max-images", "1200", "--quiet")  # two parts, one for each


def torchrun(rank: int, port: int) -> list[str]:
    about = {"nnodes": 2, "node-rank": rank, "master-addr": "127.0.0.1", "master-port": port, "nproc-per-node": 1}
    return ["torch.distributed.run", *(f"--{key}={value}" for key, value in about.items())]


def accelerate(rank: int, port: int) -> list[str]:
    """Without `--multi_gpu` it would start one process per machine that knows nothing of the other."""
    about = {"num_machines": 2, "machine_rank": rank, "main_process_ip": "127.0.0.1", "main_process_port": port}
    about |= {"num_processes": 2, "mixed_precision": "no", "dynamo_backend": "no"}
    return ["accelerate.commands.launch", "--multi_gpu", *(f"--{key}={value}" for key, value in about.items())]


def run(*words, launcher=None, code=0) -> list[str]:
    """What one process, or two machines, say to the same command: the machines differ in nothing but their rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    starts = [[]] if launcher is None else [["-m", *launcher(rank, port)] for rank in (1, 0)]
    pipes = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = ["-m", "hf_transmiter", *map(str, words)]
    processes = [subprocess.Popen([sys.executable, *start, *command], **pipes) for start in starts]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def carry_over(folder: Path, tuned: Path, launcher=None) -> list[str]:
    """`extract` and `transfer` into a folder, with a folder of embeddings that all see."""
    shared = (*WORK, "--set", f"cache_dir={folder / 'embeddings'}", "--output-dir")
    said = run("extract", "--weak", "sandbox:weak", "--teacher", tuned, *shared, folder / "weak", launcher=launcher)
    return said + run(
        "transfer", folder / "weak", "--strong", "sandbox:strong", *shared, folder / "strong", launcher=launcher
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process makes of a tuned model."""
    folder = tmp_path_factory.mktemp("one")
    options = ("--max-images", "300", "--epochs", "1", "--quiet", "--output-dir", folder / "tuned")
    run("tune", "--model", "sandbox:weak", "--dataset", "sandbox:print", *options)
    carry_over(folder, folder / "tuned")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun, accelerate])
def test_two_machines_end_as_one_process_does(one, tmp_path, launcher):
    said = carry_over(tmp_path, one / "tuned", launcher)
    assert [text.count("Extracted from") + text.count("Transferred to") for text in said] == [0, 1, 0, 1], said
    for name in ("weak", "strong"):
        found, expected = (load_file(place / name / "adapter_model.safetensors") for place in (tmp_path, one))
        assert found.keys() == expected.keys() and len(found) > 1
        for key, value in expected.items():
            assert_close(found[key], value, atol=1e-6, rtol=0, msg=f"{name}: {key}")
        assert not list((tmp_path / name).glob(".*"))
    files = sorted(path.name for path in (one / "embeddings").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "embeddings").iterdir()) and len(files) > 1
    for file in files:
        ours, theirs = (np.load(place / "embeddings" / file) for place in (tmp_path, one))
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_what_the_first_machine_refuses_ends_the_second(one):
    shared = (*WORK, "--set", f"cache_dir={one / 'embeddings'}", "--output-dir", one / "weak")
    words = ("extract", "--weak", "sandbox:weak", "--teacher", one / "tuned", *shared)
    _, first = run(*words, launcher=torchrun, code=1)
    assert f"Error: {one / 'weak'} exists: choose another place, or pass --overwrite." in first


def test_processes_that_accelerate_does_not_join(monkeypatch):
    """`accelerate launch --cpu` starts one process on each machine, and tells it only where the first one is."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="starts one process per machine, .*: pass --multi_gpu"):
        _ = RunOptions().accelerator
    monkeypatch.delenv("MASTER_ADDR")  # one machine, one process
    assert RunOptions().accelerator is None
