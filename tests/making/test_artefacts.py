"""The sandbox's artefacts, made once: their cards are those in model_cards/, and every snippet in them runs."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer
from artefacts import ARTEFACTS, make_artefacts
from huggingface_hub import ModelCard

from hf_transmiter.cli.main import app
from hf_transmiter.hub.scores import read_scores
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.saved import load_classifier
from hf_transmiter.sandbox.data import load_dataset


CARDS = Path(__file__).parents[2] / "model_cards"
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?![\w.]*[a-zA-Z_])")
every_artefact = pytest.mark.parametrize("name", ARTEFACTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the artefacts, and with what the snippets name."""
    folder = tmp_path_factory.mktemp("artefacts")
    make_artefacts(folder, progress=False)
    load_dataset("jargon", "test")[0]["image"].save(folder / "photo.jpg")
    (folder / "user").mkdir()
    shutil.copytree(folder / "jargon-adapter", folder / "user" / "adapter")
    return folder


def split_numbers(text: str) -> tuple[str, list[float]]:
    """A card without what differs from machine to machine, and its numbers."""
    text = re.sub(r"\| made with \| .*", "| made with | VERSIONS |", text)
    text = re.sub(r"`[0-9a-f]{16}`", "`DIGEST`", text).replace("**", "")
    return NUMBER.sub("#", text), [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@every_artefact
def test_the_stored_card_is_what_comes_out(made, name):
    """Exact, but for versions, digests and the last bits of what was measured; to renew them all:
    ``python tests/making/artefacts.py --output-dir out/artefacts --cards model_cards``."""
    stored, fresh = (
        split_numbers(path.read_text(encoding="utf-8")) for path in (CARDS / f"{name}.md", made / name / "README.md")
    )
    assert fresh[0] == stored[0]
    assert fresh[1] == pytest.approx(stored[1], rel=0.03, abs=0.5)
    assert {path.stem for path in CARDS.glob("*.md")} == set(ARTEFACTS)


@every_artefact
def test_every_snippet_runs(made, name, monkeypatch, capsys):
    monkeypatch.chdir(made)
    found = re.findall(r"^```python\n(.*?)^```$", (made / name / "README.md").read_text(), re.M | re.S)
    assert found
    for snippet in found:
        exec(compile(snippet, f"{name}.md", "exec"), {})
    names = load_dataset("jargon", "test").features["label"].names
    printed = capsys.readouterr().out
    assert printed.count("'label': ") >= 3 and any(name in printed for name in names)


@every_artefact
def test_every_command_is_one(made, name):
    commands = typer.main.get_command(app)
    found = re.findall(r"^hf-transmiter (.*)$", (made / name / "README.md").read_text(), re.M)
    assert found
    for line in found:
        command, *arguments = shlex.split(line)
        commands.commands[command].make_context(command, arguments)  # refuses unknown and missing options


def test_snippets_answer_as_the_artefact_does(made):
    """The number in the card is the artefact's own."""
    test = load_dataset("jargon", "test")
    classifier = AnchorClassifier.from_pretrained(made / "jargon-strong")
    said = [row[0]["label"] for row in classifier.predict(test[:500]["image"])]
    hits = [test.features["label"].names[label] == name for label, name in zip(test[:500]["label"], said, strict=True)]
    [score] = [row for row in read_scores(made / "jargon-strong" / "scores.json") if row.method == "this model"]
    assert abs(100 * sum(hits) / len(hits) - score.value) < 5
    [result] = ModelCard.load(made / "jargon-strong" / "README.md").data.eval_results
    assert result.metric_value == round(score.value, 2) and score.num_images == len(test)


def test_the_artefacts_belong_together(made):
    """The adapter has the tuned model's answers, and the upgrade is better than either."""
    images = load_dataset("jargon", "test")[:16]["image"]
    tuned, adapter = (
        load_classifier(str(made / "jargon-coop")),
        AnchorClassifier.from_pretrained(made / "jargon-adapter"),
    )
    pixels = adapter.encoder.preprocess(images)
    with torch.no_grad():
        pair = [model(pixel_values=pixels).logits_per_image for model in (tuned, adapter)]
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-4, atol=1e-3)
    values = {row.method: row.value for row in read_scores(made / "jargon-strong" / "scores.json")}
    assert values["this model"] > values["tuned weak"] > values["zero-shot strong"]


def test_existing_artefacts_are_not_replaced(made):
    with pytest.raises(FileExistsError, match="choose another --output-dir"):
        make_artefacts(made)
