"""The command `app` as far as it goes without gradio; with it: tests/app."""

import json
import re
import sys

from typer.testing import CliRunner

from hf_transmiter.cli import app
from hf_transmiter.panels import TOP_K


def run(*args, code=0):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["app", *(str(arg) for arg in args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def error(*args) -> str:
    (line,) = run(*args, "--quiet", code=1).stderr.strip().splitlines()
    assert line.startswith("Error: ")
    return line


def test_help():
    text = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "Example: hf-transmiter app --demo out" in text and "pip install 'hf-transmiter[app]'" in text
    assert "--share" not in text and re.search(rf"Names per model. \[default: {TOP_K}\]", text)


def test_export(tmp_path):
    names = ("--class-names", "cat,dog", "--template", "a {}.", "--top-k", "2")
    models = ("--weak", "sandbox:weak", "--upgraded", "me/upgraded")
    said = run(*models, *names, "--export", tmp_path / "space", "--json").stdout
    assert json.loads(said) == {"folder": str(tmp_path / "space"), "weak": "sandbox:weak", "upgraded": "me/upgraded"}
    text = (tmp_path / "space" / "app.py").read_text()
    assert "class_names=['cat', 'dog']" in text and "templates=['a {}.']" in text and "top_k=2" in text
    assert "--overwrite" in error(*models, "--export", tmp_path / "space")
    run(*models, "--export", tmp_path / "space", "--overwrite")
    assert "class_names" not in (tmp_path / "space" / "app.py").read_text()


def test_what_goes_wrong(tmp_path, monkeypatch):
    assert "name at least one of weak" in error("--port", 7861)
    assert "run hf-transmiter demo --output-dir" in error("--demo", tmp_path)
    for folder in ("adapter", "strong_adapter"):
        (tmp_path / "print" / folder).mkdir(parents=True)
        (tmp_path / "print" / folder / "adapter_config.json").write_text("{}")
    assert "leave out --strong" in error("--demo", tmp_path, "--strong", "sandbox:strong")
    assert "push it to the Hub" in error("--demo", tmp_path, "--export", tmp_path / "space")
    monkeypatch.setitem(sys.modules, "gradio", None)
    names = ("--class-names", "cat,dog")
    assert "pip install 'hf-transmiter[app]'" in error("--weak", "sandbox:weak", *names)
