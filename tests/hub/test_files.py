import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.hub import files
from hf_transmiter.hub.checks import read_header
from hf_transmiter.hub.files import file_digest, replace_file, replace_metadata
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.stored_logits import CalibrationPack


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "file.txt"
    replace_file(path, lambda temporary: temporary.write_text("first"))

    def fails(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        replace_file(path, fails)
    assert path.read_text() == "first" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_however_many_files_each_is_read_once(tmp_path):
    """A limit below the number of pictures would have all of them read again, every time."""
    path = tmp_path / "picture"
    path.write_bytes(b"one")
    reads = files._file_digest.cache_info
    assert reads().maxsize is None
    first, before = file_digest(path), reads().misses
    assert file_digest(path) == first and reads().misses == before
    path.write_bytes(b"other")
    assert file_digest(path) != first


@pytest.mark.parametrize("words", ["", "x", "a longer text than there was, über alles", "y" * 5000])
def test_other_metadata(tmp_path, words):
    path, tensors = tmp_path / "a.safetensors", {"a": torch.randn(3, 5), "b": torch.randn(7).half()}
    save_file(tensors, path, metadata={"format": "pt", "said": "something"})
    replace_metadata(path, {"format": "pt", "said": words})
    assert read_header(path)[0] == {"format": "pt", "said": words}
    found = load_file(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0


@pytest.fixture
def bridge_file(tmp_path):
    """`bridge_file(**changes)`: a saved bridge whose facts were changed; `None` drops one."""

    def make(metadata=None, **changes):
        who, tensors = ModelId("a", None, "f"), {"matrix": torch.eye(2)}
        tensors |= {"mean_strong": torch.zeros(2), "mean_weak": torch.zeros(2)}
        facts = {"space": "embedding", "scale": 1.0, "source": "images", "num_pairs": 2}
        facts |= {"alignment": 1.0, "beta": 0.0, "anchors": None, "strong": vars(who), "weak": vars(who), **changes}
        facts = {key: value for key, value in facts.items() if value != "drop"}
        metadata = {"format": "hf_transmiter.bridge", "bridge": json.dumps(facts)} if metadata is None else metadata
        save_file(tensors, tmp_path / "changed", metadata=metadata)
        return tmp_path / "changed"

    return make


def test_the_changed_file_is_fine_without_a_change(bridge_file):
    assert Bridge.load(bridge_file()).space == "embedding"


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": "drop"},
        {"surprise": 1},
        {"scale": None},
        {"scale": [1.0]},
        {"space": "time"},
        {"strong": {}},
        {"weak": 3},
        {"anchors": 3},
        {"anchors": {"task": ["cat", "cat"]}},
    ],
    ids=str,
)
def test_bridges_with_wrong_facts(bridge_file, changes):
    with pytest.raises(ValueError):
        Bridge.load(bridge_file(**changes))


@pytest.mark.parametrize("text", ["{", "[]", "3", None])
def test_bridges_with_unreadable_facts(bridge_file, text):
    metadata = {"format": "hf_transmiter.bridge"} | ({} if text is None else {"bridge": text})
    with pytest.raises(ValueError, match="is damaged"):
        Bridge.load(bridge_file(metadata))


@pytest.mark.parametrize("names", ["{", "3", "[1, 2]", '["a"]', None])
def test_packs_with_wrong_names(tmp_path, names):
    metadata = {"format": "hf_transmiter.calibration"} | ({} if names is None else {"class_names": names})
    save_file({"logits": torch.zeros(3, 2)}, tmp_path / "pack", metadata=metadata)
    with pytest.raises(ValueError):
        CalibrationPack.load(tmp_path / "pack")


@pytest.mark.parametrize("load", [Bridge.load, CalibrationPack.load])
def test_files_of_another_kind(tmp_path, load):
    (tmp_path / "garbage").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="damaged or not a"):
        load(tmp_path / "garbage")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="is not a (bridge|calibration pack)"):
        load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "missing")
