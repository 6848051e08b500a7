"""Class vectors and logits: in parts, for every image, for classes named once."""

import json

import pytest
import slow_prompts as slow
import torch
from peft import PeftModel
from prompting import NAMES, PHRASE, close, features, inputs_of, parameters, stir
from safetensors.torch import load_file
from torch.nn.functional import linear, normalize, relu

from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.families import logit_scale_and_bias
from hf_transmiter.tuners import (
    CoCoOpConfig,
    ContCoOpConfig,
    CoOpConfig,
    IVLPConfig,
    KgCoOpConfig,
    MaPLeConfig,
    PromptSRCConfig,
    set_classes,
)
from hf_transmiter.tuners.prompts import class_vectors, image_conditioned, image_conditioned_logits, prompt_layer
from hf_transmiter.tuners.prompts.layer import images_seen


LEARNERS = {
    "coop": lambda: CoOpConfig(init_phrase=PHRASE),
    "coop_middle": lambda: CoOpConfig(n_ctx=3, position="middle"),
    "coop_class_specific": lambda: CoOpConfig(n_ctx=3, class_specific=True, class_names=NAMES),
    "coop_layer": lambda: CoOpConfig(init_phrase=PHRASE, layer=1),
    "kgcoop": KgCoOpConfig,
    "cocoop": CoCoOpConfig,
    "contcoop": ContCoOpConfig,
    "contcoop_feature": lambda: ContCoOpConfig(class_embed="text_feature"),
    "ivlp": lambda: IVLPConfig(text_depth=2, vision_depth=2),
    "maple": lambda: MaPLeConfig(depth=2),
    "promptsrc": lambda: PromptSRCConfig(text_depth=2, vision_depth=2),
}
learners = pytest.mark.parametrize("learner", LEARNERS)
families = pytest.mark.parametrize("family", ["clip", "siglip"])


def gradients(model, output):
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    own = parameters(model)
    found = torch.autograd.grad((weights * output).sum(), list(own.values()), allow_unused=True)
    return {part: gradient for part, gradient in zip(own, found, strict=True) if gradient is not None}


@pytest.fixture
def stirred(prompted):
    def make(learner, family="clip"):
        model, layer = prompted(LEARNERS[learner](), family)
        stir(model)
        return model, layer

    return make


# Class vectors in parts


@learners
def test_class_vectors_in_parts(encoders, stirred, learner):
    model, _ = stirred(learner)
    inputs = inputs_of(encoders())
    whole = class_vectors(model, inputs)
    close(whole, normalize(features(model, encoders()), dim=-1), atol=1e-6)
    assert whole.requires_grad and whole.dtype == torch.float32
    expected = gradients(model, whole)
    assert "ctx" in expected
    for size in (1, 2, 3):
        parts = class_vectors(model, inputs, chunk_size=size)
        close(parts, whole, atol=1e-6)
        got = gradients(model, parts)
        assert got.keys() == expected.keys()
        for part in expected:
            close(got[part], expected[part], atol=2e-6)
        with torch.no_grad():
            close(class_vectors(model, inputs, chunk_size=size), whole.detach(), atol=1e-6)


@learners
def test_padding_is_cut(encoders, stirred, learner):
    model, _ = stirred(learner)
    tokenizer, texts = encoders().processor.tokenizer, [f"{name}." for name in NAMES]
    full = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    close(class_vectors(model, full), class_vectors(model, inputs_of(encoders())), atol=1e-6)
    close(class_vectors(model, {"input_ids": full["input_ids"]}), class_vectors(model, full), atol=1e-6)


def test_class_vectors_of_a_half_precision_model(encoders, stirred):
    model, _ = stirred("coop")
    whole = class_vectors(model, inputs_of(encoders())).detach()
    half = class_vectors(model.to(torch.bfloat16), inputs_of(encoders()))
    assert half.dtype == torch.float32
    assert (half - whole).abs().max() < 0.1 and (half.norm(dim=1) - 1).abs().max() < 1e-5


# Class vectors that every image makes for itself


@pytest.mark.parametrize("family", ["clip", "siglip", "metaclip_2"])
def test_image_conditioned_by_hand(encoders, stirred, make_images, family):
    """One image after the other, each prompt put together by hand."""
    encoder = encoders(family)
    model, layer = stirred("cocoop", family)
    own = parameters(model)
    assert own["down.weight"].shape == (1, 16) and own["up.weight"].shape == (16, 1)
    own["down.bias"].data.fill_(0.4)  # away from ReLU's kink
    pixels, tokenizer = encoder.preprocess(make_images(4)), encoder.processor.tokenizer
    logits = []
    for x in normalize(encoder.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1):
        hidden = relu(linear(x, own["down.weight"], own["down.bias"]))
        context = own["ctx"] + linear(hidden, own["up.weight"], own["up.bias"])
        sequences = [slow.rows(encoder.model, tokenizer, name, context) for name in NAMES]
        logits.append(encoder.logits(x[None], normalize(slow.text_features(encoder.model, sequences), dim=-1))[0])
    expected = torch.stack(logits)
    assert (expected.std(0) > 0.01).all()
    output = model(pixel_values=pixels, **inputs_of(encoder))
    close(output.logits_per_image, expected, atol=2e-5)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    wanted, got = gradients(model, expected), gradients(model, output.logits_per_image)
    assert wanted.keys() == got.keys() == own.keys()
    for part in wanted:
        close(got[part], wanted[part], atol=2e-4)


def test_image_conditioned_in_parts(encoders, stirred, make_images):
    model, layer = stirred("cocoop")
    inputs = inputs_of(encoders())
    images = encoders().embed_images(make_images(5))
    whole = image_conditioned_logits(model, layer, images, inputs)
    expected = gradients(model, whole)
    assert whole.shape == (5, 3)
    for size in (1, 2, 3, 4, 7, 15):  # fewer than C, a few images at once, all
        parts = image_conditioned_logits(model, layer, images, inputs, chunk_size=size)
        close(parts, whole)
        got = gradients(model, parts)
        for part in expected:
            close(got[part], expected[part], atol=1e-5)
        with torch.no_grad():
            close(image_conditioned_logits(model, layer, images, inputs, chunk_size=size), whole.detach())
    assert images_seen() is None


def test_image_conditioned_logits_are_not_rounded(encoders, stirred):
    """Under autocast the text tower is less exact, the product with the images is not."""
    encoder, (model, layer) = encoders(), stirred("cocoop")
    scale = logit_scale_and_bias(model)[0]
    images = normalize(torch.randn(4, encoder.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = image_conditioned_logits(model, layer, images, inputs_of(encoder))
    assert logits.dtype == torch.float32
    assert ((logits / scale).bfloat16().float() - logits / scale).abs().max() > 1e-4
    with torch.no_grad():
        close(logits, image_conditioned_logits(model, layer, images, inputs_of(encoder)), atol=0.02 * float(scale))


def test_image_conditioned_is_asked_of_active_learners_only(encoders, stirred):
    model, layer = stirred("cocoop")
    assert image_conditioned(model) is layer and image_conditioned(stirred("coop")[0]) is None
    assert image_conditioned(encoders().model) is None and prompt_layer(encoders().model) is None
    with model.disable_adapter():
        assert image_conditioned(model) is None


@families
@pytest.mark.parametrize("option", [{"return_loss": True}, {"return_dict": False}])
def test_image_conditioned_answers_are_not_of_plain_texts(encoders, stirred, make_images, family, option):
    encoder = encoders(family)
    model, _ = stirred("cocoop", family)
    given = {"pixel_values": encoder.preprocess(make_images(3)), **inputs_of(encoder), **option}
    with pytest.raises(ValueError, match="compute the loss from logits_per_image"):
        model(**given)
    with model.disable_adapter():
        model(**given)


# Classes named once


@learners
@families
def test_set_classes(encoders, stirred, make_images, learner, family):
    encoder = encoders(family)
    model, _ = stirred(learner, family)
    pixels = encoder.preprocess(make_images(3))
    with torch.no_grad():
        expected = model(pixel_values=pixels, **inputs_of(encoder)).logits_per_image
        model.set_classes(NAMES)
        answer = model(pixel_values=pixels).logits_per_image
        assert (answer.std(1) > 1e-3).all()
        close(answer, expected)
        close(model(pixel_values=pixels, **inputs_of(encoder, NAMES[:2])).logits_per_image, expected[:, :2])
        order = [2, 0, 1]
        set_classes(model, [NAMES[i] for i in order], encoder.processor.tokenizer)
        close(model(pixel_values=pixels).logits_per_image, expected[:, order])
        shuffled = {key: value[order] for key, value in inputs_of(encoder).items()}
        close(model(pixel_values=pixels, **shuffled).logits_per_image, expected[:, order])
        if learner != "coop_class_specific":
            set_classes(model, ["tree", "blue ship"])  # new names at any time
            new = model(pixel_values=pixels, **inputs_of(encoder, ["tree", "blue ship"])).logits_per_image
            close(model(pixel_values=pixels).logits_per_image, new)
            assert model.peft_config["default"].class_names == ["tree", "blue ship"]


@learners
def test_classes_are_saved_as_words(encoders, stirred, make_images, model_dir, tmp_path, learner):
    model, _ = stirred(learner)
    pixels = encoders().preprocess(make_images(3))
    if learner != "coop_class_specific":
        model.save_pretrained(str(tmp_path / "before"))
        set_classes(model, NAMES)
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits_per_image
    model.save_pretrained(str(tmp_path / "after"))
    assert json.loads((tmp_path / "after" / "adapter_config.json").read_text())["class_names"] == NAMES
    keys = load_file(tmp_path / "after" / "adapter_model.safetensors")
    if learner != "coop_class_specific":
        before = load_file(tmp_path / "before" / "adapter_model.safetensors")
        assert {key: value.shape for key, value in keys.items()} == {k: v.shape for k, v in before.items()}
    for seed in (0, 1):  # the model it was learnt on, and another with the same vocabulary
        base = DualEncoder.from_pretrained(model_dir("clip", seed))
        loaded = PeftModel.from_pretrained(base.model, str(tmp_path / "after"))
        with torch.no_grad():
            answer = loaded(pixel_values=pixels).logits_per_image
            close(loaded(pixel_values=pixels, **inputs_of(encoders())).logits_per_image, answer)
        if seed == 0:
            close(answer, expected)
        else:
            assert (answer - expected).abs().max() > 1e-2


def test_set_classes_needs_a_learner_and_a_tokenizer(encoders, prompted):
    with pytest.raises(ValueError, match="no active prompt learner: attach one"):
        set_classes(encoders().model, NAMES)
    model, _ = prompted(CoOpConfig(n_ctx=2))
    with model.disable_adapter(), pytest.raises(ValueError, match="no active prompt learner"):
        set_classes(model, NAMES)
    model.config._name_or_path, before = "", model.config._name_or_path
    try:
        with pytest.raises(ValueError, match=r"set_classes\(model, class_names, tokenizer=...\)"):
            set_classes(model, NAMES)
    finally:
        model.config._name_or_path = before
    for names, message in (
        ([], "there is no class name"),
        (["cat", "cat"], "twice"),
        (["a " * 12], "has 15 tokens, .* room for 14"),
    ):
        with pytest.raises(ValueError, match=message):
            set_classes(model, names)


def test_logits_have_the_models_scale_and_bias(encoders, stirred, make_images):
    encoder = encoders("siglip")
    model, layer = stirred("coop", "siglip")
    scale, bias = logit_scale_and_bias(model)
    assert bias < -9
    output = model(pixel_values=encoder.preprocess(make_images(2)), **inputs_of(encoder))
    vectors = class_vectors(model, inputs_of(encoder))
    close(output.logits_per_image, scale * output.image_embeds @ vectors.T + bias, atol=1e-4)
