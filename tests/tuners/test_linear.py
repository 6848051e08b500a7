"""The linear adapter: its two sides written out, on the model and beside it, on every family."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import set_adapter
from torch.nn.functional import normalize

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.families import feature_rows, image_inputs, token_rows
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.tuners import TransMiterConfig


NAMES, OTHERS = ["cat", "dog", "car"], ["ship", "old tree"]


def linear(**kwargs):
    return TransMiterConfig(**{"class_names": NAMES, "form": "linear", **kwargs})


def sides(encoder):
    """Every kind of linear adapter for this model, by name."""
    d, wide = encoder.embed_dim, encoder.embed_dim + encoder.tower_dim
    return {
        "text": {},
        "image": {"image_side": d},
        "tower": {"image_side": wide},
        "both": {"image_side": wide, "text_side": d},
        "wide": {"image_side": wide, "text_side": d + wide},
        "wide text": {"text_side": d + wide},
    }


def attached(encoder, settings, std=0.3):
    """A classifier with an adapter of random weights."""
    classifier = AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(linear(**settings))
    generator = torch.Generator().manual_seed(0)
    for part, tensor in classifier.transmiter.tensors("default").items():
        if part != "anchors":
            tensor.add_(std * torch.randn(tensor.shape, generator=generator))
    return classifier


def written_out(encoder, tensors, f, texts=None):
    """x' and logits by the formulas, without the layer."""
    d, x = encoder.embed_dim, f[:, : encoder.embed_dim]
    if "image_map" in tensors:
        matrix = tensors["image_map"]
        x = normalize(x + f[:, : matrix.shape[1]] @ matrix.T + tensors["image_shift"], dim=1)
    vectors, bias = tensors.get("class_vectors", tensors["anchors"]), tensors.get("bias", 0)
    if texts is not None:
        vectors, bias = texts, 0
    y = torch.cat([x, f[:, : vectors.shape[1] - d]], 1)
    return x, encoder.logit_scale * y @ vectors.T + bias + encoder.logit_bias


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family(family, encoders, make_images):
    """The formulas, the classifier and the hooks on the model itself say the same."""
    encoder = encoders(family)
    pixels = encoder.preprocess(make_images(3))
    f, d = encoder.embed_pixels(pixels, tower=True), encoder.embed_dim
    inputs = image_inputs(encoder.model, pixels)
    hidden = encoder.model.get_image_features(**inputs).last_hidden_state
    tokens = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    assert f.dtype == torch.float32 and f.shape == (3, d + encoder.tower_dim) and encoder.tower_dim > 0
    assert torch.equal(f[:, :d], encoder.embed_pixels(pixels))
    torch.testing.assert_close(f[:, d:], torch.cat([tokens[:, 0], tokens.mean(1)], 1))
    words = encoder.tokenize(["a ship.", "a tree."])
    for settings in sides(encoder).values():
        classifier = attached(encoder, settings)
        tensors = classifier.transmiter.tensors("default")
        embeds, expected = written_out(encoder, tensors, f)
        output = classifier(pixels)
        same(output.logits_per_image, expected)
        same(output.image_embeds, embeds)
        model = get_peft_model(copy.deepcopy(encoder.model), linear(**settings))
        model.get_base_model().transmiter.set_tensors("default", tensors)
        with torch.no_grad():
            on_model = model(**inputs)
            same(on_model.logits_per_image, expected)
            same(on_model.image_embeds, embeds)
            same(feature_rows(model.get_image_features(**inputs)), embeds)
            asked = model(**inputs, **words)
            same(asked.logits_per_image, encoder.logits(embeds, asked.text_embeds))
            with model.disable_adapter():
                plain = model(**inputs, **words)
            assert torch.equal(plain.logits_per_image, encoder.model(**inputs, **words).logits_per_image)


def test_tokens_of_a_map():
    hidden = torch.arange(12.0).reshape(1, 2, 2, 3)  # two channels of 2 x 3 cells
    assert token_rows(hidden).tolist() == [[0, 6, 2.5, 8.5]]
    assert token_rows(hidden.bfloat16()).dtype == torch.float32


def test_it_starts_as_zero_shot(encoder, make_images):
    pixels = encoder.preprocess(make_images(2))
    zero_shot = AnchorClassifier(encoder, Anchors(NAMES))
    for name, settings in sides(encoder).items():
        classifier = AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(linear(**settings))
        same(classifier(pixels).logits_per_image, zero_shot(pixels).logits_per_image)
        same(classifier(pixels).image_embeds, encoder.embed_pixels(pixels))
        assert classifier.reads_tower is (name not in ("text", "image"))
    vectors = classifier.transmiter.tensors("default")["class_vectors"]
    assert vectors.shape == (3, 64) and not vectors[:, 16:].any()


# Names


def test_any_names(encoder, make_images):
    images = make_images(3)
    f = encoder.embed_pixels(encoder.preprocess(images), tower=True)
    texts = encoder.embed_names(OTHERS)
    for settings in sides(encoder).values():
        classifier = attached(encoder, settings)
        tensors = classifier.transmiter.tensors("default")
        own = classifier.predict(images, top_k=3)
        assert classifier.predict(images, top_k=3, class_names=NAMES) == own
        assert classifier.open_vocabulary is ("image_map" in tensors)
        if not classifier.open_vocabulary:
            with pytest.raises(ValueError, match="its own 3 class names only, .* not for 'ship': .* an image side"):
                classifier.predict(images, class_names=["cat", *OTHERS])
            whole = classifier.classify(f)
            part = classifier.set_classes(NAMES[::-1][1:]).classify(f)  # some of its own, in any order
            torch.testing.assert_close(part, whole[:, [1, 0]])
            assert list(classifier.class_names) == list(NAMES[::-1][1:])
            with pytest.raises(ValueError, match="must be a list of names, not one string"):
                classifier.set_classes("cat")
            continue
        _, expected = written_out(encoder, tensors, f, texts)
        found = classifier.predict(images, top_k=2, class_names=OTHERS)
        scores = expected.softmax(1)
        assert [row[0]["label"] for row in found] == [OTHERS[i] for i in scores.argmax(1)]
        assert [row[0]["score"] for row in found] == pytest.approx(scores.amax(1).tolist(), abs=1e-5)
        assert classifier.class_names == tuple(NAMES) and classifier.predict(images, top_k=3) == own
        rows = f if classifier.reads_tower else f[:, :16]
        assert classifier.set_classes(OTHERS) is classifier and classifier.class_names == tuple(OTHERS)
        same(classifier.classify(rows), expected)
        assert classifier.predict(images, top_k=2) == found
        same(classifier.set_classes(NAMES).classify(rows), written_out(encoder, tensors, f)[1])


def test_any_names_without_an_adapter(encoder, make_images):
    images, classifier = make_images(3), AnchorClassifier(encoder, Anchors(NAMES, ("tree",), ("a {}.",)))
    expected = AnchorClassifier(encoder, Anchors(OTHERS, (), ("a {}.",))).predict(images, top_k=2)
    assert classifier.predict(images, top_k=2, class_names=OTHERS) == expected
    assert classifier.class_names == tuple(NAMES)
    assert classifier.set_classes(OTHERS).predict(images, top_k=2) == expected


# On the model


@pytest.fixture
def adapted(encoder):
    """A PEFT model whose adapter reads the tower and has both sides, and its encoder."""
    settings = sides(encoder)["both"]
    tensors = attached(encoder, settings).transmiter.tensors("default")
    model = get_peft_model(encoder.model, linear(**settings))
    encoder.model.transmiter.set_tensors("default", tensors)
    return model, encoder


def test_several_threads(adapted, make_images):
    """Nothing of a call is kept on the model."""
    model, encoder = adapted
    batches = [encoder.preprocess(make_images(2, seed=seed)) for seed in range(16)]

    @torch.no_grad()
    def ask(pixels):
        return model(pixel_values=pixels).logits_per_image

    expected = [ask(pixels) for pixels in batches]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(ask, batches), expected))


def test_the_fingerprint_of_embeddings(encoder):
    """Cached embeddings are of the image side that was on when they were made, and only of that."""
    before, plain = encoder.fingerprint, ModelId.of(encoder)
    model = get_peft_model(encoder.model, linear())
    assert encoder.fingerprint == before  # a text side is a head
    model.add_adapter("image", linear(image_side=16))
    assert encoder.fingerprint == before
    model.set_adapter("image")
    first = encoder.fingerprint
    assert first != before and not plain.is_of(encoder)
    with torch.no_grad():
        encoder.model.transmiter.part("image_map", "image").add_(1)
    assert encoder.fingerprint not in (before, first)
    with model.disable_adapter():
        assert encoder.fingerprint == before and plain.is_of(encoder)
    model.set_adapter("default")
    assert encoder.fingerprint == before
    model.set_adapter("image")
    model.unload()
    assert encoder.fingerprint == before


@pytest.mark.parametrize("bfloat16", [False, True])
def test_merging(encoder, make_images, bfloat16):
    """``P ← (1 + A) P`` where there is nothing else; the merged model is a plain one."""
    pixels, d = encoder.preprocess(make_images(3)), encoder.embed_dim
    encoder.model.to(torch.bfloat16 if bfloat16 else torch.float32)
    weight = encoder.model.visual_projection.weight
    matrix = 0.3 * torch.randn(d, d)
    expected = ((torch.eye(d) + matrix) @ weight.detach().float()).to(weight.dtype)
    model = get_peft_model(encoder.model, linear(image_side=d))
    encoder.model.transmiter.part("image_map", "default").data.copy_(matrix)
    adapted = encoder.embed_pixels(pixels)
    merged = model.merge_and_unload()
    assert merged is encoder.model and not hasattr(merged, "transmiter")
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(encoder.embed_pixels(pixels), adapted, atol=0.02 if bfloat16 else 1e-5, rtol=0)


def test_what_does_not_merge(fresh):
    for family, settings, shift in (
        ("clip", {"image_side": 48}, 0),
        ("clip", {"image_side": 16, "text_side": 16}, 0),
        ("clip", {"image_side": 16}, 1),
        ("siglip", {"image_side": 16}, 0),
    ):
        model = get_peft_model(fresh(family).model, linear(**settings))
        model.get_base_model().transmiter.part("image_shift", "default").data.add_(shift)
        with pytest.raises(NotImplementedError, match=r"no shift and no text side, .*; use unload\(\)"):
            model.merge_and_unload()


def test_beside_a_lora_in_the_projection(encoder, make_images):
    """The image side changes what the model, LoRA included, makes of a picture."""
    pixels = encoder.preprocess(make_images(2))
    lora = LoraConfig(target_modules=["visual_projection"], init_lora_weights=False)
    inject_adapter_in_model(lora, encoder.model, "lora")
    classifier = attached(encoder, sides(encoder)["both"])
    expected = classifier(pixels).logits_per_image
    inject_adapter_in_model(linear(**sides(encoder)["both"]), encoder.model, "own")
    encoder.model.transmiter.set_tensors("own", classifier.transmiter.tensors("default"))
    set_adapter(encoder.model, ["own", "lora"])
    with torch.no_grad():
        same(encoder.model(pixel_values=pixels).logits_per_image, expected)


def test_saved_and_loaded(encoder, make_images, tmp_path):
    pixels = encoder.preprocess(make_images(2))
    for name, settings in sides(encoder).items():
        classifier = attached(encoder, settings)
        classifier.save_pretrained(tmp_path / name)
        back = AnchorClassifier.from_pretrained(tmp_path / name, encoder)
        assert torch.equal(back(pixels).logits_per_image, classifier(pixels).logits_per_image)
        twin = PeftModel.from_pretrained(copy.deepcopy(encoder.model), str(tmp_path / name))
        with torch.no_grad():
            assert torch.equal(twin(pixel_values=pixels).logits_per_image, classifier(pixels).logits_per_image)


# Errors


def test_rows_that_lack_what_it_reads(encoder):
    x = encoder.embed_texts(["a cat."])
    for name in ("tower", "both", "wide", "wide text"):
        classifier = attached(encoder, sides(encoder)[name])
        with pytest.raises(ValueError, match="reads rows of 48 columns, .* these have 16: .* tower=True"):
            classifier.classify(x)
        if "image_side" in sides(encoder)[name]:
            with pytest.raises(ValueError, match="reads rows of 48 columns"):
                classifier.transmiter.adapt(x)
    rows = torch.cat([x, torch.zeros(1, 32)], 1)
    classifier = attached(encoder, {})
    assert torch.equal(classifier.classify(rows), classifier.classify(x))  # it reads the first columns alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "mlp", "image_side": 16}, 'form "mlp" has neither image_side nor text_side'),
        ({"text_side": 0}, "needs an image_side, a text_side or both"),
        ({"image_side": 8}, "image_side = 8 and text_side = None do not fit embeddings of width 16"),
        ({"text_side": 20}, "image_side = None and text_side = 20 do not fit embeddings of width 16"),
    ],
)
def test_sides_that_do_not_fit(encoder, settings, message):
    with pytest.raises(ValueError, match=message):
        AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(linear(**settings))
    with pytest.raises(ValueError, match=message):
        get_peft_model(encoder.model, linear(**settings))


def test_a_model_with_another_tower(encoder, model_dir, make_images):
    """Of the same embedding width, but with other tokens: ALIGN's map has as many channels as it likes."""
    other = DualEncoder.from_pretrained(model_dir("align"))
    classifier = attached(other, {"image_side": encoder.embed_dim + encoder.tower_dim + 2})
    with pytest.raises(ValueError, match="on the model it was made for"):
        classifier.predict(make_images(1))
