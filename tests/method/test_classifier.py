"""The classifier: what it answers with and without an adapter, and how an adapter is saved and found again."""

import copy
import json
import pickle
import shutil

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.saved import load_classifier
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.tuners import TransMiterConfig


NAMES = ("cat", "dog", "car")
ANCHORS = Anchors(NAMES, ("tree", "ship"))


def make_config(form="mlp", **kwargs):
    auxiliary = ["tree", "ship"] if form == "mlp" else []
    return TransMiterConfig(class_names=list(NAMES), auxiliary_names=auxiliary, form=form, **kwargs)


def stir(classifier):
    generator = torch.Generator().manual_seed(0)
    for key, tensor in classifier.transmiter.tensors("default").items():
        if key != "anchors":
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
        if key == "basis":
            tensor.copy_(torch.linalg.qr(tensor)[0])
    return classifier


@pytest.fixture
def pixels(encoder, make_images):
    return encoder.preprocess(make_images(4))


# Without an adapter


def test_zero_shot(encoder, pixels, make_images):
    classifier = AnchorClassifier(encoder, ANCHORS)
    x, a = encoder.embed_images(make_images(4)), encoder.embed_names(ANCHORS.names)
    output = classifier(pixel_values=pixels)
    torch.testing.assert_close(output.logits_per_image, encoder.logit_scale * x @ a.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.image_embeds, x, atol=1e-6, rtol=0)
    assert output.logits_per_image.shape == (4, 5)
    assert torch.equal(classifier.classify(x), encoder.logits(x, a[:3]))  # the task's columns
    assert classifier.class_names == NAMES and classifier.adapter_config is None
    assert AnchorClassifier(encoder, Anchors((), NAMES)).class_names == NAMES  # universal anchors: all of them


def test_text_embeds_are_made_once_or_given(encoder):
    given = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    classifier = AnchorClassifier(encoder, ANCHORS, given)
    assert torch.equal(classifier.text_embeds, given)
    lazy = AnchorClassifier(encoder, ANCHORS)
    assert lazy.text_embeds is lazy.text_embeds
    assert not [key for key in lazy.state_dict() if "text_embeds" in key]
    with pytest.raises(ValueError, match=r"text_embeds must be \(5, 16\) for these anchors, got \(3, 16\)"):
        AnchorClassifier(encoder, ANCHORS, given[:3])


def test_predict(encoder, make_images, tmp_path):
    classifier = stir(AnchorClassifier(encoder, ANCHORS).add_adapter(make_config()))
    images = make_images(3)
    probabilities = classifier(encoder.preprocess(images)).logits_per_image.softmax(1)
    results = classifier.predict(images, top_k=2, batch_size=2)
    assert len(results) == 3
    for result, row in zip(results, probabilities, strict=True):
        best = row.argsort(descending=True)[:2].tolist()
        assert [entry["label"] for entry in result] == [NAMES[k] for k in best]
        assert [entry["score"] for entry in result] == pytest.approx(row[best].tolist(), abs=1e-5)
    images[0].save(tmp_path / "cat.png")
    assert classifier.predict(tmp_path / "cat.png", top_k=99)[0][0] == pytest.approx(results[0][0], abs=1e-5)
    bare = AnchorClassifier(encoder, ANCHORS).predict(images[0], top_k=99)
    assert {entry["label"] for entry in bare[0]} == set(NAMES)  # auxiliary names are no answers
    assert sum(entry["score"] for entry in bare[0]) == pytest.approx(1)


def test_names_asked_once_are_no_others_where_none_are_given(encoder, make_images):
    given = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    for classifier in (AnchorClassifier(encoder, ANCHORS, given), AnchorClassifier(encoder, ANCHORS)):
        image, names = make_images(1)[0], classifier.class_names
        usual = classifier.predict(image, top_k=9)[0]
        for asked in (names, names[::-1]):  # of the vectors that were given, if any
            again = classifier.predict(image, top_k=9, class_names=asked)[0]
            assert [entry["label"] for entry in again] == [entry["label"] for entry in usual]
            assert [e["score"] for e in again] == pytest.approx([e["score"] for e in usual], abs=1e-5)
        with pytest.raises(ValueError, match="no class name|at least one|empty"):
            classifier.predict(image, class_names=[])


# With adapters


@pytest.mark.parametrize("form", ["mlp", "linear"])
def test_forward_and_classify_agree(encoder, pixels, form):
    classifier = stir(AnchorClassifier(encoder, ANCHORS).add_adapter(make_config(form)))
    output = classifier(pixel_values=pixels)
    assert output.logits_per_image.shape == (4, 3)
    torch.testing.assert_close(classifier.classify(output.image_embeds), output.logits_per_image, atol=1e-5, rtol=1e-5)
    assert torch.equal(classifier(pixels).logits_per_image, output.logits_per_image)
    assert not any(p.requires_grad for p in classifier.parameters())
    model = get_peft_model(copy.deepcopy(encoder.model), make_config(form))
    model.base_model.model.transmiter.set_tensors("default", classifier.transmiter.tensors("default"))
    assert torch.equal(model(pixel_values=pixels).logits_per_image, output.logits_per_image)


def test_an_adapter_may_have_names_of_its_own(encoder, pixels):
    classifier = AnchorClassifier(encoder, ANCHORS).add_adapter(TransMiterConfig(class_names=["ship", "bird"]))
    assert classifier.class_names == ("ship", "bird")
    expected = encoder.logits(encoder.embed_pixels(pixels), encoder.embed_names(["ship", "bird"]))
    torch.testing.assert_close(classifier(pixels).logits_per_image, expected, atol=1e-5, rtol=1e-5)


def test_another_adapter_takes_the_place_of_the_first(encoder, pixels, tmp_path):
    classifier = AnchorClassifier(encoder, ANCHORS)
    with pytest.raises(ValueError, match="no adapter to save"):
        classifier.save_pretrained("nowhere")
    stir(classifier.add_adapter(make_config())).calibration = CalibrationPack(torch.zeros(4, 3), NAMES)
    first = classifier(pixels).logits_per_image
    assert classifier.add_adapter(TransMiterConfig(class_names=["ship", "bird"])) is classifier
    assert classifier.class_names == ("ship", "bird") and classifier(pixels).logits_per_image.shape == (4, 2)
    assert classifier.calibration is None
    classifier.save_pretrained(tmp_path)
    assert AnchorClassifier.from_pretrained(tmp_path, encoder).class_names == ("ship", "bird")
    stir(classifier.add_adapter(make_config()))
    assert torch.equal(classifier(pixels).logits_per_image, first)
    with pytest.raises(ValueError, match="whose embeddings have width 16 and not 24"):
        classifier.add_adapter(make_config(embed_dim=24))
    assert torch.equal(classifier(pixels).logits_per_image, first)  # as it was


def test_one_model_serves_many_classifiers(encoder, pixels):
    before = encoder.fingerprint
    first = stir(AnchorClassifier(encoder, ANCHORS).add_adapter(make_config()))
    answer = first(pixels).logits_per_image
    second = AnchorClassifier(encoder, ANCHORS)
    assert second(pixels).logits_per_image.shape == (4, 5)
    second.add_adapter(make_config("linear"))
    assert torch.equal(first(pixels).logits_per_image, answer)
    assert not hasattr(encoder.model, "transmiter") and encoder.fingerprint == before


def test_copies(encoder, pixels):
    classifier = stir(AnchorClassifier(encoder, ANCHORS).add_adapter(make_config()))
    answer = classifier(pixels).logits_per_image
    for twin in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        torch.testing.assert_close(twin(pixels).logits_per_image, answer, atol=1e-5, rtol=1e-5)
        assert twin.encoder.model is twin.model is not encoder.model
        stir(twin)
        assert torch.equal(classifier(pixels).logits_per_image, answer)


def test_over_a_tuned_model(model_dir, pixels):
    """A LoRA inside the model stays active under the classifier's own adapter."""
    plain = DualEncoder.from_pretrained(model_dir("clip"))
    lora = get_peft_model(copy.deepcopy(plain.model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned = DualEncoder(lora, plain.processor)
    answers = [
        AnchorClassifier(e, ANCHORS).add_adapter(make_config())(pixels).logits_per_image for e in (plain, tuned)
    ]
    expected = tuned.logits(tuned.embed_pixels(pixels), tuned.embed_names(NAMES))
    torch.testing.assert_close(answers[1], expected, atol=1e-5, rtol=1e-5)
    assert (answers[0] - answers[1]).abs().max() > 0.01


# Files


@pytest.mark.parametrize("form", ["mlp", "linear"])
def test_save_and_load(encoder, pixels, tmp_path, form):
    classifier = stir(AnchorClassifier(encoder, ANCHORS).add_adapter(make_config(form, provenance={"step": "test"})))
    classifier.calibration = CalibrationPack(torch.randn(4, 3).half().float(), NAMES, "f", "somewhere")
    classifier.save_pretrained(tmp_path / "new" / "adapter")
    folder = tmp_path / "new" / "adapter"
    written = {"README.md", "adapter_config.json", "adapter_model.safetensors", "calibration.safetensors"}
    assert {path.name for path in folder.iterdir()} == written
    answer = classifier(pixels).logits_per_image
    for encoder_given in (encoder, None):
        back = AnchorClassifier.from_pretrained(folder, encoder_given)
        torch.testing.assert_close(back(pixels).logits_per_image, answer, atol=1e-5, rtol=1e-5)
        tensors = back.transmiter.tensors("default")
        assert all(torch.equal(tensors[key], value) for key, value in classifier.transmiter.tensors("default").items())
        assert back.adapter_config.provenance["step"] == "test" and back.class_names == NAMES
        assert torch.equal(back.calibration.logits, classifier.calibration.logits)
        assert not any(p.requires_grad for p in back.parameters()) and not back.training
        assert back.encoder.name_or_path == encoder.name_or_path
    raw = PeftModel.from_pretrained(copy.deepcopy(encoder.model), str(folder))
    torch.testing.assert_close(raw(pixel_values=pixels).logits_per_image, answer, atol=1e-5, rtol=1e-5)


def test_saving_again_replaces_the_adapter_and_keeps_the_card(encoder, pixels, tmp_path):
    classifier = AnchorClassifier(encoder, ANCHORS).add_adapter(make_config())
    classifier.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# My own words\n")
    (tmp_path / "notes.txt").write_text("kept")
    stir(classifier).save_pretrained(tmp_path)
    assert "My own words" in (tmp_path / "README.md").read_text() and (tmp_path / "notes.txt").exists()
    back = AnchorClassifier.from_pretrained(tmp_path, encoder)
    torch.testing.assert_close(back(pixels).logits_per_image, classifier(pixels).logits_per_image)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_revision_is_saved(encoder, tmp_path):
    encoder.revision = "abc123"
    AnchorClassifier(encoder, ANCHORS).add_adapter(make_config()).save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert facts["revision"] == "abc123" and facts["base_model_name_or_path"] == encoder.name_or_path


def test_loading_refuses(encoder, tmp_path):
    wide = DualEncoder.from_pretrained(tiny_models.save("clip", tmp_path / "wide", width=24))
    AnchorClassifier(encoder, ANCHORS).add_adapter(make_config()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="was made for .*, whose embeddings have width 24 and not 16: .* hf-transmiter transfer"
    ):
        AnchorClassifier.from_pretrained(tmp_path / "adapter", wide)
    lora = get_peft_model(copy.deepcopy(encoder.model), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="holds a .*LORA adapter, not a TransMiter adapter"):
        AnchorClassifier.from_pretrained(tmp_path / "lora", encoder)


def test_one_line_says_what_it_is(encoder):
    assert repr(encoder) == f"DualEncoder({encoder.name_or_path!r}, CLIPModel of width {encoder.embed_dim}, on cpu)"
    classifier = AnchorClassifier(encoder, ANCHORS)
    assert repr(classifier) == f"AnchorClassifier({encoder.name_or_path!r}, 3 classes)"
    with_adapter = repr(AnchorClassifier(encoder, ANCHORS).add_adapter(make_config()))
    assert with_adapter == f"AnchorClassifier({encoder.name_or_path!r}, 3 classes, mlp adapter)"


def test_where_the_model_of_an_adapter_is_not(encoder, tmp_path):
    shutil.copytree(encoder.name_or_path, tmp_path / "model")
    one = DualEncoder.from_pretrained(tmp_path / "model")
    AnchorClassifier(one, ANCHORS).add_adapter(make_config()).save_pretrained(tmp_path / "adapter")
    (tmp_path / "model").rename(tmp_path / "moved")
    said = r"^cannot load '.*model', the model of the adapter '.*adapter': there is no model .*\n.* pass it as encoder"
    for load in (AnchorClassifier.from_pretrained, load_classifier):
        with pytest.raises(FileNotFoundError, match=said):
            load(tmp_path / "adapter")
    assert AnchorClassifier.from_pretrained(tmp_path / "adapter", DualEncoder.from_pretrained(tmp_path / "moved"))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    for load in (AnchorClassifier.from_pretrained, load_classifier):
        with pytest.raises(ValueError, match="does not say which model it belongs to: name it"):
            load(tmp_path / "adapter")
    for wrong in (tmp_path / "none", f"{tmp_path}/moved/config.json", f"{tmp_path}/moved/config.json/", "~/model"):
        with pytest.raises(FileNotFoundError, match="there is no model '.*': neither a local path nor a Hub id"):
            DualEncoder.from_pretrained(wrong)
    with pytest.raises(FileNotFoundError, match="adapter/none' has no adapter_config.json"):
        AnchorClassifier.from_pretrained(tmp_path / "adapter", subfolder="none")
