"""An adapter's files: which model they load on, in a folder, a subfolder and on the Hub, and what is refused."""

import copy
import shutil

import pytest
import tiny_models
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import CLIPModel

from hf_transmiter import AnchorClassifier, Anchors, DualEncoder, TransMiterConfig, transfer
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.hub.adapter_files import SCORES, WEIGHTS, read_adapter
from hf_transmiter.hub.push import push
from hf_transmiter.method.stored_logits import CalibrationPack


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


def adapter_of(encoder, form="linear", seed=0):
    anchors = WORDS if form == "mlp" else Anchors(NAMES)
    adapter = AnchorClassifier(encoder, anchors).add_adapter(TransMiterConfig.for_anchors(anchors, form=form))
    generator = torch.Generator().manual_seed(seed)
    for part, tensor in adapter.transmiter.tensors("default").items():
        if part != "anchors":
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        if part == "basis":
            tensor.copy_(torch.linalg.qr(tensor)[0])
    return adapter


@pytest.fixture
def pixels(models, make_images):
    return models["weak"].preprocess(make_images(3))


# Which model


@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_in_a_subfolder_for_another_model(models, folders, form, pixels, make_dataset, tmp_path):
    adapter = adapter_of(models["weak"], form)
    adapter.save_pretrained(tmp_path / "adapter")
    images = {"dataset": make_dataset(20), "progress": False, "cache_dir": tmp_path / "cache"} if form == "mlp" else {}
    upgraded = transfer(adapter, models["strong"], **images)
    upgraded.save_pretrained(tmp_path / "adapter" / "l14")

    expected = upgraded(pixel_values=pixels).logits_per_image
    raw = PeftModel.from_pretrained(
        CLIPModel.from_pretrained(folders["strong"]), tmp_path / "adapter", subfolder="l14"
    )
    torch.testing.assert_close(raw(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)
    for encoder in (models["strong"], None):
        found = AnchorClassifier.from_pretrained(tmp_path / "adapter", encoder, subfolder="l14")
        torch.testing.assert_close(found(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)
    own = PeftModel.from_pretrained(CLIPModel.from_pretrained(folders["weak"]), tmp_path / "adapter")
    expected = adapter(pixel_values=pixels).logits_per_image
    torch.testing.assert_close(own(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)


def test_two_adapters_beside_each_other(models, folders, pixels, tmp_path):
    made = {name: adapter_of(models["weak"], seed=seed) for seed, name in enumerate(("one", "two"))}
    for name, adapter in made.items():
        adapter.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(folders["weak"]), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        expected = made[name](pixel_values=pixels).logits_per_image
        torch.testing.assert_close(model(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)


def test_another_model(models, folders, tmp_path):
    """Of another width, or of the same and with other weights: no silent garbage."""
    adapter_of(models["weak"]).save_pretrained(tmp_path)
    said = r"was made for '.*weak.*', this is '.*{}.*: load that model, or .* hf-transmiter transfer .* --strong"
    for name in ("strong", "upgraded"):
        with pytest.raises(ValueError, match=said.format(name)):
            AnchorClassifier.from_pretrained(tmp_path, models[name])
    with pytest.raises(ValueError, match=said.format("strong")):
        PeftModel.from_pretrained(CLIPModel.from_pretrained(folders["strong"]), tmp_path)


@pytest.mark.parametrize("made_in", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.bfloat16])
def test_the_same_model_under_another_name_and_precision(folders, pixels, tmp_path, caplog, made_in, loaded_in):
    adapter = adapter_of(DualEncoder.from_pretrained(folders["weak"], dtype=made_in))
    adapter.save_pretrained(tmp_path / "adapter")
    shutil.copytree(folders["weak"], tmp_path / "copy")
    expected = adapter(pixel_values=pixels).logits_per_image
    exact = {"atol": 0.3 if torch.bfloat16 in (made_in, loaded_in) or made_in != loaded_in else 0, "rtol": 0}
    for place in (folders["weak"], tmp_path / "copy"):
        caplog.clear()
        encoder = DualEncoder.from_pretrained(place, dtype=loaded_in)
        found = AnchorClassifier.from_pretrained(tmp_path / "adapter", encoder)(pixel_values=pixels)
        torch.testing.assert_close(found.logits_per_image, expected, **exact)
        known = {loaded_in, made_in} != {torch.float16, torch.bfloat16} or place == folders["weak"]
        assert ("cannot tell whether" in caplog.text) is not known
        raw = PeftModel.from_pretrained(CLIPModel.from_pretrained(place, dtype=loaded_in), tmp_path / "adapter")
        found = raw(pixel_values=pixels.to(loaded_in)).logits_per_image
        torch.testing.assert_close(found.float(), expected, **exact)
        assert ("cannot tell whether" in caplog.text) is (place != folders["weak"])


def test_a_raw_model_is_known_by_its_name(models, folders, tmp_path, caplog):
    adapter = adapter_of(models["weak"])
    adapter.adapter_config.base_model_name_or_path = "alice/weak"
    adapter.save_pretrained(tmp_path)
    model = CLIPModel.from_pretrained(folders["weak"])
    model.config._name_or_path = "alice/weak"
    PeftModel.from_pretrained(model, tmp_path).unload()
    assert "cannot tell" not in caplog.text
    model.config._name_or_path = "alice/other"
    with pytest.raises(ValueError, match="was made for 'alice/weak', this is 'alice/other'"):
        PeftModel.from_pretrained(model, tmp_path)
    for name in ("", str(tmp_path / "a-copy-perhaps")):
        model.config._name_or_path, caplog.handler.records[:] = name, []
        PeftModel.from_pretrained(model, tmp_path).unload()
        assert "is 'alice/weak', which the adapter was made for" in caplog.text


# Files


def test_another_adapter_is_not_written_over_scores(models, tmp_path):
    adapter_of(models["weak"]).save_pretrained(tmp_path)
    adapter_of(models["weak"]).save_pretrained(tmp_path)  # the same one
    (tmp_path / SCORES).write_text("[]")
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="holds another adapter with its scores.json"):
        adapter_of(models["weak"], seed=1).save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before


def test_a_basis_that_is_none(models, folders, tmp_path):
    adapter = adapter_of(models["weak"], "mlp")
    adapter.transmiter.tensors("default")["basis"].mul_(1.1)
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="basis"):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match="basis"):
        PeftModel.from_pretrained(CLIPModel.from_pretrained(folders["weak"]), tmp_path)


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


def test_a_model_with_an_adapter_in_its_towers_is_another_one(models):
    model = ModelId(models["weak"].name_or_path, "c" * 40, models["weak"].fingerprint)
    lora = get_peft_model(
        copy.deepcopy(models["weak"].model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned = DualEncoder(lora, models["weak"].processor, models["weak"].name_or_path, "c" * 40)
    assert not model.is_of(tuned)
    plain = DualEncoder(models["weak"].model, models["weak"].processor, models["weak"].name_or_path, "c" * 40)
    assert model.is_of(plain)


def test_a_stale_calibration_goes(models, tmp_path):
    adapter = adapter_of(models["weak"])
    adapter.calibration = CalibrationPack(torch.zeros(4, 3), NAMES)
    adapter.save_pretrained(tmp_path)
    adapter_of(models["weak"], seed=1).save_pretrained(tmp_path)
    assert AnchorClassifier.from_pretrained(tmp_path, models["weak"]).calibration is None


# Over the Hub


def pushed(hub, models, folders, form="linear"):
    """The models and an adapter, shared by alice; her encoders know the models by their ids."""
    for name in ("weak", "strong"):
        HfApi().create_repo(f"alice/{name}")
        HfApi().upload_folder(repo_id=f"alice/{name}", folder_path=folders[name], commit_message="model")
    encoders = {name: DualEncoder.from_pretrained(f"alice/{name}") for name in ("weak", "strong")}
    adapter = adapter_of(encoders["weak"], form)
    adapter.push_to_hub("alice/adapter")
    return adapter, encoders


@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_from_one_machine_to_another(hub, models, folders, form, pixels, make_dataset, tmp_path):
    adapter, encoders = pushed(hub, models, folders, form)
    own = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert set(hub.files("alice/adapter")) == {".gitattributes", *own}
    assert hub.titles("alice/adapter")[0] == "Upload adapter with hf_transmiter"
    images = {"dataset": make_dataset(20), "progress": False, "cache_dir": tmp_path} if form == "mlp" else {}
    upgraded = transfer(adapter, encoders["strong"], **images)
    upgraded.save_pretrained(tmp_path / "upgraded")
    commits, before = len(hub.titles("alice/adapter")), hub.files("alice/adapter")
    push(tmp_path / "upgraded", "alice/adapter", subfolder="l14")
    after = hub.files("alice/adapter")
    assert len(hub.titles("alice/adapter")) == commits + 1
    assert set(after) - set(before) == {"l14/adapter_config.json", "l14/adapter_model.safetensors"}
    assert all(after[file] == before[file] for file in before)

    hub.new_machine()
    strong = CLIPModel.from_pretrained("alice/strong")
    found = PeftModel.from_pretrained(strong, "alice/adapter", subfolder="l14")
    expected = upgraded(pixel_values=pixels).logits_per_image
    torch.testing.assert_close(found(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)
    found = AnchorClassifier.from_pretrained("alice/adapter", subfolder="l14")
    torch.testing.assert_close(found(pixel_values=pixels).logits_per_image, expected, rtol=0, atol=0)
    commit = HfApi().model_info("alice/strong").sha
    assert found.adapter_config.revision == found.encoder.revision == commit
    torch.testing.assert_close(
        AnchorClassifier.from_pretrained("alice/adapter")(pixel_values=pixels).logits_per_image,
        adapter(pixel_values=pixels).logits_per_image,
        rtol=0,
        atol=0,
    )
    auto = AutoPeftModel.from_pretrained("alice/adapter")(pixel_values=pixels).logits_per_image
    torch.testing.assert_close(auto, adapter(pixel_values=pixels).logits_per_image, rtol=0, atol=0)
    with pytest.raises(ValueError, match="was made for 'alice/weak' .* this is 'alice/strong'"):
        PeftModel.from_pretrained(CLIPModel.from_pretrained("alice/strong"), "alice/adapter")


def test_a_revision_behind_the_name(hub, models, folders, pixels):
    adapter, _ = pushed(hub, models, folders)
    first = HfApi().model_info("alice/adapter").sha
    found = AnchorClassifier.from_pretrained(f"alice/adapter@{first}")
    assert torch.equal(found(pixel_values=pixels).logits_per_image, adapter(pixel_values=pixels).logits_per_image)


def test_a_private_adapter_of_a_private_model(hub, models, folders, pixels):
    HfApi().create_repo("alice/weak", private=True)
    HfApi().upload_folder(repo_id="alice/weak", folder_path=folders["weak"], commit_message="model")
    adapter = adapter_of(DualEncoder.from_pretrained("alice/weak"))
    adapter.push_to_hub("alice/adapter", private=True)
    hub.new_machine(None)
    clip = CLIPModel.from_pretrained("alice/weak", token=hub.token)
    found = PeftModel.from_pretrained(clip, "alice/adapter", token=hub.token)
    expected = adapter(pixel_values=pixels).logits_per_image
    assert torch.equal(found(pixel_values=pixels).logits_per_image, expected)
    found = AnchorClassifier.from_pretrained("alice/adapter", token=hub.token)
    assert torch.equal(found(pixel_values=pixels).logits_per_image, expected)
