"""Datasets: schema, labels, fingerprints."""

import subprocess
import sys

import pytest
import torch
from datasets import ClassLabel, Image
from transformers import CLIPProcessor

from hf_transmiter import sandbox
from hf_transmiter.sandbox import words


@pytest.fixture(scope="module")
def test_split():
    return sandbox.load_dataset("neon", "test")


def test_every_domain_is_described_in_one_line():
    assert list(sandbox.domains()) == ["print", "night", "neon", "jargon", "studio", "street"]
    assert all(line and "\n" not in line for line in sandbox.domains().values())


def test_schema(test_split):
    assert test_split.column_names == ["image", "label"] and str(test_split.split) == "test"
    assert isinstance(test_split.features["image"], Image) and isinstance(test_split.features["label"], ClassLabel)
    assert test_split.features["label"].names == words.TASKS["neon"].names()
    image = test_split[0]["image"]
    assert image.size == (32, 32) and image.mode == "RGB"


@pytest.mark.parametrize("split, rows", [("unlabelled", 1500), ("validation", 500), ("test", 1500)])
def test_sizes_of_drawn_splits(split, rows):
    dataset = sandbox.load_dataset("print", split)
    assert len(dataset) == rows
    assert set(dataset["label"]) == set(range(36))


@pytest.mark.parametrize("domain, per_class, classes", [("jargon", 64, 36), ("street", 4, 720)])
def test_the_labelled_pool_is_balanced_and_shuffled(domain, per_class, classes):
    labels = torch.tensor(sandbox.load_dataset(domain, "train")["label"])
    assert torch.equal(labels.bincount(), torch.full((classes,), per_class))
    assert not torch.equal(labels, labels.sort().values)


def test_same_arguments_same_pictures_and_fingerprint(test_split):
    again = sandbox.load_dataset("neon", "test")
    assert again._fingerprint == test_split._fingerprint
    assert again.data.table.equals(test_split.data.table)


def test_fingerprint_is_the_same_in_another_process(test_split):
    code = "from hf_transmiter import sandbox; print(sandbox.load_dataset('neon', 'test')._fingerprint)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == test_split._fingerprint


def test_other_arguments_other_pictures_and_fingerprint(test_split):
    others = [
        sandbox.load_dataset("neon", "validation"),
        sandbox.load_dataset("neon", "test", seed=1),
        sandbox.load_dataset("night", "test"),
    ]
    assert len({d._fingerprint for d in [test_split, *others]}) == 4
    first = test_split[0]["image"].tobytes()
    assert all(d[0]["image"].tobytes() != first for d in others)


def test_labels_name_what_is_drawn():
    """In neon every hue is turned by the same angle, so the colours of the names stay apart in the pictures."""
    dataset = sandbox.load_dataset("studio", "validation")
    names = [dataset.features["label"].names[label].split() for label in dataset["label"]]
    pixels = torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in dataset["image"]])
    centre = pixels.view(-1, 32, 32, 3)[:, 13:19, 13:19].float().mean((1, 2))
    solid = [i for i, (t, _, s) in enumerate(names) if t == "plain" and s in ("disc", "square", "heart", "hexagon")]
    for low, high in (("blue", "yellow"), ("green", "pink")):
        means = [centre[[i for i in solid if names[i][1] == colour]].mean(0) for colour in (low, high)]
        assert means[0][0] + 40 < means[1][0]  # the red channel


def test_unknown_names_list_what_exists():
    with pytest.raises(ValueError, match="'sketch'.*print, night, neon, jargon, studio, street"):
        sandbox.load_dataset("sketch")
    with pytest.raises(ValueError, match="'dev'.*train, unlabelled, validation, test"):
        sandbox.load_dataset("print", "dev")
    with pytest.raises(ValueError, match="'huge'.*weak, strong, weak-upgraded"):
        sandbox.model_path("huge")


def test_classes_in_the_style_of_another_domain():
    own, night = (sandbox.load_dataset("jargon", "validation", style=style) for style in (None, "night"))
    assert own.features == night.features and own._fingerprint != night._fingerprint
    processor = CLIPProcessor.from_pretrained(sandbox.model_path("weak"))
    shown = [processor(images=part[:64]["image"], return_tensors="pt") for part in (own, night)]
    bright = [each["pixel_values"].mean() for each in shown]
    assert bright[1] < bright[0]
    with pytest.raises(ValueError, match="no sandbox style 'jargon'; there are studio, street"):
        sandbox.load_dataset("jargon", "validation", style="jargon")
