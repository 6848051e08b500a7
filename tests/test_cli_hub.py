"""The commands push, card and upgrade, as typed, against a Hub on this machine."""

import json

import pytest
import tiny_models
import torch
from huggingface_hub import HfApi, ModelCard
from typer.testing import CliRunner

from hf_transmiter import AnchorClassifier, Anchors, Bridge, DualEncoder, TransMiterConfig, transfer
from hf_transmiter.cli import app
from hf_transmiter.transfers import list_transfers


NAMES = ("cat", "dog", "car")


def run(*args, code=0):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def shared(hub, tmp_path):
    """Two models on the Hub as alice/weak and alice/strong, and a saved adapter of the first."""
    for seed, (name, width) in enumerate({"weak": 16, "strong": 24}.items()):
        folder = tiny_models.save("clip", tmp_path / name, seed=seed, width=width)
        HfApi().create_repo(f"alice/{name}")
        HfApi().upload_folder(repo_id=f"alice/{name}", folder_path=folder, commit_message="model")
    adapter = AnchorClassifier(DualEncoder.from_pretrained("alice/weak"), Anchors(NAMES))
    adapter.add_adapter(TransMiterConfig(class_names=list(NAMES), form="class_vectors"))
    adapter.transmiter.tensors("default")["class_vectors"].add_(0.1 * torch.randn(3, 16))
    adapter.save_pretrained(tmp_path / "adapter")
    return adapter, tmp_path


def test_push_and_upgrade(hub, shared):
    adapter, folder = shared
    found = json.loads(run("push", folder / "adapter", "alice/pets", "--json", "--commit-message", "Pets").stdout)
    assert hub.titles("alice/pets")[0] == "Pets" and found["commit"] == HfApi().model_info("alice/pets").sha
    bridge = Bridge.build(adapter.encoder, DualEncoder.from_pretrained("alice/strong"))
    bridge.save_pretrained(folder / "bridge")
    run("push", folder / "bridge", "alice/weak-to-strong", "--private")
    upgrade = (
        "upgrade",
        "--repos",
        "alice/pets",
        "--to",
        "alice/strong",
        "--bridge",
        "alice/weak-to-strong",
        "--quiet",
    )
    planned = run(*upgrade, "--output-dir", folder / "new", "--push", "--dry-run").stdout
    assert "planned; alice/pets-strong" in planned and "Nothing was done" in planned and not (folder / "new").exists()
    table = run(*upgrade, "--output-dir", folder / "new", "--push").stdout
    assert "upgraded; alice/pets-strong; not scored" in table and (folder / "new" / "upgrade.md").read_text() in (
        f"# Upgrade to alice/strong\n\n{table.split('Report:')[0].rstrip()}\n"
    )
    assert ModelCard(hub.files("alice/pets")["README.md"].decode()).data.new_version == "alice/pets-strong"
    assert AnchorClassifier.from_pretrained("alice/pets-strong").encoder.name_or_path == "alice/strong"


def test_push_as_a_transfer(hub, shared):
    adapter, folder = shared
    run("push", folder / "adapter", "alice/pets")
    strong = DualEncoder.from_pretrained("alice/strong")
    transfer(adapter, strong).save_pretrained(folder / "upgraded")
    run("push", folder / "upgraded", "alice/pets", "--as-transfer")
    assert [entry.kind for entry in list_transfers("alice/pets")] == ["adapter"]
    Bridge.build(adapter.encoder, strong).save(folder / "bridge.safetensors")
    error = run("push", folder / "bridge.safetensors", "alice/pets", "--as-transfer", code=1).stderr
    assert "already has a transfer to alice/strong" in error
    run("push", folder / "bridge.safetensors", "alice/pets", "--as-transfer", "--overwrite")
    assert [entry.kind for entry in list_transfers("alice/pets")] == ["bridge"]
    assert len(hub.files("alice/pets")) == 7  # not the replaced one
    AnchorClassifier.from_pretrained("alice/pets", strong)


@pytest.mark.parametrize("name", ["push", "card", "upgrade"])
def test_help_has_an_example(name):
    assert f"Example: hf-transmiter {name} " in " ".join(run(name, "--help").stdout.replace("│", " ").split())


def test_card(shared):
    _, folder = shared
    run("card", folder / "adapter", "--license", "mit", "--tags", "pets", "--datasets", "alice/pets")
    data = ModelCard.load(folder / "adapter" / "README.md").data
    assert data.license == "mit" and "pets" in data.tags and data.datasets == ["alice/pets"]
    run("card", folder / "adapter")  # what was said stays
    assert ModelCard.load(folder / "adapter" / "README.md").data.license == "mit"


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
        (("push", folder / "adapter", "alice/pets", "--overwrite"), "--overwrite belongs to --as-transfer"),
        (("push", folder / "adapter", "alice/pets", "--as-transfer", "--private"), "--private and --base-model are"),
        (("push", folder / "adapter", "alice/pets", "--as-transfer", "--base-model", "a/b"), "--private and --base"),
        (("card", folder), "holds neither adapter_config.json nor bridge.safetensors: no card to write"),
    ):
        error = run(*args, code=1).stderr
        assert message in error and error.startswith("Error: ") and error.count("\n") == 1
