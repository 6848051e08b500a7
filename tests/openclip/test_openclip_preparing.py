"""`prepare` of a model of open_clip: only its configuration and its safetensors, and then no network."""

from pathlib import Path

import datasets.config
import huggingface_hub.constants

from hf_transmiter.open_clip_model import CONFIG, WEIGHTS
from hf_transmiter.preparing import prepare


def test_a_model_of_open_clip(hub, folder_of, monkeypatch):
    files = {file: Path(folder_of("eva"), file).read_bytes() for file in (CONFIG, WEIGHTS[0])}
    commit = hub.write("bob/eva", {**files, "open_clip_pytorch_model.bin": b"pickled"})
    hub.new_machine(token=None)
    for status in ("fetched", "there"):
        (row,) = prepare(["open_clip:hf-hub:bob/eva"], progress=False)
        assert (row.status, row.revision, row.files) == (status, commit, 2), row.remark
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    names = ["open_clip:hf-hub:bob/eva", "open_clip:hf-hub:bob/none", "open_clip:RN50/none"]
    rows = prepare(names, progress=False)
    assert [row.status for row in rows] == ["there", "failed", "failed"] and not hub.log
    assert "'bob/none' is neither in a folder here nor in the cache" in rows[1].remark
    assert "it has openai" in rows[2].remark
