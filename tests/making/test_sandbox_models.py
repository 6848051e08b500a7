"""The shipped models: what they are, what they weigh, and that they see.

The floors lie well under the figures of `hf_transmiter/assets/sandbox/README.md`, for 500 pictures are a small sample.
"""

import functools

import measure
import pytest
import torch
from pretrain import RECIPES
from sandbox_tokenizer import build_tokenizer
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

from hf_transmiter import sandbox
from hf_transmiter.hub.repo import SANDBOX_MODELS


@functools.cache
def load(name):
    folder = sandbox.model_path(name)
    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)


@functools.cache
def pixels_and_labels(domain):
    dataset = sandbox.load_dataset(domain, "validation")
    names = dataset.features["label"].names
    return measure.pixel_values(load("weak")[1], dataset), torch.tensor(dataset["label"]), names


@functools.cache
def zero_shot(name, domain):
    model, processor = load(name)
    pixels, labels, names = pixels_and_labels(domain)
    return measure.accuracy(model, measure.class_vectors(model, processor, names), pixels, labels)


def test_all_models_together_weigh_at_most_8_mb():
    sizes = [f.stat().st_size for name in SANDBOX_MODELS for f in sandbox.model_path(name).iterdir()]
    assert 0 < sum(sizes) <= 8e6


@pytest.mark.parametrize("name", SANDBOX_MODELS)
def test_folders_load_with_plain_transformers(name):
    model, processor = load(name)
    recipe = RECIPES[name]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.vision_config.hidden_size == recipe.vision_width
    assert model.config.text_config.hidden_size == model.config.projection_dim == recipe.text_width
    assert processor.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    assert processor.tokenizer.eos_token_id == model.config.text_config.eos_token_id
    assert type(AutoProcessor.from_pretrained(sandbox.model_path(name))) is CLIPProcessor


@pytest.mark.parametrize("name", SANDBOX_MODELS)
def test_the_whole_forward_pass_ranks_the_right_name_first(name):
    model, processor = load(name)
    dataset = sandbox.load_dataset("studio", "validation").select(range(60))
    names = ["a photo of a red thing.", "a photo of a white thing.", "a photo of a blue thing."]
    colour = [dataset.features["label"].names[label].split()[1] for label in dataset["label"]]
    rows = [i for i, c in enumerate(colour) if c in ("red", "white", "blue")]
    inputs = processor(text=names, images=[dataset[i]["image"] for i in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits_per_image.argmax(1)
    truth = torch.tensor([["red", "white", "blue"].index(colour[i]) for i in rows])
    assert len(rows) > 8 and (best == truth).float().mean() > 0.8


@pytest.mark.parametrize(
    "name, domain, floor",
    [
        ("weak", "studio", 25), ("weak", "street", 18), ("weak", "neon", 18),
        ("strong", "studio", 45), ("strong", "street", 35), ("strong", "neon", 25),
        ("weak-upgraded", "studio", 35), ("weak-upgraded", "street", 25),
    ],
)  # fmt: skip
def test_zero_shot_accuracy_is_above_its_floor(name, domain, floor):
    assert zero_shot(name, domain) > floor


@pytest.mark.parametrize("domain", ["studio", "street", "print", "night", "neon"])
def test_strong_beats_weak(domain):
    assert zero_shot("strong", domain) > zero_shot("weak", domain)


@pytest.mark.parametrize("domain", ["studio", "street"])
def test_the_upgrade_beats_weak(domain):
    assert zero_shot("weak-upgraded", domain) > zero_shot("weak", domain)


def test_the_upgrade_shares_the_text_space_of_weak():
    names = sandbox.vocabulary()[::10]
    weak, upgraded = (measure.class_vectors(*load(name), names) for name in ("weak", "weak-upgraded"))
    centred = [v - v.mean(0) for v in (weak, upgraded)]
    assert torch.nn.functional.cosine_similarity(*centred).mean() > 0.7


def test_tuning_weak_on_a_shifted_domain_helps():
    model, processor = load("weak")
    pixels, labels, names = pixels_and_labels("print")
    pool = sandbox.load_dataset("print", "train")
    shots = pool.select(measure.few_shot(pool, torch.Generator().manual_seed(0)))
    assert torch.equal(torch.tensor(shots["label"]).bincount(), torch.full((36,), measure.SHOTS))
    vectors = measure.class_vectors(model, processor, names)
    tuned = measure.tune_class_vectors(
        model, vectors, measure.pixel_values(processor, shots), torch.tensor(shots["label"])
    )
    assert measure.accuracy(model, tuned, pixels, labels) > zero_shot("weak", "print") + 10


def test_measure_reports_a_row_per_way(tmp_path):
    folders = [sandbox.model_path("weak")]
    table = measure.table(lambda folder, domain: {"zero-shot": [50.0], "tuned": [60.0, 62.0]}, folders, ["print"])
    assert table.splitlines()[2:] == ["| weak | zero-shot | 50.0 |", "| weak | tuned | 61.0 ± 1.4 |"]
