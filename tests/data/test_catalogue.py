"""The rows of the catalogue against tiny copies of their datasets, rows of one's own, and what goes wrong."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import yaml
from dataset_copies import class_of, classes_in, picture, spelt, write_copy
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_transmiter.data.catalogue import DatasetSpec, catalogue, find_row, find_spec, load_split, usual_templates
from hf_transmiter.data.images import load_images
from hf_transmiter.data.splits import base_names


ROWS = catalogue()
# Base and novel classes, and the names at the ends of both halves.
FACTS = {
    "imagenet": (500, 500, "tench", "cleaver", "cliff dwelling", "toilet paper"),
    "caltech101": (50, 50, "face", "helicopter", "ibis", "yin yang"),
    "oxford_pets": (19, 18, "abyssinian", "keeshond", "leonberger", "yorkshire terrier"),
    "stanford_cars": (
        *(98, 98, "2000 AM General Hummer SUV", "1998 Eagle Talon Hatchback"),
        *("2012 FIAT 500 Abarth", "2012 smart fortwo Convertible"),
    ),
    "oxford_flowers": (51, 51, "pink primrose", "petunia", "wild pansy", "blackberry lily"),
    "food101": (51, 50, "apple pie", "grilled salmon", "guacamole", "waffles"),
    "fgvc_aircraft": (50, 50, "707-320", "Cessna 525", "Cessna 560", "Yak-42"),
    "sun397": (199, 198, "abbey", "indoor ice skating rink", "outdoor ice skating rink", "youth hostel"),
    "dtd": (24, 23, "banded", "marbled", "matted", "zigzagged"),
    "eurosat": (5, 5, "Annual Crop Land", "Industrial Buildings", "Pasture Land", "Sea or Lake"),
    "ucf101": (51, 50, "Apply Eye Makeup", "Long Jump", "Lunges", "Yo Yo"),
    "imagenetv2": (500, 500, "tench", "cleaver", "cliff dwelling", "toilet paper"),
    "imagenet_sketch": (500, 500, "tench", "cleaver", "cliff dwelling", "toilet paper"),
    "imagenet_a": (100, 100, "stingray", "storage chest", "Christmas stocking", "acorn"),
    "imagenet_r": (100, 100, "goldfish", "gazelle", "llama", "acorn"),
}
every_row = pytest.mark.parametrize("name", ROWS)


@pytest.fixture(scope="module")
def copy_of(tmp_path_factory):
    """``copy_of(name)``: the row, but of a copy on this machine, which is written once."""
    written = {}

    def get(name: str) -> DatasetSpec:
        if name not in written:
            folder = tmp_path_factory.mktemp(name)
            write_copy(ROWS[name], folder)
            written[name] = replace(ROWS[name], source=str(folder), revision=None)
        return written[name]

    return get


@pytest.fixture
def on_disk(tmp_path):
    """``on_disk(columns, types)``: a dataset of pictures of one colour each, saved; its folder."""

    def save(label: list, kind, image: str = "image") -> str:
        columns = {image: [{"bytes": picture(i), "path": None} for i in range(len(label))], "label": label}
        folder = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        Dataset.from_dict(columns, features=Features({image: Image(), "label": kind})).save_to_disk(folder)
        return str(folder)

    return save


# The rows


@every_row
def test_what_the_rows_say(name):
    row = ROWS[name]
    base, novel, *ends = FACTS[name]
    first = base_names(row.class_names)
    halves = first, row.class_names[len(first) :]
    assert [len(half) for half in halves] == [base, novel]
    assert [name for half in halves for name in (half[0], half[-1])] == ends
    assert len(row.class_names) == len(set(row.class_names)) == base + novel
    assert row.revision is not None or "revision is not pinned" in row.notes
    assert row.test is not None
    assert row.notes


def test_all_fifteen_rows_are_there():
    assert list(ROWS) == list(FACTS) and len(ROWS) == 15
    trained_on = [name for name, row in ROWS.items() if row.train]
    assert len(trained_on) == 11 and sum(len(ROWS[name].class_names) for name in trained_on[1:]) == 1191


@every_row
def test_a_copy_of_each_dataset(name, copy_of):
    rows = load_split(copy_of(name), "test")
    assert rows.column_names == ["image", "label"]
    assert rows.features["label"].names == list(ROWS[name].class_names)
    labels = rows["label"][:]
    assert Counter(labels) == Counter(classes_in(name))
    # Of a thousand classes nobody needs to see every picture.
    shown = range(0, len(rows), 1 + len(rows) // 120)
    assert [class_of(rows[i]["image"]) for i in shown] == [labels[i] for i in shown]


# The traps


def test_classes_are_matched_by_name_not_by_position(copy_of):
    """The order of the data is another one than the published, and goes over the edge between the halves."""
    for name, there in (("ucf101", "HammerThrow"), ("oxford_flowers", "100"), ("caltech101", "accordion")):
        spellings = list(spelt(ROWS[name]))
        assert spellings.index(there) != spelt(ROWS[name])[there]
    row = copy_of("oxford_flowers")
    pictures = load_split(row, "test")
    shown = {row.class_names[label]: class_of(image) + 1 for image, label in zip(*pictures[:].values(), strict=True)}
    assert shown["globe thistle"] == 10 and shown["blanket flower"] == 100 and shown["hard-leaved pocket orchid"] == 2


def test_numbers_that_the_data_do_not_name(on_disk):
    """Flowers102 numbers its classes as their names sort; elsewhere a number is a position."""
    numbers = list(range(102))
    flowers = replace(ROWS["oxford_flowers"], source=on_disk(numbers, Value("int64")), revision=None, test="train")
    names = [flowers.class_names[label] for label in load_split(flowers, "test")["label"]]
    assert names[:4] == ["pink primrose", "globe thistle", "blanket flower", "trumpet creeper"]  # 1, 10, 100, 101
    pets = replace(ROWS["oxford_pets"], source=on_disk(numbers[:37], Value("int64")), revision=None, test="train")
    assert load_split(pets, "test")["label"][:] == numbers[:37]


def test_folders_that_are_numbers(tmp_path):
    """ImageNet-V2 unpacked: "10" sorts before "2", and is 10."""
    for number in (0, 2, 10, 999):
        (tmp_path / "test" / str(number)).mkdir(parents=True)
        (tmp_path / "test" / str(number) / "a.png").write_bytes(picture(number))
    row = replace(ROWS["imagenetv2"], source=str(tmp_path), label_column="label")
    pictures = load_split(row, "test")
    assert sorted(pictures["label"]) == [0, 2, 10, 999]
    assert all(class_of(image) == label for image, label in zip(*pictures[:].values(), strict=True))
    (tmp_path / "test" / "1000").mkdir()
    (tmp_path / "test" / "1000" / "a.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match="'1000' of the data is no position among 1000 names"):
        load_split(row, "test")


def test_synonyms_become_the_names_of_openai(on_disk):
    names = ["cardigan", "Cardigan, Cardigan Welsh corgi", "crane", "crane2", "tench, Tinca tinca"]
    source = on_disk([0, 1, 2, 3, 4], ClassLabel(names=names))
    row = replace(ROWS["imagenet"], source=source, revision=None, image_column="image", label_column="label")
    labels = load_split(replace(row, test="train"), "test")["label"]
    found = [row.class_names[label] for label in labels]
    assert found == ["cardigan", "Cardigan Welsh Corgi", "crane bird", "construction crane", "tench"]


def test_the_middle_frame_of_every_video(copy_of):
    videos = load_split(copy_of("ucf101"), "train")
    assert len(videos) == 101 and 999 not in map(class_of, videos["image"])
    row = replace(copy_of("ucf101"), frame_column="number")
    with pytest.raises(ValueError, match="no column 'number'; the columns are image, video_id"):
        load_split(row, "train")


def test_classes_that_are_left_out(copy_of):
    row = copy_of("caltech101")
    assert len(load_split(row, "test")) == 100
    with pytest.raises(ValueError, match="'background_google'.*'faces_easy'"):
        load_split(replace(row, left_out=()), "test")
    with pytest.raises(ValueError, match="no picture is of one of the 1 classes"):
        load_split(replace(row, class_names=("cat",), aliases={}, left_out=tuple(spelt(ROWS["caltech101"]))), "test")


def test_a_draw_is_of_all_classes_and_always_the_same(copy_of):
    """The data are sorted by class."""
    row = copy_of("imagenet_a")
    drawn = load_split(row, "test", max_images=40)
    labels = drawn["label"][:]
    assert len(set(labels)) == 40 and max(labels) > 150 and min(labels) < 50
    assert load_split(row, "test", max_images=40)["label"][:] == labels
    again, first = load_split(row, "test"), load_split(row, "test")
    assert again._fingerprint == first._fingerprint != drawn._fingerprint  # the key of the cached embeddings


# Rows of one's own


def test_any_source_is_a_row(copy_of, tmp_path, monkeypatch):
    dtd = copy_of("dtd")
    plain = find_spec(dtd.source)
    assert plain.splits == {"train": "train", "test": "test"} and plain.class_names is None
    assert load_split(plain, "test").features["label"].names == sorted(
        name.replace(" ", "_") for name in dtd.class_names
    )
    monkeypatch.setenv("DATA", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("spotted\tdotted\nplain\n")
    source = dtd.source.replace(str(tmp_path.parent), "${DATA}")
    assert "$" in source
    mine = find_spec({"source": source, "class_names": "names.txt", "templates": ["dtd"], "test": "test[:4]"})
    assert (mine.class_names, mine.aliases, mine.templates) == (
        ("spotted", "plain"),
        {"dotted": "spotted"},
        ("{} texture.",),
    )
    assert mine.splits == {"test": "test[:4]"} and mine.title == dtd.source
    copied = find_spec({"row": "dtd", "source": dtd.source})
    assert copied.class_names == ROWS["dtd"].class_names and copied.revision is None
    assert len(load_split(replace(copied, test="test[:4]"), "test")) == 4
    assert find_spec("sandbox:print").splits["unlabelled"] == "unlabelled"
    assert (
        find_spec("ImageNet-V2") == find_spec("imagenet_v2") == ROWS["imagenetv2"] == find_spec({"row": "imagenetv2"})
    )


def test_which_pictures_have_no_labels(copy_of, on_disk):
    row = copy_of("eurosat")
    assert load_split(row, "unlabelled")["label"][:] == load_split(row, "train")["label"][:]
    unlabelled = DatasetSpec("u", "u", on_disk([-1, -1, -1], ClassLabel(names=["a", "b"])), train="train")
    assert load_split(unlabelled, "unlabelled").column_names == ["image"]
    with pytest.raises(ValueError, match="'u', split 'train': 3 of 3 pictures have no label"):
        load_split(unlabelled, "train")
    odd = DatasetSpec("f", "f", on_disk([0.5, 1.5, 2.5], Value("float32")), train="train")
    assert load_split(odd, "unlabelled").column_names == ["image"]  # labels are not looked at
    with pytest.raises(ValueError, match="neither whole numbers nor words"):
        load_split(odd, "train")
    with pytest.raises(ValueError, match=r"no test pictures \(splits: train: train\).*'test: train\[80%:\]'"):
        load_split(unlabelled, "test")
    with pytest.raises(ValueError, match="role must be one of train, validation, test, unlabelled, got 'dev'"):
        load_split(unlabelled, "dev")


# Bad input


def test_columns_labels_and_splits_that_are_not_there(copy_of, on_disk):
    with pytest.raises(ValueError, match="no column 'label'; the columns are image, variant, family, manufacturer"):
        load_split(replace(copy_of("fgvc_aircraft"), label_column="label"), "test")
    with pytest.raises(ValueError, match="no split 'dev'; there are train, test"):
        load_split(replace(copy_of("dtd"), test="dev"), "test")
    row = DatasetSpec("mine", "mine", on_disk([0, 3, 1], Value("int64")), test="train", class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"'label' has the label 3 in row 1, outside 0 to 1 \(2 names\)"):
        load_split(row, "test")
    with pytest.raises(ValueError, match="numbers without names: give class_names"):
        load_split(replace(row, class_names=None), "test")
    with pytest.raises(ValueError, match="neither whole numbers nor words"):
        load_split(replace(row, source=on_disk([0.5], Value("float32"))), "test")
    with pytest.raises(ValueError, match="there are no pictures"):
        load_split(replace(row, test="train[:0]"), "test")


def test_classes_that_match_nothing_or_the_same(on_disk):
    row = DatasetSpec("mine", "mine", on_disk([0, 1], ClassLabel(names=["dog", "catz"])), test="train")
    with pytest.raises(ValueError, match=r"'mine', split 'train'.*'catz' \(nearest: 'cat'\)"):
        load_split(replace(row, class_names=("cat", "dog")), "test")
    twice = replace(row, source=on_disk([0, 1], ClassLabel(names=["dog", "Dog"])), class_names=("cat", "dog"))
    with pytest.raises(ValueError, match="classes 'dog', 'Dog' all match 'dog'"):
        load_split(twice, "test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "x", "colum": "y"}, "no field 'colum'; did you mean 'label_column'"),
        ({"templates": ["a {}."]}, "needs a source"),
        ({"source": "x", "test": 3}, "test must be a word, got 3"),
        ({"source": "x", "test": "test", "class_names": ["a", "a"]}, "must differ, but 'a' occur twice"),
        ({"source": "x", "test": "test", "class_names": ["a", ""]}, "class names must be words, got ''"),
        ({"source": "x", "test": "test", "revision": "main"}, "full commit of 40 hex digits, got 'main'"),
        ({"source": "x", "test": "test", "templates": ["{} {}"]}, "one {} for the name"),
        ({"source": "x", "test": ""}, "test must be a word, got ''"),
        ({"source": "x", "test": "test", "aliases": {"a": 3}}, "aliases must be pairs 'name: name'"),
        ({"source": "x", "test": "test", "left_out": ["a", 3]}, "left_out must be a list of words"),
        ({"source": "x", "test": "test", "frame_column": "f"}, "belong together"),
        ({"source": "$NOT_THERE/x"}, "needs the environment variable NOT_THERE"),
        ({"row": "dtdd"}, "did you mean 'dtd'"),
    ],
)
def test_rows_that_are_no_rows(fields, message):
    with pytest.raises(ValueError, match=message):
        find_spec(fields)


def test_datasets_that_do_not_exist():
    with pytest.raises(ValueError, match="no dataset 'stanford-car'.*did you mean 'stanford_cars'"):
        find_spec("stanford-car")
    with pytest.raises(ValueError, match="there are imagenet, caltech101"):
        find_spec("zzz")
    with pytest.raises(FileNotFoundError, match="./nowhere"):
        find_spec("./nowhere")


def test_a_path_is_no_row(tmp_path, monkeypatch):
    """A folder that is not there must not become the dataset of the Hub that has its name."""
    for place in ("./dtd", "../dtd", "/dtd", "~/dtd", "me/dtd", "dtd@main", "sandbox:print"):
        assert find_row(place) is None
    with pytest.raises(FileNotFoundError, match="./dtd"):
        find_spec("./dtd")
    assert find_row("DTD") is ROWS["dtd"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dtd").mkdir()
    assert find_row("dtd") is None
    with pytest.raises(ValueError, match="no dataset 'none.parquet'.*nor a folder or file"):
        find_row("none.parquet")


def test_prompts_of_a_source():
    assert usual_templates("dtd") == usual_templates("DTD") == ("{} texture.",)
    assert usual_templates("sandbox:print") == usual_templates("me/dtd") == usual_templates(None)
    assert usual_templates(None) == ("a photo of a {}.",)


def test_splits_without_pictures(tmp_path, on_disk):
    path = str(tmp_path / "empty.parquet")
    Dataset.from_dict({"image": []}, features=Features(image=Image())).to_parquet(path)
    for source, split in ((path, "train"), (on_disk([0], Value("int64")), "train[:0]")):
        with pytest.raises(ValueError, match=rf"split {re.escape(repr(split))}: there are no pictures"):
            load_images(source, split)


def test_the_file_of_rows_is_plain_yaml():
    from hf_transmiter.data.catalogue import _FOLDER

    content = yaml.safe_load((_FOLDER / "datasets.yaml").read_text(encoding="utf-8"))
    assert list(content) == list(ROWS)
    assert all(row["class_names"].endswith(".txt") for row in content.values())
