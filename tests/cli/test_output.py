"""Where commands write: what is tried before the work, what arrives meanwhile, and what an interrupted run left."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny_models
from commands import error, run
from safetensors.torch import load_file

import hf_transmiter as ht
from hf_transmiter.hub.files import claim
from hf_transmiter.method import tune as tuning


NAMES = ("cat", "dog", "car")


@pytest.fixture(scope="module")
def here(tmp_path_factory, make_dataset):
    """Tiny models, pictures, and what a chain of commands made of them."""
    folder = tmp_path_factory.mktemp("output")
    for seed, name in enumerate(("weak", "strong")):
        tiny_models.save("clip", folder / name, seed)
    for seed, name in enumerate(("pictures", "others")):
        make_dataset(24, NAMES, seed).save_to_disk(folder / name)
    run(*tune(folder), "--output-dir", folder / "tuned", "--quiet")
    for name, solver in (("adapter", "image_map"), ("second", "ridge")):
        run(*extract(folder), "--solver", solver, "--output-dir", folder / name, "--quiet")
    return folder


def tune(here, dataset="pictures", *more):
    data = ("--dataset", here / dataset, "--cache-dir", here / "cache")
    return ("tune", "--model", here / "weak", *data, "--shots", "4", "--augment", "none", "--epochs", "5", *more)


def extract(here, *more):
    data = ("--dataset", here / "pictures", "--cache-dir", here / "cache")
    return ("extract", "--weak", here / "weak", "--teacher", here / "tuned", *data, *more)


def commands(here):
    pair, data = ("--weak", here / "weak", "--strong", here / "strong"), ("--dataset", here / "pictures")
    data += ("--cache-dir", here / "cache")
    return {
        "tune": (*tune(here), "--output-dir"),
        "extract": (*extract(here), "--output-dir"),
        "transfer": ("transfer", here / "adapter", *pair[2:], *data, "--output-dir"),
        "bridge": ("bridge", *pair, *data, "--output"),
        "compare": ("compare", *pair, "--teacher", here / "tuned", *data, "--methods", "EFT", "--output-dir"),
        "evaluate": ("evaluate", here / "adapter", *data, "--analyse", "--output-dir"),
    }


WRITERS = ("tune", "extract", "transfer", "bridge", "compare", "evaluate")


def tree(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Before the work


@pytest.fixture
def no_work(monkeypatch):
    """No model is loaded."""

    def refuse(*_, **__):
        raise AssertionError("the work began")

    for name in ("load_encoder", "load_teacher", "load_teacher_and_weak", "load_classifier"):
        monkeypatch.setattr(ht, name, refuse, raising=False)


@pytest.mark.parametrize("name", WRITERS)
def test_an_unusable_place_is_told_at_once(here, tmp_path, no_work, name):
    command = commands(here)[name]
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("mine")
    assert "it is a link to" in error(*command, tmp_path / "link")
    assert "there is a file where a folder must be" in error(*command, tmp_path / "file" / "out")
    assert "File name too long" in error(*command, tmp_path / ("x" * 300))
    assert "was not written by this command" in error(*command, tmp_path / "file")
    with claim(tmp_path / "out"):
        assert "another run is writing to" in error(*command, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_mount_point_is_told_at_once(here, tmp_path, no_work):
    (tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / "disk"]).returncode:
        pytest.skip("no mounts here")
    try:
        assert "a mount point" in error(*commands(here)["extract"], tmp_path / "disk")
        assert list((tmp_path / "disk").iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_the_current_folder_is_not_replaced(here, tmp_path, no_work, monkeypatch):
    """Whoever is in it would be nowhere."""
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    for place in ("here", "here/deeper"):
        monkeypatch.chdir(tmp_path / place)
        assert "it is the current folder" in error(*commands(here)["extract"], ".")
    assert "it is the current folder" in error(*commands(here)["extract"], "..")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("what", ["tuned", "adapter", "pictures", "weak", "bridge", "report", "plain"])
def test_only_what_a_command_writes_is_replaced(here, tmp_path, no_work, name, what):
    """With --overwrite, and if it is no input of the same run."""
    place = tmp_path / what
    if what in ("bridge", "report", "plain"):
        place.mkdir()
        mark = {"bridge": "bridge.safetensors", "report": "comparison.json", "plain": "settings"}[what]
        (place / mark).write_text("{}")
    else:
        shutil.copytree(here / what, place)
    own = {"tuned": ["tune"], "adapter": ["extract", "transfer"], "bridge": ["bridge"], "report": ["compare"]}
    before = tree(tmp_path)
    if name in own.get(what, ()):
        assert "or pass --overwrite" in error(*commands(here)[name], place)
        with pytest.raises(AssertionError, match="the work began"):
            run(*commands(here)[name], place, "--overwrite")
    else:
        assert "was not written by this command" in error(*commands(here)[name], place, "--overwrite")
    assert tree(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == [what]


def test_an_input_is_not_replaced(here, tmp_path, no_work):
    for name, options in (("adapter", ()), ("second", ("--bridge", here / "second" / "bridge"))):
        (here / "second" / "bridge").touch()
        transfer = ("transfer", here / "adapter", "--strong", here / "strong", *options)
        assert "is read by this run" in error(*transfer, "--output-dir", here / name, "--overwrite")
    taught = (*tune(here), "--teacher", here / "tuned", "--output-dir", here / "tuned", "--overwrite")
    assert "is read by this run" in error(*taught)
    (here / "second" / "bridge").unlink()


def test_a_file_that_is_no_bridge_is_not_replaced(here, tmp_path):
    place = tmp_path / "model.safetensors"
    shutil.copyfile(here / "adapter" / "adapter_model.safetensors", place)
    before = place.read_bytes()
    assert "was not written by this command" in error(*commands(here)["bridge"], place, "--overwrite")
    assert place.read_bytes() == before


# Meanwhile


@pytest.mark.parametrize("name", WRITERS)
def test_what_arrives_meanwhile_stays(here, tmp_path, monkeypatch, name):
    place, real = tmp_path / "out", ht.replace_folder

    def late(path, write, replaces=()):
        (place / "notes").mkdir(parents=True)
        (place / "notes" / "thesis.txt").write_text("years of work")
        real(path, write, replaces)

    monkeypatch.setattr(ht, "replace_folder", late, raising=False)
    said = run(*commands(here)[name], place).stderr
    assert "had other files by now, which are kept: notes." in said
    assert (place / "notes" / "thesis.txt").read_text() == "years of work" and len(list(place.iterdir())) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_arrives_under_our_name_stays(here, tmp_path, monkeypatch):
    place, real = tmp_path / "out", ht.replace_folder

    def late(path, write, replaces=()):
        place.mkdir()
        (place / "adapter_config.json").write_text("{}")
        real(path, write, replaces)

    monkeypatch.setattr(ht, "replace_folder", late, raising=False)
    said = error(*extract(here), "--output-dir", place)
    assert f"{place / 'adapter_config.json'} arrived while this was made, and stays: the result is in" in said
    assert tree(place) == {"adapter_config.json": b"{}"}
    assert tree(tmp_path / "out-2").keys() == tree(here / "adapter").keys()


def test_a_link_to_another_disk_stays(here, tmp_path):
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "big")
    run(*extract(here), "--output-dir", tmp_path / "out", "--quiet")
    run(*extract(here, "--solver", "ridge"), "--output-dir", tmp_path / "out", "--overwrite", "--quiet")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "big" / "adapter_config.json").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["big"]


def test_files_are_for_everybody(here, tmp_path):
    """safetensors, PEFT and temporary folders would have them for their owner alone."""
    place = tmp_path / "out"
    run(*tune(here), "--output-dir", place, "--quiet")
    (tmp_path / "usual").touch()
    modes = {path.stat().st_mode for path in place.rglob("*") if path.is_file()}
    modes |= {path.stat().st_mode for path in (here / "cache").iterdir()}
    assert modes == {(tmp_path / "usual").stat().st_mode}


# At the end


def full(folder, *_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_no_training(here, tmp_path, monkeypatch):
    """The checkpoint is there until the result is, and the next run trains one epoch."""
    place, steps, losses = tmp_path / "out", [], tuning.losses
    run(*tune(here), "--output-dir", tmp_path / "whole", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr("hf_transmiter.method.classifier.write_card", full)
        said = error(*tune(here), "--output-dir", place)
    assert f"{place} cannot be written: No space left on device." in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.checkpoint.safetensors", "whole"]
    monkeypatch.setattr(tuning, "losses", lambda *args: (steps.append(1), losses(*args))[1])
    run(*tune(here), "--output-dir", place, "--quiet")
    assert len(steps) == 1
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out"))
    assert all((first[key] == again[key]).all() for key in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def interrupted(here, place, monkeypatch, *more):
    """Kills a `tune` in its third epoch."""
    losses, steps = tuning.losses, []

    def stop(*args):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return losses(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "losses", stop)
        run(*tune(here, "pictures", *more), "--output-dir", place, "--quiet", code=130)
    assert (place.parent / f".{place.name}.checkpoint.safetensors").is_file()


@pytest.mark.parametrize(
    ("dataset", "more", "other"),
    [
        ("others", (), "images"),
        ("pictures", ("--template", "a drawing of a {}."), "templates, zero_shot"),
        ("pictures", ("--class-names", "car,cat,dog"), "class_names"),
        ("pictures", ("--lr", "0.5"), "lr"),
        ("pictures", ("--adapter", "r=2"), "adapter"),
        ("pictures", ("--model", "strong"), "images, model"),
        ("pictures", ("--teacher", "tuned"), ""),
    ],
    ids=["dataset", "templates", "names", "settings", "adapter", "model", "teacher"],
)
def test_another_run_begins_anew(here, tmp_path, monkeypatch, dataset, more, other):
    """And ends as it would have without the checkpoint of the first."""
    place = tmp_path / "out"
    more = tuple(here / word if word in ("strong", "tuned") else word for word in more)
    command = tune(here, dataset, *more)
    if "--teacher" in more:  # all of the pictures, without labels
        command = tuple(word for word in command if word not in ("--shots", "4"))
    interrupted(here, place, monkeypatch)
    said = run(*command, "--output-dir", place).stderr
    assert "is of another run (other " in said and "): training begins anew." in said
    assert all(word in said for word in other.split(", "))
    run(*command, "--output-dir", tmp_path / "alone", "--quiet")
    found, alone = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "alone"))
    assert all((found[key] == alone[key]).all() for key in alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"", lambda content: b"x" * 99])
def test_a_damaged_checkpoint_is_no_traceback(here, tmp_path, monkeypatch, damage):
    place, checkpoint = tmp_path / "out", tmp_path / ".out.checkpoint.safetensors"
    interrupted(here, place, monkeypatch)
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    said = run(*tune(here), "--output-dir", place).stderr
    assert f"the checkpoint {checkpoint} is damaged: training begins anew." in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_several_adapters_are_kept_by_content(here, tmp_path):
    """An adapter, bridge or model that changed under its name is carried over again."""
    for name in ("adapter", "second", "strong"):
        shutil.copytree(here / name, tmp_path / name)
    run(*commands(here)["bridge"], tmp_path / "bridge", "--quiet")
    transfer = ("transfer", tmp_path / "adapter", tmp_path / "second", "--strong", tmp_path / "strong", "--json")
    transfer += ("--bridge", tmp_path / "bridge", "--output-dir", tmp_path / "out")
    assert json.loads(run(*transfer).stdout)["kept"] == 0
    assert json.loads(run(*transfer).stdout)["kept"] == 2
    shutil.rmtree(tmp_path / "second")
    shutil.copytree(here / "adapter", tmp_path / "second")
    assert "--overwrite" in error(*(word for word in transfer if word != "--json"))
    assert json.loads(run(*transfer, "--overwrite").stdout)["kept"] == 0
    assert json.loads(run(*transfer).stdout)["kept"] == 2


def test_the_checkpoint_of_a_result_that_is_there_goes(here, tmp_path, monkeypatch):
    """A run was killed after it put its result in place; that of a later, interrupted run stays."""
    place, checkpoint = tmp_path / "out", tmp_path / ".out.checkpoint.safetensors"
    interrupted(here, place, monkeypatch)
    run(*tune(here), "--output-dir", tmp_path / "other", "--quiet")
    os.rename(tmp_path / "other", place)
    assert "--overwrite" in error(*tune(here), "--output-dir", place) and not checkpoint.exists()
    interrupted(here, place, monkeypatch, "--overwrite")
    assert "--overwrite" in error(*tune(here), "--output-dir", place) and checkpoint.exists()
