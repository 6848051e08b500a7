"""The command `app` as far as it goes without gradio; with it: tests/app."""

import sys

from typer.testing import CliRunner

from hf_transmiter.cli.main import app


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
    assert "Example: hf-transmiter app --tuned out/" in text and "pip install 'hf-transmiter[app]'" in text
    assert "--share" not in text


def test_what_goes_wrong(monkeypatch):
    assert "name at least one of weak" in error("--examples", "sandbox:print")
    monkeypatch.setitem(sys.modules, "gradio", None)
    names = ("--class-names", "cat,dog")
    assert "pip install 'hf-transmiter[app]'" in error("--weak", "sandbox:weak", *names)
