"""Finite or an error, at every border: what models say, what training leaves, what is read and what is written."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_transmiter import (
    AnchorClassifier,
    Anchors,
    Bridge,
    DualEncoder,
    TransMiterForImageClassification,
    embed_dataset,
    extract,
    tune,
)
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.method.saved import load_classifier, load_teacher
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.settings import TuningConfig
from hf_transmiter.training.loop import FitConfig, fit
from hf_transmiter.tuners import TransMiterConfig, save_adapter


NAMES = ("cat", "dog", "car")
NAN, INF = float("nan"), float("inf")
QUIET = {"progress": False}


@pytest.fixture
def linear(encoder, make_dataset, tmp_path):
    return extract(encoder, torch.randn(12, 3), make_dataset(), class_names=NAMES, cache_dir=tmp_path, **QUIET)


# What a model says


@pytest.mark.parametrize("value", [NAN, INF, 1e38])
@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("logit_scale", "values of the logit scale hold NaN"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "the text embedding of row 0 is not finite"),
        ("text_projection.weight", "the text embedding of row 0 is not finite"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", r"the image embedding of row \d is not finite"),
        ("visual_projection.weight", "the image embedding of row 0 is not finite"),
    ],
)
def test_a_damaged_model_scores_nothing(encoder, make_images, make_dataset, tmp_path, weight, said, value):
    encoder.model.get_parameter(weight).data.fill_(value)
    with pytest.raises(ValueError, match=rf"DualEncoder\('.*{said}"):
        AnchorClassifier(encoder, Anchors(NAMES)).predict(make_images(2))
    with pytest.raises(ValueError, match=said):
        AnchorClassifier(encoder, Anchors(NAMES))(encoder.preprocess(make_images(2)))
    if "vis" in weight:
        with pytest.raises(ValueError, match=said):
            embed_dataset(encoder, make_dataset(), cache_dir=tmp_path, **QUIET)


def test_pixels_that_are_not_finite(encoder, make_images):
    pixels = encoder.preprocess(make_images(3))
    pixels[1, 0, 0, 0] = INF
    for call in (encoder.embed_pixels, AnchorClassifier(encoder, Anchors(NAMES))):
        with pytest.raises(
            ValueError, match="the image embedding of row 1 is not finite, or zero: look at that image"
        ):
            call(pixels)


def test_an_adapter_whose_numbers_run_over(linear, make_images):
    """Finite weights, rows and logits that are not."""
    linear.transmiter.part("image_shift", "default").data.fill_(1e38)
    with pytest.raises(ValueError, match="the adapted image embedding of row 0 is not finite, or zero"):
        linear.predict(make_images(2))
    config = TransMiterConfig(class_names=list(NAMES), form="linear")
    linear.add_adapter(config).transmiter.part("class_vectors", "default").data.fill_(3e38)
    with pytest.raises(ValueError, match="logits of AnchorClassifier.* hold NaN"):
        linear.predict(make_images(2))


def test_the_image_classifier(linear, make_images, tmp_path):
    model = TransMiterForImageClassification.from_classifier(linear)
    pixels = linear.encoder.preprocess(make_images(2))
    model.save_pretrained(tmp_path / "whole")
    weight = model.encoder.vision_model.encoder.layers[0].mlp.fc1.weight
    weight.data[0, 0] = NAN
    with pytest.raises(ValueError, match="the classifier: the image embedding of row 0 is not finite"):
        model(pixels)
    with pytest.raises(ValueError, match=r"the classifier's weights 'encoder.*fc1.weight' hold NaN"):
        model.save_pretrained(tmp_path / "damaged")
    path = tmp_path / "whole" / "model.safetensors"
    save_file({**load_file(path), "encoder.logit_scale": torch.tensor(INF)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights 'encoder.logit_scale' hold NaN"):
        TransMiterForImageClassification.from_pretrained(tmp_path / "whole")


def test_logits_of_experts_that_run_over(encoder, model_dir, make_dataset, tmp_path):
    strong = DualEncoder.from_pretrained(model_dir("clip", 1))
    options = {"class_names": NAMES, "cache_dir": tmp_path, "config": TuningConfig(epochs=1), **QUIET}
    with pytest.raises(ValueError, match="what the tuned and the strong model say together hold NaN"):
        tune(strong, make_dataset(), teacher=torch.full((12, 3), 3e38), weak=encoder, **options)


# What training leaves


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "ia3", "coop", "cocoop", "contcoop", "maple"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_trained_in_float32(model_dir, make_dataset, tmp_path, method, dtype):
    encoder = DualEncoder.from_pretrained(model_dir("clip"), dtype=dtype)
    adapter = {
        "dora": {"method": "lora", "use_dora": True},
        "ia3": {"method": "ia3", "target_modules": ["q_proj", "v_proj"], "feedforward_modules": []},
    }.get(method, method)
    config = TuningConfig(epochs=3, shots=4)
    tuned = tune(encoder, make_dataset(), adapter, config=config, cache_dir=tmp_path, **QUIET)
    learnt = [p for name, p in tuned.model.named_parameters() if ".default" in name]
    assert learnt and all(p.dtype == torch.float32 and p.isfinite().all() for p in learnt)
    assert tuned.encoder.dtype == dtype
    tuned.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    load_teacher(str(tmp_path / "saved"), encoder)


@pytest.mark.parametrize("held_out", [None, lambda: 1.0])
def test_weights_after_the_last_step(tmp_path, held_out):
    """The loss of the last step is that of the weights before it."""
    weight = torch.nn.Parameter(torch.ones(2))

    def step(rows, generator):
        return (weight * 1e-30).sum() * 0 + torch.sqrt(weight - weight).sum()  # 0, with an infinite slope

    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(ValueError, match="the weights became NaN or infinite in training: lower the learning rate"):
        fit([weight], step, 4, FitConfig(epochs=1, batch_size=4), held_out=held_out, checkpoint=checkpoint, **QUIET)
    assert not checkpoint.exists()


# What is written and read


def test_nothing_damaged_is_written(linear, encoder, model_dir, make_dataset, tmp_path):
    for value in (NAN, INF):
        linear.transmiter.part("image_map", "default").data[0, 0] = value
        with pytest.raises(ValueError, match="image_map of .*adapter_model.safetensors hold NaN"):
            linear.save_pretrained(tmp_path / "adapter")
        bridge = Bridge.build(encoder, DualEncoder.from_pretrained(model_dir("clip", 1)), make_dataset(), **QUIET)
        bridge.mean_weak[0] = value
        with pytest.raises(ValueError, match="mean_weak of .*bridge.safetensors hold NaN"):
            bridge.save(tmp_path / "bridge.safetensors")
        bridge.mean_weak[0], bridge.scale = 0.0, value
        with pytest.raises(ValueError, match="bridge.safetensors is not saved.*is not a number of JSON"):
            bridge.save(tmp_path / "bridge.safetensors")
    with pytest.raises(ValueError, match="as float16, in which they are saved"):
        CalibrationPack(torch.full((2, 3), 1e5), NAMES).save(tmp_path / "pack.safetensors")
    tuned = tune(encoder, make_dataset(), "lora", config=TuningConfig(epochs=1, shots=4), cache_dir=tmp_path, **QUIET)
    next(p for name, p in tuned.model.named_parameters() if "lora_B" in name).data.fill_(INF)
    for save in (tuned.save_pretrained, lambda folder: save_adapter(tuned.model, folder)):
        with pytest.raises(ValueError, match="the weights '.*lora_B.weight' hold NaN"):
            save(tmp_path / "lora")
    assert not [path for path in tmp_path.rglob("*.safetensors") if path.name != "embeds.safetensors"]


@pytest.mark.parametrize("adapter", ["lora", "coop"])
def test_nothing_damaged_is_read(encoder, make_dataset, tmp_path, adapter):
    config = TuningConfig(epochs=1, shots=4)
    tune(encoder, make_dataset(), adapter, config=config, cache_dir=tmp_path, **QUIET).save_pretrained(tmp_path / "it")
    path = tmp_path / "it" / "adapter_model.safetensors"
    weights = load_file(path)
    for value in (NAN, INF, -INF):
        name = list(weights)[-1]
        save_file({**weights, name: weights[name] * value + value}, path, metadata={"format": "pt"})
        for load in (
            lambda: load_teacher(str(tmp_path / "it"), encoder),
            lambda: load_classifier(str(tmp_path / "it")),
        ):
            with pytest.raises(ValueError, match=f"{name} of .*/it hold NaN or infinite values"):
                load()


# One model, whatever it was loaded in


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("made_in", DTYPES)
def test_a_teacher_is_of_its_model_in_every_type(model_dir, make_dataset, tmp_path, made_in):
    """Also where the folder was copied; another model is another one."""
    config, place = TuningConfig(epochs=1, shots=4), str(shutil.copytree(model_dir("clip"), tmp_path / "copy"))
    tuned = tune(
        DualEncoder.from_pretrained(model_dir("clip"), dtype=made_in), make_dataset(), "lora", config=config,
        cache_dir=tmp_path, **QUIET,
    )  # fmt: skip
    tuned.save_pretrained(tmp_path / "tuned")
    for loaded_in in DTYPES:
        load_teacher(str(tmp_path / "tuned"), DualEncoder.from_pretrained(model_dir("clip"), dtype=loaded_in))
        if {made_in, loaded_in} != {torch.float16, torch.bfloat16}:  # these two do not tell
            load_teacher(str(tmp_path / "tuned"), DualEncoder.from_pretrained(place, dtype=loaded_in))
        with pytest.raises(ValueError, match="was tuned from"):
            load_teacher(str(tmp_path / "tuned"), DualEncoder.from_pretrained(model_dir("clip", 1), dtype=loaded_in))


def test_a_model_stored_in_half_precision(encoder, make_dataset, tmp_path):
    """Equal values are one model, but not one column of the cache."""
    encoder.model.bfloat16()
    encoder.model.save_pretrained(tmp_path / "half")
    encoder.processor.save_pretrained(tmp_path / "half")
    half, whole = (DualEncoder.from_pretrained(tmp_path / "half", dtype=dtype) for dtype in ("auto", torch.float32))
    assert half.dtype == torch.bfloat16 and half.fingerprint == whole.fingerprint
    assert ModelId.of(half).is_of(whole) and half.cache_key != whole.cache_key
    tables = [embed_dataset(one, make_dataset(), cache_dir=tmp_path, **QUIET).embeds for one in (half, whole)]
    assert not torch.equal(*tables)


def test_small_changes_are_told_in_float32(encoder):
    before = ModelId.of(encoder)
    with torch.no_grad():
        encoder.model.logit_scale.add_(1e-3)
    assert not before.is_of(encoder)
