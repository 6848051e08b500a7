"""Datasets as the options of commands name them."""

import io
import json
import shutil
import zlib

import pytest
from commands import error, run

from hf_transmiter.data import catalogue
from hf_transmiter.data.catalogue import DatasetSpec
from hf_transmiter.method import saved
from hf_transmiter.method.saved import teacher_templates
from hf_transmiter.method.tune import starting_templates


def test_rows_are_datasets_of_every_command():
    said = error("evaluate", "sandbox:weak", "--dataset", "ImageNet-R")
    assert "axiong/imagenet-r@762a23f169e080bef0be7c9d96bf73a126cbb660" in said


def test_a_typing_mistake_is_answered_at_once():
    for command in (("evaluate", "sandbox:weak"), ("extract", "--weak", "sandbox:weak", "--teacher", "sandbox:weak")):
        place = ("--output-dir", "nowhere") if command[0] == "extract" else ()
        assert "there is no dataset 'dttd'" in error(*command, "--dataset", "dttd", *place)


@pytest.fixture
def pets(monkeypatch, make_dataset, tmp_path):
    """A row of the catalogue, ``pets``, with a prompt of its own, which is returned."""
    make_dataset(36).save_to_disk(tmp_path / "pictures")
    source = {"source": str(tmp_path / "pictures"), "train": "train", "test": "train"}
    row = DatasetSpec("pets", "Pets", **source, templates=("a {}, a type of pet.",))
    monkeypatch.setattr(catalogue, "catalogue", lambda: {"pets": row})
    return row.templates[0]


def test_prompts_of_a_row(pets, model_dir, tmp_path, monkeypatch):
    """A row's own where nobody asks for others; PromptSRC's 60, and what a teacher was tuned with, go first."""
    shared = ("--dataset", "pets", "--cache-dir", tmp_path / "cache")
    asked, load = [], saved.load_classifier
    monkeypatch.setattr(
        saved,
        "load_classifier",
        lambda *args, **options: asked.append(options["templates"]) or load(*args, **options),
    )
    for options in ((), ("--template", "default")):
        run("evaluate", model_dir("clip"), *shared, *options)
    assert asked == [(pets,), ("a photo of a {}.",)]
    tuned, bare = tmp_path / "tuned", tmp_path / "bare"
    run("tune", "--model", model_dir("clip"), *shared, "--method", "lora", "--epochs", "1", "--output-dir", tuned)
    assert json.loads((tuned / "teacher.json").read_text())["zero_shot_templates"] == [pets]
    shutil.copytree(tuned, bare)
    (bare / "teacher.json").unlink()  # a PEFT adapter from elsewhere
    for teacher, options, expected in ((tuned, ("--template", "{}"), ["{}"]), (bare, (), [pets])):
        folder = tmp_path / f"adapter-{teacher.name}"
        models = ("--weak", model_dir("clip"), "--teacher", teacher)
        run("extract", *models, *shared, "--class-names", "cat,dog,car", "--output-dir", folder, *options)
        assert json.loads((folder / "adapter_config.json").read_text())["templates"] == expected
    assert teacher_templates(str(tuned), None, ("other {}",)) == (pets,)
    assert teacher_templates(str(bare), None, ("other {}",)) == ("other {}",)
    assert starting_templates("lora", (pets,)) == (pets,) and len(starting_templates("promptsrc", (pets,))) == 60


def test_pictures_that_cannot_be_read(tmp_path, make_images):
    for i, image in enumerate(make_images(4)):
        path = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    path.write_bytes(b"no picture")
    call = ("evaluate", "sandbox:weak", "--dataset", tmp_path / "pictures", "--cache-dir", tmp_path / "cache")
    assert "the image in row 3 cannot be read" in error(*call)
    done = run(*call, "--skip-unreadable", "--json")
    assert json.loads(done.stdout)["num_images"] == 3
    assert "1 of 4 pictures cannot be read and are left out:" in done.stderr and "row 3 (dog/3.png): " in done.stderr


def test_every_kind_of_unreadable_picture_ends_in_one_sentence(tmp_path, make_images):
    """It names the picture and the option that leaves it out."""
    content = io.BytesIO()
    make_images(1, size=100)[0].save(content, "PNG")
    whole = content.getvalue()
    bomb = bytearray(whole)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    content = io.BytesIO()
    make_images(1)[0].save(content, "PNG", exif=b"Exif\0\0no tags")
    for i, bad in enumerate((b"", b"text", whole[:-9000], bytes(bomb), content.getvalue())):
        place = tmp_path / str(i) / "photos"
        for name in ("cat", "test tube"):
            (place / name).mkdir(parents=True)
            (place / name / "good.png").write_bytes(whole)
        (place / "test tube" / "odd.jpg").write_bytes(bad)
        call = ("evaluate", "sandbox:weak", "--dataset", place, "--cache-dir", tmp_path / "cache")
        said = error(*call)
        assert "row 2 cannot be read (test tube/odd.jpg): " in said and "--skip-unreadable" in said
        found = json.loads(run(*call, "--skip-unreadable", "--json", "--quiet").stdout)
        assert found["num_images"] == 2


def test_folders_that_cannot_be_read_end_in_one_sentence(tmp_path, make_images):
    call = ("evaluate", "sandbox:weak", "--cache-dir", tmp_path / "cache", "--dataset")
    for place in ("cat", "dog"):
        (tmp_path / "script" / place).mkdir(parents=True)
        make_images(1)[0].save(tmp_path / "script" / place / "a.png")
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('it ran')")
    assert "holds a dataset script, script.py, and no data set's code is ever run" in error(*call, tmp_path / "script")
    (tmp_path / "empty").mkdir()
    assert "empty" in error(*call, tmp_path / "empty")
    shutil.copytree(tmp_path / "script" / "cat", tmp_path / "mixed" / "train" / "cat")
    shutil.copytree(tmp_path / "mixed" / "train", tmp_path / "mixed" / "test")
    shutil.copytree(tmp_path / "mixed" / "train", tmp_path / "mixed" / "more")
    assert "look like splits, and 'more' lie beside them" in error(*call, tmp_path / "mixed")


def test_one_string_in_a_config_file_is_no_list(tmp_path):
    for line, written in (("class_names: lined", "[lined]"), ("template: 'a {}'", "[a {}]")):
        (tmp_path / "config.yaml").write_text(line)
        said = error("evaluate", "sandbox:weak", "--dataset", "sandbox:print", "--config", tmp_path / "config.yaml")
        assert "must be a list, got " in said and written in said
