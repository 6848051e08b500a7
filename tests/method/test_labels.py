"""Labels are not looked at where they are not needed, and told in one sentence where they are; any format will do."""

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.images import load_images
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.compare import compare
from hf_transmiter.evaluation.evaluate import evaluate
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.extract import extract
from hf_transmiter.method.transfer import transfer
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import TuningConfig


NAMES = ("cat", "dog")
COUNT = 12
QUICK = TuningConfig(shots=2, epochs=1, batch_size=6)
# What stands in a label column, and what is said of it where labels are needed.
ODD = {
    "words": ({"label": (["a", "b"] * 6, Value("string"))}, "holds 'a', not class indices"),
    "floats": ({"label": ([0.5] * COUNT, Value("float32"))}, "holds 0.5, not class indices"),
    "none": ({"label": ([None] * COUNT, Value("int64"))}, "holds None, not class indices"),
    "some": ({"label": ([0, None] * 6, ClassLabel(names=["cat", "dog"]))}, "holds None, not class indices"),
    "lists": ({"label": ([[1]] * COUNT, List(Value("int64")))}, r"holds \[1\], not class indices"),
    "booleans": ({"label": ([True, False] * 6, Value("bool"))}, "holds True, not class indices"),
    "two": ({"label": ([0] * COUNT, Value("int64")), "cls": ([0] * COUNT, Value("int64"))}, "could be label or cls"),
    "dicts": ({"label": ([{"id": 1}] * COUNT, {"id": Value("int64")})}, "not class indices"),
    "negative": ({"label": ([-1] * COUNT, ClassLabel(names=["cat", "dog"]))}, "label -1|Labels must be 0 or more"),
}


@pytest.fixture(scope="module")
def models(model_dir):
    return DualEncoder.from_pretrained(model_dir("clip")), DualEncoder.from_pretrained(model_dir("siglip", 1))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return {"progress": False, "cache_dir": tmp_path_factory.mktemp("features")}


@pytest.fixture(scope="module")
def pictures(make_images):
    return make_images(COUNT)


def with_columns(pictures, columns: dict) -> Dataset:
    types = Features({"image": Image(), **{name: kind for name, (_, kind) in columns.items()}})
    return Dataset.from_dict({"image": pictures, **{name: values for name, (values, _) in columns.items()}}, types)


@pytest.fixture(scope="module")
def plain(models, pictures, options):
    """What comes out without any labels."""
    return unlabelled_steps(models, with_columns(pictures, {}), options)


def unlabelled_steps(models, images, options) -> list[torch.Tensor]:
    weak, strong = models
    said = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(0))
    adapter = extract(weak, said, images, class_names=NAMES, **options)
    upgraded = transfer(adapter, strong, images, **options)
    bridge = Bridge.build(weak, strong, images, **options)
    tuned = tune(strong, images, "coop", teacher=said, class_names=NAMES, config=TuningConfig(epochs=1), **options)
    tensors = [*adapter.transmiter.tensors("default").values(), *upgraded.transmiter.tensors("default").values()]
    return [*tensors, bridge.matrix, tuned.text_embeds]


@pytest.mark.parametrize("odd", ODD)
def test_labels_are_not_looked_at(models, pictures, options, plain, odd):
    found = unlabelled_steps(models, with_columns(pictures, ODD[odd][0]), options)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("odd", ODD)
def test_labels_that_are_needed_are_told_in_one_sentence(models, pictures, options, odd):
    weak, images, said = models[0], with_columns(pictures, ODD[odd][0]), ODD[odd][1]
    classifier = AnchorClassifier(weak, Anchors(NAMES))
    for call in (
        lambda: tune(weak, images, "coop", class_names=NAMES, config=QUICK, **options),
        lambda: evaluate(classifier, images, **options),
        lambda: compare(weak, models[1], models[1], images, class_names=NAMES, variants=["tuned weak"], **options),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize("odd", ["words", "two"])
def test_unlabelled_images_of_a_comparison(models, pictures, make_dataset, options, odd):
    weak, strong = models
    images = with_columns(pictures, ODD[odd][0])
    found = compare(weak, strong, strong, make_dataset(6, NAMES), unlabelled=images, variants=["refit"], **options)
    assert "label" not in str(found.skipped)


def test_images_without_labels_are_the_unlabelled_ones_too(models, make_images, options):
    """One flat folder is enough for a row that is an upgrade."""
    weak, strong = models
    flat = Dataset.from_dict({"image": make_images(110)}, features=Features(image=Image()))
    found = compare(weak, strong, strong, flat, class_names=NAMES, variants=["zero-shot strong", "refit"], **options)
    assert list(found.rows) == ["zero-shot strong", "refit"] and not found.skipped


def test_loading_does_not_ask_for_labels(pictures, tmp_path):
    for odd, (columns, _) in ODD.items():
        with_columns(pictures, columns).save_to_disk(tmp_path / odd)
        assert len(load_images(str(tmp_path / odd))) == COUNT
    with pytest.raises(ValueError, match="no column 'wrong'"):
        load_images(str(tmp_path / "two"), label_column="wrong")


# Formats, selections, and what is no split


def formatted(dataset: Dataset) -> dict[str, Dataset]:
    half = len(dataset) // 2
    return {
        "torch": dataset.with_format("torch"),
        "numpy": dataset.with_format("numpy"),
        "pandas": dataset.with_format("pandas"),
        "arrow": dataset.with_format("arrow"),
        "columns": dataset.with_format("torch", columns=["label"]),
        "transform": dataset.with_transform(lambda rows: {"pixels": [0 for _ in rows["image"]]}),
        "joined": datasets.concatenate_datasets([dataset.select(range(half)), dataset.select(range(half, 2 * half))]),
        "turned twice": dataset.select(range(len(dataset))[::-1]).select(range(len(dataset))[::-1]),
        "encoded": dataset.cast_column("image", Image(decode=False)),
    }


def test_formats_do_not_matter(models, make_dataset, options):
    weak, strong = models
    dataset = make_dataset(COUNT, NAMES)
    said = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(0))

    def steps(images):
        adapter = extract(weak, said, images, **options)
        upgraded = transfer(adapter, strong, images, **options)
        found = compare(weak, strong, strong, images, variants=["zero-shot strong"], **options)
        tuned = [tune(weak, images, method, config=QUICK, **options) for method in ("lora", "coop")]
        pixels = weak.preprocess(dataset["image"][:3])
        made = [embed_dataset(weak, images, **options).embeds, found.rows["zero-shot strong"].logits]
        for one in (adapter, upgraded):
            made += one.transmiter.tensors("default").values()
        return [*made, *(one(pixels).logits_per_image for one in tuned)]

    expected = steps(dataset)
    for kind, images in formatted(dataset).items():
        for one, other in zip(steps(images), expected, strict=True):
            assert torch.allclose(one, other, atol=1e-5), kind


def test_what_is_no_split_is_told(models, make_dataset, options):
    weak, strong = models
    data = make_dataset(COUNT, NAMES)
    adapter = extract(weak, torch.randn(COUNT, 2), data, **options)

    def refused(wrong, said):
        for call in (
            lambda: embed_dataset(weak, wrong, **options),
            lambda: tune(weak, wrong, "coop", class_names=NAMES, **options),
            lambda: tune(strong, wrong, teacher=strong, weak=weak, class_names=NAMES, **options),
            lambda: extract(weak, strong, wrong, **options),
            lambda: extract(weak, strong, wrong, class_names=NAMES, **options),
            lambda: transfer(adapter, strong, wrong, **options),
            lambda: Bridge.build(weak, strong, wrong, **options),
            lambda: evaluate(adapter, wrong, **options),
            lambda: compare(weak, strong, strong, wrong, **options),
            lambda: compare(weak, strong, strong, data, unlabelled=wrong, **options),
            lambda: compare(weak, strong, strong, data, labelled=wrong, **options),
        ):
            with pytest.raises(ValueError, match=f"[a-z]+ must be one split of a .*, not a .*: {said}"):
                call()

    refused(datasets.DatasetDict(train=data), r"pass one of its splits, such as [a-z]+\['train'\]")
    refused(data.to_iterable_dataset(), r"load it without streaming, or take some of it, Dataset.from_list")
    refused("my_photos", "load_images reads folders, files and Hub ids")
    refused(list(data), "load_images reads folders")
