"""Folders of pictures as people have them: which are classes, which are splits, and what is said of it."""

import json
import logging
import os
import unicodedata

import pytest
from datasets import Dataset
from PIL import Image

from hf_transmiter.data.folders import SPLIT_WORDS
from hf_transmiter.data.images import list_splits, load_images


@pytest.fixture
def make_folder(tmp_path):
    """``make_folder({"cat": 2, "dog/big": 1}, name="photos")``: a folder with so many pictures in each place, all
    different; or with the names of the pictures in place of a number."""
    made = []

    def make(places: dict, name: str = "photos"):
        root = tmp_path / str(len(made)) / name
        made.append(root)
        number = 0
        for place, pictures in places.items():
            (root / place).mkdir(parents=True, exist_ok=True)
            for file in [f"{i}.png" for i in range(pictures)] if isinstance(pictures, int) else pictures:
                number += 1
                kind = "PNG" if file.lower().endswith("png") else None
                Image.new("RGB", (4, 4), (number, 50, 100)).save(root / place / file, kind)
        return root

    return make


def splits_of(root) -> dict:
    """{split: (pictures, {class name: pictures of it}, `None` without labels)}"""
    found = {}
    for split in list_splits(str(root)):
        images = load_images(str(root), split)
        names = getattr(images.features.get("label"), "names", None)
        counts = None if names is None else dict.fromkeys(names, 0)
        for label in images["label"] if names else ():
            counts[names[label]] += 1
        assert [row["image"].size for row in images] == [(4, 4)] * len(images) and str(images.split) == split
        found[split] = counts or len(images)
    return found


@pytest.mark.parametrize(
    "names",
    [
        ("car", "bus", "train"),
        ("test tube", "beaker"),
        ("bullet train", "tram"),
        ("test", "quiz", "exam"),
        ("validation", "cat"),
        ("dev", "ops", "sec"),
        ("Train", "Ship"),
        ("train", "test", "car"),
        ("train-set", "test_set"),
        ("eval", "evil"),
        ("unlabelled", "labelled"),
        ("st. bernard", "shih-tzu", "dr. who"),
        ("a, b", "c; d"),
        ("[x]", "{y}", "*", "?"),
        ("(1)", "x=y&z", "%41", "#", "@2024"),
        ("größe", "ñandú", "猫", "🐈"),
        ("README.md", "data", "config.json"),
        ("a.jpg", "b.png"),
        ("0", "1", "10", "2"),
    ],
)
def test_class_folders_are_classes_whatever_they_are_called(make_folder, names):
    assert splits_of(make_folder(dict.fromkeys(names, 2))) == {"train": dict.fromkeys(sorted(names), 2)}


@pytest.mark.parametrize(
    "place",
    ["photos [2024]", "a*b", "{x}", "what?", "[!a]", "**", "train", "x-test", "a::b", "a@b", "[", "data/test/x y"],
)
def test_any_path(make_folder, place):
    assert splits_of(make_folder({"cat": 2, "dog": 1}, place)) == {"train": {"cat": 2, "dog": 1}}


@pytest.mark.parametrize("word", [word for words in SPLIT_WORDS.values() for word in words])
def test_splits_at_the_top(make_folder, word):
    split = next(split for split, words in SPLIT_WORDS.items() if word in words)
    other = "test" if split == "train" else "train"
    root = make_folder({f"{word.title()}/cat": 2, f"{word.title()}/test": 1, f"{other}/cat": 1, f"{other}/train": 3})
    expected = {split: {"cat": 2, "test": 1, "train": 0}, other: {"cat": 1, "test": 0, "train": 3}}
    assert splits_of(root) == expected and list(splits_of(root)) == sorted(expected, key=list(SPLIT_WORDS).index)
    assert len(load_images(str(root), f"{split}[:1]+{other}")) == 5
    with pytest.raises(ValueError, match="has no split 'nothing'"):
        load_images(str(root), "nothing")


def test_a_split_may_have_no_labels(make_folder, caplog):
    root = make_folder({"train/cat": 1, "train/dog": 1, "test/cat": 2, "unlabelled": 3})
    assert splits_of(root) == {"train": {"cat": 1, "dog": 1}, "test": {"cat": 2, "dog": 0}, "unlabelled": 3}
    assert not caplog.records
    flat = make_folder({"train": 2, "test": 1})
    assert splits_of(flat) == {"train": 2, "test": 1}
    assert "train, test are read as splits without labels, not as classes." in caplog.text


def test_folders_that_may_be_either_are_an_error(make_folder):
    root = make_folder({"train/cat": 1, "test/cat": 1, "extra/cat": 1})
    with pytest.raises(
        ValueError, match="train look like splits, and 'extra' lie beside them.*pass the folder of one"
    ):
        list_splits(str(root))
    assert splits_of(root / "train") == {"train": 1}
    with pytest.raises(ValueError, match="splits, and pictures lie beside them"):
        list_splits(str(make_folder({"train/cat": 1, "test/cat": 1, ".": 1})))
    with pytest.raises(ValueError, match="val, valid are both the split 'validation': keep one"):
        list_splits(str(make_folder({"train/cat": 1, "val/cat": 1, "valid/cat": 1})))


def test_folders_that_look_like_splits_are_told(make_folder, caplog):
    root = make_folder({"train2017": 1, "val2017": 1})
    assert splits_of(root) == {"train": {"train2017": 1, "val2017": 1}}
    assert "train2017, val2017 are read as classes: splits are called train, validation, test" in caplog.text
    caplog.clear()
    splits_of(make_folder({"bullet train": 1, "trainer": 1}))
    assert not caplog.records


def test_pictures_in_two_splits_are_told(make_folder, caplog):
    root = make_folder({"train/cat": 2, "train/dog": 1, "test/cat": 1, "test/dog": 1})
    load_images(str(root))
    assert not caplog.records
    again = make_folder({"train/cat": 2, "train/dog": 1, "test/cat": 1, "test/dog": 1})
    (again / "test/dog/copy.png").write_bytes((again / "train/dog/0.png").read_bytes())
    (again / "test/dog/0.png").unlink()
    (again / "test/dog/0.png").symlink_to(again / "train/cat/0.png")
    for _ in range(2):
        load_images(str(again), "test")
    (said,) = [record.getMessage() for record in caplog.records]  # once
    assert "2 pictures are in both splits, train and test" in said


# What else lies in a folder


def test_nested_folders(make_folder, caplog):
    assert splits_of(make_folder({"cat/2019": 1, "cat/2020/may": 2, "dog/test": 1, "dog": ["x.png"]})) == {
        "train": {"cat": 3, "dog": 2}
    }
    assert "the classes are the folders at the top (cat, dog), not the folders in them" in caplog.text
    assert splits_of(make_folder({"images/all/cat": 1, "images/all/dog": 1})) == {"train": {"cat": 1, "dog": 1}}
    assert splits_of(make_folder({"images/train/cat": 1, "images/test/cat": 1, "images/test/dog": 1})) == {
        "train": {"cat": 1, "dog": 0},
        "test": {"cat": 1, "dog": 1},
    }


def test_pictures_beside_class_folders_leave_all_without_labels(make_folder, caplog):
    assert splits_of(make_folder({".": 1, "cat": 2, "dog": 2})) == {"train": 5}
    assert "no labels, since 1 pictures lie beside the class folders: move them" in caplog.text


def test_flat_folders_and_single_classes(make_folder):
    assert splits_of(make_folder({".": 3})) == {"train": 3}
    assert splits_of(make_folder({"cat": 3})) == {"train": 3}
    assert splits_of(make_folder({"train": 3})) == {"train": 3}
    assert splits_of(make_folder({"test/cat": 3})) == {"test": 3}


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "xml", "csv", "yaml", "npy", "md", "zip", "JPG.txt"])
def test_one_sidecar_file_per_picture(make_folder, caplog, kind):
    root = make_folder({"cat": 2, "dog": 1})
    for picture in [*root.rglob("*.png")]:
        picture.with_suffix(f".{kind}").write_text('{"a": 1}\n')
    (root / "classes.txt").write_text("cat\ndog\n")
    with caplog.at_level(logging.INFO):
        assert splits_of(root) == {"train": {"cat": 2, "dog": 1}}
    assert f"3 (.{kind.split('.')[-1]})" in caplog.text or kind.endswith("txt")


def test_hidden_files_are_passed_over(make_folder):
    root = make_folder(
        {"cat": ["a.png", ".b.png", "._a.png"], "dog": 1, ".thumbs": 2, "__MACOSX/cat": 1, "cat/.x": 1, "__odd": 1}
    )
    assert splits_of(root) == {"train": {"__odd": 1, "cat": 1, "dog": 1}}


def test_links(make_folder, tmp_path):
    store = make_folder({"a": 2, "b": 1})
    root = make_folder({"cat": 1})
    (root / "dog").symlink_to(store / "a")
    (root / "cat" / "linked.png").symlink_to(store / "b" / "0.png")
    (root / "cat" / "around").symlink_to(root)  # without an end
    assert splits_of(root) == {"train": {"cat": 2, "dog": 2}}
    (root / "cat" / "gone.png").symlink_to(tmp_path / "gone.png")
    assert len(load_images(str(root))) == 5
    assert len(load_images(str(root), skip_unreadable=True)) == 4


def test_extensions(make_folder, caplog):
    root = make_folder({"cat": ["a.JPG", "b.JPEG", "c.Png", "d.webp", "e.tiff", "f.BMP", "g.gif"], "dog": 1})
    for name in ("h.heic", "i", "j.jpg.part"):
        (root / "cat" / name).write_bytes(b"x")
    with caplog.at_level(logging.INFO):
        assert splits_of(root) == {"train": {"cat": 7, "dog": 1}}
    assert "left alone: 1 (.heic), 1 (no extension), 1 (.part)" in caplog.text
    (root / "other").mkdir()
    (root / "other" / "k.heic").write_bytes(b"x")
    with caplog.at_level(logging.INFO), pytest.raises((ValueError, FileNotFoundError), match="other"):
        load_images(str(root / "other"))
    assert "there are no pictures that can be read among the files: 1 (.heic)." in caplog.text


def test_empty_class_folders(make_folder, caplog):
    root = make_folder({"cat": 1, "dog": 1, "bird": 0, "fish/deep": 0})
    assert splits_of(root) == {"train": {"cat": 1, "dog": 1}}
    assert "folders without pictures are no classes: bird, fish." in caplog.text
    for places in ({}, {"cat": 0}):
        with pytest.raises((ValueError, FileNotFoundError), match="photos"):
            load_images(str(make_folder({".": 0, **places})))


def test_spelling_of_class_folders(make_folder, caplog):
    wide = unicodedata.normalize("NFD", "é")
    assert splits_of(make_folder({" cat ": 1, f"{wide}t{wide}": 2})) == {"train": {"cat": 1, "été": 2}}
    with pytest.raises(ValueError, match="folders ' cat' and 'cat' are one class: join them"):
        load_images(str(make_folder({"cat": 1, " cat": 1})))
    assert splits_of(make_folder({"Cat": 1, "cat": 1, "dog": 1})) == {"train": {"Cat": 1, "cat": 1, "dog": 1}}
    assert "classes that differ in case alone, which most models do not read: Cat, cat." in caplog.text
    with pytest.raises(ValueError, match="not UTF-8"):
        load_images(str(make_folder({"cat": 1, os.fsdecode(b"dog\xff"): 1})))


# Metadata, scripts, files of a data set


@pytest.mark.parametrize("place", ["photos", "photos [2024]"])
def test_metadata_says_the_labels(make_folder, place):
    root = make_folder({"train": ["a.png", "b.png"], "test tube": ["c.png"]}, place)
    rows = [{"file_name": f"{file}.png", "label": word} for file, word in (("train/a", "x"), ("train/b", "y"))]
    rows.append({"file_name": "test tube/c.png", "label": "x"})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert splits_of(root) == {"train": {"x": 2, "y": 1}}
    split = make_folder({"train": ["a.png", "b.png"], "test": ["c.png"]}, place)
    (split / "train/metadata.csv").write_text("file_name,label\na.png,x\nb.png,y\n")
    (split / "test/metadata.csv").write_text("file_name,label\nc.png,y\n")
    assert splits_of(split) == {"train": {"x": 1, "y": 1}, "test": {"y": 1}}


def test_a_dataset_script_is_refused(make_folder):
    root = make_folder({"cat": 1, "dog": 1})
    (root / "photos.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match=r"holds a dataset script, photos.py, and no data set's code is ever run"):
        load_images(str(root))


@pytest.mark.parametrize("place", ["files", "files [2024]", "a*{b}"])
def test_files_of_a_data_set(make_dataset, tmp_path, place):
    root = tmp_path / place
    root.mkdir()
    for split, count in (("train", 5), ("test", 3)):
        make_dataset(count).to_parquet(root / f"{split}-00000-of-00001.parquet")
    assert {split: len(load_images(str(root), split)) for split in list_splits(str(root))} == {"train": 5, "test": 3}
    assert len(load_images(str(root / "test-00000-of-00001.parquet"))) == 3
    (root / "card.png").write_bytes(b"x")  # a picture beside them
    assert list_splits(str(root)) == ["train", "test"]


# What a folder is known by


def test_the_fingerprint_is_of_what_is_there(make_folder):
    places = {"train/cat": 2, "train/dog": 1, "test/cat": 1}
    root = make_folder(places)
    before = {split: load_images(str(root), split) for split in ("train", "test")}
    assert before["train"]._fingerprint == load_images(str(root), "train")._fingerprint
    assert before["train"]._fingerprint != before["test"]._fingerprint
    assert isinstance(before["train"], Dataset) and not before["train"].cache_files
    picture = root / "train/dog/0.png"
    size, when = picture.stat().st_size, picture.stat().st_mtime_ns
    picture.write_bytes(b"x" * size)  # of the same size and time
    os.utime(picture, ns=(when, when))
    assert load_images(str(root), "train")._fingerprint != before["train"]._fingerprint
    assert load_images(str(root), "test")._fingerprint == before["test"]._fingerprint
