"""Tests of `hf_transmiter.safe_weights`: a model of the Hub that has only pickles is refused with a remedy."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hf_transmiter.backbone import DualEncoder
from hf_transmiter.catalog import load_encoder
from hf_transmiter.safe_weights import no_safetensors


@pytest.fixture
def files(model_dir):
    return {path.name: path.read_bytes() for path in Path(model_dir("clip")).iterdir()}


def test_pickles_only(hub, files):
    weights = files.pop("model.safetensors")
    hub.write("bob/old", {**files, "pytorch_model.bin": b"pickled"})
    with pytest.raises(OSError, match="no model.safetensors, and pytorch_model.bin is not read.*Ask its owner"):
        DualEncoder.from_pretrained("bob/old")
    assert not hub.requests("GET", "pytorch_model.bin")
    # Proposed by somebody: named, and taken when it is asked for.
    for number, file in enumerate(("notes.txt", "model.safetensors"), 1):
        proposal = {"path_or_fileobj": weights, "path_in_repo": file, "repo_id": "bob/old", "create_pr": True}
        assert HfApi(token=hub.other_token).upload_file(**proposal).pr_num == number
    with pytest.raises(OSError, match="if you trust it, take bob/old@refs/pr/2.$"):
        load_encoder("bob/old")
    encoder = load_encoder("bob/old@refs/pr/2")
    assert encoder.revision == hub.repos["bob/old"].find("refs/pr/2")


def test_something_else_is_wrong(hub, files):
    hub.write("bob/whole", files)
    hub.write("bob/empty", {"config.json": files["config.json"]})
    for name in ("bob/whole", "bob/empty", "bob/none", "sandbox:weak"):
        assert no_safetensors(name) is None
    with pytest.raises(OSError, match="./nowhere"):
        DualEncoder.from_pretrained("./nowhere")
    with pytest.raises(OSError, match="bob/empty"):
        DualEncoder.from_pretrained("bob/empty")
    hub.write("bob/old", {"pytorch_model.bin": b"pickled"})
    hub.fault("GET", "bob/old", 503, times=100)
    assert no_safetensors("bob/old") is None
