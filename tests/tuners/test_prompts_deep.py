"""Prompts in several layers, against towers run layer by layer by hand."""

import pytest
import slow_prompts as slow
import torch
from peft import get_peft_model
from prompting import NAMES, PHRASE, close, features, parameters, stir
from torch.nn.functional import linear

from hf_transmiter.tuners import CoOpConfig, IVLPConfig, MaPLeConfig, PromptSRCConfig
from hf_transmiter.tuners.prompts import phrase_token_ids


FAMILIES = pytest.mark.parametrize("family", ["clip", "siglip", "metaclip_2"])
IVLP = pytest.mark.parametrize("config", [IVLPConfig, PromptSRCConfig])


def sequences(encoder, context, words=()):
    model, tokenizer = encoder.model, encoder.processor.tokenizer
    return [slow.rows(model, tokenizer, name, context, words=words) for name in NAMES]


def kept_words(encoder, count):
    return phrase_token_ids(encoder.processor.tokenizer, PHRASE)[count:]


def same_gradients(left, right, wanted):
    """Of a sum that treats no feature like another, to each of `wanted`."""
    weights = torch.linspace(-1, 1, left.numel()).reshape(left.shape)
    gradients = [torch.autograd.grad((weights * features).sum(), wanted) for features in (left, right)]
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 1e-3
        close(one, other, atol=1e-4)


# Independent prompts


@IVLP
@FAMILIES
def test_ivlp(encoders, prompted, make_images, config, family):
    encoder = encoders(family)
    model, _ = prompted(config(n_ctx=3, n_vision=2, text_depth=2, vision_depth=2), family)
    stir(model)
    own = parameters(model)
    assert {part: tuple(value.shape) for part, value in own.items()} == {
        "ctx": (3, 16), "text": (1, 3, 16), "vision": (2, 2, 16)
    }  # fmt: skip
    put = slow.overwrite(encoder.model, {1: own["text"][0]})
    texts = slow.text_features(encoder.model, sequences(encoder, own["ctx"], kept_words(encoder, 3)), put)
    close(features(model, encoder), texts)
    same_gradients(features(model, encoder), texts, [own["ctx"], own["text"]])
    pixels = encoder.preprocess(make_images(2))
    images = slow.image_features(encoder.model, pixels, dict(enumerate(own["vision"])))
    close(model.get_image_features(pixel_values=pixels).pooler_output, images)
    same_gradients(model.get_image_features(pixel_values=pixels).pooler_output, images, [own["vision"]])


@FAMILIES
def test_shallow_prompts_run_on(encoders, prompted, make_images, family):
    """After the last prompted layer the states at the prompts' places stay in the sequence."""
    encoder = encoders(family)
    model, _ = prompted(IVLPConfig(n_ctx=4, n_vision=3, text_depth=1, vision_depth=1), family)
    stir(model)
    own = parameters(model)
    assert set(own) == {"ctx", "vision"}
    close(features(model, encoder), slow.text_features(encoder.model, sequences(encoder, own["ctx"])))
    pixels = encoder.preprocess(make_images(2))
    images = slow.image_features(encoder.model, pixels, {0: own["vision"][0]})
    close(model.get_image_features(pixel_values=pixels).pooler_output, images)


@IVLP
@FAMILIES
def test_ivlp_of_one_text_layer_is_coop(encoders, prompted, make_images, config, family):
    encoder = encoders(family)
    model, _ = prompted(config(text_depth=1, vision_depth=0), family)
    assert set(parameters(model)) == {"ctx"}
    stir(model)
    coop, _ = prompted(CoOpConfig(init_phrase=PHRASE), family)
    parameters(coop)["ctx"].data.copy_(parameters(model)["ctx"])
    close(features(model, encoder), features(coop, encoder), atol=1e-6)
    pixels = encoder.preprocess(make_images(2))
    plain = encoder.model.get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(model.get_image_features(pixel_values=pixels).pooler_output, plain)


def test_ivlp_starts(encoders, prompted):
    ids = phrase_token_ids(encoders().processor.tokenizer, PHRASE)
    table = slow.table(encoders().model)
    own = parameters(prompted(IVLPConfig(n_ctx=6, text_depth=2, vision_depth=2, n_vision=300))[0])
    assert torch.equal(own["ctx"][2:], table[ids])
    for noise in (own["ctx"][:2], own["text"], own["vision"]):
        assert 0.012 < noise.std() < 0.028
    assert not torch.equal(own["vision"][0], own["vision"][1])


# Coupled prompts


@FAMILIES
def test_maple(encoders, prompted, make_images, family):
    """Two learnt vectors, then "of a" as words, then the name; the image tower's prompts are maps of the text's."""
    encoder = encoders(family)
    model, _ = prompted(MaPLeConfig(depth=2), family)
    stir(model)
    own = parameters(model)
    assert {part: tuple(value.shape) for part, value in own.items()} == {
        "ctx": (2, 16), "text": (1, 2, 16), "weight": (2, 16, 16), "bias": (2, 16)
    }  # fmt: skip
    put = slow.overwrite(encoder.model, {1: own["text"][0]})
    texts = slow.text_features(encoder.model, sequences(encoder, own["ctx"], kept_words(encoder, 2)), put)
    close(features(model, encoder), texts)
    prompts = {
        layer: linear(prompt, own["weight"][layer], own["bias"][layer])
        for layer, prompt in enumerate((own["ctx"], own["text"][0]))
    }
    pixels = encoder.preprocess(make_images(2))
    images = slow.image_features(encoder.model, pixels, prompts)
    close(model.get_image_features(pixel_values=pixels).pooler_output, images)
    got = model.get_image_features(pixel_values=pixels).pooler_output
    same_gradients(got, images, [own["ctx"], own["text"], own["weight"], own["bias"]])


def test_maple_starts(encoders, prompted):
    own = parameters(prompted(MaPLeConfig(n_ctx=3, depth=2))[0])
    ids = phrase_token_ids(encoders().processor.tokenizer, PHRASE)[:3]
    assert torch.equal(own["ctx"], slow.table(encoders().model)[ids])
    assert 0.01 < own["text"].std() < 0.03
    for part in ("weight", "bias"):
        assert own[part].abs().max() <= 0.25 and not torch.equal(own[part][0], own[part][1])
    assert own["weight"].std().item() == pytest.approx(0.25 / 3**0.5, rel=0.15)  # uniform, as nn.Linear starts


def test_maps_of_deeper_layers_start_as_copies():
    import tiny_models
    from transformers import CLIPConfig, CLIPModel

    config = tiny_models.clip()[0].config.to_dict()
    for tower in ("text_config", "vision_config"):
        config[tower]["num_hidden_layers"] = 3
    model = get_peft_model(CLIPModel(CLIPConfig(**config)), MaPLeConfig(depth=3, init_token_ids=[1, 2]))
    weight = parameters(model)["weight"]
    assert torch.equal(weight[1], weight[2]) and not torch.equal(weight[0], weight[1])


@pytest.mark.parametrize("word", ["of", "photo"])
def test_kept_words_are_the_current_models(encoders, prompted, word):
    """ "of" stays a word and follows the token table; "photo" has become a vector and does not."""
    encoder = encoders()
    model, layer = prompted(MaPLeConfig(depth=1))
    before = features(model, encoder)
    row = phrase_token_ids(encoder.processor.tokenizer, word)[0]
    layer.base_layer.weight.data[row] = torch.randn(16)
    change = (features(model, encoder) - before).abs().max()
    assert change > 0.01 if word == "of" else change == 0


# Depths


@pytest.mark.parametrize(
    ("config", "settings", "tower"),
    [
        (IVLPConfig, {"text_depth": 3, "vision_depth": 1}, "text"),
        (IVLPConfig, {"text_depth": 1, "vision_depth": 3}, "image"),
        (PromptSRCConfig, {"text_depth": 1, "vision_depth": 3}, "image"),
        (MaPLeConfig, {"depth": 3}, "text"),
    ],
)
@FAMILIES
def test_towers_that_are_too_shallow(prompted, config, settings, tower, family):
    with pytest.raises(ValueError, match=f"prompts in 3 layers of the {tower} tower, which has 2: use a smaller"):
        prompted(config(**settings), family)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (IVLPConfig, {"text_depth": 0}),
        (IVLPConfig, {"vision_depth": -1}),
        (IVLPConfig, {"n_vision": 0}),
        (PromptSRCConfig, {"text_depth": 0}),
        (MaPLeConfig, {"depth": 0}),
    ],
)
def test_bad_depths(config, settings):
    with pytest.raises(ValueError, match="at least 1|must not be negative"):
        config(**settings)
