"""`hf-transmiter analyse`: what it writes, without labels too, and what it refuses."""

import json

import pytest
import torch
from test_cli import error, run
from torch.nn.functional import normalize

from hf_transmiter.calibration import CalibrationPack
from hf_transmiter.classifier import AnchorClassifier
from hf_transmiter.features import embed_dataset
from hf_transmiter.tuners import TransMiterConfig


NAMES = ["cat", "dog", "car"]


@pytest.fixture
def saved(encoder, make_dataset, tmp_path):
    """A folder with an adapter, `pictures` and `bare` (no labels) written by save_to_disk, and logits."""
    config = TransMiterConfig(class_names=NAMES, auxiliary_names=["tree", "ship", "red"], form="class_vectors")
    made = AnchorClassifier(encoder, config.anchors).add_adapter(config)
    vectors = made.transmiter.tensors("default")["class_vectors"]
    vectors.copy_(normalize(vectors + 0.5 * torch.randn(vectors.shape), dim=-1))
    made.save_pretrained(tmp_path / "adapter")
    images = make_dataset(24)
    images.save_to_disk(tmp_path / "pictures")
    table = embed_dataset(encoder, images, cache_dir=tmp_path / "features", progress=False)
    with torch.no_grad():
        said = made.classify(table.embeds) + 2 * torch.randn(24, 3)
    CalibrationPack(said, NAMES).save(tmp_path / "logits.safetensors")
    images.remove_columns("label").save_to_disk(tmp_path / "bare")
    return tmp_path


def test_help():
    text = " ".join(run("analyse", "--help").stdout.replace("│", " ").split())
    assert "Example: hf-transmiter analyse " in text and "--vocabulary" in text and "--overwrite" in text


def test_pictures_without_labels(saved):
    target = saved / "analysis"
    command = ("analyse", saved / "adapter", "--dataset", saved / "bare", "--output-dir", target)
    command += ("--cache-dir", saved / "features")
    said = json.loads(run(*command, "--teacher", saved / "logits.safetensors", "--rows", "2", "--json").stdout)
    assert {path.name for path in target.iterdir()} == {"analysis.json", "analysis.md", "figures", "settings.yaml"}
    written = json.loads((target / "analysis.json").read_text())
    assert [change["name"] for change in written["classes"]] == NAMES
    assert said == {"output_dir": str(target), **{key: written[key] for key in said if key != "output_dir"}}
    assert 0 < said["changed"] <= said["num_images"] == 24 and said["corrected"] is None
    assert said["temperature"] > 0 and 0 < said["agreement"] < 100
    text = (target / "analysis.md").read_text()
    assert "fitted to the tuned model's predictions" in text and "better or worse is not known" in text
    assert str(saved) not in text + json.dumps(written)  # it is made to be shared
    assert {path.name for path in (target / "figures").iterdir()} == {"shifts.png", "neighbours.png", "changed.png"}
    assert "--overwrite" in error(*command)


def test_refused(saved, model_dir):
    images = ("--dataset", saved / "bare", "--output-dir", saved / "none", "--cache-dir", saved / "features")
    assert "is not a TransMiter adapter" in error("analyse", model_dir(), *images)
    assert "No vocabulary" in error("analyse", saved / "adapter", *images, "--vocabulary", "nothing")
    CalibrationPack(torch.randn(5, 3), NAMES).save(saved / "other.safetensors")
    assert "(24, 3)" in error("analyse", saved / "adapter", *images, "--teacher", saved / "other.safetensors")
    assert not (saved / "none").exists()
