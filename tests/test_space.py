"""The demo app as a Space: files that say and run what was asked for."""

import ast

import pytest
from huggingface_hub import RepoCard

from hf_transmiter import __version__
from hf_transmiter.space import GRADIO_VERSION, export_space


SOURCES = {"teacher": "me/tuned", "strong": "openai/clip-vit-large-patch14@abc123", "upgraded": "me/upgraded"}


def arguments(folder, name):
    """Of the call of `name` in the exported app."""
    tree = ast.parse((folder / "app.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name]
    (call,) = calls
    positional = [ast.literal_eval(value) for value in call.args if isinstance(value, (ast.Constant, ast.List))]
    return positional, {item.arg: ast.literal_eval(item.value) for item in call.keywords if item.arg != "examples"}


def test_files(tmp_path):
    folder = export_space(tmp_path / "space", SOURCES, class_names=["cat", 'a "dog"'], examples="me/pictures", top_k=3)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "app.py", "requirements.txt"]
    assert arguments(folder, "load_panels") == ([], {**SOURCES, "class_names": ["cat", 'a "dog"']})
    assert arguments(folder, "example_pictures") == (["me/pictures"], {})
    assert arguments(folder, "build_app")[1] == {"top_k": 3}
    assert (folder / "requirements.txt").read_text() == f"hf-transmiter=={__version__}\n"


def test_metadata(tmp_path):
    card = RepoCard.load(export_space(tmp_path / "space", SOURCES, examples="me/pictures@main") / "README.md")
    assert card.data.to_dict() == {
        "title": "Upgrade of a fine-tuned CLIP: me/upgraded",
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "app_file": "app.py",
        "pinned": False,
        "models": ["me/tuned", "me/upgraded", "openai/clip-vit-large-patch14"],
        "datasets": ["me/pictures"],
        "tags": ["clip", "transmiter"],
    }
    assert "the tuned weak model: `me/tuned`" in card.text


def test_sandbox_models_are_no_repositories(tmp_path):
    folder = export_space(
        tmp_path / "space", {"weak": "sandbox:weak"}, class_names=["a", "b"], examples="sandbox:print"
    )
    data = RepoCard.load(folder / "README.md").data.to_dict()
    assert "models" not in data and "datasets" not in data
    assert arguments(folder, "load_panels")[1]["weak"] == "sandbox:weak"


def test_other_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    export_space(tmp_path, SOURCES)
    before = (tmp_path / "app.py").read_bytes()
    with pytest.raises(FileExistsError, match="app.py exists: choose another folder, or pass --overwrite"):
        export_space(tmp_path, SOURCES, top_k=2)
    assert (tmp_path / "app.py").read_bytes() == before
    export_space(tmp_path, SOURCES, top_k=2, overwrite=True)
    assert arguments(tmp_path, "build_app")[1] == {"top_k": 2}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_a_space_cannot_reach(tmp_path):
    with pytest.raises(ValueError, match="adapter .* is on this machine, where a Space cannot reach it: push it"):
        export_space(tmp_path / "space", {"adapter": str(tmp_path)})
    with pytest.raises(ValueError, match="examples .* is on this machine"):
        export_space(tmp_path / "space", SOURCES, examples=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no upgraded './nothing': neither a local path nor a Hub id"):
        export_space(tmp_path / "space", {"upgraded": "./nothing"})
    with pytest.raises(ValueError, match="at least one"):
        export_space(tmp_path / "space", {})
    assert not (tmp_path / "space").exists()
