"""Many adapters to one new model: equal to single transfers, resumable, one failure does not stop the others."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from huggingface_hub import HfApi, ModelCard

import hf_transmiter.upgrading
from hf_transmiter import AnchorClassifier, Anchors, Bridge, DualEncoder, TransMiterConfig, evaluate, transfer
from hf_transmiter.report import read_scores
from hf_transmiter.sharing import push, record_scores
from hf_transmiter.upgrading import upgrade, upgrade_table


TASKS = {"pets": ("cat", "dog"), "things": ("car", "ship", "tree"), "big": ("big tree", "red dog", "old car")}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    widths = {"weak": 16, "strong": 24}
    folders = {
        name: tiny_models.save("clip", tmp_path_factory.mktemp(name), seed=seed, width=width)
        for seed, (name, width) in enumerate(widths.items())
    }
    return {name: DualEncoder.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def bridge(models):
    return Bridge.build(models["weak"], models["strong"])


@pytest.fixture
def folders(models, tmp_path):
    """One adapter per task, as folders."""
    found = {}
    for seed, (task, names) in enumerate(TASKS.items()):
        adapter = AnchorClassifier(models["weak"], Anchors(names))
        adapter.add_adapter(TransMiterConfig(class_names=list(names), form="class_vectors"))
        vectors = adapter.transmiter.tensors("default")["class_vectors"]
        vectors.add_(0.3 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed)))
        adapter.save_pretrained(tmp_path / "old" / task)
        found[task] = str(tmp_path / "old" / task)
    return found


def test_equal_to_single_transfers(models, bridge, folders, tmp_path, make_images):
    rows = upgrade(list(folders.values()), models["strong"], tmp_path / "new", bridge=bridge, **QUIET)
    assert [row.status for row in rows] == ["upgraded"] * 3 and [row.num_classes for row in rows] == [2, 3, 3]
    pixels = models["strong"].preprocess(make_images(3))
    for row in rows:
        single = transfer(
            AnchorClassifier.from_pretrained(row.source, models["weak"]), models["strong"], bridge=bridge
        )
        found = AnchorClassifier.from_pretrained(row.folder, models["strong"])
        expected = single(pixel_values=pixels).logits_per_image
        torch.testing.assert_close(found(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)
        assert "not scored" in row.remark


def test_without_a_bridge_one_is_built_from_text_and_kept(models, bridge, folders, tmp_path, monkeypatch):
    upgrade([folders["pets"]], models["strong"], tmp_path / "new", **QUIET)
    files = list((tmp_path / "new" / "bridges").iterdir())
    assert len(files) == 1
    torch.testing.assert_close(Bridge.load(files[0]).matrix, bridge.matrix, atol=1e-5, rtol=0)

    def never(*args, **kwargs):
        raise AssertionError("the bridge is there")

    monkeypatch.setattr(Bridge, "build", never)
    assert upgrade([folders["things"]], models["strong"], tmp_path / "new", **QUIET)[0].status == "upgraded"


def test_one_failure_and_an_interruption(models, bridge, folders, tmp_path, monkeypatch):
    config = Path(folders["things"]) / "adapter_config.json"
    config.write_text(config.read_text().replace('"things"', '"x"').replace('"embed_dim": 16', '"embed_dim": 17'))
    sources = [folders["pets"], folders["things"], str(tmp_path / "nothing" / "there"), folders["big"]]
    new, calls, carry = tmp_path / "new", [], hf_transmiter.upgrading.carry

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return carry(*args, **kwargs)

    monkeypatch.setattr(hf_transmiter.upgrading, "carry", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upgrade(sources, models["strong"], new, bridge=bridge, **QUIET)
    first = (new / "pets" / "adapter_model.safetensors").stat().st_mtime_ns
    rows = upgrade(sources, models["strong"], new, bridge=bridge, **QUIET)
    assert [row.status for row in rows] == ["kept", "failed", "failed", "upgraded"]
    assert (new / "pets" / "adapter_model.safetensors").stat().st_mtime_ns == first and len(calls) == 3
    assert sorted(path.name for path in new.iterdir()) == ["big", "pets", "upgrade.json"]
    table = upgrade_table(rows)
    assert "nothing/there" in table and "failed" in table
    assert [row["status"] for row in json.loads((new / "upgrade.json").read_text())["rows"]] == [
        row.status for row in rows
    ]


def test_a_dry_run_does_nothing(models, bridge, folders, tmp_path):
    rows = upgrade(list(folders.values()), models["strong"], tmp_path / "new", bridge=bridge, dry_run=True, **QUIET)
    assert [row.status for row in rows] == ["planned"] * 3 and not (tmp_path / "new").exists()
    other = Bridge.build(models["strong"], models["weak"])
    rows = upgrade([folders["pets"]], models["weak"], tmp_path / "new", bridge=other, dry_run=True, **QUIET)
    assert rows[0].status == "failed" and "the bridge begins at" in rows[0].remark
    upgrade([folders["pets"]], models["strong"], tmp_path / "new", bridge=bridge, **QUIET)
    rows = upgrade([folders["pets"]], models["strong"], tmp_path / "new", bridge=bridge, dry_run=True, **QUIET)
    assert rows[0].status == "kept"


def test_scored_where_the_old_scores_were_measured(models, bridge, folders, tmp_path, make_dataset):
    data, on = make_dataset(30, TASKS["pets"]), {"dataset_name": "alice/pets", "split": "test"}
    old = AnchorClassifier.from_pretrained(folders["pets"], models["weak"])
    record_scores(folders["pets"], old, data, evaluate(old, data, **on), **on)
    asked = []

    def images(*which):
        asked.append(which)
        return data

    new = tmp_path / "new"
    sources = [folders["pets"], folders["things"]]
    row, unscored = upgrade(sources, models["strong"], new, bridge=bridge, images=images, **QUIET)
    assert asked == [("alice/pets", "test")] and unscored.after is None
    found = AnchorClassifier.from_pretrained(row.folder, models["strong"])
    assert row.after == evaluate(found, data)[0].value and row.before == evaluate(old, data)[0].value
    assert row.zero_shot == evaluate(AnchorClassifier(models["strong"], Anchors(TASKS["pets"])), data)[0].value
    assert read_scores(new / "pets" / "scores.json")[0].value == row.after
    assert f"{row.after:.1f}" in (new / "pets" / "README.md").read_text()
    assert f"{row.after - row.before:+.1f}" in upgrade_table([row])
    again = upgrade(sources, models["strong"], new, bridge=bridge, images=images, **QUIET)[0]
    assert (again.status, again.after, again.before) == ("kept", row.after, row.before) and len(asked) == 1


def test_a_dataset_that_cannot_be_loaded(models, bridge, folders, tmp_path, make_dataset):
    data, on = make_dataset(30, TASKS["pets"]), {"dataset_name": str(tmp_path / "gone"), "split": "test"}
    old = AnchorClassifier.from_pretrained(folders["pets"], models["weak"])
    record_scores(folders["pets"], old, data, evaluate(old, data, **on), **on)
    row = upgrade([folders["pets"]], models["strong"], tmp_path / "new", bridge=bridge, **QUIET)[0]
    assert row.status == "upgraded" and row.remark.startswith("not scored: ") and row.before is not None


def test_refusals(models, bridge, folders, tmp_path):
    with pytest.raises(ValueError, match="two adapters have the same name, pets"):
        upgrade([folders["pets"], folders["pets"]], models["strong"], tmp_path / "new", **QUIET)
    upgrade([folders["pets"]], models["strong"], tmp_path / "new", bridge=bridge, **QUIET)
    with pytest.raises(ValueError, match="holds an adapter of another model"):
        upgrade([folders["pets"]], models["weak"], tmp_path / "new", **QUIET)


def test_over_the_hub(hub, models, folders, tmp_path):
    ids = {}
    for name in models:
        HfApi().create_repo(f"alice/{name}")
        HfApi().upload_folder(repo_id=f"alice/{name}", folder_path=models[name].name_or_path, commit_message="model")
    for task in ("pets", "things"):
        ids[task] = f"alice/{task}-weak"
        push(folders[task], ids[task], base_model="alice/weak")
    hub.new_machine()
    weak, strong = (DualEncoder.from_pretrained(f"alice/{name}") for name in ("weak", "strong"))
    Bridge.build(weak, strong).push_to_hub("alice/weak-to-strong")
    hub.new_machine()
    strong = DualEncoder.from_pretrained("alice/strong")
    before = len(hub.requests("GET", "alice/weak/resolve"))
    options = {"bridge": Bridge.from_pretrained("alice/weak-to-strong"), "push_to_hub": True, **QUIET}
    rows = upgrade(list(ids.values()), strong, tmp_path / "new", **options)
    assert [row.repo for row in rows] == ["alice/pets-weak-strong", "alice/things-weak-strong"]
    assert len(hub.requests("GET", "alice/weak/resolve")) == before  # the old model was not needed
    assert ModelCard(hub.files("alice/pets-weak")["README.md"].decode()).data.new_version == rows[0].repo
    commits = len(hub.titles(rows[0].repo)), len(hub.titles("alice/pets-weak"))
    upgrade(list(ids.values()), strong, tmp_path / "new", **options)
    assert (len(hub.titles(rows[0].repo)), len(hub.titles("alice/pets-weak"))) == commits
    hub.new_machine()
    found = AnchorClassifier.from_pretrained("alice/pets-weak-strong")
    assert found.class_names == TASKS["pets"]
