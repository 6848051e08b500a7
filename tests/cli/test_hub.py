"""The command push, as typed, against a Hub on this machine."""

import json

import pytest
import tiny_models
import torch
from commands import run
from huggingface_hub import HfApi, ModelCard

from hf_transmiter import AnchorClassifier, Anchors, Bridge, DualEncoder, TransMiterConfig, transfer


NAMES = ("cat", "dog", "car")


@pytest.fixture
def shared(hub, tmp_path):
    """Two models on the Hub as alice/weak and alice/strong, and a saved adapter of the first."""
    for seed, (name, width) in enumerate({"weak": 16, "strong": 24}.items()):
        folder = tiny_models.save("clip", tmp_path / name, seed=seed, width=width)
        HfApi().create_repo(f"alice/{name}")
        HfApi().upload_folder(repo_id=f"alice/{name}", folder_path=folder, commit_message="model")
    adapter = AnchorClassifier(DualEncoder.from_pretrained("alice/weak"), Anchors(NAMES))
    adapter.add_adapter(TransMiterConfig(class_names=list(NAMES), form="linear"))
    adapter.transmiter.tensors("default")["class_vectors"].add_(0.1 * torch.randn(3, 16))
    adapter.save_pretrained(tmp_path / "adapter")
    return adapter, tmp_path


def test_push(hub, shared):
    adapter, folder = shared
    options = ("--commit-message", "Pets", "--license", "mit", "--tags", "pets")
    found = json.loads(run("push", folder / "adapter", "alice/pets", "--json", *options).stdout)
    assert hub.titles("alice/pets")[0] == "Pets" and found["commit"] == HfApi().model_info("alice/pets").sha
    data = ModelCard(hub.files("alice/pets")["README.md"].decode()).data
    assert data.license == "mit" and "pets" in data.tags
    strong = DualEncoder.from_pretrained("alice/strong")
    bridge = Bridge.build(adapter.encoder, strong)
    bridge.save_pretrained(folder / "bridge")
    run("push", folder / "bridge", "alice/weak-to-strong", "--private")
    transfer(adapter, strong, bridge=bridge).save_pretrained(folder / "upgraded")
    run("push", folder / "upgraded", "alice/pets", "--subfolder", "strong")
    assert AnchorClassifier.from_pretrained("alice/pets", subfolder="strong").encoder.name_or_path == "alice/strong"


@pytest.mark.parametrize("name", ["push"])
def test_help_has_an_example(name):
    assert f"Example: hf-transmiter {name} " in " ".join(run(name, "--help").stdout.replace("│", " ").split())


def test_scores_are_recorded(shared, make_dataset, tmp_path):
    _, folder = shared
    make_dataset(12).to_parquet(tmp_path / "pets.parquet")
    run("evaluate", folder / "adapter", "--dataset", tmp_path / "pets.parquet", "--record", "--quiet")
    methods = [row["method"] for row in json.loads((folder / "adapter" / "scores.json").read_text())]
    assert methods == ["this model", "zero-shot"]
    error = run("evaluate", "alice/weak", "--dataset", tmp_path / "pets.parquet", "--record", code=1).stderr
    assert "--record needs the folder of an adapter" in error


def test_errors_are_one_line(hub, shared):
    _, folder = shared
    for args, message in (
        (("push", folder / "nothing", "alice/pets"), "nothing to share"),
        (("push", folder / "adapter", "bob/pets"), "403"),
        (("push", folder / "adapter", "alice/pets", "--token", "wrong"), "hf auth login"),
    ):
        error = run(*args, code=1).stderr
        assert message in error and error.startswith("Error: ") and error.count("\n") == 1
