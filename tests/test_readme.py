"""The README: its snippets run, in order, in one folder; its commands, options and links are what there is.

The snippets speak to the Hub of these tests, where the sandbox's tiny models stand under the names of real ones.
"""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import hf_transmiter
from hf_transmiter import AnchorClassifier, Anchors, DualEncoder, sandbox
from hf_transmiter.cli.main import app
from hf_transmiter.hub.repo import model_location
from hf_transmiter.tuners import TransMiterConfig


ROOT = Path(hf_transmiter.__file__).parents[1]
MOST_LINES = 250
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "tests" / "studies" / "RESULTS.md").read_text(encoding="utf-8")

# Models on the tests' Hub: what stands in for which.
STAND_INS = {
    "openai/clip-vit-base-patch32": "sandbox:weak",
    "openai/clip-vit-base-patch16": "sandbox:weak",
    "openai/clip-vit-large-patch14": "sandbox:strong",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": "sandbox:weak-upgraded",
    "alice/my-tuned-clip-b32": "sandbox:weak-upgraded",
}
# What is changed in a snippet before it runs: the user on the tests' Hub, and shorter runs.
REPLACED = {
    "me/": "alice/",
    'labelled, "contcoop")': 'labelled, "contcoop", config=TuningConfig(epochs=1, shots=1))',
    "import attach, tune": "import TuningConfig, attach, tune",
    "--shots 16": "--shots 4 --epochs 2 --batch-size 8",
    "--unlabelled my_photos --labelled my_photos": "--methods refit --unlabelled my_photos",  # not the slow ones
    "--min-gain 1": "--min-gain -100 --gate refit",  # of tiny models
}
NOT_RUN = {
    "python -m venv": "what CI does before it runs the tests; the demo has a test of its own",
    "python -m pytest": "this is it",
    "pip install": "asks a package registry",
    "hf-transmiter app": "serves until it is stopped; .ci/app-tests has it in a browser",
    "ruff check": "CI does",
    "python tests/run_notebooks.py": "takes minutes; tests/test_notebooks.py does",
    "python tests/making/pretrain.py": "takes hours",
}


def blocks(page: str = README) -> list[tuple[int, str, str]]:
    """Line number, language and text of the fenced blocks."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [(page[: block.start(2)].count("\n"), *block.groups()) for block in found]


def commands(text: str) -> list[str]:
    """Lines of a bash block, put together where they go on, without comments."""
    return [re.sub(r"\s+#.*", "", line) for line in text.replace("\\\n", " ").splitlines()]


def replaced(text: str) -> str:
    for ours, theirs in REPLACED.items():
        text = text.replace(ours, theirs)
    return text


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """What the README takes for granted: pictures in a folder, models on the Hub, and two things somebody shared."""
    monkeypatch.chdir(tmp_path)
    for repo_id, model in STAND_INS.items():
        hub.write(repo_id, {path.name: path.read_bytes() for path in Path(model_location(model)).iterdir()})
    pictures = sandbox.load_dataset("print", "train")
    for label, name in enumerate(("lined", "woven")):
        for split in ("train", "test"):
            Path("my_photos", split, name).mkdir(parents=True)
        rows = [row for row, found in enumerate(pictures["label"]) if found == label]
        for row in rows:
            pictures[row]["image"].save(Path("my_photos", "test" if row in rows[-3:] else "train", name, f"{row}.png"))
    pictures[pictures["label"].index(0)]["image"].save("photo.jpg")
    pets = AnchorClassifier(DualEncoder.from_pretrained("openai/clip-vit-base-patch32"), Anchors(("cat", "dog")))
    pets.add_adapter(TransMiterConfig(class_names=["cat", "dog"], form="linear"))
    pets.push_to_hub("alice/pets-b32")
    return hub


def test_every_snippet_runs(here):
    names, left_out = {}, set()
    for line, language, text in blocks():
        if language == "python":
            exec(compile("\n" * line + replaced(text), "README.md", "exec"), names)
        elif language == "bash":
            for command in commands(text):
                reason = next((start for start in NOT_RUN if command.startswith(start)), None)
                if reason is None:
                    run(replaced(command))
                left_out.add(reason)
    assert left_out - {None} == set(NOT_RUN)
    [[answer]] = names["upgraded"].predict("photo.jpg")
    label, score = re.search(r"# \[\[\{'label': '(\w+)', 'score': ([\d.]+)\}\]\]", README).groups()
    assert (answer["label"], answer["score"]) == (label, pytest.approx(float(score), abs=0.02))
    assert set(here.repos) >= {"alice/textures-l14", "alice/textures-b32", "alice/pets-b32"}


def run(command: str) -> None:
    """A line of the shell, without the shell."""
    words = shlex.split(command)
    assert words.pop(0) == "hf-transmiter", f"say in NOT_RUN why this does not run: {command}"
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{command}\n{result.output}"


def test_nothing_is_replaced_in_vain():
    snippets = "".join(text for _, _, text in blocks())
    assert [text for text in REPLACED if text not in snippets] == []
    assert [name for name in STAND_INS if name.replace("alice/", "me/") not in snippets] == []


def test_commands_and_options():
    """Those of the snippets and of the text exist, and every command there is has its place."""
    known = {name: options(command) for name, command in get_command(app).commands.items()}
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "studies").glob("*.py"))
    anywhere = {"--help", *options_read(scripts)}.union(*known.values())
    pages = (README, RESULTS)
    scripted = [text for page in pages for _, language, text in blocks(page) if language == "bash"]
    shown = [line for text in scripted for line in commands(text)]
    shown += [line for page in pages for line in re.findall(r"`((?:hf-transmiter |--)[^`]*)`", page)]
    named = set()
    for words in (shlex.split(part) for line in shown for part in line.split("&&")):
        taken = anywhere if words[0].startswith("--") else None
        if "hf-transmiter" in words[:-1]:
            name = words[words.index("hf-transmiter") + 1]
            taken = known[name]
            named.add(name)
        if words[0] == "python" and words[1].startswith("tests/"):
            taken = options_read((ROOT / words[1]).read_text(encoding="utf-8"))
        if taken is not None:
            assert [word for word in words if word.startswith("--") and word not in taken] == [], words
    assert named == set(known)


def options(command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def options_read(script: str) -> set[str]:
    """Those of a script, from its text."""
    return set(re.findall(r'"(--[a-z-]+)"', script))


def test_it_is_short():
    assert len(README.splitlines()) <= MOST_LINES


def test_links_and_scripts():
    anchors = [
        "#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    ]
    targets = re.findall(r"\]\((?!https://)([^)]+)\)", README)
    assert [target for target in targets if target not in anchors and not (ROOT / target).is_file()] == []
    texts = [README, RESULTS, *(path.read_text(encoding="utf-8") for path in (ROOT / "hf_transmiter").rglob("*.py"))]
    scripts = {name for text in texts for name in re.findall(r"tests/studies/\w+\.py", text)}
    assert len(scripts) > 5 and [name for name in sorted(scripts) if not (ROOT / name).is_file()] == []
