"""Label-free tuning: the strong model learns from a teacher's soft labels; and what tuning says it has learnt."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from hf_transmiter.cli.demo import SANDBOX_TUNING
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.hub.adapter_files import TeacherFacts
from hf_transmiter.method import lessons
from hf_transmiter.method import tune as tuning
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.experts import expert_logits, tuned_and_weak_logits
from hf_transmiter.method.extract import extract
from hf_transmiter.method.lessons import taught_by
from hf_transmiter.method.saved import load_teacher_and_weak
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.method.teacher import teacher_logits
from hf_transmiter.method.tune import tune
from hf_transmiter.sandbox import load_dataset
from hf_transmiter.settings import ExtractionConfig, TuningConfig
from hf_transmiter.training import batches


NAMES = ("cat", "dog", "car")
QUICK = {"epochs": 3, "batch_size": 6, "lr": 1e-2, "optimizer": "adamw", "schedule": "cosine", "warmup": 0.05}


@pytest.fixture
def strong(model_dir):
    return DualEncoder.from_pretrained(model_dir("clip", seed=1))


@pytest.fixture
def options(tmp_path):
    return {"progress": False, "cache_dir": tmp_path / "features"}


def tuned_weak(encoder, dataset, options, adapter="lora") -> AnchorClassifier:
    config = TuningConfig(**{**QUICK, "shots": 4, "epochs": 6})
    return tune(encoder, dataset, adapter, config=config, **options)


def weights(classifier: AnchorClassifier) -> torch.Tensor:
    named = classifier.encoder.model.named_parameters()
    parts = [p.flatten() for name, p in named if "default" in name]
    return torch.cat(parts)


def zero_shot(encoder, names=NAMES) -> AnchorClassifier:
    return AnchorClassifier(encoder, Anchors(tuple(names), (), ("a photo of a {}.",)))


def test_experts(encoder, strong, make_dataset, options):
    data = make_dataset(12)
    tuned = tuned_weak(encoder, data, options)
    t, w, z = (teacher_logits(one, data, NAMES, **options) for one in (tuned, zero_shot(encoder), zero_shot(strong)))
    found = expert_logits(tuned, strong, data, NAMES, weak=encoder, **options)
    assert torch.allclose(found, 2 * t + z - w, atol=1e-4)
    # Stored logits hold w, or not; logits as a tensor are t where the weak model is given, else the experts' own.
    pack = CalibrationPack(t, NAMES, weak_logits=w)
    assert torch.allclose(expert_logits(pack, strong, data, NAMES, **options), found, atol=1e-4)
    with_model = expert_logits(CalibrationPack(t, NAMES), strong, data, NAMES, weak=encoder, **options)
    assert torch.allclose(with_model, found, atol=1e-4)
    assert torch.equal(expert_logits(found, strong, data, NAMES, **options), found)
    assert torch.allclose(expert_logits(t, strong, data, NAMES, weak=encoder, **options), found, atol=1e-4)
    for weak, said in ((encoder, "softmax(2 t + z - w)"), (None, "softmax(logits as given)")):
        assert taught_by(t, weak, 12)["experts"] == said
    pair = tuned_and_weak_logits([tuned, tuned], encoder, data, NAMES, **options)
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(pair, (t, w), strict=True))
    # An adapter on the weak model has that in itself.
    adapter = extract(encoder, tuned, data, **options)
    own = expert_logits(adapter, strong, data, NAMES, **options)
    assert torch.allclose(own, 2 * teacher_logits(adapter, data, NAMES, **options) + z - w, atol=1e-4)
    for teacher in (tuned, CalibrationPack(t, NAMES)):
        with pytest.raises(ValueError, match="need the weak model as it was before its tuning: pass weak="):
            expert_logits(teacher, strong, data, NAMES, **options)
    with pytest.raises(ValueError, match="belong to 12 other images"):
        expert_logits(pack, strong, make_dataset(6), NAMES, **options)
    with pytest.raises(ValueError, match=r"must be \(12, 3\)"):
        expert_logits(found[:, :2], strong, data, NAMES, **options)


def test_labels_are_not_read(encoder, strong, make_dataset, options):
    data, config = make_dataset(20), TuningConfig(**QUICK)
    logits = expert_logits(tuned_weak(encoder, data, options), strong, data, NAMES, weak=encoder, **options)
    none = data.remove_columns("label")
    wrong = none.add_column("label", [7] * 20)
    found = [
        tune(strong, images, teacher=logits, class_names=NAMES, config=config, **options)
        for images in (data, none, wrong)
    ]
    assert torch.equal(weights(found[0]), weights(found[1])) and torch.equal(weights(found[0]), weights(found[2]))
    assert found[0].facts.taught_by["num_images"] == 18
    assert found[0].facts.learnt == found[1].facts.learnt
    with pytest.raises(ValueError, match="the teacher does not name its classes: pass class_names"):
        tune(strong, none, teacher=logits, config=config, **options)


@pytest.mark.parametrize("method", ["lora", "coop", "cocoop", "promptsrc"])
def test_it_follows_the_experts_and_is_saved_as_any_tuned_model(
    encoder, strong, make_dataset, options, method, tmp_path
):
    data = make_dataset(40)
    before = copy.deepcopy(strong.model.state_dict())
    teacher = tuned_weak(encoder, data, options)
    logits = expert_logits(teacher, strong, data, NAMES, weak=encoder, **options)
    config = TuningConfig(**{**QUICK, "epochs": 8, "keep_near": 0.0, "augment": "none"})
    found = tune(strong, data, method, teacher=teacher, weak=encoder, config=config, **options)
    assert all(torch.equal(tensor, before[key]) for key, tensor in strong.model.state_dict().items())
    q, losses = logits.softmax(1), []
    for model in (zero_shot(strong), found):
        z = teacher_logits(model, data, NAMES, **options)
        losses.append(torch.nn.functional.cross_entropy(z, q).item())
    assert losses[1] < 0.9 * losses[0], losses
    facts = found.facts
    assert facts.settings["shots"] is None and facts.weak == strong.name_or_path
    assert facts.taught_by["experts"] == "softmax(2 t + z - w)" and facts.taught_by["num_images"] == 36
    assert facts.taught_by["weak"]["fingerprint"] == encoder.fingerprint
    assert facts.taught_by["settings"]["method"] == "lora"
    assert set(facts.learnt["held_out"]) == {"num_images", "agreement", "zero_shot"}
    assert facts.learnt["held_out"]["num_images"] == 4
    found.save_pretrained(tmp_path / "strong")
    assert TeacherFacts.read(str(tmp_path / "strong")) == facts
    loaded, own = load_teacher_and_weak(str(tmp_path / "strong"))
    assert own.fingerprint == strong.fingerprint and loaded.class_names == NAMES
    expected = teacher_logits(found, data, NAMES, **options)
    assert torch.allclose(teacher_logits(loaded, data, NAMES, **options), expected, atol=1e-3)
    card = (tmp_path / "strong" / "README.md").read_text()
    assert "It learnt without labels: 36 unlabelled images had the soft labels `softmax(2 t + z - w)`" in card
    assert "labelled images per class" not in card and "| unlabelled images | 36 |" in card
    assert "agreement with the teacher" in card and "--teacher path/to/tuned-model" in card


def test_the_adapter_follows_from_what_was_tuned(encoder, strong, make_dataset, options, tmp_path):
    data, config = make_dataset(12), TuningConfig(**{**QUICK, "epochs": 1})

    def method(teacher, **more):
        kept = tune(strong, data, teacher=teacher, config=config, **more, **options).facts.settings
        return kept["method"], kept.get("n_ctx")

    for adapter, expected in (
        ("lora", ("lora", None)),
        ({"method": "coop", "n_ctx": 5}, ("coop", 5)),
        ("contcoop", ("contcoop", 4)),
        ("ivlp", ("ivlp", None)),
        # Words changed, but by no prompt.
        (LoraConfig(r=2, target_modules=r"text_model\..*(q_proj|v_proj)"), ("coop", None)),
    ):
        tuned = tuned_weak(encoder, data, options, adapter)
        found = method(tuned, weak=encoder)
        assert found[0] == expected[0] and expected[1] in (None, found[1])
        if expected[0] == "coop":
            assert method(extract(encoder, tuned, **options))[0] == "coop"
    words, tuned = tuned, tuned_weak(encoder, data, options)
    for solver in (None, "image_map", "discriminant"):
        found = extract(encoder, tuned, data, config=ExtractionConfig(solver=solver), **options)
        assert method(found)[0] == "lora"
    assert method(torch.randn(12, 3))[0] == "lora"
    assert method([words, words], weak=encoder)[0] == "coop"
    CalibrationPack(torch.randn(12, 3), NAMES, weak_logits=torch.randn(12, 3)).save(tmp_path / "pack.safetensors")
    assert method(tmp_path / "pack.safetensors")[0] == "lora"


def test_bad_input(encoder, strong, make_dataset, options):
    data, logits = make_dataset(12), torch.randn(12, 3)
    for bad, said in (
        ({"config": TuningConfig(shots=4)}, "a teacher labels all there are: leave shots out"),
        ({"teacher": logits[:1], "dataset": data.select([0])}, "needs at least two images"),
        ({"teacher": logits[:5]}, r"must be \(12, 3\)"),
        ({"teacher": zero_shot(encoder)}, "pass weak="),
        (
            {"teacher": zero_shot(encoder), "weak": encoder, "class_names": ["cow"]},
            "does not know 1 of the class names",
        ),
    ):
        given = {"dataset": data, "teacher": logits, **bad}
        with pytest.raises(ValueError, match=said):
            tune(strong, **given, **options)


@pytest.mark.parametrize("method", ["lora", "coop"])
def test_an_interrupted_run_resumes(strong, make_dataset, options, tmp_path, monkeypatch, method):
    """And keeps the best epoch, here one before the interruption."""
    data, config, calls = make_dataset(20), TuningConfig(**{**QUICK, "epochs": 6}), []
    how = {"teacher": 3 * torch.randn(20, 3), "config": config, **options}

    def run(stop_at=None, losses=(2.0, 1.0, 1.6, 1.5, 1.4, 1.3), **kwargs):
        def measured(*args):
            calls.append(args)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return losses[len(calls) - 1]

        monkeypatch.setattr(tuning, "held_out_loss", measured)
        return tune(strong, data, method, **how, **kwargs)

    expected, path = run(), tmp_path / "run.safetensors"
    assert len(calls) == 6
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(4, checkpoint=path)
    calls.pop()
    resumed = run(checkpoint=path)
    assert len(calls) == 6 and not path.exists()
    assert torch.equal(weights(resumed), weights(expected))
    calls.clear()
    assert not torch.equal(weights(run(losses=(6, 5, 4, 3, 2, 1))), weights(expected))


def test_pixels_that_do_not_fit_in_memory(strong, make_dataset, options, monkeypatch):
    how = {"teacher": torch.randn(20, 3), "config": TuningConfig(**QUICK), **options}
    kept = tune(strong, make_dataset(20), "lora", **how)
    monkeypatch.setattr(batches, "PIXEL_MEMORY", 0)
    assert torch.equal(weights(tune(strong, make_dataset(20), "lora", **how)), weights(kept))


def _in_two_processes(folder, data, logits, out):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    options = {"accelerator": accelerator, "progress": False, "cache_dir": out / "features"}
    found = tune(DualEncoder.from_pretrained(folder), data, teacher=logits, config=TuningConfig(**QUICK), **options)
    assert accelerator.num_processes == 2
    save_file({"weights": weights(found)}, out / f"{accelerator.process_index}.safetensors")
    (out / f"{accelerator.process_index}.json").write_text(json.dumps(found.facts.learnt))


def test_two_processes_tune_one_model(strong, make_dataset, options, tmp_path):
    data, logits = make_dataset(30), 3 * torch.randn(30, 3)
    expected = tune(strong, data, teacher=logits, config=TuningConfig(**QUICK), **options)
    out = tmp_path / "two"
    out.mkdir()
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_in_two_processes, args=(strong.name_or_path, data, logits, out), num_processes=2)
    for process in range(2):
        found = load_file(out / f"{process}.safetensors")["weights"]
        assert torch.allclose(found, weights(expected), atol=2e-3)
        assert json.loads((out / f"{process}.json").read_text())["held_out"]["num_images"] == 3


def test_what_was_learnt_from_labels(encoder, make_dataset, options, caplog):
    """Accuracy on left-over pictures beside zero-shot, or only what changed; and a warning where that is nothing."""
    data = make_dataset(60)
    config = TuningConfig(**{**QUICK, "shots": 10, "epochs": 12, "keep_near": 0.0, "augment": "none"})
    for method in ("lora", "coop"):
        tuned = tune(encoder, data, method, config=config, **options)
        learnt = tuned.facts.learnt
        assert learnt["held_out"]["num_images"] == 30 and learnt["warning"] is None
        assert learnt["held_out"]["accuracy"] > learnt["held_out"]["zero_shot"]
        z, labels = teacher_logits(tuned, data, NAMES, **options), torch.tensor(data["label"])
        before = teacher_logits(zero_shot(encoder), data, NAMES, **options)
        drawn = lessons.draw_few_shot(data, "label", NAMES, config)[0]
        rest = sorted(set(range(60)) - set(drawn))
        right = 100 * (z.argmax(1) == labels)[rest].float().mean().item()
        changed = 100 * (z.argmax(1) != before.argmax(1))[rest].float().mean().item()
        assert (learnt["held_out"]["accuracy"], learnt["changed"]) == pytest.approx((right, changed), abs=0.01)
        assert "held-out images" in tuned.facts.verdict and "Warning" not in tuned.facts.verdict
    assert not caplog.records
    few = tune(encoder, make_dataset(30), "coop", config=config, **options).facts
    assert few.learnt["held_out"] is None and "not measured, no picture was left over" in few.verdict
    for method in ("lora", "coop"):
        caplog.clear()
        idle = tune(encoder, data, method, config=TuningConfig(**{**QUICK, "lr": 1e-9, "shots": 10}), **options)
        assert idle.facts.learnt["changed"] == 0
        (record,) = caplog.records
        assert "nothing was learnt: only 0.0 % of the predictions changed" in record.message
        assert record.message in idle.facts.verdict


def test_labels_that_teach_nothing(encoder, make_dataset, options, caplog, monkeypatch):
    """Predictions change, and are no better for it."""
    few_shot = lessons.draw_few_shot

    def wrong(*args):
        rows, labels, left, left_labels = few_shot(*args)
        return rows, torch.zeros_like(labels), left, torch.ones_like(left_labels)

    monkeypatch.setattr(tuning, "draw_few_shot", wrong)
    config = TuningConfig(**{**QUICK, "shots": 10, "epochs": 12, "keep_near": 0.0})
    learnt = tune(encoder, make_dataset(60), "coop", config=config, **options).facts.learnt
    assert learnt["changed"] > 10 and learnt["held_out"]["accuracy"] == 0
    (record,) = caplog.records
    assert "nothing was learnt: accuracy is 0.0 % on held-out images, " in record.message


def test_pictures_that_are_left_over_need_not_be_readable(encoder, make_dataset, options, caplog, monkeypatch):
    embed, config = lessons.embed_dataset, TuningConfig(**{**QUICK, "shots": 2})

    def fails(encoder, images, **kwargs):
        if len(images) == 24:
            raise ValueError("the image in row 3 cannot be read")
        return embed(encoder, images, **kwargs)

    monkeypatch.setattr(lessons, "embed_dataset", fails)
    assert tune(encoder, make_dataset(30), "coop", config=config, **options).facts.learnt["held_out"] is None
    assert "not measured on the pictures that are left over: the image in row 3" in caplog.text


def test_at_most_a_thousand_are_held_out_evenly(make_dataset, monkeypatch):
    monkeypatch.setattr(lessons, "MOST_HELD_OUT", 12)
    _, _, left, labels = lessons.draw_few_shot(make_dataset(90), "label", NAMES, TuningConfig(shots=2).of("lora"))
    assert len(set(left)) == 12 and labels.bincount().tolist() == [4, 4, 4]
    monkeypatch.setattr(lessons, "MOST_HELD_OUT", 2)
    assert len(lessons.draw_few_shot(make_dataset(90), "label", NAMES, TuningConfig(shots=2).of("lora"))[2]) == 2


def test_sandbox(options):
    """The strong model overtakes itself and its teacher without a label."""
    weak, strong = (DualEncoder.from_pretrained(f"sandbox:{name}") for name in ("weak", "strong"))
    pool, test = load_dataset("neon", "validation", seed=1), load_dataset("neon", "validation")
    names = tuple(test.features["label"].names)
    training = {**SANDBOX_TUNING, "augment": "none"}
    teacher = tune(weak, pool, config=TuningConfig(**{**training, "epochs": 10}), **options)
    config = TuningConfig(**{**training, "epochs": 4})
    upgraded = tune(strong, pool.remove_columns("label"), teacher=teacher, weak=weak, config=config, **options)
    assert upgraded.facts.settings["method"] == "lora"
    labels, hits = torch.tensor(test["label"]), []
    for model in (zero_shot(strong, names), teacher, upgraded):
        said = teacher_logits(model, test, names, **options).argmax(1)
        hits.append(100 * (said == labels).float().mean().item())
    assert hits[2] > max(hits[:2]) + 2, hits
