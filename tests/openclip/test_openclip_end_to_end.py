"""Tune, extract, transfer, save, evaluate and compare between models of open_clip, in Python and as commands."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

from hf_transmiter.cli.main import app
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.open_clip import CONFIG, WEIGHTS
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.extract import extract
from hf_transmiter.method.transfer import transfer
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import TuningConfig
from hf_transmiter.tuners import CoOpConfig, TransMiterConfig


NAMES = ["cat", "dog", "car"]
TUNING = TuningConfig(shots=8, epochs=6, batch_size=8, lr=5e-3)


def right(classifier, data) -> int:
    logits = classifier.classify(classifier.encoder.embed_images(data["image"]))
    return int((logits.argmax(1) == torch.tensor(data["label"])).sum())


@pytest.mark.parametrize(("weak", "strong"), [("resnet", "eva"), ("eva", "resnet")])
def test_a_tuning_is_carried_between_them(weak, strong, load, make_dataset, tmp_path):
    weak, strong, data = load(weak), load(strong), make_dataset(60)
    tuned = tune(weak, data, {"method": "lora", "r": 2}, config=TUNING, progress=False)
    adapter = extract(weak, tuned, data, progress=False)
    zero_shot = AnchorClassifier(strong, Anchors(NAMES))
    carried = transfer(adapter, strong, data, progress=False)
    assert right(carried, data) > right(zero_shot, data) + 10  # of 60; the pictures are told apart by one colour each
    carried.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == strong.name_or_path
    found = AnchorClassifier.from_pretrained(tmp_path)
    pixels = strong.preprocess(data["image"][:4])
    torch.testing.assert_close(found(pixels)["logits_per_image"], carried(pixels)["logits_per_image"])


def test_shared_by_name(hub, load, folder_of, tmp_path):
    """An adapter on the Hub names its model; the card too."""
    files = {file: Path(folder_of("eva"), file).read_bytes() for file in (CONFIG, WEIGHTS[0])}
    commit = hub.write("bob/eva", files)
    strong = DualEncoder.from_pretrained("open_clip:hf-hub:bob/eva")
    classifier = AnchorClassifier(strong, Anchors(NAMES))
    classifier.add_adapter(TransMiterConfig(class_names=NAMES, form="linear"))
    classifier.push_to_hub("alice/pets")
    card = hub.files("alice/pets")["README.md"].decode()
    assert f"DualEncoder.from_pretrained('open_clip:hf-hub:bob/eva', revision='{commit}')" in card.replace('"', "'")
    assert "is read by open_clip" in card and "base_model:" not in card
    hub.new_machine()
    found = AnchorClassifier.from_pretrained("alice/pets")
    assert found.encoder.fingerprint == strong.fingerprint and found.encoder.revision == commit
    # PEFT's own way, which looks for the model's files on the Hub when it saves.
    get_peft_model(strong.model, CoOpConfig(n_ctx=2)).save_pretrained(tmp_path / "coop")
    assert (tmp_path / "coop" / "adapter_model.safetensors").is_file()
    local = AnchorClassifier(load("eva"), Anchors(NAMES))
    local.add_adapter(TransMiterConfig(class_names=NAMES, form="linear"))
    with pytest.raises(ValueError, match="which nobody else has: pass the Hub id"):
        local.push_to_hub("alice/local")


def test_commands(load, make_dataset, tmp_path):
    names = [load(kind).name_or_path for kind in ("resnet", "eva")]
    for split, seed in (("train", 0), ("test", 1)):
        for number, row in enumerate(make_dataset(110, seed=seed)):
            target = tmp_path / "data" / split / NAMES[row["label"]]
            target.mkdir(parents=True, exist_ok=True)
            row["image"].save(target / f"{number}.png")

    def run(*args):
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    pictures = ("--dataset", tmp_path / "data", "--cache-dir", tmp_path / "features", "--json", "--quiet")
    steps = ("--shots", 8, "--epochs", 4, "--batch-size", 8, "--adapter", "r=2", "--lr", 0.005)
    run("tune", "--model", names[0], *pictures, *steps, "--output-dir", tmp_path / "tuned")
    teacher = ("--weak", names[0], "--teacher", tmp_path / "tuned")
    run("extract", *teacher, *pictures, "--output-dir", tmp_path / "adapter")
    run("transfer", tmp_path / "adapter", "--strong", names[1], *pictures, "--output-dir", tmp_path / "strong")
    before, after = (run("evaluate", source, *pictures)["scores"][0] for source in (names[1], tmp_path / "strong"))
    assert before["metric"] == after["metric"] == "accuracy" and after["value"] > before["value"] + 20
    rows = ("zero-shot strong", "refit", "tuned strong")
    chosen = [word for row in rows for word in ("--methods", row)]
    table = run("compare", *teacher, "--strong", names[1], *pictures, "--unlabelled", tmp_path / "data", *chosen)
    accuracy = {row["name"]: row["scores"]["accuracy"] for row in table["rows"]}
    assert accuracy["zero-shot strong"] == before["value"] and accuracy["refit"] > before["value"] + 20
    config = json.loads((tmp_path / "strong" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == names[1]
