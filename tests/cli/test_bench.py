"""The command `bench`: everything but what `test_bench` says of the run itself."""

import json
import subprocess
import sys

import bench_folder
import pytest
import yaml
from typer.testing import CliRunner

from hf_transmiter.bench.config import ready_configs
from hf_transmiter.cli.main import app


def run(*args, code=0):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def config(tmp_path_factory, make_dataset):
    folder = tmp_path_factory.mktemp("bench")
    content = bench_folder.write(folder, make_dataset)
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump({**content, "seeds": [1], "variants": ["zero-shot strong", "EFT"]}))
    return path


def test_help():
    text = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "Example: hf-transmiter bench --config sandbox-smoke --output-dir out/bench" in text
    assert "YAML file of a bench, or the name of a ready one" in text and "--dry-run" in text
    assert "with any of these options" not in text  # the other commands' --config


def test_help_is_cheap():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from hf_transmiter.cli.main import app\n"
        "assert CliRunner().invoke(app, ['bench', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_list():
    lines = run("--list").stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == list(ready_configs())
    assert json.loads(run("--list", "--json").stdout) == ready_configs()


def test_dry_run(tmp_path):
    options = ("--config", "base-to-novel-promptsrc", "--output-dir", tmp_path / "out", "--dry-run")
    text = run(*options, "--datasets", "eurosat", "--datasets", "dtd", "--seeds", 1, "--seeds", 2).stdout
    assert text.startswith("4 cells: 0 done, 4 to do (0 failed before).\n")
    assert "\nTune openai/clip-vit-base-patch16 (PromptSRC) on eurosat: 2 runs\n" in text
    plan = json.loads(run(*options, "--datasets", "eurosat", "--shots", 1, "--shots", 2, "--json").stdout)
    assert (plan["total"], plan["done"], plan["failed"]) == (6, 0, 0)
    # Three seeds of one and of two shots, for the tuned model and for the ceiling.
    models = ("openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14")
    assert plan["tunings"] == [[model, "PromptSRC", "eurosat", 6] for model in models]
    assert not (tmp_path / "out").exists()


def test_run_and_report(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ("--config", config, "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--quiet")
    found = json.loads(run(*options, "--json").stdout)
    assert (found["total"], found["done"], found["made"], found["failed"]) == (1, 1, 1, {})
    text = run(*options).stdout
    assert text == f"1 of 1 cells are done, 0 of them now.\nReport: {tmp_path / 'out' / 'report.md'}\n"
    written = (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "out" / "report.md").unlink()
    assert run(*options, "--report").stdout == f"Report: {tmp_path / 'out' / 'report.md'}\n"
    assert (tmp_path / "out" / "report.md").read_text() == written
    # A cell that fails: the others are done, the exit code says it.
    failed = run(*options, "--shots", 3, "--shots", 9, code=1).stdout
    assert (
        "1 of 2 cells are done, 0 of them now.\nFailed: colours, CoOp, 9 shots, seed 1: 9 images per class" in failed
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--config and --output-dir are needed; --list names the ready configurations"),
        (("--config", "sandbox-smok"), "--config and --output-dir are needed"),
        (("--config", "sandbox-smok", "--output-dir", "out"), "did you mean 'sandbox-smoke'"),
        (("--config", "sandbox-smoke", "--output-dir", "out", "--datasets", "dtt"), "there is no dataset 'dtt'"),
        (
            ("--config", "sandbox-smoke", "--output-dir", "out", "--shots", 0),
            "shots must be whole numbers of at least 1",
        ),
        (("--config", "sandbox-smoke", "--output-dir", "out", "--report"), "there is no finished cell"),
        (("--config", "sandbox-smoke", "--output-dir", "out", "--report", "--dry-run"), "--dry-run or --report"),
    ],
)
def test_what_is_wrong_is_said(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stderr = run("--quiet", *args, code=1).stderr
    assert stderr.startswith("Error: ") and message in stderr and stderr.count("\n") == 1
