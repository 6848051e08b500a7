"""A few labelled steps on an adapter: what they change, what they leave, and what they refuse."""

import pytest
import torch

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.table import FeatureTable
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.label_tune import label_tune
from hf_transmiter.settings import LabelTuningConfig
from hf_transmiter.tuners import TransMiterConfig


NAMES = ("cat", "dog", "car")
QUICK = LabelTuningConfig(epochs=8, batch_size=8, lr=0.01)


@pytest.fixture(scope="module")
def encoder(model_dir):
    return DualEncoder.from_pretrained(model_dir("clip"))


@pytest.fixture(scope="module")
def dataset(make_dataset):
    return make_dataset(30)


@pytest.fixture(scope="module")
def table(encoder, dataset, tmp_path_factory):
    return embed_dataset(encoder, dataset, cache_dir=tmp_path_factory.mktemp("features"))


def adapter(encoder, form="mlp"):
    config = TransMiterConfig(
        class_names=list(NAMES), auxiliary_names=["tree", "ship"] if form == "mlp" else [], form=form
    )
    config.provenance = {"step": "transfer"}
    return AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(config)


def tensors(classifier):
    return {key: tensor.clone() for key, tensor in classifier.transmiter.tensors("default").items()}


def loss(classifier, table):
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(classifier.classify(table.embeds), table.labels))


@pytest.mark.parametrize("form", ["mlp", "linear"])
def test_it_learns(encoder, dataset, table, form, tmp_path):
    start, fingerprint = adapter(encoder, form), encoder.fingerprint
    before = tensors(start)
    tuned = label_tune(start, dataset, config=QUICK, cache_dir=tmp_path, progress=False)
    assert loss(tuned, table) < 0.9 * loss(start, table)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors(start).items())  # a copy was tuned
    changed = {key for key, tensor in tensors(tuned).items() if not torch.equal(tensor, before[key])}
    assert changed == set(before) - {"anchors", "basis"}
    assert tuned.encoder is encoder and encoder.fingerprint == fingerprint
    assert not any(p.requires_grad for p in tuned.parameters()) and tuned.class_names == NAMES
    facts = tuned.adapter_config.provenance
    assert facts.pop("versions") and facts == {"step": "label_tune", "num_images": 30, "before": {"step": "transfer"}}
    tuned.save_pretrained(tmp_path / "saved")
    back = AnchorClassifier.from_pretrained(tmp_path / "saved", encoder)
    assert torch.equal(back.classify(table.embeds), tuned.classify(table.embeds))
    assert back.adapter_config.provenance == facts


def test_beside_an_image_side_class_vectors_stay(encoder, dataset, tmp_path):
    sides = TransMiterConfig(class_names=list(NAMES), form="linear", image_side=48, text_side=16)
    start = AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(sides)
    tuned = label_tune(start, dataset, config=QUICK, cache_dir=tmp_path, progress=False)
    changed = {key for key, tensor in tensors(tuned).items() if not torch.equal(tensor, tensors(start)[key])}
    assert changed == {"image_map", "image_shift", "bias"}
    rows = embed_dataset(encoder, dataset, tower=True, cache_dir=tmp_path)
    assert loss(tuned, rows) < 0.9 * loss(start, rows)


def test_the_basis_moves_only_when_asked(encoder, table):
    before = tensors(adapter(encoder))
    tuned = label_tune(adapter(encoder), table, config=LabelTuningConfig(epochs=1, train_basis=True), progress=False)
    changed = {key for key, tensor in tensors(tuned).items() if not torch.equal(tensor, before[key])}
    assert "basis" in changed and "anchors" not in changed


def test_a_table_does_for_a_dataset(encoder, dataset, table, tmp_path):
    first = label_tune(adapter(encoder), dataset, config=QUICK, cache_dir=tmp_path, progress=False)
    second = label_tune(adapter(encoder), table, config=QUICK, progress=False)
    for key, tensor in tensors(first).items():
        torch.testing.assert_close(tensors(second)[key], tensor, atol=1e-4, rtol=1e-3)


def test_only_seen_classes_enter_the_loss(encoder, table):
    """A class outside has no column in the loss: nothing of its own changes, and its images are refused."""
    pets = table.select((table.labels < 2).nonzero()[:, 0])
    start = adapter(encoder, "linear")
    config = LabelTuningConfig(epochs=8, batch_size=8, lr=0.01, weight_decay=0.0)
    tuned = label_tune(start, pets, seen_classes=("dog", "cat"), config=config, progress=False)
    vectors, before = tensors(tuned)["class_vectors"], tensors(start)["class_vectors"]
    assert torch.equal(vectors[2], before[2]) and (vectors[:2] - before[:2]).abs().max() > 0.01
    columns = tuned.classify(pets.embeds)[:, :2].argmax(1)
    assert (columns == pets.labels).float().mean() > (
        start.classify(pets.embeds)[:, :2].argmax(1) == pets.labels
    ).float().mean()
    every = label_tune(start, pets, config=config, progress=False)
    assert not torch.equal(tensors(every)["class_vectors"][2], before[2])
    with pytest.raises(ValueError, match="image 2 has label 2, which is not one of the 2 classes tuned here: select"):
        label_tune(start, table, seen_classes=("dog", "cat"), progress=False)


def test_interrupted_and_resumed(encoder, table, tmp_path, monkeypatch):
    expected = tensors(label_tune(adapter(encoder), table, config=QUICK, progress=False))
    classify, calls = AnchorClassifier.classify, []

    def stopping(self, rows):
        calls.append(0)
        if len(calls) > 18:  # four batches an epoch
            raise KeyboardInterrupt
        return classify(self, rows)

    monkeypatch.setattr(AnchorClassifier, "classify", stopping)
    with pytest.raises(KeyboardInterrupt):
        label_tune(adapter(encoder), table, config=QUICK, checkpoint=tmp_path / "run", progress=False)
    monkeypatch.undo()
    found = tensors(label_tune(adapter(encoder), table, config=QUICK, checkpoint=tmp_path / "run", progress=False))
    assert all(torch.equal(found[key], expected[key]) for key in expected) and not (tmp_path / "run").exists()


def test_refused(encoder, table):
    with pytest.raises(ValueError, match="no adapter to tune: attach one with add_adapter, or pass what transfer"):
        label_tune(AnchorClassifier(encoder, Anchors(NAMES)), table)
    for without in (FeatureTable(table.embeds), FeatureTable(torch.zeros(0, 16), [])):
        with pytest.raises(ValueError, match=r"needs labelled images: pass a dataset with a label column"):
            label_tune(adapter(encoder), without)
    for label in (3, -1):
        wrong = FeatureTable(table.embeds[:2], [0, label])
        with pytest.raises(ValueError, match=f"image 1 has label {label}, which is not one of the 3 classes"):
            label_tune(adapter(encoder), wrong)
    with pytest.raises(ValueError, match="seen_classes holds names the adapter does not know: .*'tree'"):
        label_tune(adapter(encoder), table, seen_classes=("cat", "tree"))


def test_classes_without_an_image_are_told(encoder, dataset, caplog):
    some = dataset.filter(lambda label: label < 2, input_columns="label")
    label_tune(adapter(encoder), dataset, config=QUICK)
    label_tune(adapter(encoder), some, seen_classes=NAMES[:2], config=QUICK)
    assert "unlearnt" not in caplog.text
    label_tune(adapter(encoder), some, config=QUICK)
    assert "1 of the 3 classes have no image here and will be unlearnt" in caplog.text
