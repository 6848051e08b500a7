"""CoOp as a PEFT method: what its start equals, what it trains, and that it goes as it came."""

import copy
import json

import pytest
import tiny_models
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.tuners import CoOpConfig, PeftType
from hf_transmiter.tuners.prompts import phrase_token_ids


NAMES = ["cat", "big red dog", "old car"]
PHRASE = "a photo of a"
KEY = "base_model.model.text_model.embeddings.token_embedding.coop_ctx"


def prompted(encoder, **kwargs):
    return get_peft_model(encoder.model, CoOpConfig(**{"init_phrase": PHRASE, **kwargs}))


def bare(model):
    """Class vectors of prompts without words of their own."""
    return DualEncoder(model).embed_names(NAMES, templates=("{}.",))


def test_legacy_end_token(tmp_path):
    encoder = DualEncoder.from_pretrained(tiny_models.save("clip", tmp_path, legacy_eos=True))
    written = encoder.embed_names(NAMES)
    assert (bare(prompted(encoder)) - written).abs().max() < 1e-5


def test_padding_and_mask_do_not_matter(encoder):
    model, tokenizer = prompted(encoder), encoder.processor.tokenizer
    features = []
    for padding in ({"padding": True}, {"padding": "max_length", "max_length": 16}):
        texts = tokenizer(["cat.", "big red dog."], return_tensors="pt", **padding)
        features.append(model.get_text_features(**texts).pooler_output)
        features.append(model.get_text_features(input_ids=texts["input_ids"]).pooler_output)
        features.append(model.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output)
    for other in features[1:]:
        assert torch.allclose(features[0], other, atol=1e-5)


def test_only_the_context_trains(encoder):
    model = prompted(encoder)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [f"{KEY}.default"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    texts = encoder.processor.tokenizer(["cat.", "dog."], return_tensors="pt")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.get_text_features(**texts).pooler_output[:, 0].sum().backward()
    gradient = model.get_parameter(f"{KEY}.default").grad
    assert gradient.shape == (4, 16) and gradient.abs().sum(1).min() > 0
    optimizer.step()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == [f"{KEY}.default"]


def test_images_do_not_change(encoder, make_images):
    before = encoder.embed_images(make_images(3))
    prompted(encoder, init_phrase=None, n_ctx=8)
    assert torch.equal(encoder.embed_images(make_images(3)), before)


def test_random_start(encoder, fresh):
    model = prompted(encoder, init_phrase=None, n_ctx=8, seed=3)
    context = model.get_parameter(f"{KEY}.default")
    assert context.shape == (8, 16) and 0.01 < context.std() < 0.03
    again = prompted(fresh(), init_phrase=None, n_ctx=8, seed=3)
    assert torch.equal(again.get_parameter(f"{KEY}.default"), context)
    other = prompted(fresh(), init_phrase=None, n_ctx=8, seed=4)
    assert not torch.equal(other.get_parameter(f"{KEY}.default"), context)


def test_phrase_and_number_of_vectors(encoder, fresh):
    config = prompted(encoder).peft_config["default"]
    assert config.n_ctx == 4 and config.init_phrase == PHRASE
    assert config.init_token_ids == phrase_token_ids(encoder.processor.tokenizer, PHRASE)
    other = fresh()
    table = other.model.text_model.embeddings.token_embedding.weight
    context = prompted(other, n_ctx=6).get_parameter(f"{KEY}.default")
    assert torch.equal(context[2:], table[config.init_token_ids]) and 0 < context[:2].std() < 0.05
    with pytest.raises(ValueError, match="'a photo of a' has 4 tokens, but the context only n_ctx=3"):
        prompted(fresh(), n_ctx=3)


def test_save_and_load(encoder, tmp_path, recwarn):
    model = prompted(encoder)
    model.get_parameter(f"{KEY}.default").data.normal_()
    expected = bare(model)
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == {KEY: (4, 16)}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "COOP"
    assert PeftConfig.from_pretrained(str(tmp_path)).peft_type == PeftType.COOP
    base = AutoModel.from_pretrained(encoder.name_or_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert not loaded.get_parameter(f"{KEY}.default").requires_grad
    assert torch.equal(DualEncoder(loaded, encoder.processor).embed_names(NAMES, ("{}.",)), expected)
    assert torch.equal(bare(AutoPeftModel.from_pretrained(str(tmp_path))), expected)
    quick = PeftModel.from_pretrained(
        AutoModel.from_pretrained(encoder.name_or_path), str(tmp_path), low_cpu_mem_usage=True
    )
    assert torch.equal(bare(quick), expected)
    assert not [str(warning.message) for warning in recwarn if "embedding" in str(warning.message)]


def test_transformers_own_adapters(encoder, tmp_path, transformers_adapters):
    model = encoder.model
    model.add_adapter(CoOpConfig(init_phrase=PHRASE))
    model.get_parameter(KEY.removeprefix("base_model.model.") + ".default").data.normal_()
    expected = bare(model)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {KEY}
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(encoder.name_or_path), str(tmp_path))
    assert torch.equal(bare(loaded), expected)
    other = AutoModel.from_pretrained(encoder.name_or_path)
    other.load_adapter(str(tmp_path))
    assert torch.equal(bare(other), expected)


def test_second_adapter(encoder, tmp_path):
    written, other = encoder.embed_names(NAMES), encoder.embed_names(NAMES, templates=("this is good {}.",))
    model = prompted(encoder)
    model.add_adapter("second", CoOpConfig(init_phrase="this is good"))
    assert torch.allclose(bare(model), written, atol=1e-5)
    model.set_adapter("second")
    assert torch.allclose(bare(model), other, atol=1e-5)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [f"{KEY}.second"]
    model.save_pretrained(str(tmp_path))
    assert load_file(tmp_path / "second" / "adapter_model.safetensors")[KEY].shape == (3, 16)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.allclose(bare(model), written, atol=1e-5)


def test_unload_leaves_nothing(encoder):
    keys, plain = list(encoder.model.state_dict()), encoder.embed_names(NAMES, templates=("{}.",))
    model = prompted(encoder)
    with pytest.raises(NotImplementedError, match="unload"):
        model.merge_and_unload()
    base = model.unload()
    assert list(base.state_dict()) == keys
    assert not base.text_model._forward_pre_hooks and not hasattr(base, "peft_config")
    assert torch.equal(bare(base), plain)
    assert (bare(prompted(DualEncoder(base))) - encoder.embed_names(NAMES, ("{}.",))).abs().max() < 1e-5


def test_copies_are_independent(encoder):
    model = prompted(encoder)
    before = bare(model)
    twin = copy.deepcopy(model)
    twin.get_parameter(f"{KEY}.default").data.normal_()
    assert torch.equal(bare(model), before)
    assert not torch.allclose(bare(twin), before, atol=1e-3)
    twin.unload()
    assert torch.equal(bare(model), before)


def test_half_precision_base(encoder):
    model = get_peft_model(encoder.model.to(torch.bfloat16), CoOpConfig(init_phrase=PHRASE))
    assert model.get_parameter(f"{KEY}.default").dtype == torch.float32
    assert torch.isfinite(bare(model)).all()


def test_fingerprint_knows_the_context(encoder):
    plain = encoder.fingerprint
    model = prompted(encoder)
    first = DualEncoder(model).fingerprint
    assert first != plain
    with torch.no_grad():
        model.get_parameter(f"{KEY}.default").add_(1)
    assert DualEncoder(model).fingerprint != first


@pytest.mark.parametrize("padding", [True, "max_length"])
@pytest.mark.parametrize("masked", [True, False])
def test_too_long(encoder, padding, masked):
    model = prompted(encoder)
    texts = encoder.processor.tokenizer(
        ["cat.", "this is the big old red car and tree."], padding=padding, max_length=16, return_tensors="pt"
    )
    length = int(texts["attention_mask"][1].sum())
    assert 16 - 4 < length <= 16
    if not masked:
        texts.pop("attention_mask")
    with pytest.raises(ValueError, match=rf"text 1 of the batch has {length} tokens, but only 12 of"):
        model.get_text_features(**texts)


def test_longest_text_that_fits(encoder):
    written = encoder.embed_texts(["a photo of a big old red blue cat dog tree car ship."])
    tokenizer = encoder.processor.tokenizer
    texts = tokenizer(["big old red blue cat dog tree car ship."], padding="max_length", return_tensors="pt")
    assert int(texts["attention_mask"].sum()) == 12
    model = prompted(encoder)
    for inputs in (texts, {"input_ids": texts["input_ids"]}):
        features = model.get_text_features(**inputs).pooler_output
        assert torch.allclose(torch.nn.functional.normalize(features, dim=-1), written, atol=1e-5)


def test_siglip_keeps_its_end_token(fresh):
    encoder = fresh("siglip")
    model = prompted(encoder, init_phrase=None, n_ctx=1)
    ids = torch.arange(5, 21)[None]
    ids[0, -1] = 1  # 15 words and the end token fill all 16 positions
    with pytest.raises(ValueError, match="has 16 tokens, but only 15"):
        model.get_text_features(input_ids=ids)


def test_left_padding_is_refused(encoder):
    model = prompted(encoder)
    with pytest.raises(ValueError, match="padded on the right"):
        model.get_text_features(torch.tensor([[3, 4, 5]]), torch.tensor([[0, 1, 1]]))


@pytest.mark.parametrize("family", ["align", "vision-text-dual-encoder", "siglip2"])
def test_other_families_are_refused(fresh, family):
    with pytest.raises(ValueError, match=r"Supported: CLIP \(clip\), .*Chinese-CLIP"):
        prompted(fresh(family))


def test_one_tower_is_refused(encoder):
    with pytest.raises(ValueError, match="whole two-tower model"):
        get_peft_model(encoder.model.text_model, CoOpConfig())


def test_bad_settings(encoder, fresh):
    with pytest.raises(ValueError, match="at least 1 vector"):
        CoOpConfig(n_ctx=0)
    with pytest.raises(ValueError, match="leaves no room"):
        prompted(encoder, init_phrase=None, n_ctx=14)
    with pytest.raises(ValueError, match="not all in this model's vocabulary"):
        prompted(fresh(), init_token_ids=[1, 10**6])
    model, processor = tiny_models.build("clip")
    with pytest.raises(ValueError, match="give init_token_ids"):
        get_peft_model(model, CoOpConfig(init_phrase=PHRASE))
    model, processor = tiny_models.build("clip")
    written = DualEncoder(model, processor).embed_names(NAMES)
    ids = phrase_token_ids(processor.tokenizer, PHRASE)
    model = get_peft_model(model, CoOpConfig(init_phrase=PHRASE, init_token_ids=ids))
    assert torch.allclose(DualEncoder(model, processor).embed_names(NAMES, ("{}.",)), written, atol=1e-5)
    with pytest.raises(ValueError, match="clashes with the prefix"):
        get_peft_model(fresh().model, CoOpConfig(n_ctx=4), adapter_name="coop")
