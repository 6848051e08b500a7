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

from hf_transmiter.catalog import load_encoder
from hf_transmiter.cli import app
from hf_transmiter.drift import drift_table, feature_drift, parameter_drift
from hf_transmiter.vocabulary import universal_vocabulary


COMMANDS = ("drift",)
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
