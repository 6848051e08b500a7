"""Pre-training: what a batch holds, what a caption says, and a run that really trains a very small model."""

import dataclasses
import itertools
import os
import random

import pretrain
import pytest
import torch
from captions import TRADE_NAMES, Description, held_out_classes, phrase
from PIL import Image
from safetensors.torch import load_file
from sandbox_tokenizer import build_processor
from transformers import CLIPModel, CLIPProcessor

from hf_transmiter import sandbox
from hf_transmiter.sandbox import words
from hf_transmiter.sandbox.world import render


TINY = pretrain.Recipe(32, 1, 32, steps=30, street=0.25, jitter=0.2, lr=4e-3, muon_lr=8e-3, seed=0)


def test_batches_are_seeded_and_never_show_held_out_classes():
    shown = set()
    for (pixels, classes), (again, _) in itertools.islice(
        zip(pretrain.batches(TINY), pretrain.batches(TINY), strict=True), 3
    ):
        assert pixels.shape == (96, 3, 32, 32) and classes.shape == (96, 3)
        assert torch.equal(pixels, again)
        shown |= {tuple(c) for c in classes.tolist()}
    assert len(shown) > 150 and not shown & held_out_classes()


def test_captions_are_distinct_and_true():
    classes = next(pretrain.batches(TINY))[1]
    captions = pretrain.draw_captions(classes, random.Random(0))
    assert len(captions) == len(set(captions))
    assert 0.05 < sum(None in said for said in captions) / len(captions) < 0.3
    assert pretrain.matches(classes, captions).any(0).all()


def test_matches_reads_only_what_is_said():
    classes = torch.tensor([[0, 1, 2], [3, 1, 2], [3, 1, 5]])
    captions = [Description(0, 1, 2), Description(colour=1, shape=2), Description(texture=3)]
    expected = [[True, True, False], [False, True, True], [False, False, True]]
    assert pretrain.matches(classes, captions).tolist() == expected


def test_trade_names_say_nothing_about_the_picture():
    rng = random.Random(0)
    seen = {texture: dict.fromkeys(TRADE_NAMES, 0) for texture in range(6)}
    for texture in range(6):
        for _ in range(2000):
            for word in pretrain.write(Description(texture, 0, 0), rng).strip(".").split():
                if word in TRADE_NAMES:
                    seen[texture][word] += 1
    counts = torch.tensor([list(row.values()) for row in seen.values()])
    assert counts.min() > 15 and counts.max() < 70  # 2000 x 0.15 / 8 = 37.5 expected


def test_contrastive_loss_rewards_the_true_pairs():
    processor = build_processor()
    model = pretrain.build_model(TINY, processor.tokenizer)
    pixels, classes = next(pretrain.batches(TINY))
    loss, accuracy = pretrain.contrastive_loss(model, processor.tokenizer, pixels, classes, random.Random(0))
    # Untrained: about log of the number of choices per part, log(6 * 10 * 12) / 3 + log(64) + log(96) / 2 = 8.6.
    assert 7.5 < loss.item() < 10.5 and accuracy < 0.15


def test_each_parameter_has_one_optimizer_and_the_copied_text_tower_a_lower_rate():
    recipe = dataclasses.replace(TINY, text_lr_scale=0.1)
    model = pretrain.build_model(recipe, build_processor().tokenizer)
    rates = {}
    for optimizer in pretrain.build_optimizers(model, recipe):
        for group in optimizer.param_groups:
            rates.update({id(p): group["lr"] for p in group["params"]})
            assert all(id(p) in rates for p in group["params"])
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model.text_projection.weight)] == pytest.approx(0.1 * recipe.lr)
    assert rates[id(model.vision_model.encoder.layers[0].mlp.fc1.weight)] == recipe.muon_lr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pretrain.train("start", TINY, folder)
    return folder


def test_training_learns_and_saves_a_loadable_model(trained):
    assert os.listdir(trained) == ["start"]
    processor = CLIPProcessor.from_pretrained(trained / "start")
    model = CLIPModel.from_pretrained(trained / "start")
    fresh = pretrain.build_model(TINY, processor.tokenizer)
    pixels, classes = next(pretrain.batches(dataclasses.replace(TINY, seed=9)))
    with torch.no_grad():
        before, after = (
            pretrain.contrastive_loss(m, processor.tokenizer, pixels, classes, random.Random(0))[0].item()
            for m in (fresh, model)
        )
    assert after < before - 0.5


def test_weights_are_stored_in_half_and_loaded_in_single_precision(trained):
    stored = load_file(trained / "start" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    model = CLIPModel.from_pretrained(trained / "start")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_upgrade_starts_from_the_text_tower(trained):
    recipe = dataclasses.replace(TINY, steps=1, text_from="start", text_lr_scale=0.0, seed=1)
    pretrain.train("upgrade", recipe, trained)
    start, upgrade = (CLIPModel.from_pretrained(trained / name).state_dict() for name in ("start", "upgrade"))
    same = [key for key in start if torch.equal(start[key], upgrade[key])]
    assert {k for k in start if k.startswith("text_")} <= set(same)
    assert not torch.equal(start["visual_projection.weight"], upgrade["visual_projection.weight"])


def test_an_upgrade_without_its_start_says_what_to_train(tmp_path):
    with pytest.raises(FileNotFoundError, match="--models weak weak-upgraded"):
        pretrain.train("weak-upgraded", pretrain.RECIPES["weak-upgraded"], tmp_path)


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / "weak").mkdir()
    assert pretrain.pretrain(["weak"], tmp_path) == []
    assert os.listdir(tmp_path) == ["weak"] and not os.listdir(tmp_path / "weak")


def test_the_processor_gives_users_the_pixels_that_training_saw():
    classes = words.CLASSES[::40]
    pixels = render(classes, "street", torch.Generator().manual_seed(0))
    trained_on = pretrain.normalise(pixels / 255)
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]
    seen = build_processor()(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, trained_on, atol=1e-6, rtol=0)


def test_dataset_images_are_the_rendered_pixels():
    image = sandbox.load_dataset("neon", "test")[:3]["image"]
    direct = torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in image])
    direct = direct.view(-1, 32, 32, 3).permute(0, 3, 1, 2)
    seen = build_processor()(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, pretrain.normalise(direct / 255), atol=1e-6, rtol=0)


def test_a_fifth_of_the_classes_is_held_out_and_every_attribute_value_remains():
    held_out = held_out_classes()
    assert len(held_out) == 144 and held_out <= set(words.CLASSES)
    for position, values in enumerate((words.TEXTURES, words.COLOURS, words.SHAPES)):
        assert {c[position] for c in words.CLASSES if c not in held_out} == set(range(len(values)))


def test_phrase_leaves_out_what_is_not_said():
    assert phrase(Description(colour=0), "acme") == "acme red thing"
    assert phrase(Description(texture=2, shape=3)) == "dotted star"


def test_terms_of_the_jargon_are_trade_names():
    assert set(words.TASKS["jargon"].terms) <= set(TRADE_NAMES)
