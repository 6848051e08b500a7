"""Pushing what was saved: what goes along, what stays at home, and what becomes of what is there."""

import json
from dataclasses import replace

import pytest
import tiny_models
import torch
from huggingface_hub import HfApi, ModelCard, metadata_update
from peft import PeftModel
from transformers import CLIPModel

from hf_transmiter import AnchorClassifier, Anchors, Bridge, DualEncoder, TransMiterConfig, evaluate
from hf_transmiter.evaluation.evaluate import record_scores
from hf_transmiter.hub.push import push
from hf_transmiter.hub.repo import push_folder
from hf_transmiter.hub.scores import read_scores, write_scores
from hf_transmiter.method.stored_logits import CalibrationPack


NAMES = ("cat", "dog", "car")


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    return DualEncoder.from_pretrained(tiny_models.save("clip", tmp_path_factory.mktemp("secret-place"), seed=0))


def adapter_of(encoder, seed=0):
    adapter = AnchorClassifier(encoder, Anchors(NAMES))
    adapter.add_adapter(TransMiterConfig(class_names=list(NAMES), form="linear"))
    vectors = adapter.transmiter.tensors("default")["class_vectors"]
    vectors.add_(0.3 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed)))
    return adapter


@pytest.fixture
def saved(weak, tmp_path):
    adapter_of(weak).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_local_model_needs_a_name_that_others_can_use(hub, saved, weak):
    with pytest.raises(ValueError, match=r"local folder .*base_model='user/model' \(--base-model\)"):
        push(saved, "alice/adapter")
    assert not hub.requests("POST", "alice/adapter")
    push(saved, "alice/adapter", base_model="alice/clip")
    files = hub.files("alice/adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "alice/clip"
    assert not any(b"secret-place" in content for content in files.values())
    assert b"secret-place" in (saved / "adapter_config.json").read_bytes()  # what lies here is as it was
    HfApi().create_repo("alice/clip")
    HfApi().upload_folder(repo_id="alice/clip", folder_path=weak.name_or_path, commit_message="model")
    hub.new_machine()
    AnchorClassifier.from_pretrained("alice/adapter")


def test_only_what_belongs_there_goes_along(hub, saved):
    (saved / "settings.yaml").write_text("dataset: /home/me/private")
    (saved / "notes.txt").write_text("mine")
    (saved / "optimizer.pt").write_bytes(b"0")
    push(saved, "alice/adapter", base_model="alice/clip", commit_message="First", private=True)
    assert set(hub.files("alice/adapter")) - {".gitattributes"} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    assert hub.titles("alice/adapter")[0] == "First" and HfApi().model_info("alice/adapter").private


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md", "scores.json", "teacher.json"])
@pytest.mark.parametrize("kind", ["file", "folder", "relative"])
def test_no_link_out_of_the_folder_is_followed(hub, saved, tmp_path, name, kind):
    """What it leads to is not part of the adapter: a key, say."""
    secret = tmp_path / "secret" / name
    secret.parent.mkdir()
    secret.write_bytes((saved / name).read_bytes() if (saved / name).exists() else b"[]")
    (saved / name).unlink(missing_ok=True)
    if kind == "folder":  # in two steps
        (saved / "inside").symlink_to(secret.parent)
    place = {"file": secret, "folder": f"inside/{name}", "relative": f"../secret/{name}"}[kind]
    (saved / name).symlink_to(place)
    with pytest.raises(ValueError, match=f"{name} in .* is a link out of that folder, to .*secret"):
        push(saved, "alice/adapter", base_model="alice/clip")
    assert not hub.requests("POST", "alice/adapter")


def test_links_within_the_folder_are_followed(hub, saved, tmp_path):
    """And the folder itself may be one."""
    (saved / "README.md").rename(saved / "card.md")
    (saved / "README.md").symlink_to("card.md")
    (tmp_path / "link").symlink_to(saved)
    push(tmp_path / "link", "alice/adapter", base_model="alice/clip")
    assert "README.md" in hub.files("alice/adapter") and "card.md" not in hub.files("alice/adapter")


def test_a_folder_with_a_link_out_is_not_pushed(hub, tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "folder" / "deep" / "b.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="deep/b.txt in .* is a link out of that folder"):
        push_folder(tmp_path / "folder", "alice/files", commit_message="first")
    assert not hub.requests("POST", "alice/files")


def test_new_weights_take_away_what_described_the_old_ones(hub, weak, saved, make_dataset):
    adapter = adapter_of(weak)
    data = make_dataset(12)
    record_scores(saved, adapter, data, evaluate(adapter, data, dataset_name="alice/pets"), dataset_name="alice/pets")
    CalibrationPack(torch.zeros(12, 3), NAMES).save(saved / "calibration.safetensors")
    push(saved, "alice/adapter", base_model="alice/clip")
    told = {"scores.json", "calibration.safetensors"}
    assert told < set(hub.files("alice/adapter"))
    push(saved, "alice/adapter", base_model="alice/clip", commit_message="Again")  # the same weights
    assert told < set(hub.files("alice/adapter"))
    other = adapter_of(weak, seed=1)
    commits = len(hub.titles("alice/adapter"))
    other.push_to_hub("alice/adapter", base_model="alice/clip")
    assert not told & set(hub.files("alice/adapter")) and len(hub.titles("alice/adapter")) == commits + 1


def test_what_people_wrote_on_the_hub_stays(hub, saved):
    push(saved, "alice/adapter", base_model="alice/clip")
    path = HfApi().hf_hub_download("alice/adapter", "README.md")
    card = ModelCard.load(path)
    card.data.license = "mit"
    card.push_to_hub("alice/adapter")
    (saved / "README.md").unlink()
    push(saved, "alice/adapter", base_model="alice/clip")
    assert ModelCard(hub.files("alice/adapter")["README.md"].decode()).data.license == "mit"


def test_a_bridge_names_no_folder_of_this_machine(hub, weak, tmp_path):
    """Its facts are written anew, its tensors stay as they are."""
    bridge = Bridge.build(weak, weak)
    bridge.dataset, bridge.through = f"{tmp_path} (train)", (f"{tmp_path}/private-place", "alice/clip")
    bridge.save_pretrained(tmp_path / "bridge")
    push(tmp_path / "bridge", "alice/bridge")
    hidden = (b"pytest", b"private-place/", b"secret-place/", str(tmp_path).encode())
    assert not any(word in content for content in hub.files("alice/bridge").values() for word in hidden)
    found = Bridge.from_pretrained("alice/bridge")
    assert found.through == ("private-place", "alice/clip") and found.weak.fingerprint == weak.fingerprint
    for part in ("matrix", "mean_weak", "mean_strong"):
        assert torch.equal(getattr(found, part), getattr(bridge, part))
    assert (found.scale, found.held_out, found.anchors) == (bridge.scale, bridge.held_out, bridge.anchors)


def test_a_subfolder(hub, weak, saved, make_dataset, tmp_path):
    """What an adapter is on another model goes beside it, and replaces nothing but what was there."""
    push(saved, "alice/adapter", base_model="alice/clip")
    before, other = hub.files("alice/adapter"), adapter_of(weak, seed=1)
    other.save_pretrained(tmp_path / "other")
    data = make_dataset(12)
    record_scores(tmp_path / "other", other, data, evaluate(other, data))
    push(tmp_path / "other", "alice/adapter", base_model="alice/clip", subfolder="l14")
    after = hub.files("alice/adapter")
    names = {"adapter_config.json", "adapter_model.safetensors", "scores.json"}
    assert set(after) - set(before) == {f"l14/{name}" for name in names}
    assert all(after[file] == before[file] for file in before)
    adapter_of(weak, seed=2).save_pretrained(tmp_path / "newer")
    push(tmp_path / "newer", "alice/adapter", base_model="alice/clip", subfolder="l14")
    assert set(hub.files("alice/adapter")) == set(after) - {"l14/scores.json"}


def test_licence_and_tags(hub, saved):
    push(saved, "alice/adapter", base_model="alice/clip", license="apache-2.0", tags=["pets"])
    push(saved, "alice/adapter", base_model="alice/clip", tags=["cats"])
    data = ModelCard(hub.files("alice/adapter")["README.md"].decode()).data
    assert data.license == "apache-2.0" and {"pets", "cats", "transmiter"} < set(data.tags)


def test_nothing_to_share(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither adapter_config.json nor bridge.safetensors"):
        push(tmp_path, "alice/adapter")


def test_loading_needs_the_right_token(hub, saved, weak):
    push(saved, "alice/adapter", base_model="alice/clip", private=True)
    clip = CLIPModel.from_pretrained(weak.name_or_path)
    hub.new_machine(hub.other_token)
    with pytest.raises((OSError, ValueError), match="alice/adapter"):  # PEFT's own words
        PeftModel.from_pretrained(clip, "alice/adapter")
    with pytest.raises(OSError, match="no repository 'alice/adapter' .* that you may see"):
        AnchorClassifier.from_pretrained("alice/adapter", weak)
    AnchorClassifier.from_pretrained("alice/adapter", weak, token=hub.token)


def test_a_second_push_keeps_what_people_said_there(hub, saved):
    """Although `save_pretrained` has written a card into the folder, too."""
    push(saved, "alice/adapter", base_model="alice/clip")
    metadata_update("alice/adapter", {"new_version": "alice/newer"})
    push(saved, "alice/adapter", base_model="alice/clip")
    assert ModelCard(hub.files("alice/adapter")["README.md"].decode()).data.new_version == "alice/newer"
    mine = ModelCard("---\nlicense: mit\n---\n\n# My own words\n")
    mine.push_to_hub("alice/adapter")
    push(saved, "alice/adapter", base_model="alice/clip")
    card = ModelCard(hub.files("alice/adapter")["README.md"].decode())
    assert "# My own words" in card.text and card.data.license == "mit" and card.data.library_name == "hf-transmiter"


def test_the_card_of_a_second_push_tells_what_the_repository_has(hub, weak, saved, make_dataset, tmp_path):
    adapter, data = adapter_of(weak), make_dataset(12)
    record_scores(saved, adapter, data, evaluate(adapter, data, dataset_name="alice/pets"), dataset_name="alice/pets")
    push(saved, "alice/adapter", base_model="alice/clip")
    adapter_of(weak).save_pretrained(tmp_path / "same")
    push(tmp_path / "same", "alice/adapter", base_model="alice/clip")
    assert "scores.json" in hub.files("alice/adapter")
    assert "alice/pets" in hub.files("alice/adapter")["README.md"].decode()


def test_no_path_of_this_machine_is_pushed(hub, weak, make_dataset, tmp_path):
    place = tmp_path / "private-place"
    make_dataset(12).save_to_disk(place / "photos")
    adapter = adapter_of(weak)
    adapter.adapter_config.provenance["dataset"] = f"{place / 'photos'} (train)"
    adapter.save_pretrained(tmp_path / "adapter")
    scores = [replace(score, dataset=str(place / "photos")) for score in evaluate(adapter, make_dataset(12))]
    write_scores(tmp_path / "adapter" / "scores.json", scores)
    push(tmp_path / "adapter", "alice/adapter", base_model="alice/clip")
    for file, content in hub.files("alice/adapter").items():
        assert b"private-place" not in content and weak.name_or_path.encode() not in content, file
    assert read_scores(tmp_path / "adapter" / "scores.json")[0].dataset == str(place / "photos")


def test_a_base_model_whose_folder_is_gone(hub, saved):
    config = saved / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "base_model_name_or_path": "/home/somebody/clip"}))
    with pytest.raises(ValueError, match="local folder '/home/somebody/clip'"):
        push(saved, "alice/adapter")


def test_a_class_with_the_name_of_the_folder(hub, tmp_path, monkeypatch):
    """Only names of models are replaced."""
    monkeypatch.chdir(tmp_path)
    dog = DualEncoder.from_pretrained(tiny_models.save("clip", "dog", seed=0))
    dog.name_or_path = "dog"
    adapter_of(dog).push_to_hub("alice/adapter", base_model="alice/clip")
    content = json.loads(hub.files("alice/adapter")["adapter_config.json"])
    assert content["class_names"] == list(NAMES) and content["base_model_name_or_path"] == "alice/clip"
    AnchorClassifier.from_pretrained("alice/adapter", dog)


def test_a_name_without_its_owner(hub, saved):
    push(saved, "adapter", base_model="alice/clip")
    assert "README.md" in hub.files("alice/adapter")
    assert b'from_pretrained("alice/adapter")' in hub.files("alice/adapter")["README.md"]
