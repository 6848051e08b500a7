"""Adapters as image classifiers of transformers: the same numbers without a text tower, in pipelines, on the Hub."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification, CLIPConfig, pipeline

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.pictures import read_picture
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.image_classifier import TransMiterForImageClassification, TransMiterImageClassificationConfig
from hf_transmiter.tuners import TransMiterConfig


NAMES = ("cat", "dog", "car")


def make_classifier(encoder, form="mlp", names=NAMES, **sides):
    """An adapter that answers otherwise than zero-shot."""
    auxiliary = ["tree", "ship"] if form == "mlp" else []
    config = TransMiterConfig(class_names=list(names), auxiliary_names=auxiliary, form=form, **sides)
    classifier = AnchorClassifier(encoder, Anchors(tuple(names), tuple(auxiliary))).add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in classifier.transmiter.tensors("default").items():
        if key not in ("anchors", "basis"):
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return classifier


def classify(classifier, pixels):
    return classifier.classify(classifier.encoder.embed_pixels(pixels, classifier.reads_tower))


@torch.no_grad()
def logits(model, pixels):
    return model(pixel_values=pixels).logits


def assert_same_predictions(found, expected):
    assert [[entry["label"] for entry in row] for row in found] == [[e["label"] for e in row] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert [entry["score"] for entry in row] == pytest.approx([entry["score"] for entry in wanted], abs=1e-5)


def image_weights(folder):
    """How many numbers a model's checkpoint has outside its text side."""
    weights = load_file(f"{folder}/model.safetensors")
    kept = [tensor for name, tensor in weights.items() if not name.startswith(("text_model", "text_projection"))]
    assert len(kept) < len(weights)
    return sum(tensor.numel() for tensor in kept)


@pytest.fixture
def pictures(make_images):
    return [make_images(1, size, seed=size)[0] for size in (20, 16, 33)] + [make_images(1)[0].resize((40, 12))]


@pytest.fixture
def saved(encoder, tmp_path):
    """A classifier that stands alone, saved, and the AnchorClassifier it was made from."""
    classifier = make_classifier(encoder)
    TransMiterForImageClassification.from_classifier(classifier).save_pretrained(tmp_path / "alone")
    return tmp_path / "alone", classifier


# The same numbers


@pytest.mark.parametrize("form", ["mlp", "linear", "linear, both sides"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family(family, form, tmp_path, pictures):
    base = tiny_models.save(family, tmp_path / "base")
    encoder = DualEncoder.from_pretrained(base)
    wide = encoder.embed_dim + encoder.tower_dim
    sides = {"image_side": wide, "text_side": encoder.embed_dim + wide} if "sides" in form else {}
    classifier = make_classifier(encoder, form.split(",")[0], **sides)
    classifier.save_pretrained(tmp_path / "adapter")
    pixels = classifier.encoder.preprocess(pictures)
    expected = classify(classifier, pixels)
    model = TransMiterForImageClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(model.image_processor(images=pictures, return_tensors="pt")["pixel_values"], pixels)
    assert torch.equal(logits(model, pixels), expected)
    assert torch.equal(logits(model, pixels[:1]), classify(classifier, pixels[:1]))
    head = sum(tensor.numel() for tensor in classifier.transmiter.tensors("default").values())
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in model.state_dict())
    assert sum(parameter.numel() for parameter in model.parameters()) + buffers == image_weights(base) + head
    assert not [name for name in model.state_dict() if "text" in name]

    model.save_pretrained(tmp_path / "alone")
    files = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in (tmp_path / "alone").iterdir()} == files
    classify_images = pipeline("image-classification", model=str(tmp_path / "alone"))
    assert isinstance(classify_images.model, TransMiterForImageClassification)
    assert torch.equal(logits(classify_images.model, pixels), expected)
    assert_same_predictions(classify_images(pictures, top_k=2), classifier.predict(pictures, top_k=2))


def test_saved_and_loaded_again(saved, pictures, tmp_path):
    folder, classifier = saved
    pixels = classifier.encoder.preprocess(pictures)
    expected = classify(classifier, pixels)
    model = TransMiterForImageClassification.from_pretrained(folder)
    found, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for again in (model, found, copy.deepcopy(model)):
        assert torch.equal(logits(again, pixels), expected)
        assert again.config.id2label == dict(enumerate(NAMES)) and again.config.label2id["car"] == 2
        learnt = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
        head = {name for name, _ in again.named_parameters() if name.startswith("transmiter.")}
        assert not again.training and learnt < head and not [name for name in head - learnt if "_up" in name]
    found.config.id2label = {0: "chat", 1: "chien", 2: "voiture"}
    found.save_pretrained(tmp_path / "french")  # its image processor goes with it, too
    french = pipeline("image-classification", model=str(tmp_path / "french"))
    assert {entry["label"] for entry in french(pictures[0])} == {"chat", "chien", "voiture"}
    before = (folder / "model.safetensors").read_bytes()
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_pipelines_see_what_the_classifier_sees(encoder, tmp_path):
    """A photograph that its camera turned, by path; sixteen bits, through the one function that reads pictures."""
    classifier = make_classifier(encoder)
    model = TransMiterForImageClassification.from_classifier(classifier)
    classify_images = pipeline("image-classification", model=model, image_processor=model.image_processor)
    grey, tags = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8), Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(grey).save(tmp_path / "turned.jpg", exif=tags)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "wide.png")
    for given, path in ((str(tmp_path / "turned.jpg"),) * 2, (read_picture(tmp_path / "wide.png"), grey)):
        (expected,) = classifier.predict(path)
        found = classify_images(given, top_k=1)
        assert found[0]["label"] == expected[0]["label"]
        assert found[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-6)


def test_pipeline_with_a_model_in_memory(encoder, pictures):
    classifier = make_classifier(encoder, "linear")
    model = TransMiterForImageClassification.from_classifier(classifier)
    found = pipeline("image-classification", model=model, image_processor=model.image_processor)(pictures, top_k=9)
    assert_same_predictions(found, classifier.predict(pictures, top_k=9))
    for parameter in model.parameters():  # a copy
        parameter.data.zero_()
    assert_same_predictions(found, classifier.predict(pictures, top_k=9))


def test_forward(saved, encoder, pictures):
    model = TransMiterForImageClassification.from_pretrained(saved[0])
    pixels, labels = encoder.preprocess(pictures), torch.tensor([0, 2, 1, 1])
    output = model(pixels, labels=labels)
    rows = output.logits.log_softmax(1)[torch.arange(4), labels]
    torch.testing.assert_close(output.loss, -rows.mean())
    loss, found = model(pixels, labels, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(found, output.logits)
    assert model(pixels).loss is None and len(model(pixels, return_dict=False)) == 1
    model.transmiter.requires_grad_()
    model(pixels, labels).loss.backward()  # may be trained further
    assert model.transmiter.transmiter_down["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(encoder, pictures, tmp_path, dtype):
    make_classifier(encoder).save_pretrained(tmp_path / "adapter")
    half = DualEncoder.from_pretrained(encoder.name_or_path, dtype=dtype)
    classifier = AnchorClassifier.from_pretrained(tmp_path / "adapter", half)
    pixels = half.preprocess(pictures)
    model = TransMiterForImageClassification.from_classifier(classifier)
    model.save_pretrained(tmp_path / "alone")
    again = pipeline("image-classification", model=str(tmp_path / "alone"))
    TransMiterForImageClassification.from_pretrained(tmp_path / "adapter").save_pretrained(tmp_path / "full")
    narrowed = TransMiterForImageClassification.from_pretrained(tmp_path / "full", dtype=dtype)
    for found in (model, again.model, narrowed):
        assert found.encoder.dtype == dtype and found.transmiter.transmiter_basis["default"].dtype == torch.float32
        assert torch.equal(logits(found, pixels), classify(classifier, pixels))
    assert_same_predictions(again(pictures, top_k=3), classifier.predict(pictures, top_k=3))
    wide = TransMiterForImageClassification.from_pretrained(tmp_path / "alone", dtype=torch.float32)
    assert wide.encoder.dtype == torch.float32
    torch.testing.assert_close(logits(wide, pixels), logits(model, pixels), atol=0.1, rtol=0.1)


# Which model


def test_an_adapter_for_another_model_in_a_subfolder(hub, model_dir, tmp_path, pictures):
    made = {}
    for place, family in ((".", "clip"), ("strong", "siglip")):
        HfApi().create_repo(f"alice/{family}")
        HfApi().upload_folder(repo_id=f"alice/{family}", folder_path=model_dir(family))
        made[place] = make_classifier(DualEncoder.from_pretrained(f"alice/{family}"), "linear")
        made[place].save_pretrained(tmp_path / "adapter" / place)
    for place, classifier in made.items():
        options = {} if place == "." else {"subfolder": place}
        model = TransMiterForImageClassification.from_pretrained(tmp_path / "adapter", **options)
        pixels = classifier.encoder.preprocess(pictures)
        assert model.config.base_config.model_type == classifier.encoder.family
        assert torch.equal(logits(model, pixels), classify(classifier, pixels))


def test_a_model_under_another_name_is_known_by_its_weights(encoder, model_dir, tmp_path, pictures):
    classifier = make_classifier(encoder)
    classifier.save_pretrained(tmp_path / "adapter")
    copied = tiny_models.save("clip", tmp_path / "copy")
    change(tmp_path / "adapter" / "adapter_config.json", "base_model_name_or_path", value=copied)
    model = TransMiterForImageClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(model, encoder.preprocess(pictures)), classify(classifier, encoder.preprocess(pictures)))
    other = model_dir("clip", seed=1)
    change(tmp_path / "adapter" / "adapter_config.json", "base_model_name_or_path", value=other)
    with pytest.raises(ValueError, match="other weights|was made for"):
        TransMiterForImageClassification.from_pretrained(tmp_path / "adapter")


def test_a_folder_whose_weights_were_replaced(tmp_path):
    base = tiny_models.save("clip", tmp_path / "base")
    make_classifier(DualEncoder.from_pretrained(base)).save_pretrained(tmp_path / "adapter")
    assert TransMiterForImageClassification.from_pretrained(tmp_path / "adapter")
    tiny_models.save("clip", tmp_path / "base", seed=1)
    for kind in (AnchorClassifier, TransMiterForImageClassification):
        with pytest.raises(ValueError, match="other weights|was made for"):
            kind.from_pretrained(tmp_path / "adapter")


def test_a_sandbox_model_by_its_name(tmp_path, make_images):
    encoder = DualEncoder.from_pretrained("sandbox:weak")
    classifier = make_classifier(encoder)
    classifier.save_pretrained(tmp_path / "adapter")
    model = TransMiterForImageClassification.from_pretrained(tmp_path / "adapter")
    pixels = encoder.preprocess(make_images(2, size=40))
    assert torch.equal(logits(model, pixels), classify(classifier, pixels))
    assert model.config.adapter["base_model_name_or_path"] == "sandbox:weak"


def test_the_config_names_no_folder_of_this_machine(saved, tmp_path):
    assert str(tmp_path.parent) not in (saved[0] / "config.json").read_text()
    assert json.loads((saved[0] / "config.json").read_text())["adapter"]["base_model_name_or_path"]


# What is refused


def test_other_repositories(encoder, model_dir, saved, tmp_path):
    load = TransMiterForImageClassification.from_pretrained
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds neither a TransMiter adapter nor a classifier"):
        load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="neither a local path nor a Hub id"):
        load("./nowhere")
    with pytest.raises(ValueError, match="holds a model of type 'clip', not a TransMiter adapter: pass the adapter"):
        load(model_dir("clip"))
    get_peft_model(copy.deepcopy(encoder.model), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        str(tmp_path / "lora")
    )
    with pytest.raises(ValueError, match="holds a LORA adapter, not a TransMiter adapter"):
        load(tmp_path / "lora")
    saved[1].save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="device_map: not for an adapter; save it as a classifier first"):
        load(tmp_path / "adapter", device_map="auto")
    model = load(saved[0])
    with pytest.raises(ValueError, match="holds an adapter: save the classifier to a folder of its own"):
        model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="call push_to_hub"):
        model.save_pretrained(tmp_path / "new", push_to_hub=True)


def test_classifiers_that_cannot_be_saved(encoder):
    with pytest.raises(ValueError, match="there is no adapter"):
        TransMiterForImageClassification.from_classifier(AnchorClassifier(encoder, Anchors(NAMES)))
    lora = get_peft_model(encoder.model, LoraConfig(target_modules=["q_proj"]))
    tuned = make_classifier(DualEncoder(lora, encoder.processor))
    with pytest.raises(ValueError, match="merge them first"):
        TransMiterForImageClassification.from_classifier(tuned)
    with pytest.raises(ValueError, match="no adapter in this config"):
        TransMiterForImageClassification(TransMiterImageClassificationConfig())


def change(path, *keys, value):
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("adapter", "embed_dim"), 2**16, "made for embeddings of width 65536, this model has 16"),
        (("adapter", "class_names"), ["cat", 5, "car"], r"class_names\[1\] must be a name"),
        (("adapter", "class_names"), ["cat", "dog", "cow"], "anchors_fingerprint does not fit"),
        (("adapter", "width"), 10**6, "are not those of the model in its config"),
        (("adapter", "peft_type"), "LORA", "not that of a TransMiter classifier"),
        (("adapter",), None, "no adapter in this config"),
        (("id2label",), {"0": "cat", "1": "dog"}, "must name the 3 classes 0 to 2"),
        (("id2label",), {"0": "cat", "1": "dog", "2": ["car"]}, "must name the 3 classes"),
        (("base_config", "model_type"), "bert", "not a supported two-tower model"),
        (("base_config", "vision_config", "hidden_size"), 10**6, "are not those of the model in its config"),
        (("base_config", "vision_config", "hidden_size"), "16", "describes no model|must be a whole number"),
        (
            ("base_config", "vision_config", "num_hidden_layers"),
            10**9,
            "num_hidden_layers in config.json is more than",
        ),
        (("base_config", "vision_config", "num_attention_heads"), 0, "describes no model"),
        (("base_config", "text_config", "num_hidden_layers"), 10**9, "num_hidden_layers in config.json is more than"),
        (("base_config", "vision_config", "num_labels"), 10**12, "num_labels in config.json is more than"),
        (("transformers_weights",), "other.safetensors", "must not have transformers_weights"),
        (("model_type",), "clip", "holds a model of type 'clip'"),
    ],
)
def test_a_strangers_config(saved, keys, value, message):
    change(saved[0] / "config.json", *keys, value=value)
    with pytest.raises(ValueError, match=message):
        TransMiterForImageClassification.from_pretrained(saved[0])


def test_a_strangers_weights(saved):
    folder, _ = saved
    path, load = folder / "model.safetensors", TransMiterForImageClassification.from_pretrained
    weights = load_file(path)
    down = "transmiter.transmiter_down.default.weight"

    def write(**changed):
        save_file({**weights, **changed}, path, metadata={"format": "pt"})

    write(**{down: weights[down] * float("nan")})
    with pytest.raises(ValueError, match="the classifier's weights 'transmiter.transmiter_down.default.weight'"):
        load(folder)
    write(**{down: weights[down][:1].clone()})
    with pytest.raises(ValueError, match="are not those of the model in its config.json"):
        load(folder)
    moved = {("encoder.x" if name == "encoder.visual_projection.weight" else name): t for name, t in weights.items()}
    save_file(moved, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights encoder.visual_projection.weight"):
        load(folder)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load(folder)
    path.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    for auto in (TransMiterForImageClassification, AutoModelForImageClassification):
        with pytest.raises(FileNotFoundError, match="has no model.safetensors, the only kind of weights"):
            auto.from_pretrained(folder)


def test_configs_of_other_models_stay_what_they_are(encoder):
    config = TransMiterImageClassificationConfig.of(CLIPConfig(), make_classifier(encoder).adapter_tensors()[0])
    again = AutoConfig.for_model("transmiter", **{k: v for k, v in config.to_dict().items() if k != "model_type"})
    assert again.to_dict() == config.to_dict()


# On the Hub


def test_over_the_hub(hub, model_dir, tmp_path, pictures):
    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=model_dir("clip"))
    classifier = make_classifier(DualEncoder.from_pretrained("alice/base"))
    classifier.push_to_hub("alice/adapter")
    hub.new_machine()
    model = TransMiterForImageClassification.from_pretrained("alice/adapter")
    pixels = classifier.encoder.preprocess(pictures)
    assert torch.equal(logits(model, pixels), classify(classifier, pixels))
    model.push_to_hub("alice/alone", private=True)
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(hub.files("alice/alone"))
    revision = HfApi().model_info("alice/alone").sha
    hub.new_machine()
    asked = len(hub.requests("GET", "alice/base"))
    found = pipeline("image-classification", model="alice/alone", revision=revision)
    assert len(hub.requests("GET", "alice/base")) == asked  # it stands alone
    assert_same_predictions(found(pictures, top_k=3), classifier.predict(pictures, top_k=3))
    for again in (
        AutoModelForImageClassification.from_pretrained("alice/alone"),
        TransMiterForImageClassification.from_pretrained(f"alice/alone@{revision}", local_files_only=True),
    ):
        assert torch.equal(logits(again, pixels), classify(classifier, pixels))
    hub.new_machine(token=None)
    with pytest.raises(OSError, match="no repository 'alice/alone' on the Hub that you may see"):
        TransMiterForImageClassification.from_pretrained("alice/alone")


# In a process of its own


def test_importing_the_class_registers_it(saved, pictures, tmp_path):
    folder, classifier = saved
    pictures[0].save(tmp_path / "picture.png")
    code = """
import sys
from hf_transmiter import TransMiterForImageClassification
from transformers import pipeline
found = pipeline("image-classification", model=sys.argv[1])(sys.argv[2])
print([entry["label"] for entry in found], [m for m in ("torchvision", "timm") if m in sys.modules])
"""
    arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "picture.png")]
    result = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    labels = [entry["label"] for entry in classifier.predict(pictures[0], top_k=3)[0]]
    assert result.stdout.splitlines() == [f"{labels} []"]
    assert "is not supported" not in result.stderr
