"""What reaches the terminal: one sentence for what goes wrong, options by their names, nothing that moves it."""

import json
import os
import random
import subprocess
import sys
import time
import unicodedata

import commands
import pytest
import typer
from typer.testing import CliRunner

import hf_transmiter as ht
from hf_transmiter.cli import method
from hf_transmiter.cli.main import app
from hf_transmiter.cli.reporting import in_options, reporting


SPELT = {name: f"--{name.replace('_', '-')}" for name in ("unlabelled", "class_names", "lr", "overwrite", "teacher")}
SPELT["general"] = "--set general=VALUE"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("it needs images: pass `unlabelled`", "it needs images: pass --unlabelled"),
        ("any pictures: pass `general`", "any pictures: pass --set general=VALUE"),
        ("pass class_names in label order.", "pass --class-names in label order."),
        ("lr must be above 0, got -1.", "--lr must be above 0, got -1."),
        ("choose another path or overwrite=True.", "choose another path or --overwrite."),
        ("pass teacher=, or leave class_names out", "pass --teacher, or leave --class-names out"),
        # Not about an option: a key of a file, a word of English, Python, a path.
        ("a.json: class_names[1] must be a name", "a.json: class_names[1] must be a name"),
        ("an unlabelled picture; the teacher is one", "an unlabelled picture; the teacher is one"),
        ("config=TuningConfig(lr=...)", "config=TuningConfig(lr=...)"),
        ("/my/class_names/x.png", "/my/class_names/x.png"),
    ],
)
def test_messages_name_options(text, said):
    assert in_options(text, SPELT) == said
    assert in_options(text, {}) == text


def ended(error: BaseException, capsys, **options) -> tuple[int, str]:
    with pytest.raises(typer.Exit) as caught, reporting(**{"quiet": True, "debug": False, **options}):
        raise error
    return caught.value.exit_code, capsys.readouterr().err


def test_every_error_is_one_sentence(capsys):
    assert ended(ValueError("no\n  good"), capsys) == (1, "Error: no good\n")
    assert ended(FileNotFoundError(2, "No such file", "a\x1bb"), capsys) == (1, "Error: 'a\\x1bb': No such file.\n")
    assert ended(OSError(28, "No space left on device"), capsys) == (1, "Error: No space left on device.\n")
    assert ended(KeyboardInterrupt(), capsys) == (130, "Interrupted.\n")
    for error in (RuntimeError("size mismatch\n for x"), KeyError("x"), MemoryError(), RecursionError("deep")):
        code, said = ended(error, capsys)
        assert code == 1 and said.startswith(f"Error: {type(error).__name__}") and said.count("\n") == 1
        assert said.endswith("(--debug shows where)\n")
    assert len(ended(RuntimeError("tensor " * 10_000), capsys)[1]) < 2000
    with pytest.raises(RuntimeError, match="size"), reporting(quiet=True, debug=True):
        raise RuntimeError("size mismatch")


def test_a_wrong_kind_that_this_package_names_needs_no_traceback(capsys):
    with pytest.raises(typer.Exit), reporting(quiet=True, debug=False):
        ht.transfer("folder", None)
    assert capsys.readouterr().err.startswith("Error: adapter must be an AnchorClassifier, not of the type str: ")


def test_what_strangers_wrote_moves_no_terminal(capsys):
    odd = "a\x1b[31mb\x07c\u202ed\u2066e\x9bf\ufeffg\r"
    code, said = ended(ValueError(odd), capsys)
    assert all(letter == "\n" or unicodedata.category(letter) not in ("Cc", "Cf") for letter in said)
    assert "a\\x1b[31mb\\x07c\\u202ed" in said
    with reporting(quiet=False, debug=False) as fit:
        ht.cli.reporting.logging.getLogger("hf_transmiter.x").warning("left out %s", odd)
        assert fit("café ☕ 日本語 a\u200db\n|") == "café ☕ 日本語 a\u200db\n|"  # what people write stays
    assert "\x1b" not in (said := capsys.readouterr().err) and "left out a\\x1b[31mb" in said


def test_ctrl_c_ends_a_command_quietly(monkeypatch):
    def pressed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(method.ht, "load_encoder", pressed, raising=False)
    done = CliRunner().invoke(app, ["evaluate", "sandbox:weak", "--dataset", "sandbox:print", "--base-model", "x"])
    assert (done.exit_code, done.stderr.splitlines()[-1], done.stdout) == (130, "Interrupted.", "")


def test_json_has_no_nan(monkeypatch):
    monkeypatch.setattr(ht, "ready_configs", lambda: {"a": float("nan")}, raising=False)
    monkeypatch.setattr("hf_transmiter.cli.bench.ht", ht)
    shown = CliRunner().invoke(app, ["bench", "--list", "--json"]).stdout
    assert json.loads(shown, parse_constant=lambda word: pytest.fail(word)) == {"a": None}


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_an_encoding_without_the_letter_costs_no_work(variables, tmp_path):
    (tmp_path / "x.yaml").write_text("☕: 1\n", encoding="utf-8")
    command = [sys.executable, "-m", "hf_transmiter", "tune", "--config", "x.yaml"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(b"Error: x.yaml has unknown options \\u2615; there are: ")
    assert done.stderr.count(b"\n") == 1


def test_closed_streams_and_pipes():
    """`| head`, `>&-` and `2>&-` end no command in a traceback."""
    command = f"{sys.executable} -m hf_transmiter --help"
    for end, code in (("| head -1", 0), (">&-", 0), ("2>&-", 0), ("> /dev/full", 1)):
        done = subprocess.run(["bash", "-c", f"{command} {end}"], capture_output=True, text=True)
        assert done.returncode == code and len(done.stderr.splitlines()) <= 1, (end, done.stderr)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = {
    "bomb": BOMB,
    "merged": MERGED,
    "deep": "a: " + "[" * 500 + "]" * 500,
    "round": "a: &a [*a]",
    "twice": "epochs: 1\nepochs: 2",
    "latin": "title: café".encode("latin-1"),
    "binary": bytes(range(256)),
    "tag": "a: !!python/object/apply:os.system [ls]",
    "date": "title: 2024-99-99",
    "list": "[1, 2]",
    "text": "hello",
    "empty": "",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("command", [("bench",), ("tune", "--model", "m", "--dataset", "d")])
def test_files_that_are_no_config(name, command, tmp_path):
    path, content = tmp_path / f"{name}.yaml", TEXTS[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.monotonic()
    said = commands.error(*command, "--config", path, "--output-dir", tmp_path / "out") if name != "empty" else ""
    assert time.monotonic() - start < 5 and len(said) < 1600
    assert not (tmp_path / "out").exists()


def test_numbers_of_a_file_are_read_as_the_command_line_reads_them(tmp_path):
    path = tmp_path / "x.yaml"
    for value in ("1.5", "true", "[1]", "many", ".nan"):
        path.write_text(f"epochs: {value}\n")
        tune = ["tune", "--model", "m", "--dataset", "d", "--output-dir", "o"]
        done = CliRunner().invoke(app, [*tune, "--config", path])
        assert done.exit_code == 2 and "--epochs" in done.stderr and "Traceback" not in done.stderr, value


ODD = ["", " ", "nothere", "./nothere", "a/b/c", "\x1b[31m", "\u202e", "x" * 300, "\0", "-", "@", "a@b@c", "/dev/null"]
NUMBERS = ["-5", "0", "nan", "inf", "-inf", "1e400", "1.5", "x", "", "99999999999999999999", "true"]
FILES = {
    "empty": b"",
    "zeros.safetensors": bytes(64),
    "x.json": b"{]",
    "names.txt": bytes(range(128, 256)),
    "x.parquet": b"PAR1",
    "adapter/adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "\\u001b[31m"}',
    "adapter/adapter_model.safetensors": bytes(8),
    "model/config.json": b'{"model_type": "bert"}',
    "clip/config.json": b'{"model_type": "clip"}',
    "script/script.py": b"import datasets",
    "photos/a/x.png": b"no picture",
    "here/": b"",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("odd")
    for name, content in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).mkdir() if name.endswith("/") else (place / name).write_bytes(content)
    return place


def _invocations(rng: random.Random, folder, count: int):
    """Commands with some of their options, each with a value that is odd for it."""
    listed = typer.main.get_command(app).commands
    for _ in range(count):
        name = rng.choice([name for name in listed if name not in ("demo", "app")])
        options = [one for one in listed[name].params if one.name not in ("help", "debug", "token")]
        paths = [*ODD, *(str(folder / file) for file in FILES), str(folder), "sandbox:none", "sandbox:print:x"]
        given = []
        for one in options:
            value = rng.choice(NUMBERS if one.bare_type() in ("int", "float") else paths + NUMBERS)
            if one.param_type_name == "argument":
                given.append(value if not value.startswith("-") else "x")
            elif one.required or rng.random() < 0.12:
                given += [one.opts[0]] if getattr(one, "is_flag", False) else [one.opts[0], value]
        yield [name, *given]


def test_wrong_inputs_of_every_command_end_in_a_sentence(folder, request, monkeypatch, caplog):
    """Deterministic; more of them with --slow."""
    monkeypatch.chdir(folder)
    slow = request.config.getoption("--slow")
    for arguments in _invocations(random.Random(0), folder, 600 if slow else 80):
        done = CliRunner(env={"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}).invoke(app, [*arguments, "--quiet"])
        assert done.exception is None or isinstance(done.exception, SystemExit), (arguments, done.exception)
        assert done.exit_code in (0, 1, 2) and "Traceback" not in done.stderr, (arguments, done.stderr)
        lines = done.stderr.strip().splitlines()
        if done.exit_code == 1:
            assert lines[-1].startswith("Error: "), (arguments, done.stderr)
            assert "--debug shows" not in lines[-1], (arguments, lines)
        shown = done.stdout + done.stderr
        assert not any(letter != "\n" and unicodedata.category(letter) in ("Cc", "Cf") for letter in shown), arguments
