"""`hf-transmiter evaluate`: an analysis, without labels too, a bridge, and what is refused."""

import json

import pytest
import torch
from commands import error, run
from huggingface_hub import ModelCard
from torch.nn.functional import normalize

from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.hub.scores import read_scores
from hf_transmiter.method.bridge import Bridge
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


@pytest.fixture
def bridge(model_dir, make_dataset, tmp_path):
    """A folder with `bridge`, the pictures it is from, `known`, and `new` ones."""
    pair = [DualEncoder.from_pretrained(model_dir(family)) for family in ("clip", "siglip")]
    made = Bridge.build(*pair, make_dataset(60), cache_dir=tmp_path / "features", progress=False)
    made.dataset = "known (train)"
    made.save_pretrained(tmp_path / "bridge")
    for name, seed in {"known": 0, "new": 1}.items():
        pictures = make_dataset(40, seed=seed).remove_columns("label")
        for row, picture in enumerate(pictures["image"]):
            (tmp_path / name).mkdir(exist_ok=True)
            picture.save(tmp_path / name / f"{row}.png")
    return tmp_path


def test_a_bridge_is_judged_by_an_index(bridge):
    command = ("evaluate", bridge / "bridge", "--cache-dir", bridge / "features", "--dataset")
    found = json.loads(run(*command, bridge / "new", "--record", "--json").stdout)
    assert found["num_images"] == 40 and len(found["scores"]) == 6
    assert "on the old index (40 pictures asked)." in found["verdict"] and "Warning" not in found["verdict"]
    text = run(*command, bridge / "new").stdout
    assert text.startswith(found["verdict"]) and "| new queries, translated index |" in text
    assert "Warning: the bridge was built from these pictures" in run(*command, bridge / "known").stdout
    assert len(read_scores(bridge / "bridge" / "scores.json")) == 6
    card = ModelCard.load(bridge / "bridge" / "README.md")
    assert "| new queries, translated index |" in card.text and "no scores beside" not in card.text
    assert "what an adapter that crosses it is worth: not measured" in card.text
    assert str(bridge) not in card.content
    single = bridge / "bridge" / "bridge.safetensors"
    assert run("evaluate", single, *command[2:], bridge / "new").stdout == text
    assert "is a bridge, which has no classes: leave --class-names, --analyse out" in error(
        *command, bridge / "new", "--class-names", "cat", "--analyse"
    )
    assert "--record needs the folder of a bridge" in error(
        "evaluate", single, *command[2:], bridge / "new", "--record"
    )


def test_a_bridge_of_models_that_are_gone(bridge):
    made = Bridge.from_pretrained(bridge / "bridge")
    made.weak.name = str(bridge / "moved")
    made.save(bridge / "gone.safetensors")
    assert str(bridge / "moved") in error("evaluate", bridge / "gone.safetensors", "--dataset", bridge / "new")
    made.weak.name = None
    made.save(bridge / "nameless.safetensors")
    said = error("evaluate", bridge / "nameless.safetensors", "--dataset", bridge / "new")
    assert "the bridge does not say which models it is between" in said
