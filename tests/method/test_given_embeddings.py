"""Embeddings in place of pictures, from extraction to the score: the same adapters, and no picture is looked at."""

import json

import pytest
import torch
from commands import error, run
from datasets import Dataset, concatenate_datasets

from hf_transmiter import (
    AnchorClassifier,
    Bridge,
    DualEncoder,
    compare,
    embed_dataset,
    evaluate,
    extract,
    load_images,
    transfer,
)
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.method.teacher import teacher_logits
from hf_transmiter.settings import ExtractionConfig


QUIET = {"progress": False}


@pytest.fixture(scope="module")
def models():
    return DualEncoder.from_pretrained("sandbox:weak"), DualEncoder.from_pretrained("sandbox:strong")


@pytest.fixture(scope="module")
def pictures():
    return load_images("sandbox:print", "unlabelled", max_images=300)


@pytest.fixture(scope="module")
def said(models, pictures):
    """What a tuned weak model says: class vectors that were moved, so that it is better than by chance."""
    weak, names = models[0], load_images("sandbox:print", "test").features["label"].names
    moved = weak.embed_names(names) + 0.05 * torch.randn(len(names), 64, generator=torch.Generator().manual_seed(0))
    teacher = AnchorClassifier(weak, Anchors(names), moved)
    return tuple(names), teacher_logits(teacher, pictures, names, **QUIET)


@pytest.fixture(scope="module")
def embedded(models, pictures):
    """The embeddings of both models, one column each, of the tower too where that is asked for."""

    def make(images: Dataset, tower: bool = True) -> Dataset:
        weak, strong = models
        tables = [embed_dataset(weak, images, **QUIET), embed_dataset(strong, images, tower=tower, **QUIET)]
        first, second = (table.to_dataset() for table in tables)
        return concatenate_datasets([first, second.select_columns("sandbox:strong")], axis=1)

    return make


def tensors(adapter: AnchorClassifier) -> dict:
    return adapter.adapter_tensors()[1]


def close(left: AnchorClassifier, right: AnchorClassifier, atol: float = 1e-5) -> None:
    assert tensors(left).keys() == tensors(right).keys()
    for name, tensor in tensors(left).items():
        torch.testing.assert_close(tensors(right)[name], tensor, atol=atol, rtol=0)


@pytest.mark.parametrize("solver", ["image_map", "ridge", "discriminant"])
def test_adapters_are_those_of_the_pictures(models, pictures, said, embedded, solver, monkeypatch):
    (weak, strong), (names, logits), data = models, said, embedded(pictures)
    how = {"class_names": names, "config": ExtractionConfig(solver=solver), **QUIET}
    adapter = extract(weak, logits, pictures, **how)
    upgraded = transfer(adapter, strong, pictures, **QUIET)
    monkeypatch.setattr("hf_transmiter.data.embeddings.pixel_batches", None)  # nobody looks at a picture
    again = extract(weak, logits, data, **how)
    close(adapter, again)
    carried = transfer(again, strong, data, **QUIET)
    close(upgraded, carried, 1e-4)
    bridge = Bridge.build(weak, strong, data, **QUIET)
    torch.testing.assert_close(bridge.matrix, Bridge.build(weak, strong, pictures, **QUIET).matrix, atol=1e-5, rtol=0)
    # A table of the one model that is asked does the same.
    table = embed_dataset(weak, data, **QUIET)
    close(again, extract(weak, logits, table, **how))
    wide = embed_dataset(strong, data, tower=True, **QUIET)
    close(transfer(again, strong, data, bridge=bridge, **QUIET), transfer(again, strong, wide, bridge=bridge, **QUIET))


def test_without_the_tower_the_image_side_reads_embeddings_alone(models, pictures, said, embedded):
    (weak, strong), (names, logits) = models, said
    few, test = embedded(pictures, tower=False), load_images("sandbox:print", "test", max_images=100)
    adapter = extract(weak, logits, few, class_names=names, config=ExtractionConfig(solver="image_map"), **QUIET)
    upgraded = transfer(adapter, strong, few, **QUIET)
    assert upgraded.adapter_config.reads == strong.embed_dim
    scores = [evaluate(upgraded, data, **QUIET)[0].value for data in (test, embedded(test, tower=False))]
    assert scores[0] == pytest.approx(scores[1])
    # The other way round it is said what is missing.
    reads = transfer(adapter, strong, pictures, **QUIET)
    with pytest.raises(ValueError, match="rows of 416 columns.*these have 96: embed the images with tower=True"):
        evaluate(reads, embedded(test, tower=False), **QUIET)
    assert evaluate(reads, embedded(test), **QUIET)[0].value == pytest.approx(evaluate(reads, test, **QUIET)[0].value)


def test_a_tuned_model_of_the_same_name_is_not_taken_for_the_weak_one(models, pictures, said, embedded):
    (weak, _), (names, _) = models, said
    tuned = DualEncoder.from_pretrained("sandbox:weak")
    with torch.no_grad():
        tuned.model.visual_projection.weight.add_(0.1)
    for tuned.name_or_path in ("./sandbox:weak", "sandbox:weak"):
        with pytest.raises(ValueError, match="neither pictures nor embeddings of .*sandbox:weak.* the logits will do"):
            extract(weak, tuned, embedded(pictures), class_names=names, **QUIET)
    with_pictures = concatenate_datasets([pictures, embedded(pictures).select_columns("sandbox:weak")], axis=1)
    close(
        extract(weak, tuned, with_pictures, class_names=names, **QUIET),
        extract(weak, tuned, pictures, class_names=names, **QUIET),
    )


def test_a_comparison_of_embeddings(models, pictures, embedded):
    (weak, strong), names = models, pictures.features["label"].names if "label" in pictures.features else None
    test = load_images("sandbox:print", "test", max_images=200)
    names = test.features["label"].names
    moved = weak.embed_names(names) + 0.05 * torch.randn(len(names), 64, generator=torch.Generator().manual_seed(0))
    teacher, rows = AnchorClassifier(weak, Anchors(names), moved), ["refit", "bridge from text", "EFT"]
    expected = compare(weak, strong, teacher, test, unlabelled=pictures, variants=rows, **QUIET)
    found = compare(weak, strong, teacher, embedded(test), unlabelled=embedded(pictures), variants=rows, **QUIET)
    assert found.rows.keys() == expected.rows.keys() == set(rows) and found.recommended == expected.recommended
    for row in rows:
        assert found.value(row) == pytest.approx(expected.value(row), abs=0.5)
    with pytest.raises(
        ValueError, match="test must be one split of a dataset, not a FeatureTable: .* a column for each"
    ):
        compare(weak, strong, teacher, embed_dataset(weak, test, **QUIET), **QUIET)


def test_on_the_command_line(models, pictures, said, embedded, tmp_path):
    names, logits = said
    test = load_images("sandbox:print", "test", max_images=100)
    for name, images in (("pictures", pictures), ("test", test)):
        table = embedded(images, tower=False).rename_columns({"sandbox:weak": "b32", "sandbox:strong": "l14"})
        table.to_parquet(tmp_path / f"{name}.parquet")
    CalibrationPack(logits, names).save(tmp_path / "said.safetensors")
    data = ("--dataset", tmp_path / "pictures.parquet", "--embedding-columns", "sandbox:weak=b32")
    both = (*data, "--embedding-columns", "sandbox:strong=l14")
    models = ("--weak", "sandbox:weak", "--teacher", tmp_path / "said.safetensors")
    run("extract", *models, *data, "--solver", "image_map", "--output-dir", tmp_path / "b32", "--quiet")
    run("transfer", tmp_path / "b32", "--strong", "sandbox:strong", *both, "--output-dir", tmp_path / "l14", "--quiet")
    asked = ("--dataset", tmp_path / "test.parquet", "--embedding-columns", "sandbox:strong=l14", "--json", "--quiet")
    found = json.loads(run("evaluate", tmp_path / "l14", *asked).stdout)
    expected = evaluate(AnchorClassifier.from_pretrained(tmp_path / "l14"), test, **QUIET)[0].value
    assert found["scores"][0]["value"] == pytest.approx(expected) and found["num_images"] == 100
    said = error("evaluate", tmp_path / "l14", "--dataset", tmp_path / "test.parquet")
    assert "among the columns b32, label, l14" in said and "--embedding-columns" in said
    for given in ("l14", "=l14", "sandbox:strong="):
        said = error("evaluate", tmp_path / "l14", *asked[:2], "--embedding-columns", given)
        assert f"--embedding-columns takes MODEL=COLUMN, got {given!r}" in said
