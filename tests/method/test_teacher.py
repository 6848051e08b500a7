"""Teachers of every kind say the same about the same images."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.method.teacher import same_image_tower, teacher_class_vectors, teacher_logits
from hf_transmiter.tuners import CoOpConfig, TransMiterConfig


NAMES = ("cat", "dog", "car")


@pytest.fixture(scope="module")
def weak(model_dir):
    return DualEncoder.from_pretrained(model_dir("clip"))


@pytest.fixture
def dataset(make_dataset):
    return make_dataset(9)


def lora(weak, target="vision_model.*q_proj"):
    torch.manual_seed(3)
    config = LoraConfig(target_modules=target, init_lora_weights=False)
    return get_peft_model(copy.deepcopy(weak.model), config)


def coop(weak):
    model = get_peft_model(copy.deepcopy(weak.model), CoOpConfig(n_ctx=4, init_token_ids=[3, 5, 7, 9]))
    model.requires_grad_(False)
    return model


def head(weak, bias=0.0):
    """A classifier whose class vectors were tuned."""
    classifier = AnchorClassifier(weak, Anchors(NAMES)).add_adapter(
        TransMiterConfig(class_names=list(NAMES), form="linear")
    )
    tensors = classifier.transmiter.tensors("default")
    tensors["class_vectors"] += 0.2 * torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    tensors["bias"] += bias
    return classifier


def test_all_kinds_agree(weak, dataset, tmp_path):
    model = lora(weak)
    tuned = DualEncoder(model, weak.processor)
    table = embed_dataset(tuned, dataset, cache_dir=tmp_path / "cache")
    expected = tuned.logits(table.embeds, tuned.embed_names(NAMES))
    assert (expected - weak.logits(embed_dataset(weak, dataset).embeds, weak.embed_names(NAMES))).abs().max() > 0.01
    pack = CalibrationPack(expected, NAMES, dataset._fingerprint)
    pack.save(tmp_path / "pack.safetensors")
    classifier = AnchorClassifier(tuned, Anchors(NAMES, ("tree",)))
    teachers = {
        **{"peft": model, "inside": model.get_base_model(), "encoder": tuned, "classifier": classifier},
        **{"pack": pack, "logits": expected, "list": [expected + 1, pack, expected - 1]},
    }
    for kind, teacher in teachers.items():
        found = teacher_logits(teacher, dataset, NAMES, cache_dir=tmp_path / "cache")
        torch.testing.assert_close(
            found, expected, atol=1e-5, rtol=1e-5, msg=lambda text, kind=kind: f"{kind}: {text}"
        )
        backwards = teacher_logits(teacher, dataset, NAMES[::-1], cache_dir=tmp_path / "cache")
        if kind not in ("logits", "list"):  # those with names know their columns
            torch.testing.assert_close(backwards, expected.flip(1), atol=1e-5, rtol=1e-5)
    for path in (tmp_path / "pack.safetensors", str(tmp_path / "pack.safetensors")):
        torch.testing.assert_close(teacher_logits(path, dataset, NAMES), expected, atol=0.02, rtol=0)  # float16


def test_an_adapter_that_reads_the_tower(weak, dataset, tmp_path):
    config = TransMiterConfig(class_names=list(NAMES), form="linear", image_side=48)
    classifier = AnchorClassifier(weak, Anchors(NAMES)).add_adapter(config)
    matrix = classifier.transmiter.tensors("default")["image_map"]
    matrix += 0.2 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
    expected = classifier(weak.preprocess(dataset["image"])).logits_per_image
    narrow = embed_dataset(weak, dataset, cache_dir=tmp_path)
    for options in ({}, {"weak": weak, "table": narrow}):  # embeddings alone would not do
        found = teacher_logits(classifier, dataset, NAMES, cache_dir=tmp_path, **options)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert teacher_class_vectors(classifier, weak, NAMES) is None
    classifier.set_classes(["tree", "ship"])
    expected = weak.logits(classifier(weak.preprocess(dataset["image"])).image_embeds, weak.embed_names(["ship"]))
    found = teacher_logits(classifier, dataset, ["ship"], cache_dir=tmp_path)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_an_ensemble_is_the_mean(weak, dataset, tmp_path):
    parts = [lora(weak), head(weak), torch.randn(9, 3)]
    several = teacher_logits(parts, dataset, NAMES, cache_dir=tmp_path)
    alone = [teacher_logits(part, dataset, NAMES, cache_dir=tmp_path) for part in parts]
    torch.testing.assert_close(several, torch.stack(alone).mean(0))
    with pytest.raises(ValueError, match="the list of teachers is empty"):
        teacher_logits([], dataset, NAMES)


def test_templates_are_those_of_a_bare_model(weak, dataset, tmp_path):
    x = embed_dataset(weak, dataset, cache_dir=tmp_path).embeds
    found = teacher_logits(weak, dataset, NAMES, templates=("{}.",), cache_dir=tmp_path)
    expected = weak.logits(x, weak.embed_names(NAMES, ("{}.",)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # A learnt context takes their place.
    tuned = DualEncoder(coop(weak), weak.processor)
    expected = weak.logits(x, tuned.embed_names(NAMES, ("{}.",)))
    for options in ({}, {"templates": ("{}.",)}):
        found = teacher_logits(coop(weak), dataset, NAMES, cache_dir=tmp_path, **options)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_embeddings_at_hand_are_used_where_the_image_tower_is_the_same(weak, dataset, tmp_path):
    table = embed_dataset(weak, dataset, cache_dir=tmp_path)
    expected = teacher_logits(coop(weak), dataset, NAMES, cache_dir=tmp_path)
    # No dataset to embed: the table is enough.
    found = teacher_logits(coop(weak), None, NAMES, weak=weak, table=table)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="dataset must be"):
        teacher_logits(lora(weak), None, NAMES, weak=weak, table=table)


def test_same_image_tower(weak, model_dir):
    assert same_image_tower(weak, DualEncoder(coop(weak), weak.processor))
    assert not same_image_tower(weak, DualEncoder(lora(weak), weak.processor))
    assert same_image_tower(weak, DualEncoder(lora(weak, "text_model.*q_proj"), weak.processor))
    for other in ("siglip", "metaclip_2"):
        assert not same_image_tower(weak, DualEncoder.from_pretrained(model_dir(other)))


def test_class_vectors_of_a_teacher(weak):
    classifier = head(weak)
    expected = classifier.transmiter.tensors("default")["class_vectors"]
    assert torch.equal(teacher_class_vectors(classifier, weak, NAMES), expected)
    assert torch.equal(teacher_class_vectors(classifier, weak, NAMES[::-1]), expected.flip(0))
    prompts = DualEncoder(coop(weak), weak.processor)
    for templates in (("a photo of a {}.",), ("{}.",)):
        found = teacher_class_vectors(prompts.model, weak, NAMES, templates)
        torch.testing.assert_close(found, prompts.embed_names(NAMES, ("{}.",)), atol=1e-5, rtol=0)
    sharper = copy.deepcopy(weak.model)
    sharper.logit_scale.data += torch.tensor(2.0).log()
    found = teacher_class_vectors(sharper, weak, NAMES)
    torch.testing.assert_close(found, 2 * weak.embed_names(NAMES), atol=1e-5, rtol=0)
    # Where logits are no product of weak embeddings and class vectors there are none.
    mlp = AnchorClassifier(weak, Anchors(NAMES)).add_adapter(TransMiterConfig(class_names=list(NAMES)))
    for teacher in (lora(weak), mlp, head(weak, bias=1.0), torch.zeros(2, 3), [classifier]):
        assert teacher_class_vectors(teacher, weak, NAMES) is None


def test_refused(weak, dataset, make_dataset, tmp_path):
    table = embed_dataset(weak, dataset, cache_dir=tmp_path)
    pack = CalibrationPack(torch.zeros(9, 3), NAMES, dataset._fingerprint)
    with pytest.raises(ValueError, match="does not know 1 of the class names, first 'tree': pass the names it was"):
        teacher_logits(head(weak), dataset, ("cat", "tree"), cache_dir=tmp_path)
    with pytest.raises(ValueError, match="not know 1 of the class names, first 'tree': .* tuned on, such as 'cat'"):
        teacher_logits(pack, dataset, ("cat", "tree"))
    for wrong in (torch.zeros(9, 2), torch.zeros(9), torch.zeros(8, 3)):
        with pytest.raises(ValueError, match=r"must be \(9, 3\): one row per image, one column per class name; got"):
            teacher_logits(wrong, dataset, NAMES, table=table)
    broken = torch.zeros(9, 3)
    broken[4, 0] = float("nan")
    with pytest.raises(ValueError, match="the teacher's logits hold NaN .* first in row 4"):
        teacher_logits(broken, dataset, NAMES)
    other = embed_dataset(weak, make_dataset(9, seed=7), cache_dir=tmp_path)
    assert torch.equal(teacher_logits(pack, dataset, NAMES, table=table), pack.logits)
    with pytest.raises(ValueError, match="belong to 9 other images .* Pass the very dataset"):
        teacher_logits(pack, dataset, NAMES, table=other)
    with pytest.raises(TypeError, match="a teacher is an AnchorClassifier, .* not int"):
        teacher_logits(7, dataset, NAMES)
    with pytest.raises(TypeError, match="not CLIPVisionModel"):
        teacher_logits(weak.model.vision_model, dataset, NAMES)
    adapted = get_peft_model(copy.deepcopy(weak.model), TransMiterConfig(class_names=list(NAMES)))
    with pytest.raises(ValueError, match="is read by AnchorClassifier.from_pretrained"):
        teacher_logits(adapted, dataset, NAMES)
