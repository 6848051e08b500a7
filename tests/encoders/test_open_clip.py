"""What holds without open_clip: how its names are read, and what is said where it is missing. The models themselves
are tested in `tests/openclip`."""

import os
import sys

import pytest

from hf_transmiter.encoders.dual_encoder import DualEncoder, load_encoder, load_image_processor
from hf_transmiter.hub.card_text import NamedModel
from hf_transmiter.hub.repo import is_hub_id, is_open_clip, is_public_open_clip, public_name, read_json, split_revision


PUBLIC = ["open_clip:RN50/openai", "open_clip:EVA02-B-16/merged2b_s8b_b131k", "open_clip:hf-hub:laion/model"]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for read in (DualEncoder.from_pretrained, load_encoder, load_image_processor):
        with pytest.raises(
            ValueError, match=r'models need the open_clip library.*pip install "hf-transmiter\[open-clip\]"'
        ):
            read("open_clip:RN50/openai")


@pytest.mark.parametrize("name", PUBLIC)
def test_names_that_mean_the_same_everywhere(name):
    assert is_open_clip(name) and is_public_open_clip(name) and public_name(name) == name
    assert split_revision(f"{name}@abc") == (name, "abc") and split_revision(name) == (name, None)
    assert not is_hub_id(name) and read_json(name, "adapter_config.json") is None
    model = NamedModel(name, "1" * 40)
    assert model.source == name and model.kind == "open_clip" and str(model.label) == f"`{name}`"


def test_names_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip@home").mkdir()
    weights = tmp_path / "w.safetensors"
    for name, public in (
        (f"open_clip:{tmp_path}", f"open_clip:{tmp_path.name}"),
        ("open_clip:clip@home", "open_clip:clip@home"),
        (f"open_clip:RN50/{weights}", "open_clip:RN50/w.safetensors"),
        ("open_clip:RN50/./sub/w.safetensors", "open_clip:RN50/w.safetensors"),
    ):
        assert public_name(name) == public and not is_public_open_clip(name) and not is_public_open_clip(public)
        assert os.sep not in NamedModel(public).source.removeprefix("path/to/").removeprefix("open_clip:RN50/")
    assert split_revision("open_clip:clip@home") == ("open_clip:clip@home", None)
    assert not is_open_clip("openai/clip-vit-base-patch16") and not is_public_open_clip("sandbox:weak")
