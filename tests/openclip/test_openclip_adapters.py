"""Adapters on models of open_clip: TransMiter, LoRA, prompts, and prompts that come from a model of transformers."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import normalize
from transformers import CLIPModel

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.families import unwrap
from hf_transmiter.evaluation.drift import feature_drift
from hf_transmiter.method.attach import attach
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.image_classifier import TransMiterForImageClassification
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import VISION_LINEARS, TuningConfig
from hf_transmiter.tuners import (
    CoCoOpConfig,
    ContCoOpConfig,
    CoOpConfig,
    IVLPConfig,
    KgCoOpConfig,
    MaPLeConfig,
    PromptSRCConfig,
    TransMiterConfig,
    inject,
    save_adapter,
    set_classes,
)
from hf_transmiter.tuners.prompts import class_inputs, prompt_layer


NAMES, PHRASE = ["cat", "big red dog", "old x3 car"], "a photo of a"
KINDS = pytest.mark.parametrize("kind", ["resnet", "eva"])
PROMPTS = {
    "coop": lambda: CoOpConfig(init_phrase=PHRASE),
    "coop_layer": lambda: CoOpConfig(init_phrase=PHRASE, layer=1),
    "kgcoop": KgCoOpConfig,
    "cocoop": CoCoOpConfig,
    "contcoop": ContCoOpConfig,
    "contcoop_feature": lambda: ContCoOpConfig(class_embed="text_feature"),
    "ivlp_text": lambda: IVLPConfig(text_depth=2, vision_depth=0),
}
prompts = pytest.mark.parametrize("learner", PROMPTS)


def same(left, right, atol=1e-5):
    torch.testing.assert_close(left, right, atol=atol, rtol=1e-5)


@torch.no_grad()
def contexts(model, tokenizer):
    """(C, M, width): what the active prompt learner puts beside each name, on this base model."""
    layer, root = prompt_layer(model), unwrap(model)
    count = len(layer.slot_ids(layer.active_config))
    seen, made = [], layer.context
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "context", lambda *arguments: seen.append(made(*arguments)) or seen[-1])
        root.get_text_features(**class_inputs(NAMES, tokenizer, root.config.model_type, layer.positions, count))
    return seen[0].expand(len(NAMES), *seen[0].shape[-2:]).clone()


def stir(model, prefix, std=0.1):
    generator = torch.Generator().manual_seed(0)
    changed = [name for name, _ in model.named_parameters() if prefix in name and "anchors" not in name]
    for name in changed:
        parameter = model.get_parameter(name)
        parameter.data += std * torch.randn(parameter.shape, generator=generator)
    assert changed


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# TransMiter


@KINDS
@pytest.mark.parametrize("form", ["mlp", "linear", "image side"])
def test_transmiter_is_a_peft_method_here_too(kind, form, load, pictures, tmp_path):
    encoder = load(kind)
    pixels = encoder.preprocess(pictures(4))
    zero_shot = encoder.logits(encoder.embed_pixels(pixels), encoder.embed_names(NAMES))
    before, count = copy.deepcopy(encoder.model.state_dict()), hooks(encoder.model)
    settings = {"mlp": {"auxiliary_names": ["tree"]}, "image side": {"image_side": encoder.embed_dim}}.get(form, {})
    kind_of = "mlp" if form == "mlp" else "linear"
    model = get_peft_model(encoder.model, TransMiterConfig(class_names=NAMES, form=kind_of, **settings))
    assert encoder.tower_dim == 0
    same(model(pixel_values=pixels).logits_per_image, zero_shot, atol=1e-4)  # starts as the identity
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("transmiter" in name for name in trainable)
    model(pixel_values=pixels).logits_per_image.log_softmax(1)[:, 0].sum().backward()
    stir(model, "transmiter_")
    answer = model(pixel_values=pixels).logits_per_image.detach()
    assert (answer - zero_shot).abs().max() > 0.01
    with model.disable_adapter():
        same(model(pixel_values=pixels).logits_per_image, zero_shot, atol=1e-4)
    if form == "mlp":
        basis = model.get_parameter("base_model.model.transmiter.transmiter_basis.default")
        basis.data.copy_(torch.linalg.qr(basis.data)[0])
        answer = model(pixel_values=pixels).logits_per_image.detach()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == encoder.name_or_path
    other = load(kind)
    reloaded = PeftModel.from_pretrained(other.model, tmp_path)
    same(reloaded(pixel_values=pixels).logits_per_image, answer)
    found = AnchorClassifier.from_pretrained(str(tmp_path))  # the model too, by its name
    assert found.encoder.name_or_path == encoder.name_or_path
    same(found(pixel_values=pixels)["logits_per_image"], answer)
    base = model.unload()
    assert hooks(base) == count
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())


def test_no_image_classifier_of_transformers(load, tmp_path):
    encoder = load("vit")
    model = get_peft_model(encoder.model, TransMiterConfig(class_names=NAMES, form="linear"))
    model(pixel_values=torch.zeros(1, 3, 32, 32))
    model.save_pretrained(tmp_path)
    classifier = AnchorClassifier.from_pretrained(str(tmp_path))
    for make in (
        lambda: TransMiterForImageClassification.from_classifier(classifier),
        lambda: TransMiterForImageClassification.from_pretrained(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match="models of open_clip cannot be made an image classifier"):
            make()


# LoRA


@pytest.mark.parametrize("kind", ["resnet", "eva", "vit"])
def test_lora_reaches_every_layer_it_is_put_on(kind, load, pictures, tmp_path):
    encoder = load(kind)
    plain = encoder.embed_images(pictures(3))
    inject(encoder.model, LoraConfig(r=2, target_modules=VISION_LINEARS, init_lora_weights=False))
    tuned = DualEncoder(encoder.model, encoder.processor)
    assert (tuned.embed_images(pictures(3)) - plain).abs().max() > 1e-3
    assert tuned.fingerprint != load(kind).fingerprint
    encoder.model.get_image_features(encoder.preprocess(pictures(3))).pooler_output.sum().backward()
    updates = {name: p.grad for name, p in encoder.model.named_parameters() if "lora_" in name}
    # A layer whose weight is read past it would learn nothing.
    assert updates and all(gradient is not None and gradient.any() for gradient in updates.values())
    save_adapter(encoder.model, tmp_path)
    assert not list(tmp_path.glob("open_clip*"))
    again = load(kind)
    loaded = PeftModel.from_pretrained(again.model, str(tmp_path))
    same(DualEncoder(loaded, again.processor).embed_images(pictures(3)), tuned.embed_images(pictures(3)))
    with pytest.raises(ValueError, match="adapter inside the model"):
        get_peft_model(load(kind).model, LoraConfig(target_modules=VISION_LINEARS)).get_base_model().save_pretrained(
            tmp_path
        )


# Prompts


@prompts
@KINDS
def test_the_phrase_is_what_it_starts_from(kind, learner, load):
    encoder = load(kind)
    written, plain = encoder.embed_names(NAMES), encoder.embed_names(NAMES, ("{}.",))
    model = get_peft_model(encoder.model, PROMPTS[learner]())
    prompted = DualEncoder(model, encoder.processor)
    if learner != "ivlp_text":  # starts from noise in the second layer
        same(prompted.embed_names(NAMES, ("{}.",)), written)
    assert (plain - written).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(prompted.embed_names(NAMES, ("{}.",)), plain)
    set_classes(model, NAMES)
    assert model(pixel_values=torch.zeros(2, 3, 32, 32)).logits_per_image.shape == (2, 3)
    count = hooks(model)
    assert hooks(model.unload()) < count
    assert torch.equal(DualEncoder(encoder.model, encoder.processor).embed_names(NAMES, ("{}.",)), plain)


@prompts
def test_saved_and_loaded(learner, load, pictures, tmp_path):
    encoder = load("eva")
    pixels, texts = encoder.preprocess(pictures(2)), encoder.tokenize([f"{name}." for name in NAMES])
    model = get_peft_model(encoder.model, PROMPTS[learner]())
    stir(model, model.peft_config["default"].peft_type.value.lower() + "_")
    answer = model(pixel_values=pixels, **texts).logits_per_image.detach()
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load("eva").model, tmp_path)
    same(reloaded(pixel_values=pixels, **texts).logits_per_image, answer)
    assert reloaded.peft_config["default"].base_model_name_or_path == encoder.name_or_path


@KINDS
@pytest.mark.parametrize("config", [IVLPConfig, MaPLeConfig, PromptSRCConfig])
def test_prompts_in_the_image_tower_are_refused(kind, config, load):
    with pytest.raises(ValueError, match="puts prompts into the image tower.*use coop, kgcoop, cocoop or contcoop"):
        get_peft_model(load(kind).model, config())


def by_hand(reference, table, contexts, names):
    """open_clip's own text tower on token vectors with `contexts` (C, M, width) between start and name."""
    import open_clip

    count = contexts.shape[1]
    ids = open_clip.tokenize([" ".join(["x"] * count) + f" {name}." for name in names])
    vectors = table[ids].clone()
    vectors[:, 1 : 1 + count] = contexts
    text = reference.text
    hidden = text.transformer(vectors + text.positional_embedding, attn_mask=text.attn_mask)
    pooled = text.ln_final(hidden)[torch.arange(len(ids)), ids.argmax(1)]
    return normalize(pooled @ text.text_projection, dim=-1)


@pytest.mark.parametrize("learner", ["coop", "kgcoop", "cocoop", "contcoop"])
@KINDS
def test_prompts_learnt_on_a_clip_of_transformers_go_on(kind, learner, clip_dir, load, folder_of, pictures, tmp_path):
    import open_clip

    old = DualEncoder.from_pretrained(clip_dir)
    model = get_peft_model(CLIPModel.from_pretrained(clip_dir), PROMPTS[learner]())
    stir(model, f"{learner}_")
    model.save_pretrained(tmp_path)
    new = load(kind)
    if learner == "cocoop" and kind == "resnet":  # its net reads embeddings, which are wider here
        with pytest.raises(ValueError, match="embeddings have 24 dimensions, those it was learnt on 16"):
            attach(str(tmp_path), new)
        return
    upgraded = attach(str(tmp_path), new)
    assert upgraded.model.peft_config["default"].base["vocabulary"] == model.peft_config["default"].base["vocabulary"]
    texts = [f"{name}." for name in NAMES]
    tokenizer = new.processor.tokenizer
    before, after = (contexts(on, tokenizer) for on in (model, upgraded.model))
    # CoOp's vectors are carried as they are; ContCoOp's follow the new token table.
    assert torch.equal(before, after) is (learner != "contcoop")
    reference = open_clip.create_model(f"local-dir:{folder_of(kind)}").eval()
    with torch.no_grad():
        expected = by_hand(reference, reference.text.token_embedding.weight, after, NAMES)
    same(upgraded.embed_texts(texts), expected)
    peft = PeftModel.from_pretrained(load(kind).model, tmp_path)  # as any PEFT adapter
    same(DualEncoder(peft, new.processor).embed_texts(texts), expected)
    assert (old.embed_names(NAMES) - DualEncoder(model, old.processor).embed_texts(texts)).abs().max() > 0.01
    pixels = new.preprocess(pictures(2))
    logits = upgraded.model(pixel_values=pixels, **new.tokenize(texts)).logits_per_image
    if learner != "cocoop":
        same(logits, new.logit_scale * new.embed_pixels(pixels) @ expected.T, atol=1e-3)


def test_and_back_again(clip_dir, load, tmp_path):
    model = get_peft_model(load("eva").model, PROMPTS["coop"]())
    stir(model, "coop_")
    model.save_pretrained(tmp_path)
    old = DualEncoder.from_pretrained(clip_dir)
    context = contexts(attach(str(tmp_path), old).model, old.processor.tokenizer)
    assert torch.equal(context, contexts(model, old.processor.tokenizer))


def test_another_width_does_not_fit(clip_dir, load, tmp_path):
    get_peft_model(CLIPModel.from_pretrained(clip_dir), PROMPTS["coop"]()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the text tower is 48 wide, the one it was learnt on 32"):
        PeftModel.from_pretrained(load("wide").model, tmp_path)


def test_how_far_the_text_tower_has_moved(clip_dir, load):
    old, new = DualEncoder.from_pretrained(clip_dir), load("eva")
    rows = {row.name: row for row in feature_drift(old, new, NAMES)}
    assert list(rows) == ["embeddings", "layer 1", "layer 2", "class vector"]
    assert all(row.relative > 0.1 for row in rows.values())
    assert all(row.absolute == 0 for row in feature_drift(new, load("eva"), NAMES))


# Tuning


@pytest.mark.parametrize("method", ["coop", "contcoop", "lora"])
@KINDS
def test_tune(kind, method, load, make_dataset):
    encoder, data = load(kind), make_dataset(24)
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    rate = 2e-3 if method == "lora" else 0.02
    own = {"r": 2} if method == "lora" else {}
    config = TuningConfig(shots=8, epochs=4, batch_size=8, lr=rate)
    tuned = tune(encoder, data, {"method": method, **own}, config=config, progress=False)
    labels, right = torch.tensor(data["label"]), []
    for classifier in (AnchorClassifier(encoder, Anchors(tuned.class_names)), tuned):
        logits = classifier.classify(classifier.encoder.embed_images(data["image"]))
        right.append(int((logits.argmax(1) == labels).sum()))
    assert right[1] > right[0]
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items())
