"""Commands about an upgrade of the base model, end to end on the sandbox models."""

import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from hf_transmiter.backbone import load_encoder
from hf_transmiter.cli import app
from hf_transmiter.compatibility import score_upgrade, upgrade_table
from hf_transmiter.drift import drift_table, feature_drift, parameter_drift
from hf_transmiter.prompt_tuning import tune
from hf_transmiter.sandbox import load_dataset
from hf_transmiter.settings import TuningConfig
from hf_transmiter.vocabulary import universal_vocabulary


COMMANDS = ("compat", "drift")
PAIR = ("--old", "sandbox:weak", "--new", "sandbox:weak-upgraded")


def run(*args, code=0):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory):
    """What the example of the help leaves and says."""
    folder = tmp_path_factory.mktemp("upgrade") / "drift"
    said = run("drift", *PAIR, "--output-dir", folder, "--json", "--quiet")
    assert said.stderr == ""
    return folder, json.loads(said.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    text = " ".join(run(name, "--help").stdout.replace("│", " ").split())
    assert f"Example: hf-transmiter {name} --old sandbox:weak --new sandbox:weak-upgraded --output-dir" in text
    assert "--json" in text and "--config" in text and "--overwrite" in text
    assert re.search(rf"│ {name} ", run("--help").stdout)


def test_help_is_cheap():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from hf_transmiter.cli import app\n"
        f"for name in {COMMANDS}:\n"
        "    assert CliRunner().invoke(app, [name, '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_drift_numbers_are_those_of_the_api(upgraded):
    _, found = upgraded
    pair = [load_encoder(name) for name in PAIR[1::2]]
    names = universal_vocabulary(200)
    parameters, features = parameter_drift(*pair), feature_drift(*pair, names)
    assert found["class_names"] == list(names) and found["remark"] is None
    for rows, key in ((parameters, "parameters"), (features, "features")):
        assert [row["name"] for row in found[key]] == [row.name for row in rows]
        for saved, row in zip(found[key], rows, strict=True):
            assert saved == pytest.approx(asdict(row))
    # The upgrade trained on from the weak text tower: it moved, but is the same tower still.
    assert all(0 < row.relative < 0.5 for row in parameters)
    assert all(0.3 < row.similarity < 1 for row in features)


def test_drift_leaves_numbers_table_and_figure(upgraded):
    folder, found = upgraded
    assert sorted(path.name for path in folder.iterdir()) == ["drift.json", "drift.md", "drift.png", "settings.yaml"]
    assert [path.name for path in folder.parent.iterdir()] == ["drift"]
    assert {"output_dir": str(folder), **json.loads((folder / "drift.json").read_text())} == found
    text = (folder / "drift.md").read_text()
    assert "sandbox:weak to sandbox:weak-upgraded" in text and "![drift](drift.png)" in text
    pair = [load_encoder(name) for name in PAIR[1::2]]
    assert drift_table(parameter_drift(*pair)) in text
    with Image.open(folder / "drift.png") as image:
        assert image.width > image.height
    assert yaml.safe_load((folder / "settings.yaml").read_text())["new"] == "sandbox:weak-upgraded"


def test_an_existing_folder_stays(upgraded):
    folder, _ = upgraded
    before = (folder / "drift.json").read_bytes()
    names = ("--class-names", "red disc,blue ring,green star", "--template", "a {}.")
    refused = run("drift", *PAIR, *names, "--output-dir", folder, "--quiet", code=1)
    assert "--overwrite" in refused.stderr and (folder / "drift.json").read_bytes() == before
    other = folder.with_name("other")
    run("drift", *PAIR, *names, "--output-dir", other, "--quiet")
    said = run("drift", *PAIR, *names, "--output-dir", other, "--overwrite", "--quiet").stdout
    assert "| class vector |" in said and str(other / "drift.md") in said
    found = json.loads((other / "drift.json").read_text())
    assert found["class_names"] == ["red disc", "blue ring", "green star"] and found["templates"] == ["a {}."]


def test_models_of_other_sizes_are_compared_by_similarity(tmp_path):
    names = "red disc,striped blue ring,faded green star,one heart"
    args = ("--old", "sandbox:weak", "--new", "sandbox:strong", "--class-names", names)
    said = run("drift", *args, "--output-dir", tmp_path / "drift", "--quiet").stdout
    assert "'token table'" in said and "(660, 64)" in said and "(660, 96)" in said
    found = json.loads((tmp_path / "drift" / "drift.json").read_text())
    assert found["parameters"] is None and found["remark"].lower() in said.lower()
    assert all(row["absolute"] is None and 0 < row["similarity"] <= 1 for row in found["features"])
    assert (tmp_path / "drift" / "drift.png").is_file()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Saved prompts: CoOp's of two seeds in one folder, MaPLe's in one of its own; a cache of embeddings beside."""
    folder = tmp_path_factory.mktemp("prompts")
    weak, train = load_encoder("sandbox:weak"), load_dataset("jargon", "train")
    for name, settings in (("coop/seed-0", {}), ("coop/seed-1", {"seed": 1}), ("maple", {"method": "maple"})):
        options = {"method": "coop", "optimizer": "adamw", "lr": 1e-2, "epochs": 1, "batch_size": 36, "shots": 1}
        config = TuningConfig(**{**options, **settings})
        tuned = tune(weak, train, config=config, progress=False, cache_dir=folder / "cache")
        tuned.save_pretrained(folder / name)
    return folder


def compat(folder, *args, code=0):
    pictures = ("--dataset", "sandbox:jargon", "--max-images", 100, "--split", "validation")
    return run("compat", *PAIR, *pictures, "--cache-dir", folder / "cache", *args, "--quiet", code=code)


@pytest.fixture(scope="module")
def judged(prompts):
    folder = prompts / "report"
    adapters = ("--adapters", prompts / "coop", "--adapters", prompts / "maple")
    said = compat(prompts, *adapters, "--train", "sandbox:jargon", "--map-tokens", "--output-dir", folder, "--json")
    assert said.stderr == ""
    return folder, json.loads(said.stdout)


def test_compat_numbers_are_those_of_the_api(prompts, judged):
    _, found = judged
    pictures = load_dataset("jargon", "validation").shuffle(seed=0).select(range(100))
    rows = score_upgrade(
        [prompts / "coop" / "seed-0", prompts / "coop" / "seed-1", prompts / "maple"],
        *(load_encoder(name) for name in PAIR[1::2]),
        pictures,
        train=load_dataset("jargon", "train"),
        mapped=True,
        output_dir=judged[0],
        progress=False,
        cache_dir=prompts / "cache",
    )
    assert [row.method for row in rows] == ["zero-shot", "coop", "coop, mapped", "maple"]
    assert rows[1].seeds == (0, 1) and len(rows[1].retrained) == 2 and rows[3].refused
    assert found["rows"] == json.loads(json.dumps([asdict(row) for row in rows]))
    assert (found["num_images"], found["split"], found["seen_classes"]) == (100, "validation", [])
    assert upgrade_table(rows) in (judged[0] / "compat.md").read_text()


def test_compat_leaves_numbers_table_figure_and_adapters(judged):
    folder, found = judged
    names = ["compat.json", "compat.md", "compat.png", "retrained"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert len(list((folder / "retrained").iterdir())) == 3
    assert {"output_dir": str(folder), **json.loads((folder / "compat.json").read_text())} == found
    text = (folder / "compat.md").read_text()
    assert text.startswith("# Prompts from sandbox:weak to sandbox:weak-upgraded, on sandbox:jargon\n")
    assert "100 images (validation)." in text and "![compatibility](compat.png)" in text
    with Image.open(folder / "compat.png") as image:
        assert image.width > image.height


def test_compat_again_trains_nothing(prompts, judged, monkeypatch):
    folder, found = judged
    before = (folder / "compat.json").read_bytes()
    args = ("--adapters", prompts / "coop", "--train", "sandbox:jargon", "--output-dir", folder)
    refused = compat(prompts, *args, code=1)
    assert "--overwrite" in refused.stderr and (folder / "compat.json").read_bytes() == before
    monkeypatch.setattr("hf_transmiter.retraining.tune", lambda *args, **kwargs: pytest.fail("trained again"))
    said = compat(prompts, *args, "--overwrite").stdout
    assert "| coop |" in said and "maple" not in said and str(folder / "compat.md") in said
    assert json.loads((folder / "compat.json").read_text())["rows"] == found["rows"][:2]


def test_compat_of_base_and_novel(prompts, tmp_path):
    seen = tmp_path / "seen.txt"
    seen.write_text("\n".join(load_dataset("jargon", "validation").features["label"].names[:18]))
    args = ("--adapters", prompts / "maple", "--seen-classes", seen, "--output-dir", tmp_path / "report")
    said = compat(prompts, *args).stdout
    assert "| old model base | old model novel | old model hm |" in said and "refused: the image tower" in said
    found = json.loads((tmp_path / "report" / "compat.json").read_text())
    assert len(found["seen_classes"]) == 18 and set(found["rows"][1]["halves"]) == {"old"}


def test_compat_says_what_is_wrong(prompts, tmp_path):
    (tmp_path / "empty").mkdir()
    report = ("--output-dir", tmp_path / "report")
    assert "there is no adapter in" in compat(prompts, "--adapters", tmp_path / "empty", *report, code=1).stderr
    said = compat(prompts, "--adapters", prompts / "maple", "--seen-classes", "unicorn", *report, code=1).stderr
    assert "'unicorn' is not among the 36 class names" in said and not (tmp_path / "report").exists()
