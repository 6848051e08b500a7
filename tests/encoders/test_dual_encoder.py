import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny_models
import torch
from datasets import Image as ImageFeature
from huggingface_hub import HfApi
from peft.functional import delete_adapter
from PIL import Image
from safetensors.torch import load_file
from tiny_models import FAMILIES
from transformers import BertConfig, CLIPForImageClassification
from transformers.utils import cached_file

from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.families import dummy_text_inputs, image_inputs, is_dual_encoder, logit_scale_and_bias
from hf_transmiter.encoders.identity import ModelId


TEXTS = ["a photo of a cat.", "dog", "this is the big old ship"]
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def any_encoder(family, model_dir):
    return DualEncoder.from_pretrained(model_dir(family))


def close(left, right, atol=1e-5):
    torch.testing.assert_close(left, right, atol=atol, rtol=0)


# Every family answers as its own root forward does


def test_logits_equal_the_models_own(any_encoder, make_images):
    images = make_images(3)
    z = any_encoder.logits(any_encoder.embed_images(images), any_encoder.embed_texts(TEXTS))
    # The model's inputs come from its processor, called as its documentation says, not from our code.
    siglip = any_encoder.family.startswith("siglip")
    padding = {"padding": "max_length", "max_length": any_encoder.context_length} if siglip else {"padding": True}
    # The NaFlex processor's own default is the size of the released checkpoints, not that of its image processor.
    patches = {"max_num_patches": 4, "patch_size": 8} if any_encoder.family == "siglip2" else {}
    inputs = any_encoder.processor(
        images=images, text=TEXTS, return_tensors="pt", truncation=True, **padding, **patches
    )
    if siglip:  # trained without a mask, so the checkpoints' tokenizers return none
        inputs.pop("attention_mask")
    with torch.no_grad():
        expected = any_encoder.model(**inputs).logits_per_image
    assert expected.std(dim=1).mean() > 0.05  # the texts are told apart, so a mix-up would show
    close(z, expected)


def test_root_forward_without_texts(any_encoder, make_images):
    pixels = any_encoder.preprocess(make_images(2))
    inputs = dummy_text_inputs(any_encoder.model)
    assert all(tensor.shape == (1, 2) for tensor in inputs.values())
    with torch.no_grad():
        embeds = any_encoder.model(**image_inputs(any_encoder.model, pixels), **inputs).image_embeds
    close(embeds.norm(dim=-1), torch.ones(2))
    close(embeds, any_encoder.embed_pixels(pixels))


def test_shapes_and_types(any_encoder, make_images):
    pixels = any_encoder.preprocess(make_images(2))
    side = any_encoder.image_size
    assert pixels.shape == (2, 3, side, side) and pixels.dtype == torch.float32
    x, a = any_encoder.embed_pixels(pixels), any_encoder.embed_texts(TEXTS)
    assert x.shape == (2, any_encoder.embed_dim) and a.shape == (3, any_encoder.embed_dim)
    close(torch.cat([x, a]).norm(dim=-1), torch.ones(5))
    assert not any_encoder.model.training
    assert not any(parameter.requires_grad for parameter in any_encoder.model.parameters())


def test_padding_does_not_change_a_text(any_encoder):
    together = any_encoder.embed_texts(["dog", *TEXTS])
    close(together[:1], any_encoder.embed_texts(["dog"]))
    close(any_encoder.embed_texts(TEXTS, batch_size=1), together[1:])


def test_a_long_text_is_cut_with_one_warning(any_encoder, caplog):
    long, longer = "dog " * 60, "cat " * 70
    with caplog.at_level(logging.WARNING):
        embeds = any_encoder.embed_texts(["dog", long, longer], batch_size=1)
    (record,) = caplog.records
    assert repr(long) in record.getMessage() and "2 text(s)" in record.getMessage()
    tokenizer = any_encoder.processor.tokenizer
    inputs, _ = any_encoder._tokenize([long])
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    assert inputs["input_ids"].shape[1] == any_encoder.context_length and inputs["input_ids"][0, -1] == end
    assert torch.isfinite(embeds).all()
    # What is kept is the beginning of the text.
    words = any_encoder.context_length - 2 if any_encoder.family != "siglip2" else None
    if words and any_encoder.family != "siglip":
        close(embeds[1:2], any_encoder.embed_texts(["dog " * words]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family, model_dir, make_images, dtype):
    whole = DualEncoder.from_pretrained(model_dir(family))
    half = DualEncoder.from_pretrained(model_dir(family), dtype=dtype)
    assert half.dtype == dtype and half.fingerprint != whole.fingerprint
    assert ModelId.of(whole).is_of(half) and ModelId.of(half).is_of(whole)
    other = DualEncoder.from_pretrained(model_dir(family, seed=1), dtype=dtype)
    assert not ModelId.of(whole).is_of(other) and not ModelId.of(other).is_of(whole)
    pixels = whole.preprocess(make_images(2))
    for ours, exact in (
        (half.embed_pixels(pixels), whole.embed_pixels(pixels)),
        (half.embed_texts(TEXTS), whole.embed_texts(TEXTS)),
    ):
        assert ours.dtype == torch.float32
        close(ours.norm(dim=-1), torch.ones(len(ours)))
        assert (ours * exact).sum(dim=-1).min() > 0.998


def test_scale_and_bias(any_encoder):
    scale, bias = logit_scale_and_bias(any_encoder.model)
    expected = {"align": (1 / 0.07, 0.0), "siglip": (10.0, -10.0), "siglip2": (10.0, -10.0)}
    scale_expected, bias_expected = expected.get(any_encoder.family, (np.exp(2.6592), 0.0))
    assert scale.shape == () and float(scale) == pytest.approx(scale_expected, rel=1e-4)
    assert float(bias) == any_encoder.logit_bias == bias_expected
    assert float(any_encoder.logit_scale) == float(scale)


def test_fingerprint_names_the_content_not_the_folder(family, model_dir, tmp_path):
    loaded = DualEncoder.from_pretrained(model_dir(family))
    assert DualEncoder(*tiny_models.build(family)).fingerprint == loaded.fingerprint
    assert DualEncoder(*tiny_models.build(family, seed=1)).fingerprint != loaded.fingerprint
    assert DualEncoder.from_pretrained(tiny_models.save(family, tmp_path)).fingerprint == loaded.fingerprint


# Texts and names


def test_names_are_the_unit_mean_over_templates(encoder):
    templates = ("a photo of a {}.", "a drawing of the {}")
    rows = [encoder.embed_texts([t.format(name) for t in templates]) for name in ("old ship", "cat")]
    expected = torch.stack([torch.nn.functional.normalize(row.mean(0), dim=-1) for row in rows])
    close(encoder.embed_names(["old_ship", "cat"], templates), expected)
    close(encoder.embed_names(["old ship", "cat"], templates, batch_size=1), expected)


def test_names_are_embedded_once_until_the_text_tower_changes(model_dir):
    encoder, passes = DualEncoder.from_pretrained(model_dir("clip")), []
    encoder.model.text_model.register_forward_hook(lambda *_: passes.append(1))
    first = encoder.embed_names(["cat", "dog"])
    kept = first.clone()
    first.zero_()  # whoever writes to an answer does not change the next one
    assert torch.equal(encoder.embed_names(("cat", "dog")), kept) and len(passes) == 1
    for names, templates in ((["dog", "cat"], ("a photo of a {}.",)), (["cat", "dog"], ("{}.",))):
        encoder.embed_names(names, templates)
    assert len(passes) == 3
    with torch.no_grad():
        next(encoder.model.text_model.parameters()).mul_(2)
    assert not torch.allclose(encoder.embed_names(["cat", "dog"]), kept, atol=1e-3) and len(passes) == 4


def test_a_name_may_contain_braces(encoder):
    close(encoder.embed_names(["{cat}"], ("a {}",)), encoder.embed_texts(["a {cat}"]))


@pytest.mark.parametrize("templates", [(), ("a photo",), ("a {}", "no place")])
def test_templates_without_a_place_for_the_name(encoder, templates):
    with pytest.raises(ValueError, match="template"):
        encoder.embed_names(["cat"], templates)


def test_one_string_is_not_a_list_of_texts(encoder):
    with pytest.raises(ValueError, match="list of strings"):
        encoder.embed_texts("cat")


def test_nothing_in_nothing_out(encoder):
    assert encoder.embed_texts([]).shape == encoder.embed_images([]).shape == (0, encoder.embed_dim)


def test_legacy_end_of_text(make_images):
    """The first OpenAI configs say ``eos_token_id = 2`` and pool at the largest id."""
    legacy = DualEncoder(*tiny_models.build("clip", legacy_eos=True))
    modern = DualEncoder(*tiny_models.build("clip"))
    close(legacy.embed_texts(TEXTS), modern.embed_texts(TEXTS))


# Pictures


def test_every_way_to_give_a_picture(encoder, make_images, tmp_path):
    (image,) = make_images(1)
    image.save(tmp_path / "a.png")
    pixels = encoder.preprocess(image)
    for same in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image), [image]):
        assert torch.equal(encoder.preprocess(same), pixels)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I"])
def test_any_colour_mode(encoder, mode):
    assert encoder.preprocess(Image.new(mode, (20, 30))).shape == (1, 3, 16, 16)


def test_grey_arrays(encoder):
    grey = np.arange(400, dtype=np.uint8).reshape(20, 20)
    assert torch.equal(encoder.preprocess(grey), encoder.preprocess(grey[..., None]))


def test_exif_orientation_as_in_datasets(encoder, tmp_path, make_images):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = str(tmp_path / "turned.png")
    make_images(1)[0].save(path, exif=exif)
    decoded = ImageFeature().decode_example({"path": path, "bytes": None})
    assert torch.equal(encoder.preprocess(path), encoder.preprocess(decoded))
    with Image.open(path) as as_stored:
        assert torch.equal(encoder.preprocess(as_stored), encoder.preprocess(path))


def test_unreadable_pictures_are_named(encoder, make_images, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match="text.jpg"):
        encoder.preprocess([make_images(1)[0], tmp_path / "text.jpg"])
    with pytest.raises(ValueError, match="missing.jpg"):
        encoder.preprocess(tmp_path / "missing.jpg")
    make_images(1)[0].resize((200, 200)).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    with Image.open(tmp_path / "half.jpg") as lazy, pytest.raises(ValueError, match="half.jpg"):
        encoder.preprocess([lazy])
    with pytest.raises(ValueError, match="image 1.*uint8"):
        encoder.preprocess([make_images(1)[0], np.zeros((4, 4, 3))])
    with pytest.raises(ValueError, match="image 0"):
        encoder.preprocess([None])
    with pytest.raises(ValueError, match="no images"):
        encoder.preprocess([])


def test_batches_do_not_change_pictures(encoder, make_images):
    images = make_images(5)
    close(encoder.embed_images(images, batch_size=2), encoder.embed_images(images))


def test_siglip2_patches_are_the_processors_own(model_dir, make_images):
    encoder = DualEncoder.from_pretrained(model_dir("siglip2"))
    images = make_images(2, size=encoder.image_size)
    theirs = encoder.processor.image_processor(images=images, return_tensors="pt")
    ours = image_inputs(encoder.model, encoder.preprocess(images))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].to(tensor.dtype))
    with pytest.raises(ValueError, match="whole number"):
        image_inputs(encoder.model, torch.zeros(1, 3, 12, 16))


def test_siglip2_with_a_patch_budget_that_is_no_square(make_images):
    model, processor = tiny_models.build("siglip2")
    processor.image_processor.max_num_patches = 7
    assert DualEncoder(model, processor).preprocess(make_images(2)).shape == (2, 3, 16, 16)


# Gradients and modes


def test_embeddings_can_be_used_in_training(encoder, make_images):
    x = encoder.embed_images(make_images(2))
    head = torch.nn.Linear(encoder.embed_dim, 2)
    head(x).sum().backward()
    assert head.weight.grad is not None and not x.requires_grad and not x.is_inference()


def test_dropout_is_off_and_the_mode_is_given_back(make_images):
    model, processor = tiny_models.build("align")
    model.train()
    model.text_model.eval()
    modes = [module.training for module in model.modules()]
    encoder = DualEncoder(model, processor)
    images = make_images(2)
    assert torch.equal(encoder.embed_images(images), encoder.embed_images(images))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())


# Adapters


def test_lora_is_run_and_fingerprinted(model_dir, make_images):
    plain = DualEncoder.from_pretrained(model_dir("clip"))
    images, before = make_images(2), plain.fingerprint
    base = DualEncoder.from_pretrained(model_dir("clip")).model
    tuned = peft.get_peft_model(base, peft.LoraConfig(**LORA))
    encoder = DualEncoder(tuned)
    assert encoder.processor is not None and encoder.name_or_path == model_dir("clip")
    assert (encoder.embed_images(images) - plain.embed_images(images)).abs().max() > 1e-2
    assert (encoder.embed_texts(TEXTS) - plain.embed_texts(TEXTS)).abs().max() > 1e-2
    attached = encoder.fingerprint
    assert attached != before

    with tuned.disable_adapter():
        assert encoder.fingerprint not in (attached, before)
        close(encoder.embed_images(images), plain.embed_images(images))
    assert encoder.fingerprint == attached

    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    inputs = plain.processor(images=images, text=TEXTS, padding=True, return_tensors="pt")
    tuned(**inputs).logits_per_image.square().sum().backward()
    optimizer.step()
    assert encoder.fingerprint not in (attached, before)
    assert DualEncoder(tuned.unload()).fingerprint == before == plain.fingerprint


def test_each_new_adapter_of_one_name_has_its_own_fingerprint(model_dir):
    """Memory and write counters of a deleted adapter are reused; its digest must not be."""
    model = DualEncoder.from_pretrained(model_dir("clip")).model
    encoder, seen = DualEncoder(model), set()
    for seed in range(5):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft.LoraConfig(**LORA), model, "a")
        seen.add(encoder.fingerprint)
        delete_adapter(model, "a", "lora_")
    assert len(seen) == 5


def test_a_head_on_the_root_is_not_part_of_the_encoder(encoder):
    before = encoder.fingerprint
    encoder.model.head = torch.nn.Linear(2, 2)
    assert encoder.fingerprint == before


def test_writing_a_weight_changes_the_fingerprint(encoder):
    before = encoder.fingerprint
    with torch.no_grad():
        encoder.model.logit_scale.add_(1e-3)
    changed = encoder.fingerprint
    assert changed != before
    weights = load_file(os.path.join(encoder.name_or_path, "model.safetensors"))
    encoder.model.load_state_dict(weights)
    assert encoder.fingerprint == before


def test_a_merged_adapter_makes_another_model(encoder):
    """PEFT merges through ``.data``, where no write is counted."""
    before, version, texts = encoder.fingerprint, encoder.text_version, encoder.embed_names(["cat"])
    model = peft.get_peft_model(encoder.model, peft.LoraConfig(**LORA)).merge_and_unload()
    assert model is encoder.model and not torch.equal(encoder.embed_names(["cat"]), texts)
    assert encoder.fingerprint != before and encoder.text_version != version


def test_a_model_that_was_loaded_in_inference_mode(encoder):
    with torch.inference_mode():  # its tensors do not count writes
        loaded = DualEncoder.from_pretrained(encoder.name_or_path)
    assert loaded.fingerprint == encoder.fingerprint and loaded.text_version


def test_processor_settings_change_the_fingerprint():
    model, processor = tiny_models.build("clip")
    before = DualEncoder(model, processor).fingerprint
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert DualEncoder(model, processor).fingerprint != before


def test_fingerprint_is_equal_in_another_process(encoder):
    code = (
        "import sys; from hf_transmiter.encoders.dual_encoder import DualEncoder;"
        "print(DualEncoder.from_pretrained(sys.argv[1]).fingerprint)"
    )
    path = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code, encoder.name_or_path],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert run.stdout.split()[-1] == encoder.fingerprint


# Loading


def test_what_is_a_dual_encoder(any_encoder):
    assert is_dual_encoder(any_encoder.model)
    assert not is_dual_encoder(any_encoder.model.vision_model)
    assert not is_dual_encoder(torch.nn.Linear(2, 2))


def test_peft_models_are_dual_encoders(encoder):
    tuned = peft.get_peft_model(encoder.model, peft.LoraConfig(**LORA))
    assert is_dual_encoder(tuned)
    assert logit_scale_and_bias(tuned)[0] == encoder.logit_scale
    assert dummy_text_inputs(tuned)["input_ids"].shape == (1, 2)


def test_unsupported_types_name_the_supported_ones(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'bert'.*Supported: CLIP \(clip\).*ALIGN \(align\)"):
        DualEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Linear.*Supported"):
        DualEncoder(torch.nn.Linear(2, 2))


def test_one_tower_is_not_enough(encoder):
    with pytest.raises(ValueError, match="clip_vision_model"):
        DualEncoder(encoder.model.vision_model)
    with pytest.raises(ValueError, match="CLIPForImageClassification has only one tower"):
        DualEncoder(CLIPForImageClassification(encoder.model.config))


def test_checkpoints_in_half_precision_load_in_float32(model_dir, tmp_path):
    half = DualEncoder.from_pretrained(model_dir("clip"), dtype=torch.float16)
    half.model.save_pretrained(tmp_path)
    half.processor.save_pretrained(tmp_path)
    assert DualEncoder.from_pretrained(tmp_path).dtype == torch.float32
    assert DualEncoder.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16


def test_pickled_weights_are_refused(model_dir, tmp_path):
    encoder = DualEncoder.from_pretrained(model_dir("clip"))
    encoder.model.config.save_pretrained(tmp_path)
    encoder.processor.save_pretrained(tmp_path)
    torch.save(encoder.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="no model.safetensors, and pickles such as pytorch_model.bin are not read"):
        DualEncoder.from_pretrained(tmp_path)


@pytest.fixture
def pickled(hub, model_dir):
    """A model of the Hub with pickles only, and the pull request in which somebody proposes safetensors."""
    files = {path.name: path.read_bytes() for path in Path(model_dir("clip")).iterdir()}
    weights = files.pop("model.safetensors")
    hub.write("bob/old", {**files, "pytorch_model.bin": b"pickled"})
    proposal = {"path_in_repo": "model.safetensors", "repo_id": "bob/old", "create_pr": True}
    return HfApi(token=hub.other_token).upload_file(path_or_fileobj=weights, **proposal).pr_revision


def test_pickles_of_the_hub_are_refused(hub, pickled):
    with pytest.raises(OSError, match="'bob/old' has no model.safetensors.*(revision='refs/pr/N')"):
        DualEncoder.from_pretrained("bob/old")
    assert not hub.requests("GET", "pytorch_model.bin")
    assert DualEncoder.from_pretrained("bob/old", revision=pickled).revision == hub.repos["bob/old"].find(pickled)
    hub.write("bob/empty", {"config.json": hub.files("bob/old")["config.json"]})
    with pytest.raises(OSError, match="bob/empty does not appear to have a file named model.safetensors") as caught:
        DualEncoder.from_pretrained("bob/empty")
    assert "pickles" not in str(caught.value)


def test_weights_of_the_hubs_converter(hub, pickled, monkeypatch):
    """transformers finds them; they are no commit of the main branch, so none is noted."""

    def auto_conversion(name, **options):
        return cached_file(name, "model.safetensors", revision=pickled), pickled, False

    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION")
    monkeypatch.setattr("transformers.modeling_utils.auto_conversion", auto_conversion)
    encoder = DualEncoder.from_pretrained("bob/old")
    assert encoder.revision is None
    assert encoder.fingerprint == DualEncoder.from_pretrained("bob/old", revision=pickled).fingerprint


def test_missing_folder(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        DualEncoder.from_pretrained(tmp_path / "nowhere")


def test_folder_without_an_image_processor(model_dir, tmp_path):
    encoder = DualEncoder.from_pretrained(model_dir("clip"))
    encoder.model.save_pretrained(tmp_path)
    encoder.processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError), match="image processor|preprocessor"):
        DualEncoder.from_pretrained(tmp_path)


def test_a_model_without_a_processor(make_images):
    model, processor = tiny_models.build("clip")
    encoder = DualEncoder(model)
    assert encoder.processor is None and encoder.revision is None and len(encoder.fingerprint) == 64
    pixels = DualEncoder(model, processor).preprocess(make_images(1))
    assert encoder.embed_pixels(pixels).shape == (1, encoder.embed_dim)
    with pytest.raises(ValueError, match="no tokenizer: pass processor="):
        encoder.embed_texts(["cat"])
    with pytest.raises(ValueError, match="no image_processor"):
        encoder.preprocess(make_images(1))


def test_sizes_come_from_the_processor(model_dir):
    encoder = DualEncoder.from_pretrained(model_dir("clip"))
    assert (encoder.image_size, encoder.context_length, encoder.embed_dim) == (16, 16, 16)
    encoder.processor.tokenizer.model_max_length = 8
    encoder.processor.image_processor.crop_size = {"height": 12, "width": 12}
    assert (encoder.image_size, encoder.context_length) == (12, 8)


def test_revision_is_the_resolved_commit(model_dir):
    model, processor = tiny_models.build("clip")
    model.config._commit_hash = "c" * 40
    assert DualEncoder(model, processor, revision="main").revision == "c" * 40
    assert DualEncoder.from_pretrained(model_dir("clip")).revision is None


def test_config_is_written_as_transformers_does(model_dir):
    """Guard for the fixtures: a tiny model must be found by the auto classes under its family's type."""
    for family in FAMILIES:
        with open(os.path.join(model_dir(family), "config.json")) as file:
            assert json.load(file)["model_type"] == family


def test_fingerprint_ignores_version_marks_and_spelled_out_defaults(encoder):
    """A digest saved with a bridge must still hold after an upgrade of transformers."""
    before = encoder.fingerprint
    encoder.model.config.transformers_version = "99.0"
    encoder.model.config.text_config.layer_norm_eps = 1e-5  # its default
    assert encoder.fingerprint == before
    encoder.model.config.text_config.hidden_act = "gelu"
    assert encoder.fingerprint != before


def test_an_adapter_folder_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a PEFT adapter, not a model: load its base model"):
        DualEncoder.from_pretrained(tmp_path)
