"""Every notebook runs from top to bottom in a fresh kernel, and what is stored in it is what it says today."""

import json
import os
import re

import nbformat
import pytest
from run_notebooks import FOLDER, SHARING, notebooks, picture, reader, run, shape


# Of this machine or another: folders, and the Hub of the tests.
PLACES = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|usr|var|work|opt|mnt|private|Users|content)/|[A-Z]:\\|127\.0\.0\.1|localhost"
)
AGAIN = "if that is as it should be, `python tests/run_notebooks.py` stores what the notebooks say now"

every_notebook = pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)


def texts(notebook):
    """Everything that was printed or shown as text."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield output.get("text", "")
            yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def streams(notebook):
    return {
        output.name for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in notebooks() if p.name != SHARING], ids=lambda path: path.stem)
def test_runs_offline_and_says_what_is_stored(path, tmp_path):
    (tmp_path / "cwd").mkdir()
    ran = run(path, tmp_path / "cwd", {**os.environ, **reader(str(tmp_path / "home"))})
    assert shape(ran) == shape(nbformat.read(path, as_version=4)), AGAIN
    assert not list((tmp_path / "cwd").iterdir())  # nothing is left beside the notebook


@pytest.mark.slow
def test_sharing_over_http(hub, tmp_path):
    ran = run(FOLDER / SHARING, tmp_path, hub.environment())
    assert shape(ran) == shape(nbformat.read(FOLDER / SHARING, as_version=4)), AGAIN
    assert all(repo.private for repo in hub.repos.values())
    assert hub.titles("alice/jargon-adapter") == [
        "Upload adapter with hf_transmiter",
        "Upload adapter with hf_transmiter",
    ]
    assert "bridge.safetensors" in hub.files("alice/weak-to-strong")


@pytest.mark.slow
def test_sharing_without_a_login(tmp_path):
    (tmp_path / "cwd").mkdir()
    ran = run(FOLDER / SHARING, tmp_path / "cwd", {**os.environ, **reader(str(tmp_path / "home"))})
    assert streams(ran) == {"stdout"} and "not logged in" in next(texts(ran))
    assert len(list(texts(ran))) == len(list(texts(nbformat.read(FOLDER / SHARING, as_version=4))))


@every_notebook
def test_what_is_stored_is_complete_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata for cell in notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert streams(notebook) <= {"stdout"}  # no warning, no progress bar
    found = PLACES.findall(json.dumps([cell.source for cell in notebook.cells])) + [
        place for text in texts(notebook) for place in PLACES.findall(text)
    ]
    assert not found
    assert path.stat().st_size < 400_000


@every_notebook
def test_figures_are_stored(path):
    outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", ())]
    pictures = [picture(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    assert pictures
    for drawn in pictures:
        assert min(drawn.size) >= 200 and len(drawn.convert("RGB").getcolors(2**24)) > 10


@every_notebook
def test_links_between_notebooks_lead_somewhere(path):
    text = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https:)([^)]+)\)", text)
    assert links and all((FOLDER / link).is_file() for link in links)


def shape_of(output):
    return shape(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])]))


def test_shape_forgets_numbers_and_nothing_else():
    def said(text, kind="stdout"):
        return shape_of(nbformat.v4.new_output("stream", name=kind, text=text))

    assert said("right: 61.4 % (+35.0), torch 2.13.0+cpu") == said("right:  8.0 % (-1.5), torch 3.0.1")
    assert said("| **70.8** | 3e-07 |") == said("| 70.8 | 0 |")
    assert said("right: 61.4 %") != said("wrong: 61.4 %") != said("wrong: 61.4 %", "stderr")


def test_shape_of_a_card_is_its_headings():
    def shown(text):
        return shape_of(nbformat.v4.new_output("display_data", data={"text/markdown": text}))

    assert shown("> # Card\n> \n> old words") == shown("> # Card\n> new words") != shown("> # Other\n> new words")
    assert shown("# Card\n\nold words") != shown("# Card\n\nnew words")
