"""`compare` on the command line: folders of pictures with and without labels, rows to choose, the gate, and errors."""

import json

import pytest
import torch
from commands import run

from hf_transmiter import AnchorClassifier, Anchors, DualEncoder, TransMiterConfig
from hf_transmiter.cli.compare import _few_shot, _judge, _rows
from hf_transmiter.cli.options import DataOptions, Result
from hf_transmiter.evaluation.compare import Comparison, Row
from hf_transmiter.evaluation.evidence import AT_CHANCE, NOTHING_LEARNT
from hf_transmiter.evaluation.methods import METHODS
from hf_transmiter.hub.scores import Score


NAMES = ("cat", "dog", "car")
ROWS = ("zero-shot strong", "tuned weak", "EFT", "bridge from task images", "image map", "refit", "linear probe")


def rows(*names):
    return [part for name in names for part in ("--methods", name)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def command(out, model_dir, make_dataset):
    """``compare`` on tiny models: a teacher, ``photos/{train,test}/CLASS``, and the same pictures without a word."""
    weak = DualEncoder.from_pretrained(model_dir("clip"))
    text = weak.embed_names(NAMES)
    moved = torch.nn.functional.normalize(text + 0.3 * torch.randn(text.shape), dim=-1)
    config = TransMiterConfig(class_names=list(NAMES), form="linear")
    tensors = {"anchors": text, "class_vectors": moved, "bias": torch.zeros(3)}
    AnchorClassifier(weak, Anchors(NAMES)).add_adapter(config, tensors).save_pretrained(out / "teacher")
    for split, count, seed in (("train", 120, 1), ("test", 102, 0)):
        images = make_dataset(count, NAMES, seed)
        for i, row in enumerate(images):
            folder = out / "photos" / split / NAMES[row["label"]]
            for place in (folder, out / "plain"):
                place.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{i}.png")
            if split == "test":
                row["image"].save(out / "plain" / f"{i}.png")
    models = ("--weak", weak.name_or_path, "--strong", model_dir("siglip", seed=1), "--teacher", out / "teacher")
    return ("compare", *models, "--cache-dir", out / "features")


def test_a_folder_with_labels(command, out):
    data = ("--dataset", out / "photos", "--unlabelled", out / "photos", "--labelled", out / "photos")
    result = run(*command, *data, *rows(*ROWS), "--shots", "48", "--output-dir", out / "report")
    header, _, *table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert header.startswith("| method | accuracy | ECE | seconds | size | any class names | labels |")
    assert [line.split(" | ")[0].strip("| ") for line in table] == list(ROWS)
    verdict = result.stdout.splitlines()[0]
    assert verdict.startswith(("Take refit: refit scores ", "Keep the strong model as it is: refit scores "))
    assert "points on these 102 labelled test images" in verdict
    assert "3 of 3 classes have fewer than 48 labelled pictures, first 'car'" in result.stderr  # they have 40
    report = (out / "report" / "report.md").read_text()
    assert result.stdout.strip() in report and str(out) not in report
    for name in ("ways", "methods", "reliability"):
        assert f"figures/{name}.png" in report and (out / "report" / "figures" / f"{name}.png").is_file()
    found = json.loads((out / "report" / "comparison.json").read_text())
    assert found["advice"] == verdict and [row["name"] for row in found["rows"]] == list(ROWS)
    assert all(set(row["scores"]) == {"accuracy", "ece"} for row in found["rows"])
    assert [row["name"] for row in found["rows"] if not row["needs"]] == ["zero-shot strong"]
    assert "--overwrite" in run(*command, *data, "--output-dir", out / "report", "--quiet", code=1).stderr


def test_a_folder_without_labels(command, out):
    """The names are the teacher's, or those given; what is scored is agreement."""
    data = ("--dataset", out / "plain", "--unlabelled", out / "plain", "--json", "--quiet")
    folder = ("--output-dir", out / "agreement")
    asked = rows("tuned weak", "image map", "refit", "linear probe")
    found = json.loads(run(*command, *data, *asked, *folder).stdout)
    assert list(found)[:3] == ["recommended", "advice", "evidence"] and "gain" not in found["evidence"]
    doubted = found["evidence"]["changed"] < 100 * NOTHING_LEARNT or found["evidence"]["kappa_strong"] < AT_CHANCE
    start = "Keep the strong model as it is: the tun" if doubted else "Take refit, but test it first: without labels"
    assert found["advice"].startswith(start)
    assert (", and its held-out KL to the experts' labels is " in found["advice"]) != doubted
    assert [row["name"] for row in found["rows"]] == ["tuned weak", "image map", "refit"]
    tuned, image_map, refit = found["rows"]
    assert set(tuned["scores"]) == {"agreement", "confidence", "calibration gap"} == set(refit["scores"])
    assert tuned["scores"]["agreement"] == 100 and 0 <= refit["scores"]["agreement"] <= 100
    assert refit["needs"] == ["task images"] and tuned["needs"] == ["weak model at run time"]
    # The image side; beside it the carried class vectors, zero-shot ones, and the bias.
    d, width = 16, 16 + 2 * 16  # of the tiny model, and with what its tower saw
    assert image_map["bytes"] == 4 * (d * width + d + 3 * d + 3 * d + 3)
    assert found["skipped"] == {"linear probe": "it needs labelled images: pass `labelled`"}
    assert "agreement" in (out / "agreement" / "report.md").read_text()
    assert not (out / "agreement" / "figures" / "reliability.png").exists()
    said = run(*command, *data, "--min-gain", "1", code=1).stderr
    assert "the test pictures have no labels: pass a labelled --dataset" in said
    alone = json.loads(run(*command, "--dataset", out / "plain", "--json", "--quiet", *rows("refit")).stdout)
    assert [row["name"] for row in alone["rows"]] == ["refit"] and not alone["skipped"]
    assert alone["rows"][0]["scores"] == refit["scores"]


def test_the_gate(command, out):
    data = ("--dataset", out / "photos", *rows("EFT"), "--json", "--quiet", "--gate", "EFT")
    failed = run(*command, *data, "--min-gain", "100.5", code=1)
    found = json.loads(failed.stdout)  # the result is there all the same
    values = {row["name"]: row["scores"]["accuracy"] for row in found["rows"]}
    assert found["gate"] == {
        "method": "EFT",
        "gain": pytest.approx(values["EFT"] - values["zero-shot strong"]),
        "min_gain": 100.5,
        "passed": False,
    }
    (line,) = failed.stderr.strip().splitlines()
    assert line.startswith("Error: EFT gains ") and line.endswith("fewer than the 100.5 of --min-gain.")
    assert json.loads(run(*command, *data, "--min-gain", "-100").stdout)["gate"]["passed"] is True


def test_the_gate_needs_something_to_look_at():
    def judged(row, **more):
        scores = {"accuracy": Score("zero-shot strong", "test", "accuracy", 50.0)}
        found = Comparison({"zero-shot strong": Row(torch.zeros(1, 1), scores)}, None, ("a",), **more)
        result = Result({}, "")
        _judge(result, found, 0.0, row)
        return result

    assert "no row 'refit' (it is not among --methods)" in judged("refit").failed
    assert "no row 'refit' (it failed: broken)" in judged("refit", skipped={"refit": "it failed: broken"}).failed
    nothing = Comparison({}, None, ("a", "b"))
    for name, value in (("refit", float("nan")), ("zero-shot strong", 50.0)):
        nothing.rows[name] = Row(None, {"accuracy": Score(name, "test", "accuracy", value)})
    _judge(unknown := Result({}, ""), nothing, 0.0, "refit")
    assert "gains +nan points" in unknown.failed
    # What is recommended is to do nothing: that is no gain, even where none is asked for.
    assert "the strong model as it is is recommended" in judged("zero-shot strong").failed
    names = [row.name for row in _rows(["EFT"], 1.0, "refit")]
    assert names == ["EFT", "zero-shot strong", "refit"]
    assert [row.name for row in _rows(None, 1.0, "refit")] == list(METHODS)  # runs anyway
    more = [row.name for row in _rows(None, 1.0, "refit: {solver: ridge}")]
    assert more == [*METHODS, "refit (solver: ridge)"]


def test_labelled_pictures(make_dataset, caplog):
    data, test = DataOptions(), make_dataset(6)
    few = _few_shot(make_dataset(7, seed=1), test, data, 2, 0)
    assert few["label"] == [0, 0, 1, 1, 2, 2] and not caplog.records
    assert len(_few_shot(make_dataset(7, seed=1), test, data, 3, 0)) == 7
    assert "2 of 3 classes have fewer than 3 labelled pictures, first 'dog'" in caplog.text
    with pytest.raises(ValueError, match="the labelled pictures are the test pictures"):
        _few_shot(test, test, data, 2, 0)
    with pytest.raises(ValueError, match="have no labels; their columns are image"):
        _few_shot(make_dataset(6).remove_columns("label"), test, data, 2, 0)


def test_errors(command, out):
    def said(*args):
        (line,) = run(*command, "--dataset", out / "photos", *args, "--quiet", code=1).stderr.strip().splitlines()
        return line

    assert "did you mean 'refit'" in said(*rows("refitt"))
    assert "did you mean 'refit'" in said("--gate", "refitt", "--min-gain", "1")
    assert "pass --min-gain, too" in said("--gate", "refit")
    assert "cannot gain over itself" in said("--gate", "zero-shot strong", "--min-gain", "0")
    assert "tuned weak is no upgrade" in said("--gate", "tuned weak", "--min-gain", "0")
    assert "retune must be one of lora, teacher" in said("--retune", "coop")
    for value in ("nan", "inf"):  # a gain is never below not-a-number
        assert "--min-gain must be a number that is finite" in said("--min-gain", value)
    for option in (("--shots", "3"), ("--seed", "1"), ("--retune", "teacher")):
        assert "pass --labelled, too" in said(*option)
    assert "shots must be at least 1, got -2" in said("--labelled", "sandbox:print", "--shots", "-2")
    nothing = said(*rows("linear probe"), "--output-dir", out / "none")
    assert "no row could be had" in nothing and not (out / "none").exists()
