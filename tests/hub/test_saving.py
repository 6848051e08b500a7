"""What could not be loaded again is not saved: the same rules on both sides."""

from dataclasses import replace

import pytest
import torch

from hf_transmiter import AnchorClassifier, Anchors, Bridge, TransMiterConfig, attach, tune
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.hub import checks
from hf_transmiter.hub.adapter_files import TeacherFacts, read_adapter, write_adapter
from hf_transmiter.hub.files import write_json
from hf_transmiter.hub.scores import Score, write_scores
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.settings import TuningConfig


LONG = "x" * 1001
FACTS = TeacherFacts("weak", None, "0" * 64, ["cat", "dog"], ["{}."], ["{}."], {})


def nothing(folder) -> bool:
    return not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize(
    ("task", "auxiliary", "templates"),
    [
        (["cat", LONG], [], ["{}."]),
        (["cat"], [LONG], ["{}."]),
        (["cat"], [], ["{}" + LONG]),
        (map(str, range(100_001)), [], ["{}."]),
        (["cat"], [], [f"{i} {{}}" for i in range(1001)]),
    ],
    ids=["name", "auxiliary", "template", "names", "templates"],
)
def test_anchors_beyond_the_limits_are_not_made(task, auxiliary, templates):
    with pytest.raises(ValueError, match="1,00[01]|at most 100,000"):
        Anchors(tuple(task), tuple(auxiliary), tuple(templates))


def test_anchors_at_the_limits_are_loaded_again(tmp_path):
    anchors = Anchors(("cat", LONG[:1000]), templates=("{}" + LONG[:998],))
    anchors.save(tmp_path / "anchors.json")
    assert Anchors.load(tmp_path / "anchors.json") == anchors
    many = Anchors(tuple(f"{number} {'x' * 90}" for number in range(100_000)))  # more than a file may hold
    with pytest.raises(ValueError, match=r"many.json is not saved, .*: .*many.json holds more"):
        many.save(tmp_path / "many.json")
    assert [path.name for path in tmp_path.iterdir()] == ["anchors.json"]


def test_a_name_that_is_too_long_is_told_before_the_training(encoder, make_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_transmiter.method.tune.fit", None)
    data = make_dataset(6, names=("cat", LONG))
    for method in ("lora", "coop"):
        with pytest.raises(ValueError, match=r"has 1,001 characters; names and templates may have 1,000: shorten it"):
            tune(encoder, data, method, config=TuningConfig(shots=1, epochs=1), progress=False)
    with pytest.raises(ValueError, match="has 1,001 characters"):
        TransMiterConfig(class_names=["cat", LONG], form="linear")


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": []},
        {"class_names": ["cat", LONG]},
        {"templates": ["no braces"]},
        {"revision": "a b"},
        {"fingerprint": "none"},
        {"weak": LONG},
        {"settings": {"lr": float("nan")}},
    ],
    ids=str,
)
def test_facts_of_a_tuned_model(tmp_path, change):
    with pytest.raises(ValueError, match=r"teacher.json is not saved, as .*: .*/teacher.json"):
        replace(FACTS, **change).write(tmp_path)
    assert nothing(tmp_path)
    FACTS.write(tmp_path)
    assert TeacherFacts.read(str(tmp_path)) == FACTS


def test_packs(tmp_path):
    for pack, said in (
        (CalibrationPack(torch.zeros(3, 2), ("cat", LONG)), "pack is not saved, as it could not be loaded again"),
        (CalibrationPack(torch.zeros(0, 2), ("cat", "dog")), "pack is not saved, as it could not be loaded again"),
        (CalibrationPack(torch.full((3, 2), 1e5), ("cat", "dog")), "logits as float16, in which they are saved"),
    ):
        with pytest.raises(ValueError, match=said):
            pack.save(tmp_path / "pack")
    assert nothing(tmp_path)


def bridge(**changes) -> Bridge:
    who = ModelId("a", None, "f")
    facts = {"space": "embedding", "scale": 1.0, "source": "images", "num_pairs": 2, "alignment": 1.0}
    facts |= {"matrix": torch.eye(2), "mean_strong": torch.zeros(2), "mean_weak": torch.zeros(2), "beta": 0.0}
    return Bridge(**{**facts, "anchors": None, "strong": who, "weak": who, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": LONG},
        {"strong": ModelId(LONG, None, "f")},
        {"matrix": torch.ones(2, 2)},
        {"mean_weak": torch.tensor([0.0, float("nan")])},
        {"mean_weak": torch.zeros(3)},
        {"alignment": float("nan")},
        {"num_pairs": -1},
    ],
    ids=str,
)
def test_bridges(tmp_path, changes):
    bridge().save(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"a.safetensors is not saved, as it could not be loaded again"):
        bridge(**changes).save(tmp_path / "a.safetensors", overwrite=True)
    with pytest.raises(ValueError, match=r"bridge.safetensors is not saved, as it could not be loaded again"):
        bridge(**changes).save_pretrained(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize("part", ["provenance", "seed", "shape", "size"])
def test_adapters(encoder, tmp_path, part, monkeypatch):
    """Nothing is left of one that is refused, and what was there stays."""
    made = AnchorClassifier(encoder, Anchors(("cat", "dog")))
    made.add_adapter(TransMiterConfig(class_names=["cat", "dog"], form="linear"))
    made.save_pretrained(tmp_path / "good")
    before = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    config, tensors = made.adapter_tensors()
    if part == "provenance":
        config["provenance"] = {"loss": float("nan")}
    elif part == "seed":
        config["seed"] = 2**70
    elif part == "shape":
        tensors["class_vectors"] = torch.zeros(3, 16)
    else:
        monkeypatch.setattr(checks, "MAX_JSON_BYTES", 100)
    for folder in (tmp_path / "new", tmp_path / "good"):
        with pytest.raises(ValueError):
            write_adapter(folder, config, tensors)
    assert nothing(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()} == before
    monkeypatch.undo()
    assert read_adapter(tmp_path / "good")[1].keys() == tensors.keys()


def test_a_prompt_whose_configuration_is_refused(encoder, make_dataset, tmp_path):
    tuned = tune(encoder, make_dataset(6), "coop", config=TuningConfig(shots=1, epochs=1), progress=False)
    tuned.save_pretrained(tmp_path / "good")
    attach(tmp_path / "good", encoder)
    tuned.encoder.model.peft_config["default"].init_phrase = LONG
    with pytest.raises(ValueError, match="new/adapter_config.json is not saved, as it could not be loaded again"):
        tuned.save_pretrained(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_json_that_is_none(tmp_path):
    deep = []
    for _ in range(40):
        deep = [deep]
    for value in (float("nan"), float("inf"), deep, "\ud800", "x" * 9 * 2**20):
        with pytest.raises(ValueError, match="a.json is not saved|surrogates"):
            write_json(tmp_path / "a.json", value)
    with pytest.raises(ValueError, match="method must be a text"):
        write_scores(tmp_path / "scores.json", [Score(LONG, "test", "accuracy", 1.0)])
    assert nothing(tmp_path)
