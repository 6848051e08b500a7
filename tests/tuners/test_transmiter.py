"""The TransMiter adapter: its arithmetic, where it starts, what a call needs, and what it refuses."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from hf_transmiter.algebra import standardise
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.families import image_inputs
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.moments import CrossMoment
from hf_transmiter.tuners import PeftType, TransMiterConfig, register
from hf_transmiter.tuners.transmiter.layer import TransMiterLayer, refine
from hf_transmiter.tuners.transmiter.model import TransMiterModel


NAMES, AUXILIARY = ["cat", "dog", "car"], ["tree", "ship"]


def config(form="mlp", **kwargs):
    auxiliary = AUXILIARY if form == "mlp" else []
    return TransMiterConfig(**{"class_names": NAMES, "auxiliary_names": auxiliary, "form": form, **kwargs})


def stir(model, std=0.3):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "transmiter_" in name and "anchors" not in name:
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
        if "basis" in name:  # another one than the seed gives, and a basis still
            parameter.data.copy_(torch.linalg.qr(parameter.data)[0])


@pytest.fixture
def pixels(encoder, make_images):
    return encoder.preprocess(make_images(3))


# The published arithmetic


def waves(*shape, step, size=1.0):
    """Numbers that need no random generator: size · sin(step · (1, 4, 9, ...))."""
    return size * np.sin(step * np.arange(1, math.prod(shape) + 1) ** 2).reshape(shape)


K, C, N, BETA = 6, 4, 40, 2.0
WEAK, STRONG = (
    20 + waves(N, K, step=0.73, size=4),
    20 + waves(N, K, step=1.31, size=5) + waves(N, K, step=0.73, size=3),
)
TUNED = WEAK[:, :C] + waves(N, C, step=2.17, size=3)
MLP = {
    "gain": 1 + waves(K, step=0.9, size=0.2),
    "shift": waves(K, step=1.7, size=0.2),
    "up": waves(4 * K, K, step=0.37, size=0.3),
    "up_bias": waves(4 * K, step=0.57, size=0.2),
    "down": waves(K, 4 * K, step=0.41, size=0.2),
    "down_bias": waves(K, step=0.21, size=0.1),
}
BASIS, _r = np.linalg.qr(waves(K, K, step=1.9))
BASIS = BASIS * np.sign(np.diag(_r))
# What the published arithmetic makes of these inputs.
FORWARD = [21.7583667, 21.2513466, 21.6051118, 16.4361078]
STRONG_BASIS = [0.5259385, 0.2037975, -0.0787627, -0.1033348]
STRONG_FORWARD = [26.7465368, 18.0974679, 17.9024158, 22.1923803]
LOSS = 0.2369212642


def published_forward(logits, basis):
    """As the paper writes it, in float64: h = z Wᵀ, ĥ = h + MLP(LN(h)), ẑ = ĥ W, given its mean and std back."""
    mean, std = logits.mean(1, keepdims=True), logits.std(1, ddof=1, keepdims=True) + 1e-6
    h = (logits - mean) / std @ basis.T
    normed = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5) * MLP["gain"] + MLP["shift"]
    hidden = normed @ MLP["up"].T + MLP["up_bias"]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return (h + hidden @ MLP["down"].T + MLP["down_bias"]) @ basis * std + mean


def modules():
    norm, up, down = nn.LayerNorm(K), nn.Linear(K, 4 * K), nn.Linear(4 * K, K)
    pairs = zip((norm, up, down), (("gain", "shift"), ("up", "up_bias"), ("down", "down_bias")), strict=True)
    for module, (weight, bias) in pairs:
        module.weight.data, module.bias.data = torch.tensor(MLP[weight]), torch.tensor(MLP[bias])
    return [module.double().requires_grad_(False) for module in (norm, up, down)]


def test_forward_is_the_published_one():
    found = refine(torch.tensor(WEAK), torch.tensor(BASIS), *modules())
    np.testing.assert_allclose(found.numpy(), published_forward(WEAK, BASIS), atol=1e-9)
    np.testing.assert_allclose(found[0, :4], FORWARD, atol=1e-5)


def test_transfer_is_the_published_one():
    """Ŵ = argmin ‖H_strong Ŵ - H_weak‖² + β‖Ŵ - I‖², the strong model's basis is Ŵᵀ W, the MLP stays."""
    weak, strong = ((x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-6) for x in (WEAK, STRONG))
    u, _, vh = np.linalg.svd((strong @ BASIS.T).T @ (weak @ BASIS.T) + BETA * np.eye(K))
    published = (u @ vh).T @ BASIS
    moment = CrossMoment.zeros(K, K)
    moment.update(standardise(torch.tensor(STRONG))[0], standardise(torch.tensor(WEAK))[0])
    pair = ModelId("weak", None, ""), ModelId("strong", None, "")
    basis = Bridge.from_moment(moment, *pair, space="logit", beta=BETA).carry_basis(torch.tensor(BASIS).float())
    np.testing.assert_allclose(basis, published, atol=1e-5)
    np.testing.assert_allclose(basis.T @ basis, np.eye(K), atol=1e-5)
    np.testing.assert_allclose(basis[0, :4], STRONG_BASIS, atol=1e-5)
    refined = refine(torch.tensor(STRONG), basis.double(), *modules())
    np.testing.assert_allclose(refined, published_forward(STRONG, published), atol=1e-4)
    np.testing.assert_allclose(refined[0, :4], STRONG_FORWARD, atol=1e-4)


def test_extraction_loss_is_the_published_one():
    """τ · KL(softmax(teacher / τ) ‖ softmax(ẑ)) over the task classes, batch mean, τ = 0.5; the adapter's loss is
    checked against it in the tests of extraction."""
    assert published_loss(published_forward(WEAK, BASIS)[:, :C], TUNED) == pytest.approx(LOSS, rel=1e-6)


def published_loss(student, teacher, temperature=0.5):
    p, q = teacher / temperature, student
    p, q = (
        x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in (p, q)
    )
    return temperature * (np.exp(p) * (p - q)).sum(1).mean()


# What it computes


@given(st.integers(0, 2**31), st.integers(2, 7), st.integers(0, 4))
def test_refine_starts_as_the_identity(seed, k, extra):
    generator = torch.Generator().manual_seed(seed)
    layer = TransMiterLayer()
    names = [str(i) for i in range(k)]
    layer.update_layer(
        "a", TransMiterConfig(class_names=names, width=k + extra, embed_dim=4, seed=seed), torch.ones(1)
    )
    basis = layer.transmiter_basis["a"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(k), atol=1e-5, rtol=0)
    parts = layer.transmiter_norm["a"], layer.transmiter_up["a"], layer.transmiter_down["a"]
    logits = 20 + 5 * torch.randn(3, k, generator=generator)
    torch.testing.assert_close(refine(logits, basis, *parts), logits, atol=1e-4, rtol=0)


@given(st.permutations(range(K)))
def test_permuting_the_anchors_permutes_the_logits(order):
    plain = refine(torch.tensor(WEAK), torch.tensor(BASIS), *modules())
    permuted = refine(torch.tensor(WEAK[:, order]), torch.tensor(BASIS[:, order]), *modules())
    torch.testing.assert_close(permuted, plain[:, order])


@given(st.integers(0, 2**31))
def test_turning_the_basis_is_turning_the_hidden_units(seed):
    """W is nearly redundant: only the LayerNorm's own gain and shift see a permutation of its rows."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    norm, up, down = modules()
    plain = refine(torch.tensor(WEAK), torch.tensor(BASIS), norm, up, down)
    norm.weight.data, norm.bias.data = norm.weight[order], norm.bias[order]
    up.weight.data, down.weight.data, down.bias.data = up.weight[:, order], down.weight[order], down.bias[order]
    torch.testing.assert_close(refine(torch.tensor(WEAK), torch.tensor(BASIS)[order], norm, up, down), plain)


CASES = {"mlp": {}, "wide": {"width": 9}, "linear": {"form": "linear"}}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_identity_at_the_start(family, model_dir, make_images):
    encoder = DualEncoder.from_pretrained(model_dir(family))
    pixels = encoder.preprocess(make_images(3))
    zero_shot = encoder.logits(encoder.embed_pixels(pixels), encoder.embed_names(NAMES))
    for case in CASES.values():
        model = get_peft_model(encoder.model, config(**case))
        output = model(**image_inputs(encoder.model, pixels))
        torch.testing.assert_close(output.logits_per_image, zero_shot, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.logits_per_text, output.logits_per_image.T)
        torch.testing.assert_close(output.text_embeds, encoder.embed_names(NAMES), atol=1e-5, rtol=0)
        model.unload()
        classifier = AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(config(**case))
        torch.testing.assert_close(classifier(pixels).logits_per_image, zero_shot, atol=1e-5, rtol=1e-5)


def test_forward_on_a_model(encoder, pixels):
    model = get_peft_model(encoder.model, config())
    model(pixel_values=pixels)
    stir(model)
    layer = encoder.model.transmiter
    z = encoder.logits(encoder.embed_pixels(pixels), encoder.embed_names(NAMES + AUXILIARY))
    parts = layer.transmiter_norm["default"], layer.transmiter_up["default"], layer.transmiter_down["default"]
    expected = refine(z, layer.transmiter_basis["default"], *parts)[:, :3]
    found = model(pixel_values=pixels).logits_per_image
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert (found - z[:, :3]).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(model(pixel_values=pixels).logits_per_image, z[:, :3], atol=1e-5, rtol=1e-5)


def test_class_vectors_on_a_model(encoder, pixels):
    model = get_peft_model(encoder.model, config("linear"))
    model(pixel_values=pixels)
    stir(model)
    tensors = encoder.model.transmiter.tensors("default")
    expected = encoder.logit_scale * encoder.embed_pixels(pixels) @ tensors["class_vectors"].T + tensors["bias"]
    torch.testing.assert_close(model(pixel_values=pixels).logits_per_image, expected, atol=1e-4, rtol=1e-5)


# Calls


def test_own_texts_are_answered_as_before(encoder, pixels):
    texts = encoder.processor.tokenizer(["old dog.", "cat."], padding=True, return_tensors="pt")
    before = encoder.model(pixel_values=pixels, **texts)
    positional = encoder.model(texts["input_ids"], pixels, texts["attention_mask"])
    features = encoder.embed_pixels(pixels), encoder.embed_texts(["cat."]), encoder.fingerprint
    model = get_peft_model(encoder.model, config())
    model(pixel_values=pixels)
    stir(model)
    after = model(pixel_values=pixels, **texts)
    for key in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        assert torch.equal(after[key], before[key])
    again = model(texts["input_ids"], pixels, texts["attention_mask"])
    assert torch.equal(again.logits_per_image, positional.logits_per_image)
    assert torch.equal(encoder.embed_pixels(pixels), features[0])
    assert torch.equal(encoder.embed_texts(["cat."]), features[1])
    assert encoder.fingerprint == features[2]  # the adapter is a head: the embeddings are the model's own


def test_a_tuple_cannot_be_answered(encoder, pixels):
    model = get_peft_model(encoder.model, config())
    with pytest.raises(ValueError, match="call the model with return_dict=True"):
        model(pixel_values=pixels, return_dict=False)


@pytest.fixture
def saved(encoder, pixels, tmp_path):
    """Folder of an adapter, and its answers."""
    model = get_peft_model(copy.deepcopy(encoder.model), config())
    model(pixel_values=pixels)
    stir(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter", model(pixel_values=pixels).logits_per_image


def test_no_tokenizer_after_loading(encoder, pixels, saved):
    folder, answer = saved
    bare = type(encoder.model)(encoder.model.config)  # a model that no folder is known of
    bare.load_state_dict(encoder.model.state_dict())
    bare.config._name_or_path = bare.name_or_path = ""
    model = PeftModel.from_pretrained(bare.eval(), str(folder))
    bare.text_model.embeddings.token_embedding.weight.data.zero_()  # nor does the text tower play a part
    torch.testing.assert_close(model(pixel_values=pixels).logits_per_image, answer, atol=1e-5, rtol=1e-5)
    fresh = get_peft_model(copy.deepcopy(model.unload()), config())
    with pytest.raises(ValueError, match="no tokenizer"):
        fresh(pixel_values=pixels)


def test_a_saved_adapter_holds_everything(saved):
    folder, _ = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {key.split("transmiter_")[1]: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert shapes == {
        **{"anchors": (5, 16), "basis": (5, 5), "norm.weight": (5,), "norm.bias": (5,)},
        **{"up.weight": (20, 5), "up.bias": (20,), "down.weight": (5, 20), "down.bias": (5,)},
    }
    facts = json.loads((folder / "adapter_config.json").read_text())
    assert facts["peft_type"] == "TRANSMITER" and facts["class_names"] == NAMES and facts["embed_dim"] == 16
    assert facts["anchors_fingerprint"] == Anchors(NAMES, AUXILIARY).fingerprint


# Files that do not fit


def rewrite(folder: Path, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.transmiter.transmiter_"


def load_raw(encoder, folder):
    PeftModel.from_pretrained(encoder.model, str(folder))


def load_low(encoder, folder):
    PeftModel.from_pretrained(encoder.model, str(folder), low_cpu_mem_usage=True)


def load_classifier(encoder, folder):
    AnchorClassifier.from_pretrained(folder, encoder)


@pytest.mark.parametrize("load", [load_raw, load_low, load_classifier])
@pytest.mark.parametrize("part", ["anchors", "basis", "down.weight"])
def test_damaged_weights(encoder, saved, load, part):
    folder, _ = saved
    good = load_file(folder / "adapter_model.safetensors")
    for change, message in (
        (lambda tensors: tensors.pop(KEY + part), "it lacks .*; load the weights that were saved"),
        (lambda tensors: tensors.update({KEY + part: torch.ones(2, 2)}), r"\(2, 2\)"),
        (lambda tensors: tensors[KEY + part].view(-1)[0].fill_(float("nan")), "hold NaN or infinite values"),
    ):
        save_file(good, folder / "adapter_model.safetensors")
        rewrite(folder, change)
        twin = DualEncoder(copy.deepcopy(encoder.model), encoder.processor)
        with pytest.raises(ValueError, match=message) as error:
            load(twin, folder)
        assert part in str(error.value)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_edited_names(saved):
    folder, _ = saved
    for changes in (
        {"class_names": ["dog", "cat", "car"]},
        {"templates": ["{}"]},
        {"auxiliary_names": ["tree", "sea"]},
    ):
        before = (folder / "adapter_config.json").read_text()
        edit(folder, **changes)
        with pytest.raises(ValueError, match="one of them was edited. Restore the original adapter_config.json"):
            PeftConfig.from_pretrained(str(folder))
        (folder / "adapter_config.json").write_text(before)


def test_a_model_of_another_width(saved, tmp_path):
    folder, _ = saved
    wide = AutoModel.from_pretrained(tiny_models.save("clip", tmp_path / "wide", width=24))
    with pytest.raises(ValueError, match="whose embeddings have width 24 and not 16: .* hf-transmiter transfer"):
        PeftModel.from_pretrained(wide, str(folder))


# Configurations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_names": []}, "class_names is empty: pass the names"),
        ({"class_names": ["cat", "cat"]}, "occur more than once: .*cat.* Rename or remove them"),
        ({"class_names": ["cat", "tree"]}, "occur more than once: .*tree"),
        ({"class_names": ["cat", ""]}, "empty"),
        ({"width": 4}, "K = 5 anchors do not fit a basis of width D = 4: .* fewer auxiliary names or a larger width"),
        ({"form": "lora"}, r"form must be one of \('mlp', 'linear'\), got 'lora'"),
        ({"templates": ["a photo"]}, "exactly one {}"),
        ({"anchors_fingerprint": "0" * 64}, "anchors_fingerprint does not fit"),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_a_config_of_anchors():
    anchors = Anchors(NAMES, AUXILIARY, ("{}", "the {}."))
    made = TransMiterConfig.for_anchors(anchors, width=7)
    assert made.anchors == anchors and made.width == 7 and made.peft_type is PeftType.TRANSMITER
    assert TransMiterConfig(**made.to_dict()) == made


def test_registration():
    assert PeftConfig.from_peft_type(peft_type="TRANSMITER", class_names=["cat"]).peft_type is PeftType.TRANSMITER
    register(PeftType.TRANSMITER, TransMiterConfig, TransMiterModel)  # once more does no harm

    class Other(TransMiterConfig):
        pass

    with pytest.raises(KeyError, match="already taken by hf_transmiter"):
        register(PeftType.TRANSMITER, Other, TransMiterModel)


# Tensors from hand to hand


def test_tensors_go_from_one_adapter_to_another(encoder, pixels):
    first = AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(config())
    stir(first)
    tensors = first.transmiter.tensors("default")
    second = AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(config(), tensors)
    assert torch.equal(second(pixels).logits_per_image, first(pixels).logits_per_image)
    layer = second.transmiter
    for change, message in (
        ({"basis": torch.zeros(4, 5)}, r"basis must be \(5, 5\), got \(4, 5\)"),
        ({"basis": torch.full((5, 5), float("inf"))}, "'basis' hold NaN or infinite"),
        ({"more": torch.zeros(1)}, "the weights hold 'more', unlike a transmiter adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.set_tensors("default", {**tensors, **change})
    with pytest.raises(ValueError, match=r"anchor embeddings must be \(5, 16\), got \(5, 3\)"):
        layer.set_anchors("default", torch.zeros(5, 3))


def test_no_active_adapter(encoder):
    classifier = AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(config())
    layer = classifier.transmiter
    layer.delete_adapter("default")
    with pytest.raises(ValueError, match="no TransMiter adapter is active: call set_adapter"):
        layer(torch.zeros(1, 16), 1.0)
