"""Processes of two machines that do not share the folder of embeddings: one sentence on each, and none waits."""

import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState

from hf_transmiter.data import embeddings
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.encoders.dual_encoder import DualEncoder


def _on_own_disks(model, dataset, said, caches, part_rows):
    """One of two processes; what it says goes into a file."""
    signal.alarm(60)  # or a process that waits for the other would do so for ever
    embeddings.PART_ROWS = part_rows
    rank = torch.distributed.get_rank()
    try:
        table = embed_dataset(DualEncoder.from_pretrained(model), dataset, cache_dir=caches[rank], progress=False)
        text = f"{len(table)} rows"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    Path(said, str(rank)).write_text(text)
    os._exit(0)  # without the launcher's farewell, for which both would have to be well


@pytest.mark.parametrize("part_rows", [1024, 4], ids=["one part", "parts of both"])
@pytest.mark.parametrize(
    "has_them", [None, 0, 1], ids=["nobody has them", "the first has them", "the second has them"]
)
def test_machines_that_do_not_share_the_folder(
    encoder, make_dataset, model_dir, tmp_path, monkeypatch, part_rows, has_them
):
    dataset = make_dataset(10)
    caches = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(embeddings, "PART_ROWS", part_rows)
    if has_them is not None:
        embed_dataset(encoder, dataset, cache_dir=caches[has_them], progress=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = (model_dir("clip"), dataset, tmp_path, [str(cache) for cache in caches], part_rows)
    debug_launcher(_on_own_disks, args=arguments, num_processes=2)
    said = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    if (has_them, part_rows) == (1, 1024):  # the first makes its own
        assert said == ["10 rows"] * 2
        return
    for text in said:
        assert text.startswith("ValueError: ") and "pass `cache_dir`, a folder that all of them see" in text, said


def test_a_shared_folder_that_one_process_saw_filled(encoder, make_dataset, model_dir, tmp_path):
    """The same folder, under two names: nobody has the embeddings, or all do."""
    dataset = make_dataset(10)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").symlink_to(tmp_path / "first")
    arguments = (model_dir("clip"), dataset, tmp_path, [str(tmp_path / name) for name in ("first", "second")], 4)
    for _ in range(2):
        AcceleratorState._reset_state(reset_partial_state=True)
        debug_launcher(_on_own_disks, args=arguments, num_processes=2)
        assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["10 rows"] * 2
