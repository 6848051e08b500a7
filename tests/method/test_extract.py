"""Extraction: both solvers against what they should find, teachers of every kind, and bad input."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.table import FeatureTable
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.method import extract as extraction
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.extract import extract, gradient
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.method.teacher import teacher_logits
from hf_transmiter.settings import ExtractionConfig
from hf_transmiter.tuners import CoOpConfig, TransMiterConfig


NAMES = ("cat", "dog", "car")
ANCHORS = Anchors(NAMES, ("tree", "ship", "big tree", "red dog", "old car"))
RIDGE = ExtractionConfig(solver="ridge")
MAP, DISCRIMINANT = (ExtractionConfig(solver=solver) for solver in ("image_map", "discriminant"))
GRADIENT = ExtractionConfig(solver="gradient", epochs=15, batch_size=8, lr=5e-3)


@pytest.fixture(scope="module")
def weak(model_dir):
    return DualEncoder.from_pretrained(model_dir("clip"))


@pytest.fixture(scope="module")
def dataset(make_dataset):
    return make_dataset(40)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"cache_dir": tmp_path_factory.mktemp("features"), "progress": False}


@pytest.fixture(scope="module")
def table(weak, dataset, cache):
    return embed_dataset(weak, dataset, **cache)


@pytest.fixture(scope="module")
def linear(weak, table):
    """Logits of a teacher that is linear in the weak model's embeddings, with its weights."""
    generator = torch.Generator().manual_seed(5)
    vectors = weak.embed_names(NAMES) + 0.3 * torch.randn(3, 16, generator=generator)
    bias = 2 * torch.randn(3, generator=generator)
    return weak.logit_scale * table.embeds @ vectors.T + bias


def centred(logits):
    return logits - logits.mean(1, keepdim=True)


def divergence(student, teacher):
    return torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean"
    )


def coop(weak):
    return get_peft_model(copy.deepcopy(weak.model), CoOpConfig(n_ctx=4, init_token_ids=[3, 5, 7, 9]))


# Closed form


def test_a_class_vector_teacher_is_taken_as_it_is(weak, table):
    prompts = DualEncoder(coop(weak), weak.processor)
    teacher = AnchorClassifier(prompts, Anchors(NAMES, (), ("{}.",)))
    adapter = extract(weak, teacher)  # no image
    expected = weak.logits(table.embeds, prompts.embed_names(NAMES, ("{}.",)))
    torch.testing.assert_close(adapter.classify(table.embeds), expected, atol=1e-4, rtol=1e-5)
    assert adapter.encoder is weak and adapter.class_names == NAMES and adapter.calibration is None
    facts = adapter.adapter_config.provenance
    assert (facts["step"], facts["solver"], facts["num_images"]) == ("extract", None, 0)
    assert facts["own_class_vectors"]
    assert facts["weak"] == {"name": weak.name_or_path, "revision": None, "fingerprint": weak.fingerprint}
    bare = extract(weak, prompts.model, class_names=NAMES)
    torch.testing.assert_close(bare.classify(table.embeds), expected, atol=1e-4, rtol=1e-5)


def test_a_linear_teacher_is_found_from_images(weak, dataset, table, linear, cache):
    config = ExtractionConfig(solver="ridge", lambdas=(1e-8,))
    adapter = extract(weak, linear, dataset, config=config, **cache)
    found = adapter.classify(table.embeds)
    torch.testing.assert_close(centred(found), centred(linear), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.softmax(1), linear.softmax(1), atol=1e-3, rtol=0)
    assert torch.equal(adapter.calibration.logits, linear)
    assert adapter.calibration.class_names == NAMES
    assert adapter.calibration.dataset_fingerprint == dataset._fingerprint
    zero_shot = weak.logits(table.embeds, weak.embed_names(NAMES))
    torch.testing.assert_close(adapter.calibration.weak_logits, zero_shot, atol=1e-5, rtol=1e-5)
    facts = adapter.adapter_config.provenance
    assert facts["num_images"] == 40 and facts["lambda"] == 1e-8


def test_an_infinite_penalty_leaves_zero_shot(weak, dataset, table, linear, cache):
    adapter = extract(weak, linear, dataset, config=ExtractionConfig(solver="ridge", lambdas=(1e12,)), **cache)
    tensors = adapter.transmiter.tensors("default")
    torch.testing.assert_close(tensors["class_vectors"], weak.embed_names(NAMES), atol=1e-5, rtol=0)


def test_the_penalty_is_chosen(weak, dataset, linear, cache):
    noisy = linear + 0.5 * torch.randn(linear.shape)
    for teacher in (linear, noisy):
        facts = extract(weak, teacher, dataset, config=RIDGE, **cache).adapter_config.provenance
        assert facts["lambda"] in ExtractionConfig().lambdas and facts["leave_one_out_error"] >= 0


def test_the_discriminant_learns_the_teacher(weak, dataset, table, cache):
    """Its vectors are unit rows, so it is judged by what it would answer, not by how surely."""
    zero_shot = weak.logits(table.embeds, weak.embed_names(NAMES))
    said = table.labels
    teacher = 8 * torch.nn.functional.one_hot(said, 3).float()
    agreement = [float((zero_shot.argmax(1) == said).float().mean())]
    for shrinkage in (30.0, 1.0):
        config = ExtractionConfig(solver="discriminant", shrinkage=shrinkage)
        adapter = extract(weak, teacher, dataset, config=config, **cache)
        tensors = adapter.transmiter.tensors("default")
        torch.testing.assert_close(tensors["class_vectors"].norm(dim=1), torch.ones(3))
        assert not tensors["bias"].any() and adapter.adapter_config.provenance["shrinkage"] == shrinkage
        agreement.append(float((adapter.classify(table.embeds).argmax(1) == said).float().mean()))
    assert agreement[0] < agreement[1] <= agreement[2], agreement


def test_a_tuned_image_tower_becomes_an_image_side(weak, dataset, table, cache):
    """Of a teacher that turns pictures: closer to it than zero-shot, for any names, the texts as they were."""
    generator = torch.Generator().manual_seed(1)
    turned = torch.nn.functional.normalize(table.embeds + 0.5 * torch.randn(16, generator=generator), dim=1)
    teacher = weak.logits(turned, weak.embed_names(NAMES)) + torch.randn(40, 3, generator=generator)  # not linear in x
    adapter = extract(weak, teacher, dataset, **cache)
    facts, tensors = adapter.adapter_config.provenance, adapter.transmiter.tensors("default")
    assert facts["solver"] == "image_map" and facts["linear"] < 0.98
    assert set(tensors) == {"anchors", "image_map", "image_shift"} and adapter.open_vocabulary
    zero_shot = weak.logits(table.embeds, weak.embed_names(NAMES))
    assert divergence(adapter.classify(table.embeds), teacher) < 0.8 * divergence(zero_shot, teacher)
    x = torch.nn.functional.normalize(
        table.embeds + table.embeds @ tensors["image_map"].T + tensors["image_shift"], dim=1
    )
    expected = weak.logits(x, weak.embed_names(("tree", "ship")))
    asked = adapter.set_classes(("tree", "ship")).classify(table.embeds)
    torch.testing.assert_close(asked, expected, atol=1e-4, rtol=1e-4)


def test_a_tuned_head_is_told_from_its_logits(weak, dataset, linear, cache):
    """Logits that are linear in the embeddings are those of class vectors, in half precision, too."""
    for teacher in (linear, linear.half().float()):
        adapter = extract(weak, teacher, dataset, **cache)
        facts = adapter.adapter_config.provenance
        assert facts["solver"] == "ridge" and facts["own_class_vectors"] and facts["linear"] > 0.98
        assert not adapter.open_vocabulary
    forced = extract(weak, linear, dataset, config=MAP, **cache)
    assert forced.adapter_config.provenance["solver"] == "image_map" and forced.open_vocabulary


@pytest.mark.parametrize("solver", ["discriminant", "ridge"])
def test_constants_per_image_do_not_matter(weak, dataset, linear, cache, solver):
    shifted, config = linear + 10 * torch.randn(40, 1), ExtractionConfig(solver=solver)
    first, second = (
        extract(weak, t, dataset, config=config, **cache).transmiter.tensors("default") for t in (linear, shifted)
    )
    for key in ("class_vectors", "bias"):
        torch.testing.assert_close(first[key], second[key], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("solver", ["discriminant", "ridge"])
def test_blocks_do_not_matter(weak, dataset, linear, cache, monkeypatch, solver):
    config = ExtractionConfig(solver=solver)
    first = extract(weak, linear, dataset, config=config, **cache).transmiter.tensors("default")
    batches = FeatureTable.batches
    monkeypatch.setattr(FeatureTable, "batches", lambda self, size: batches(self, 7))
    second = extract(weak, linear, dataset, config=config, **cache).transmiter.tensors("default")
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], atol=1e-4, rtol=1e-4)


# By gradients, as published


@pytest.mark.parametrize("settings", [{}, {"basis": "fixed"}, {"width": 10}], ids=str)
def test_the_adapter_learns_the_teacher(weak, dataset, table, linear, cache, settings):
    config = replace(GRADIENT, **settings)
    adapter = extract(weak, linear, dataset, anchors=ANCHORS, config=config, **cache)
    zero_shot = weak.logits(table.embeds, weak.embed_names(NAMES))
    with torch.no_grad():
        assert divergence(adapter.classify(table.embeds), linear) < 0.7 * divergence(zero_shot, linear)
    tensors = adapter.transmiter.tensors("default")
    basis = tensors["basis"]
    assert basis.shape == (config.width or 8, 8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-5, rtol=0)
    start = AnchorClassifier(weak, ANCHORS).add_adapter(
        TransMiterConfig.for_anchors(ANCHORS, width=config.width, seed=config.seed)
    )
    moved = (basis - start.transmiter.tensors("default")["basis"]).abs().max()
    assert moved < 1e-6 if config.basis == "fixed" else moved > 1e-3
    torch.testing.assert_close(tensors["anchors"], weak.embed_names(ANCHORS.names))
    assert adapter.adapter_config.anchors == ANCHORS
    assert adapter.adapter_config.provenance["settings"]["epochs"] == 15


def test_the_loss_is_the_published_one(weak, table, linear):
    """One epoch of one batch without noise reports the loss of the identity adapter: zero-shot logits."""
    config = replace(GRADIENT, epochs=1, batch_size=64, noise_probability=0.0)
    text = weak.embed_names(ANCHORS.names)
    _, facts = gradient(table, linear, text, weak, config, progress=False)
    p, q = (linear / 0.5).softmax(1), weak.logits(table.embeds, text)[:, :3].log_softmax(1)
    assert facts["loss"] == pytest.approx(float(0.5 * (p * (p.log() - q)).sum(1).mean()), rel=1e-4)
    _, later = gradient(table, linear, text, weak, replace(GRADIENT, noise_probability=0.0), progress=False)
    assert later["loss"] < 0.8 * facts["loss"]


def test_noise_is_in_units_of_the_rows_spread(weak, table, linear, monkeypatch):
    seen = []
    refine = extraction.refine
    monkeypatch.setattr(extraction, "refine", lambda z, *parts: seen.append(z) or refine(z, *parts))
    text = weak.embed_names(ANCHORS.names)
    config = replace(GRADIENT, epochs=200, batch_size=40, lr=1e-30, noise_std=0.5, noise_probability=0.25)
    gradient(table, linear, text, weak, config, progress=False)
    clean = weak.logits(table.embeds, text)
    sums = clean.sum(1).sort().values
    noisy = [z for z in seen if (z.sum(1).sort().values - sums).abs().max() > 1e-2]
    assert 30 <= len(noisy) <= 70  # a quarter of 200 batches
    total = torch.cat(noisy).var() - clean.var()
    assert float(total / (0.25 * clean.var(1).mean())) == pytest.approx(1, abs=0.1)


def test_the_seed_decides(weak, dataset, linear, cache):
    config = replace(GRADIENT, epochs=2)
    first, again, other = (
        extract(weak, linear, dataset, anchors=ANCHORS, config=c, **cache).transmiter.tensors("default")
        for c in (config, config, replace(config, seed=1))
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["basis"], other["basis"]) and torch.equal(first["anchors"], other["anchors"])


def test_interrupted_and_resumed(weak, dataset, linear, cache, tmp_path, monkeypatch):
    config = replace(GRADIENT, epochs=4)
    arguments = {"anchors": ANCHORS, "config": config, **cache}
    expected = extract(weak, linear, dataset, **arguments).transmiter.tensors("default")
    refine, calls = extraction.refine, []

    def stopping(*args):
        calls.append(0)
        if len(calls) > 12:  # five batches an epoch: in the third
            raise KeyboardInterrupt
        return refine(*args)

    monkeypatch.setattr(extraction, "refine", stopping)
    with pytest.raises(KeyboardInterrupt):
        extract(weak, linear, dataset, checkpoint=tmp_path / "run", **arguments)
    assert (tmp_path / "run").is_file()
    monkeypatch.setattr(extraction, "refine", refine)
    resumed = extract(weak, linear, dataset, checkpoint=tmp_path / "run", **arguments).transmiter.tensors("default")
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert not (tmp_path / "run").exists()


def test_save_and_load(weak, dataset, table, linear, cache, tmp_path):
    for config in (MAP, DISCRIMINANT, RIDGE, replace(GRADIENT, epochs=1)):
        adapter = extract(weak, linear, dataset, anchors=ANCHORS, config=config, **cache)
        folder = tmp_path / config.solver
        adapter.save_pretrained(folder)
        back = AnchorClassifier.from_pretrained(folder, weak)
        assert torch.equal(back.classify(table.embeds), adapter.classify(table.embeds))
        assert back.adapter_config.provenance["solver"] == config.solver
        assert back.calibration.dataset_fingerprint == dataset._fingerprint


def test_what_the_images_are(weak, dataset, linear, cache, tmp_path):
    """Is said by the adapter, its calibration and the card; of a path no more than the last part."""
    named = [extract(weak, linear, dataset, dataset_name=name, **cache) for name in ("me/pets", str(tmp_path), None)]
    said = [each.adapter_config.provenance.get("dataset") for each in named]
    assert said == ["me/pets", tmp_path.name, None]  # the split is not known
    assert [each.calibration.dataset for each in named] == said
    named[0].save_pretrained(tmp_path / "named")
    assert "me/pets" in (tmp_path / "named" / "README.md").read_text()
    train = Dataset.from_list(list(dataset), features=dataset.features, split="train")
    assert extract(weak, linear, train, dataset_name="me/pets", **cache).calibration.dataset == "me/pets (train)"


def test_auxiliary_names_are_drawn_when_none_are_given(weak, dataset, linear, cache):
    config = replace(GRADIENT, epochs=1, basis="fixed", batch_size=64)
    adapter = extract(weak, linear, dataset, config=config, **cache)
    anchors = adapter.adapter_config.anchors
    assert len(anchors) == 1024 and anchors.task == NAMES and anchors == Anchors.build(NAMES)


# Teachers


def test_teachers_of_every_kind(weak, dataset, table, cache, tmp_path):
    torch.manual_seed(2)
    model = get_peft_model(
        copy.deepcopy(weak.model), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    tuned = DualEncoder(model, weak.processor)
    logits = teacher_logits(tuned, dataset, NAMES, **cache)
    pack = CalibrationPack(logits, NAMES, dataset._fingerprint)
    pack.save(tmp_path / "pack")
    expected = extract(weak, logits, dataset, **cache).classify(table.embeds)
    teachers = [model, tuned, AnchorClassifier(tuned, Anchors(NAMES)), pack, [logits - 3, logits + 3]]
    for teacher in teachers:
        adapter = extract(weak, teacher, dataset, **cache)
        torch.testing.assert_close(adapter.classify(table.embeds), expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(adapter.calibration.logits, logits, atol=1e-4, rtol=1e-4)
    stored = extract(weak, tmp_path / "pack", dataset, **cache)
    torch.testing.assert_close(stored.classify(table.embeds), expected, atol=0.2, rtol=0.01)  # float16


# Errors


def test_refused(weak, dataset, make_dataset, table, linear, cache):
    broken = linear.clone()
    broken[3, 1] = float("nan")
    with pytest.raises(ValueError, match="the teacher's logits hold NaN or infinite values, first in row 3"):
        extract(weak, broken, dataset, **cache)
    with pytest.raises(ValueError, match=r"must be \(40, 3\): one row per image"):
        extract(weak, linear[:-1], dataset, **cache)
    with pytest.raises(ValueError, match="dataset is empty"):
        extract(weak, linear, make_dataset(3).select([]), **cache)
    with pytest.raises(ValueError, match="does not know 1 of the class names, first 'tree'"):
        extract(weak, AnchorClassifier(weak, Anchors(NAMES)), dataset, class_names=["cat", "tree"], **cache)
    for anchors in (Anchors(NAMES[::-1], ("tree",)), Anchors(NAMES[:2], ("tree",))):
        with pytest.raises(ValueError, match="anchors' task names are not the class names, or in another order"):
            extract(weak, linear, dataset, class_names=NAMES, anchors=anchors, **cache)
    with pytest.raises(ValueError, match="no class names: pass class_names, or a dataset whose label column is"):
        extract(weak, linear, dataset.remove_columns("label"), **cache)
    with pytest.raises(ValueError, match="has no class vectors .* pass unlabelled images as dataset"):
        extract(weak, linear, class_names=NAMES)
    with pytest.raises(ValueError, match="gradient solver needs unlabelled images: pass a dataset"):
        extract(weak, coop(weak), class_names=NAMES, anchors=ANCHORS, config=GRADIENT)
    with pytest.raises(ValueError, match="K = 8 anchors do not fit a basis of width D = 4"):
        extract(weak, linear, dataset, anchors=ANCHORS, config=replace(GRADIENT, width=4), **cache)
    with pytest.raises(ValueError, match="the loss became"):
        extract(weak, linear, dataset, anchors=ANCHORS, config=replace(GRADIENT, lr=1e30), **cache)
    pack = CalibrationPack(linear, NAMES, "another dataset")
    with pytest.raises(ValueError, match="belong to 40 other images"):
        extract(weak, pack, dataset, **cache)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"solver must be one of .*, got 'magic'"):
        ExtractionConfig(solver="magic")
    with pytest.raises(ValueError, match="basis must be one of learned, fixed, got 'free'"):
        ExtractionConfig(basis="free")
    for unread, said in (
        ({"solver": "ridge", "lr": 0.1, "shrinkage": 3.0}, "solver 'ridge' does not read lr, shrinkage: leave"),
        ({"shrinkage": 1.0, "basis": "fixed"}, "no solver chosen does not read shrinkage, basis: leave"),
        ({"solver": "discriminant", "lambdas": (1.0,)}, "solver 'discriminant' does not read lambdas: leave"),
        ({"solver": "image_map", "lambdas": (1.0,), "lr": 0.1}, "solver 'image_map' does not read lr, lambdas: leave"),
        ({"solver": "gradient", "shrinkage": 3.0}, "solver 'gradient' does not read shrinkage: leave"),
        ({"solver": "gradient", "epochs": 0}, "epochs must be at least 1, got 0"),
        ({"solver": "gradient", "batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"solver": "gradient", "lr": 0.0}, "lr must be above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            ExtractionConfig(**unread)


# Several processes


SHARED = replace(GRADIENT, epochs=2)


def _all_steps(folder, dataset, linear, cache, accelerator=None):
    weak = DualEncoder.from_pretrained(folder)
    options = {"cache_dir": cache, "progress": False, "accelerator": accelerator}
    results = {}
    for config in (MAP, DISCRIMINANT, RIDGE, SHARED):
        adapter = extract(weak, linear, dataset, anchors=ANCHORS, config=config, **options)
        for key, tensor in adapter.transmiter.tensors("default").items():
            results[f"{config.solver}.{key}"] = tensor.contiguous()
    for space in ("embedding", "logit"):
        bridge = Bridge.build(weak, weak, dataset, space=space, anchors=ANCHORS, **options)
        results[f"bridge.{space}"] = bridge.matrix.contiguous()
    return results


def _in_two_processes(folder, dataset, linear, path):
    batches = FeatureTable.batches
    FeatureTable.batches = lambda self, size: batches(self, 7)  # both processes get blocks
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    results = _all_steps(folder, dataset, linear, path / "cache", accelerator)
    save_file(results, path / f"{accelerator.process_index}.safetensors")


def test_two_processes_find_what_one_does(model_dir, dataset, linear, cache, tmp_path):
    expected = _all_steps(model_dir("clip"), dataset, linear, cache["cache_dir"])
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_in_two_processes, args=(model_dir("clip"), dataset, linear, tmp_path), num_processes=2)
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(
                found[key], tensor, atol=1e-3, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
            )
