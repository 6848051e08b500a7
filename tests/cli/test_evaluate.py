"""`hf-transmiter evaluate --analyse`: what it says and writes, without labels too, and what it refuses."""

import json

import pytest
import torch
from commands import error, run
from torch.nn.functional import normalize

from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.tuners import TransMiterConfig


NAMES = ["cat", "dog", "car"]


@pytest.fixture
def saved(encoder, make_dataset, tmp_path):
    """A folder with an adapter, `pictures` and `bare` (no labels) written by save_to_disk, and logits."""
    config = TransMiterConfig(class_names=NAMES, auxiliary_names=["tree", "ship", "red"], form="linear")
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


def test_pictures_without_labels(saved):
    target = saved / "analysis"
    command = ("evaluate", saved / "adapter", "--dataset", saved / "bare", "--cache-dir", saved / "features")
    command += ("--analyse", "--output-dir", target)
    said = json.loads(run(*command, "--teacher", saved / "logits.safetensors", "--json").stdout)
    assert {path.name for path in target.iterdir()} == {"analysis.json", "report.md", "figures"}
    written = json.loads((target / "analysis.json").read_text())
    assert [change["name"] for change in written["classes"]] == NAMES
    assert said["scores"] == [] and said["analysis"] == written
    assert 0 < written["changed"] <= written["num_images"] == 24 and written["corrected"] is None
    assert 0 < written["agreement"] < 100
    text = (target / "report.md").read_text()
    assert "better or worse is not known" in text
    assert str(saved) not in text + json.dumps(written)  # it is made to be shared
    assert {path.name for path in (target / "figures").iterdir()} == {"shifts.png"}
    assert "--overwrite" in error(*command)


def test_pictures_with_labels(saved):
    """The accuracy, and below it what changed; nothing is written that was not asked for."""
    command = ("evaluate", saved / "adapter", "--dataset", saved / "pictures", "--cache-dir", saved / "features")
    before = {path.name for path in saved.iterdir()}
    text = run(*command, "--analyse").stdout
    assert "accuracy |" in text.splitlines()[0] and "## Confusions that came and went" in text
    assert text.startswith(run(*command).stdout.strip()) and {path.name for path in saved.iterdir()} == before


def test_refused(saved, model_dir):
    images = ("--dataset", saved / "bare", "--cache-dir", saved / "features")
    options = (*images, "--analyse", "--output-dir", saved / "none")
    names = ("--class-names", "cat,dog,car")
    assert "there is no adapter to analyse" in error("evaluate", model_dir(), *options, *names)
    CalibrationPack(torch.randn(5, 3), NAMES).save(saved / "other.safetensors")
    assert "(24, 3)" in error("evaluate", saved / "adapter", *options, "--teacher", saved / "other.safetensors")
    assert "pass --analyse, too" in error("evaluate", saved / "adapter", *images, "--output-dir", saved / "none")
    assert "scoring needs labels" in error("evaluate", saved / "adapter", *images, "--analyse", "--record")
    assert not (saved / "none").exists()
