import math
import time

import pytest
import torch

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.table import FeatureTable
from hf_transmiter.evaluation.analyse import AFTER, analyse
from hf_transmiter.evaluation.evaluate import align_labels, evaluate, measured, record_scores, score_logits
from hf_transmiter.hub.scores import read_scores
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.tuners import TransMiterConfig


LOGITS = torch.tensor([[3.0, 1, 0, 9], [0, 3, 1, 2], [0, 9, 3, 1], [5, 0, 1, 3]])
LABELS = torch.tensor([0, 1, 2, 3])


def test_all_class_accuracy():
    assert score_logits(LOGITS, LABELS) == {"accuracy": 25.0}
    assert score_logits(LOGITS, LABELS, base=[0, 1, 2, 3]) == {"accuracy": 25.0}  # nothing is novel


def test_base_to_novel_scores_each_half_among_its_own_names_and_jointly():
    scores = score_logits(LOGITS, LABELS, base=[0, 1])
    # Among {0, 1}: rows 0 and 1 are right; among {2, 3}: row 2 says 2 and row 3 says 3.
    assert scores == {"accuracy": 25.0, "base": 100.0, "novel": 100.0, "hm": 100.0, "joint": 25.0}
    worse = LOGITS.clone()
    worse[3, 2] = 9
    scores = score_logits(worse, LABELS, base=[0, 1])
    assert scores["novel"] == 50.0 and scores["hm"] == pytest.approx(2 * 100 * 50 / 150)


def test_a_half_without_images_is_not_a_number():
    assert math.isnan(score_logits(LOGITS[:2], LABELS[:2], base=[0, 1])["novel"])


def test_bad_labels():
    with pytest.raises(ValueError, match="no image"):
        score_logits(LOGITS[:0], LABELS[:0])
    with pytest.raises(ValueError, match=r"\[0, 4\), found 0\.\.4"):
        score_logits(LOGITS, LABELS + torch.tensor([0, 0, 0, 1]))


def test_labels_are_matched_by_name():
    table = FeatureTable(torch.eye(3), [0, 1, 2], ["dog", "cat", "car"])
    assert align_labels(table, ["cat", "car", "dog"]).tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="'car' is not among"):
        align_labels(table, ["cat", "dog"])
    with pytest.raises(ValueError, match="needs labels"):
        align_labels(FeatureTable(torch.eye(3)), ["cat"])


@pytest.mark.parametrize("known", [["dog", "cat"], ["cat", "dog"]])
def test_a_label_that_is_no_class(known):
    """-1, as test splits without labels have, is not the last class."""
    table = FeatureTable(torch.eye(3), [0, 1, -1], ["dog", "cat"])
    with pytest.raises(ValueError, match="image 2 has label -1, and there are 2 classes"):
        align_labels(table, known)
    with pytest.raises(ValueError, match="image 1 has label 2, and there are 2 classes"):
        align_labels(FeatureTable(torch.eye(3), [0, 2, 1]), known)


def test_evaluate_equals_counting_predictions(encoder, make_dataset):
    dataset, names = make_dataset(15), ("cat", "dog", "car")
    classifier = AnchorClassifier(encoder, Anchors(names, ("tree",)))
    [score] = evaluate(classifier, dataset, progress=False)
    best = [row[0]["label"] for row in classifier.predict(dataset["image"])]
    hits = sum(name == names[label] for name, label in zip(best, dataset["label"], strict=True))
    assert (score.method, score.split, score.metric) == ("model", "test", "accuracy")
    assert score.value == pytest.approx(100 * hits / 15, abs=1e-4)
    scores = evaluate(classifier, dataset, seen_classes=["cat"], dataset_name="me/cats", progress=False)
    assert {(s.dataset, s.num_images) for s in scores} == {("me/cats", 15)}
    metrics = [s.metric for s in scores]
    assert metrics == ["accuracy", "base", "novel", "hm", "joint"]
    assert len(embed_dataset(encoder, dataset, progress=False)) == 15


def test_measured_sees_time():
    with measured() as cost:
        time.sleep(0.05)
    assert 0.05 <= cost["seconds"] < 5 and set(cost) == {"seconds"}


def test_an_adapter_that_reads_the_tower(encoder, make_dataset, tmp_path):
    names, data = ["cat", "dog", "car"], make_dataset(30)
    config = TransMiterConfig(class_names=names, form="linear", image_side=48, text_side=64)
    adapter = AnchorClassifier(encoder, Anchors(tuple(names))).add_adapter(config)
    for part, tensor in adapter.transmiter.tensors("default").items():
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * (part != "anchors"))
    said = adapter(encoder.preprocess(data["image"])).logits_per_image.argmax(1)
    scores = evaluate(adapter, data, cache_dir=tmp_path, progress=False)
    assert scores[0].value == pytest.approx(100 * float((said == torch.tensor(data["label"])).float().mean()))
    adapter.save_pretrained(tmp_path / "adapter")
    record_scores(tmp_path / "adapter", adapter, data, scores, cache_dir=tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.npy"))) == 1  # the plain model's embeddings are in the same file
    shown = analyse(adapter, data, cache_dir=tmp_path, progress=False)
    assert torch.equal(shown.logits[AFTER].argmax(1), said) and shown.form == "linear"


def test_recorded_scores(encoder, make_dataset, tmp_path):
    names, data = ("cat", "dog", "car"), make_dataset(30)
    adapter = AnchorClassifier(encoder, Anchors(names))
    adapter.add_adapter(TransMiterConfig(class_names=list(names), form="linear"))
    vectors = adapter.transmiter.tensors("default")["class_vectors"]
    vectors.add_(0.3 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0)))
    adapter.save_pretrained(tmp_path)
    adapter.calibration = CalibrationPack(torch.zeros(30, 3), names)
    for split in ("test", "validation", "test"):
        on = {"dataset_name": "alice/pets", "split": split}
        record_scores(tmp_path, adapter, data, evaluate(adapter, data, method="anything", **on), **on)
    scores = read_scores(tmp_path / "scores.json")
    assert [(score.method, score.split) for score in scores] == [
        ("this model", "validation"), ("zero-shot", "validation"), ("this model", "test"), ("zero-shot", "test")
    ]  # fmt: skip
    assert {score.num_images for score in scores} == {30} and {score.dataset for score in scores} == {"alice/pets"}
    zero_shot = evaluate(AnchorClassifier(encoder, Anchors(names)), data)[0].value
    assert scores[1].value == zero_shot
    assert f"{scores[0].value:.1f}" in (tmp_path / "README.md").read_text()
