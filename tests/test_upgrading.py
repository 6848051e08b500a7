"""Many adapters to one new model: equal to single transfers, resumable, one failure does not stop the others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

import hf_transmiter.upgrading
from hf_transmiter import AnchorClassifier, Anchors, Bridge, DualEncoder, TransMiterConfig, evaluate, transfer
from hf_transmiter.scores import Score, read_scores, write_scores
from hf_transmiter.sharing import push, record_scores
from hf_transmiter.transferring import carry
from hf_transmiter.transfers import read_adapter
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
    upgrade([folders["pets"]], models["strong"], tmp_path / "new", bridge=bridge, **QUIET)
    rows = upgrade([folders["pets"]], models["strong"], tmp_path / "new", bridge=bridge, dry_run=True, **QUIET)
    assert rows[0].status == "kept"


def test_what_cannot_be_carried_is_known_before(models, bridge, folders, tmp_path, model_dir, make_dataset):
    weak, strong = models["weak"], models["strong"]
    published = AnchorClassifier(weak, Anchors(TASKS["pets"]))
    published.add_adapter(TransMiterConfig(class_names=list(TASKS["pets"]), form="mlp"))
    published.save_pretrained(tmp_path / "old" / "mlp")
    pets, mlp = folders["pets"], str(tmp_path / "old" / "mlp")
    other = DualEncoder.from_pretrained(model_dir("siglip"))
    logits = Bridge.build(weak, strong, make_dataset(12), space="logit", anchors=Anchors(TASKS["things"]), **QUIET)
    for source, to, over, message in (
        (pets, weak, None, "an adapter of the strong model already"),
        (pets, other, bridge, "built for the strong model"),
        (pets, weak, Bridge.build(strong, weak), "an adapter of the strong model already"),
        (pets, other, Bridge.build(strong, other), "the bridge begins at"),
        (pets, strong, logits, "class vectors cross a logit-space bridge by the weak model's texts"),
        (mlp, strong, bridge, "the published adapter reads logits"),
        (mlp, strong, None, "does not cross a bridge built from text"),
    ):
        for dry_run in (True, False):
            row = upgrade([source], to, tmp_path / "new", bridge=over, dry_run=dry_run, **QUIET)[0]
            assert row.status == "failed" and message in row.remark
    assert not list((tmp_path / "new").glob("*/*"))


def test_an_adapter_that_does_not_know_its_weights(models, bridge, folders, tmp_path):
    """Its model's name decides, and the width must fit: nothing is carried on a guess, nothing stops the others."""

    def forget(task, **more):
        path = Path(folders[task]) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": None} | more))

    forget("pets")
    forget("things", base_model_name_or_path="alice/somebody-else")
    narrow = AnchorClassifier(models["strong"], Anchors(TASKS["big"]))
    narrow.add_adapter(TransMiterConfig(class_names=list(TASKS["big"]), form="class_vectors"))
    narrow.save_pretrained(tmp_path / "other" / "wide")
    folders["wide"] = str(tmp_path / "other" / "wide")
    forget("wide", base_model_name_or_path=models["weak"].name_or_path, embed_dim=None)
    sources = [folders[task] for task in ("pets", "things", "wide", "big")]
    rows = upgrade(sources, models["strong"], tmp_path / "new", bridge=bridge, **QUIET)
    assert [row.status for row in rows] == ["upgraded", "failed", "failed", "upgraded"]
    assert "the names must agree" in rows[1].remark
    assert "embeddings of width 24, the weak model of the bridge has 16" in rows[2].remark


def test_half_precision(models, bridge, tmp_path):
    """An adapter made in half precision has another fingerprint; the revision of its model says what it is."""
    content, tensors = _saved(models["weak"], tmp_path / "half")
    content |= {"base_fingerprint": "0" * 64, "revision": "1" * 40}
    with pytest.raises(ValueError, match="take a bridge of this pair"):
        carry(content, tensors, models["strong"], bridge)
    same = replace(bridge, weak=replace(bridge.weak, revision="1" * 40))
    assert carry(content, tensors, models["strong"], same)[1]["class_vectors"].shape == (2, 24)


def _saved(encoder, folder):
    adapter = AnchorClassifier(encoder, Anchors(TASKS["pets"]))
    adapter.add_adapter(TransMiterConfig(class_names=list(TASKS["pets"]), form="class_vectors"))
    adapter.save_pretrained(folder)
    return read_adapter(folder)


def test_what_a_kept_folder_was_made_from(models, bridge, folders, tmp_path):
    again = {"bridge": bridge, **QUIET}
    upgrade([folders["pets"]], models["strong"], tmp_path / "new", **again)
    other = Bridge.build(models["weak"], models["strong"], anchors=Anchors(("cat", "dog", "car", "tree", "ship")))
    for dry_run in (True, False):
        row = upgrade([folders["pets"]], models["strong"], tmp_path / "new", bridge=other, dry_run=dry_run, **QUIET)[0]
        assert row.status == "failed" and "made over another bridge; remove the folder" in row.remark
    assert upgrade([folders["pets"]], models["strong"], tmp_path / "new", **again)[0].remark != row.remark
    path = Path(folders["pets"]) / "adapter_model.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(path).items()}, path)
    for dry_run in (True, False):
        row = upgrade([folders["pets"]], models["strong"], tmp_path / "new", dry_run=dry_run, **again)[0]
        assert row.status == "failed" and "made from other weights; remove the folder" in row.remark
    shutil.rmtree(row.folder)
    assert upgrade([folders["pets"]], models["strong"], tmp_path / "new", **again)[0].status == "upgraded"


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


@pytest.mark.parametrize("content", ["{", "[]x", '[{"value": "high"}]', "\x00"])
def test_scores_that_cannot_be_read(models, bridge, folders, tmp_path, content):
    """They do not stop the upgrade; the row says that there is no score, and why."""
    (Path(folders["pets"]) / "scores.json").write_text(content)
    (row,) = upgrade([folders["pets"]], models["strong"], tmp_path / "new", bridge=bridge, **QUIET)
    assert row.status == "upgraded" and row.after is None
    assert row.remark.startswith("not scored: scores.json of the source is damaged (")


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


@pytest.fixture
def online(hub, models, bridge):
    """The strong model from the Hub, and the options of a push."""
    HfApi().create_repo("alice/strong")
    HfApi().upload_folder(repo_id="alice/strong", folder_path=models["strong"].name_or_path, commit_message="model")
    return DualEncoder.from_pretrained("alice/strong"), {"bridge": bridge, "push_to_hub": True, **QUIET}


def test_a_private_source(hub, online, folders, tmp_path):
    """The token reads too, and what was private stays so."""
    strong, options = online
    push(folders["pets"], "alice/pets-weak", base_model="alice/weak", private=True)
    push(folders["things"], "alice/things-weak", base_model="alice/weak")
    hub.new_machine(None)
    row = upgrade(["alice/pets-weak"], strong, tmp_path / "new", dry_run=True, **options)[0]
    assert row.repo is None and "cannot be pushed" in row.remark and "hf auth login" in row.remark
    with pytest.raises(OSError, match="hf auth login"):
        upgrade(["alice/pets-weak"], strong, tmp_path / "new", **options)
    options["token"] = hub.token
    rows = upgrade(["alice/pets-weak", "alice/things-weak"], strong, tmp_path / "new", **options)
    assert [row.status for row in rows] == ["upgraded"] * 2
    api = HfApi(token=hub.token)
    assert [api.model_info(row.pushed).private for row in rows] == [True, False]


def test_anothers_adapter_goes_into_the_callers_namespace(hub, online, folders, tmp_path):
    strong, options = online
    push(folders["pets"], "bob/pets-weak", base_model="alice/weak", token=hub.other_token)
    assert upgrade(["bob/pets-weak"], strong, tmp_path / "new", dry_run=True, **options)[0].repo == (
        "alice/pets-weak-strong"
    )
    row = upgrade(["bob/pets-weak"], strong, tmp_path / "new", **options)[0]
    assert "adapter_config.json" in hub.files("alice/pets-weak-strong") and row.pushed is None
    assert (
        row.push_error.startswith("pushed, but the card of bob/pets-weak does not name it") and "403" in row.push_error
    )
    row = upgrade(["bob/pets-weak"], strong, tmp_path / "new", create_pr=True, **options)[0]
    assert (row.status, row.pushed, row.push_error) == ("kept", "alice/pets-weak-strong", None)
    proposed = hub.files("bob/pets-weak", "refs/pr/1")["README.md"].decode()
    assert ModelCard(proposed).data.new_version == "alice/pets-weak-strong"
    push(folders["pets"], "alice/pets-weak", base_model="alice/weak")
    with pytest.raises(ValueError, match="two adapters would be pushed to alice/pets-weak-strong"):
        upgrade(["alice/pets-weak", "bob/pets-weak"], strong, tmp_path / "new", **options)


def test_a_failed_push_is_made_up_for(hub, online, folders, tmp_path):
    strong, options = online
    push(folders["pets"], "alice/pets-weak", base_model="alice/weak")
    hub.fault("POST", "alice/pets-weak-strong/commit", 403)
    row = upgrade(["alice/pets-weak"], strong, tmp_path / "new", **options)[0]
    assert row.status == "upgraded, not pushed" and "403" in row.push_error and row.remark.startswith("not scored")
    row = upgrade(["alice/pets-weak"], strong, tmp_path / "new", **options)[0]
    assert (row.status, row.pushed, row.push_error) == ("kept", "alice/pets-weak-strong", None)
    assert row.remark.startswith("not scored")
    upgrade(["alice/pets-weak"], strong, tmp_path / "new", **options | {"push_to_hub": False})
    before = hub.titles("alice/pets-weak")
    row = upgrade(["alice/pets-weak"], strong, tmp_path / "new", **options)[0]
    assert row.pushed == "alice/pets-weak-strong" and hub.titles("alice/pets-weak") == before


@pytest.mark.parametrize("dataset, loaded", [("home/secret/pictures", False), ("alice/pets", True)])
def test_a_stranger_does_not_choose_what_is_read(hub, online, folders, tmp_path, make_dataset, dataset, loaded):
    strong, options = online
    push(folders["pets"], "bob/pets-weak", base_model="alice/weak", token=hub.other_token)
    write_scores(tmp_path / "scores.json", [Score("this model", "test", "accuracy", 50.0, dataset=dataset)])
    hub.write("bob/pets-weak", {"scores.json": (tmp_path / "scores.json").read_bytes()})
    asked = []

    def images(*which):
        asked.append(which)
        return make_dataset(12, TASKS["pets"])

    options = options | {"push_to_hub": False, "images": images}
    found = upgrade(["bob/pets-weak"], strong, tmp_path / "new", **options)[0]
    assert found.status == "upgraded", found.remark
    assert (found.after is not None) == loaded == bool(asked)
    assert loaded or found.remark == "not scored: 'home/secret/pictures' is no dataset of the Hub"
