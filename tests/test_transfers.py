"""Finished transfers beside an adapter: saving, choosing by the model at hand, sharing, and what is refused."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import CLIPModel

import hf_transmiter.transfers
from hf_transmiter import AnchorClassifier, Anchors, Bridge, CalibrationPack, DualEncoder, TransMiterConfig, transfer
from hf_transmiter.fingerprint import ModelId
from hf_transmiter.transfers import (
    INDEX,
    WEIGHTS,
    list_transfers,
    push_transfer,
    read_adapter,
    read_transfer,
    save_transfer,
)


NAMES = ("cat", "dog", "car")
WORDS = Anchors(NAMES, ("tree", "ship", "big tree", "red dog", "old car"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models by name; `upgraded` has the widths of `weak`."""
    widths = {"weak": 16, "strong": 24, "upgraded": 16}
    return {
        name: tiny_models.save("clip", tmp_path_factory.mktemp(name), seed=seed, width=width)
        for seed, (name, width) in enumerate(widths.items())
    }


@pytest.fixture(scope="module")
def models(folders):
    return {name: DualEncoder.from_pretrained(folder) for name, folder in folders.items()}


def adapter_of(encoder, form="class_vectors", seed=0):
    anchors = WORDS if form == "mlp" else Anchors(NAMES)
    adapter = AnchorClassifier(encoder, anchors).add_adapter(TransMiterConfig.for_anchors(anchors, form=form))
    generator = torch.Generator().manual_seed(seed)
    for part, tensor in adapter.transmiter.tensors("default").items():
        if part != "anchors":
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        if part == "basis":
            tensor.copy_(torch.linalg.qr(tensor)[0])
    return adapter


def bridge_of(models, form, make_dataset, cache_dir):
    if form == "class_vectors":
        return Bridge.build(models["weak"], models["strong"])
    options = {"space": "logit", "anchors": WORDS, "progress": False, "cache_dir": cache_dir}
    return Bridge.build(models["weak"], models["strong"], make_dataset(20), **options)


@pytest.fixture
def pixels(models, make_images):
    return models["weak"].preprocess(make_images(3))


@pytest.mark.parametrize("form", ["class_vectors", "mlp"])
@pytest.mark.parametrize("kind", ["adapter", "bridge"])
def test_the_transfer_that_fits_the_model_is_taken(models, folders, form, kind, make_dataset, pixels, tmp_path):
    adapter = adapter_of(models["weak"], form)
    adapter.save_pretrained(tmp_path / "adapter")
    bridge = bridge_of(models, form, make_dataset, tmp_path / "cache")
    upgraded = transfer(adapter, models["strong"], bridge=bridge)
    entry = save_transfer(tmp_path / "adapter", upgraded if kind == "adapter" else bridge)
    assert entry == list_transfers(tmp_path / "adapter")[0] and entry.kind == kind
    assert entry.model.fingerprint == models["strong"].fingerprint

    expected = upgraded(pixel_values=pixels).logits_per_image
    raw = PeftModel.from_pretrained(CLIPModel.from_pretrained(folders["strong"]), tmp_path / "adapter")
    torch.testing.assert_close(raw(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)
    found = AnchorClassifier.from_pretrained(tmp_path / "adapter", models["strong"])
    torch.testing.assert_close(found(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)
    assert found.adapter_config.base_fingerprint == models["strong"].fingerprint
    assert found.adapter_config.provenance["step"] == "transfer"
    # The adapter's own model gets the adapter's own weights.
    own = PeftModel.from_pretrained(CLIPModel.from_pretrained(folders["weak"]), tmp_path / "adapter")
    expected = adapter(pixel_values=pixels).logits_per_image
    torch.testing.assert_close(own(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)


def test_two_adapters_of_one_repository_beside_each_other(models, folders, pixels, tmp_path):
    adapter = adapter_of(models["weak"])
    adapter.save_pretrained(tmp_path / "a")
    upgraded = transfer(adapter, models["strong"])
    save_transfer(tmp_path / "a", upgraded)
    other = adapter_of(models["strong"], seed=1)
    other.save_pretrained(tmp_path / "b")
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(folders["strong"]), tmp_path / "a", adapter_name="one")
    model.load_adapter(tmp_path / "b", adapter_name="two")
    for name, made in (("one", upgraded), ("two", other), ("one", upgraded)):
        model.set_adapter(name)
        expected = made(pixel_values=pixels).logits_per_image
        torch.testing.assert_close(model(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)


def test_no_transfer_for_this_model(models, folders, tmp_path):
    adapter_of(models["weak"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Finished transfers there: none\. .*hf-transmiter transfer .* --strong"):
        PeftModel.from_pretrained(CLIPModel.from_pretrained(folders["strong"]), tmp_path)
    save_transfer(tmp_path, transfer(adapter_of(models["weak"]), models["strong"]))
    name = Path(folders["strong"]).name
    with pytest.raises(ValueError, match=rf"there: {name}\."):  # same widths, other weights: no silent garbage
        PeftModel.from_pretrained(CLIPModel.from_pretrained(folders["upgraded"]), tmp_path)


def test_the_same_model_under_another_name_and_precision(models, folders, pixels, tmp_path):
    adapter = adapter_of(models["weak"])
    adapter.save_pretrained(tmp_path / "adapter")
    shutil.copytree(folders["weak"], tmp_path / "copy")
    for dtype in (torch.float32, torch.bfloat16):
        copy = CLIPModel.from_pretrained(tmp_path / "copy", dtype=dtype)
        found = PeftModel.from_pretrained(copy, tmp_path / "adapter")(pixel_values=pixels.to(dtype)).logits_per_image
        expected = adapter(pixel_values=pixels).logits_per_image
        torch.testing.assert_close(found.float(), expected, atol=0.3 if dtype == torch.bfloat16 else 0, rtol=0)


def test_without_a_processor_nothing_can_be_told(models, folders, tmp_path, caplog):
    adapter_of(models["weak"]).save_pretrained(tmp_path / "adapter")
    (tmp_path / "bare").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(Path(folders["weak"]) / file, tmp_path / "bare")
    PeftModel.from_pretrained(CLIPModel.from_pretrained(folders["weak"]), tmp_path / "adapter")
    assert "cannot tell" not in caplog.text  # the very name
    with pytest.raises(ValueError, match="cannot tell whether .* its processor cannot be loaded"):
        PeftModel.from_pretrained(CLIPModel.from_pretrained(tmp_path / "bare"), tmp_path / "adapter")
    nameless = CLIPModel(CLIPModel.from_pretrained(folders["weak"]).config)
    nameless.config._name_or_path = ""
    PeftModel.from_pretrained(nameless, tmp_path / "adapter")
    assert "cannot tell whether this is the adapter's model" in caplog.text


def test_saving_touches_nothing_else(models, tmp_path):
    adapter = adapter_of(models["weak"])
    adapter.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    upgraded = transfer(adapter, models["strong"])
    save_transfer(tmp_path, upgraded)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    with pytest.raises(FileExistsError, match="already has a transfer"):
        save_transfer(tmp_path, upgraded)
    save_transfer(tmp_path, Bridge.build(models["weak"], models["strong"]), overwrite=True)
    assert [entry.kind for entry in list_transfers(tmp_path)] == ["bridge"]
    assert len(list((tmp_path / "transfers").glob("*.safetensors"))) == 1
    save_transfer(tmp_path, transfer(adapter, models["upgraded"]))
    assert len(list_transfers(tmp_path)) == 2


def test_another_adapter_is_not_written_over_scores_and_transfers(models, tmp_path):
    adapter_of(models["weak"]).save_pretrained(tmp_path)
    adapter_of(models["weak"]).save_pretrained(tmp_path)  # the same one
    save_transfer(tmp_path, transfer(adapter_of(models["weak"]), models["strong"]))
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="holds another adapter with its transfers/index.json"):
        adapter_of(models["weak"], seed=1).save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before


def test_names_of_files(models, tmp_path, monkeypatch):
    adapter = adapter_of(models["weak"])
    adapter.save_pretrained(tmp_path)
    for model, name in (
        ("strong", "openai/clip-vit-large-patch14@main"),
        ("upgraded", "openai/clip-vit-large-patch14"),
    ):
        monkeypatch.setattr(models[model], "name_or_path", name)
        save_transfer(tmp_path, transfer(adapter, models[model]))
    files = [entry.file for entry in list_transfers(tmp_path)]
    second = models["upgraded"].fingerprint[:8]
    assert files == [
        "transfers/openai--clip-vit-large-patch14.safetensors",
        f"transfers/openai--clip-vit-large-patch14-{second}.safetensors",
    ]


@pytest.fixture
def shared(models, tmp_path):
    """An adapter with a finished transfer, and what changes one entry of its index."""
    adapter_of(models["weak"]).save_pretrained(tmp_path)
    save_transfer(tmp_path, transfer(adapter_of(models["weak"]), models["strong"]))

    def change(**values):
        content = json.loads((tmp_path / INDEX).read_text())
        content["transfers"][0].update(values)
        (tmp_path / INDEX).write_text(json.dumps(content))
        return tmp_path

    return change


@pytest.mark.parametrize(
    "values",
    [
        {"file": "../adapter_model.safetensors"},
        {"file": "transfers/../../secret.safetensors"},
        {"file": "/etc/passwd"},
        {"kind": "pickle"},
        {"num_bytes": -1},
        {"sha256": "no"},
        {"model": {"name": 3}},
    ],
)
def test_hostile_index(shared, values):
    with pytest.raises(ValueError, match="index.json"):
        list_transfers(shared(**values))


@pytest.mark.parametrize("values", [{"num_bytes": 5}, {"sha256": "0" * 64}, {"file": "transfers/none.safetensors"}])
def test_a_file_that_is_not_the_one_described(shared, values):
    folder = shared(**values)
    with pytest.raises(ValueError, match="not the file its index describes"):
        read_transfer(folder, list_transfers(folder)[0])


def test_a_transfer_whose_tensors_do_not_fit_its_configuration(shared, models):
    folder = shared()
    path = folder / list_transfers(folder)[0].file
    content = path.read_bytes()
    start = content.index(b'\\"embed_dim\\": 24')
    path.write_bytes(content[:start] + content[start:].replace(b'\\"embed_dim\\": 24', b'\\"embed_dim\\": 99', 1))
    shared(num_bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="anchors"):
        AnchorClassifier.from_pretrained(folder, models["strong"])


# Over the Hub


def pushed(hub, models, folders, form="class_vectors"):
    """The models and an adapter, shared by alice; her encoders know the models by their ids."""
    for name in ("weak", "strong"):
        HfApi().create_repo(f"alice/{name}")
        HfApi().upload_folder(repo_id=f"alice/{name}", folder_path=folders[name], commit_message="model")
    encoders = {name: DualEncoder.from_pretrained(f"alice/{name}") for name in ("weak", "strong")}
    adapter = adapter_of(encoders["weak"], form)
    adapter.push_to_hub("alice/adapter")
    return adapter, encoders


@pytest.mark.parametrize("form", ["class_vectors", "mlp"])
def test_from_one_machine_to_another(hub, models, folders, form, pixels, make_dataset, tmp_path):
    adapter, encoders = pushed(hub, models, folders, form)
    assert sorted(hub.files("alice/adapter")) == sorted(
        [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "anchors.json"]
    )
    assert hub.titles("alice/adapter")[0] == "Upload adapter with hf_transmiter"
    first = HfApi().model_info("alice/adapter").sha
    images = {"dataset": make_dataset(20), "progress": False, "cache_dir": tmp_path} if form == "mlp" else {}
    upgraded = transfer(adapter, encoders["strong"], **images)
    commits, before = len(hub.titles("alice/adapter")), hub.files("alice/adapter")
    push_transfer("alice/adapter", upgraded)
    after = hub.files("alice/adapter")
    assert len(hub.titles("alice/adapter")) == commits + 1
    assert set(after) - set(before) == {"transfers/index.json", "transfers/alice--strong.safetensors"}
    assert all(after[file] == before[file] for file in before)

    commit = HfApi().model_info("alice/strong").sha
    assert list_transfers("alice/adapter")[0].model.revision == encoders["strong"].revision == commit

    hub.new_machine()
    strong = CLIPModel.from_pretrained("alice/strong")
    found = PeftModel.from_pretrained(strong, "alice/adapter")
    expected = upgraded(pixel_values=pixels).logits_per_image
    torch.testing.assert_close(found(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)
    torch.testing.assert_close(
        AnchorClassifier.from_pretrained("alice/adapter")(pixel_values=pixels).logits_per_image,
        adapter(pixel_values=pixels).logits_per_image,
        rtol=0,
        atol=0,
    )
    auto = AutoPeftModel.from_pretrained("alice/adapter")(pixel_values=pixels).logits_per_image
    torch.testing.assert_close(auto, adapter(pixel_values=pixels).logits_per_image, rtol=0, atol=0)
    with pytest.raises(ValueError, match="there: none"):  # as it was before
        PeftModel.from_pretrained(CLIPModel.from_pretrained("alice/strong"), "alice/adapter", revision=first)


def test_somebody_else_commits_at_the_same_moment(hub, models, folders, monkeypatch):
    adapter, encoders = pushed(hub, models, folders)
    bridge = Bridge.build(encoders["weak"], models["upgraded"])
    late, calls = hf_transmiter.transfers._add, []

    def slow(*args, **kwargs):
        if not calls:
            calls.append(1)
            push_transfer("alice/adapter", bridge)  # between reading the index and the commit
        return late(*args, **kwargs)

    upgraded = transfer(adapter, encoders["strong"])
    monkeypatch.setattr(hf_transmiter.transfers, "_add", slow)
    push_transfer("alice/adapter", upgraded)
    assert sorted(entry.kind for entry in list_transfers("alice/adapter")) == ["adapter", "bridge"]
    with pytest.raises(FileExistsError, match="already has a transfer to alice/strong"):
        push_transfer("alice/adapter", upgraded)


def test_files_that_do_not_belong_together(models, tmp_path):
    adapter_of(models["weak"], "mlp").save_pretrained(tmp_path)
    Anchors(("cat", "dog", "lorry")).save(tmp_path / "anchors.json", overwrite=True)
    with pytest.raises(ValueError, match="anchors.json and adapter_config.json .* different names or templates"):
        AnchorClassifier.from_pretrained(tmp_path, models["weak"])


def test_a_basis_that_is_none(models, folders, tmp_path):
    adapter = adapter_of(models["weak"], "mlp")
    adapter.transmiter.tensors("default")["basis"].mul_(1.1)
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="basis"):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match="basis"):
        PeftModel.from_pretrained(CLIPModel.from_pretrained(folders["weak"]), tmp_path)


def test_half_precision_says_what_it_changes(models, make_dataset, pixels, tmp_path):
    adapter = adapter_of(models["weak"])
    data = make_dataset(30, NAMES)
    adapter.save_pretrained(tmp_path / "full")
    adapter.save_pretrained(tmp_path / "half", dtype=torch.float16, measure_on=data)
    adapter.save_pretrained(tmp_path / "unmeasured", dtype=torch.float16)
    full, half = (load_file(tmp_path / name / WEIGHTS) for name in ("full", "half"))
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert sum(t.nbytes for t in half.values()) == sum(t.nbytes for t in full.values()) / 2
    config, _ = read_adapter(tmp_path / "half")
    facts = config["provenance"]["saved_as"]
    assert facts["dtype"] == "float16" and facts["num_images"] == 30 and 0 <= facts["agreement"] <= 100
    assert {"accuracy", "rounded_accuracy"} < set(facts)
    assert read_adapter(tmp_path / "unmeasured")[0]["provenance"]["saved_as"] == {"dtype": "float16"}
    found = AnchorClassifier.from_pretrained(tmp_path / "half", models["weak"])
    assert found.transmiter.tensors("default")["class_vectors"].dtype == torch.float32
    rounded = adapter.transmiter.tensors("default")["class_vectors"].half().float()
    torch.testing.assert_close(found.transmiter.tensors("default")["class_vectors"], rounded, rtol=0, atol=0)
    exact = adapter(pixel_values=pixels).logits_per_image
    torch.testing.assert_close(found(pixel_values=pixels).logits_per_image, exact, atol=0.1, rtol=0)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="dtype must be torch.float16"):
            adapter.save_pretrained(tmp_path / "bad", dtype=dtype)
    found.save_pretrained(tmp_path / "again")
    assert "saved_as" not in read_adapter(tmp_path / "again")[0]["provenance"]


def test_reading_without_a_model(models, tmp_path):
    adapter = adapter_of(models["weak"])
    adapter.save_pretrained(tmp_path)
    config, tensors = read_adapter(tmp_path)
    assert config["base_fingerprint"] == models["weak"].fingerprint
    for part, tensor in adapter.transmiter.tensors("default").items():
        torch.testing.assert_close(tensors[part], tensor, rtol=0, atol=0)
    assert set(load_file(tmp_path / WEIGHTS)) == {f"base_model.model.transmiter.transmiter_{part}" for part in tensors}
    assert normalize(tensors["anchors"], dim=-1).allclose(tensors["anchors"], atol=1e-6)
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="adapter_model.bin"):
        read_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter"):
        read_adapter(empty)


def test_a_bridge_in_half_precision(hub, models, folders, pixels):
    """Weights in half precision have another fingerprint; the name decides, and the bridge still fits."""
    adapter, encoders = pushed(hub, models, folders)
    bridge = Bridge.build(encoders["weak"], encoders["strong"])
    push_transfer("alice/adapter", bridge)
    half = CLIPModel.from_pretrained("alice/strong", dtype=torch.bfloat16)
    found = PeftModel.from_pretrained(half, "alice/adapter")(pixel_values=pixels.bfloat16()).logits_per_image
    expected = transfer(adapter, encoders["strong"], bridge=bridge)(pixel_values=pixels).logits_per_image
    torch.testing.assert_close(found.float(), expected, atol=0.3, rtol=0)


def test_a_model_with_an_adapter_in_its_towers_is_another_one(models):
    model = ModelId(models["weak"].name_or_path, "c" * 40, models["weak"].fingerprint)
    lora = get_peft_model(
        copy.deepcopy(models["weak"].model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned = DualEncoder(lora, models["weak"].processor, models["weak"].name_or_path, "c" * 40)
    assert not model.is_of(tuned)
    plain = DualEncoder(models["weak"].model, models["weak"].processor, models["weak"].name_or_path, "c" * 40)
    assert model.is_of(plain)


def test_a_finished_transfer_of_something_else(models, tmp_path):
    adapter_of(models["weak"]).save_pretrained(tmp_path)
    other = AnchorClassifier(models["strong"], Anchors(("cat", "lorry", "car")))
    other.add_adapter(TransMiterConfig(class_names=["cat", "lorry", "car"], form="class_vectors"))
    with pytest.raises(ValueError, match="other class names"):
        save_transfer(tmp_path, other)
    with pytest.raises(ValueError, match="the adapter is another model's"):
        save_transfer(tmp_path, Bridge.build(models["upgraded"], models["strong"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="and there is none"):
        save_transfer(tmp_path / "empty", adapter_of(models["strong"]))


def test_the_index_is_not_lost_when_the_hub_does_not_answer(hub, models, folders):
    adapter, encoders = pushed(hub, models, folders)
    push_transfer("alice/adapter", transfer(adapter, encoders["strong"]))
    hub.fault("HEAD", "/transfers/index.json", "no answer", times=20)
    with pytest.raises(OSError):
        push_transfer("alice/adapter", Bridge.build(encoders["weak"], models["upgraded"]))
    hub.faults.clear()
    assert [entry.kind for entry in list_transfers("alice/adapter")] == ["adapter"]


def test_a_revision_behind_the_name(hub, models, folders, pixels):
    adapter, _ = pushed(hub, models, folders)
    first = HfApi().model_info("alice/adapter").sha
    found = AnchorClassifier.from_pretrained(f"alice/adapter@{first}")
    assert torch.equal(found(pixel_values=pixels).logits_per_image, adapter(pixel_values=pixels).logits_per_image)


def test_a_private_model_and_its_transfer(hub, models, folders, pixels):
    """Identifying the model takes its processor, with the token that the adapter is read with."""
    for name in ("weak", "upgraded"):  # of equal width: the wrong vectors would load without an error
        HfApi().create_repo(f"alice/{name}", private=True)
        HfApi().upload_folder(repo_id=f"alice/{name}", folder_path=folders[name], commit_message="model")
    encoders = {name: DualEncoder.from_pretrained(f"alice/{name}") for name in ("weak", "upgraded")}
    adapter = adapter_of(encoders["weak"])
    adapter.push_to_hub("alice/adapter", private=True)
    upgraded = transfer(adapter, encoders["upgraded"])
    push_transfer("alice/adapter", upgraded)
    hub.new_machine(None)
    clip = CLIPModel.from_pretrained("alice/upgraded", token=hub.token)
    found = PeftModel.from_pretrained(clip, "alice/adapter", token=hub.token)
    expected = upgraded(pixel_values=pixels).logits_per_image
    assert torch.equal(found(pixel_values=pixels).logits_per_image, expected)


def test_a_stale_calibration_goes(models, tmp_path):
    adapter = adapter_of(models["weak"])
    adapter.calibration = CalibrationPack(torch.zeros(4, 3), NAMES)
    adapter.save_pretrained(tmp_path)
    adapter_of(models["weak"], seed=1).save_pretrained(tmp_path)
    assert AnchorClassifier.from_pretrained(tmp_path, models["weak"]).calibration is None
