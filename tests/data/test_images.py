"""Pictures from anywhere: their columns, datasets of the Hub with and without it, pictures that cannot be decoded."""

import logging

import datasets
import huggingface_hub.constants
import pytest
from datasets import Dataset, Features, Image
from local_hub import dataset_files

from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.images import guess_columns, list_splits, load_images
from hf_transmiter.encoders.dual_encoder import DualEncoder


# Pictures that cannot be decoded: an error that names them, or left out of everything alike


@pytest.fixture
def folder(tmp_path, make_images):
    """Four pictures of cats and four of dogs; one file is cut short, one is text, one is empty."""
    for i, image in enumerate(make_images(8)):
        path = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    cats, dogs = tmp_path / "pictures" / "cat", tmp_path / "pictures" / "dog"
    (cats / "2.png").write_bytes((cats / "2.png").read_bytes()[:-600])  # its header is whole
    (dogs / "3.png").write_text("no picture")
    (dogs / "7.png").write_bytes(b"")
    return str(tmp_path / "pictures")


def test_without_the_option_it_is_an_error(folder, encoder, tmp_path):
    with pytest.raises(ValueError, match="the image in row 1 cannot be read"):
        embed_dataset(encoder, load_images(folder), cache_dir=tmp_path / "cache", progress=False)


def test_left_out_for_every_model_alike(folder, encoder, model_dir, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_transmiter"):
        images = load_images(folder, skip_unreadable=True)
    (record,) = caplog.records
    first, *listed = record.getMessage().splitlines()
    assert first == "3 of 8 pictures cannot be read and are left out:"
    assert [name.split(":")[0].strip() for name in listed] == [
        "row 1 (cat/2.png)",
        "row 5 (dog/3.png)",
        "row 7 (dog/7.png)",
    ]
    assert "truncated" in listed[0] and "cannot identify image file" in listed[1]
    assert images["label"][:] == [0, 0, 0, 1, 1]
    tables = [
        embed_dataset(model, images, cache_dir=tmp_path / "cache", progress=False)
        for model in (encoder, DualEncoder.from_pretrained(model_dir("clip", 1)))
    ]
    assert [table.labels.tolist() for table in tables] == [[0, 0, 0, 1, 1]] * 2
    again = load_images(folder, skip_unreadable=True)
    assert again._fingerprint == images._fingerprint  # so embeddings are found again
    assert len(caplog.records) == 2  # and said again


def test_of_those_that_are_drawn(folder, caplog):
    images = load_images(folder, max_images=6, skip_unreadable=True)
    assert 1 <= 6 - len(images) <= 3 and f"{6 - len(images)} of 6 pictures" in caplog.text


def test_nothing_to_leave_out_and_nothing_left(make_dataset, make_images, tmp_path, caplog):
    def load(dataset):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        dataset.save_to_disk(folder)
        return load_images(str(folder), skip_unreadable=True)

    good = make_dataset(3)
    assert load(good)._fingerprint == load(good)._fingerprint and not caplog.text
    missing = Dataset.from_dict({"image": [make_images(1)[0], None]}, features=Features(image=Image()))
    assert len(load(missing)) == 1 and "row 1: there is no picture" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 pictures can be read: row 0: there is no picture"):
        load(missing.select([1]))


# Datasets of the Hub


@pytest.fixture
def unplug(hub, monkeypatch):
    """``unplug()``: no network from here on; any request fails the test."""

    def now():
        hub.log.clear()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    yield now
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        assert not hub.log


@pytest.fixture
def versions(hub, make_dataset):
    """Two commits of bob/OddPets: 4 training pictures, then 6."""
    return [hub.add_dataset("bob/OddPets", dataset_files({"train": make_dataset(count)})) for count in (4, 6)]


def test_offline_the_same_as_online(versions, unplug):
    sources = ("bob/OddPets", f"bob/OddPets@{versions[1]}")
    online = [load_images(source) for source in sources]
    unplug()
    for source, before in zip(sources, online, strict=True):
        offline = load_images(source)
        assert len(offline) == len(before) == 6
        assert offline._fingerprint == before._fingerprint  # calibration packs and embeddings stay valid
        assert offline[0]["image"].tobytes() == before[0]["image"].tobytes()
        assert list_splits(source) == ["train"]


def test_what_is_not_in_the_cache_is_an_error_that_names_it(versions, unplug):
    """Never another version than the one that was asked for."""
    load_images(f"bob/OddPets@{versions[0]}")
    unplug()
    for source in (f"bob/OddPets@{versions[1]}", "bob/others"):
        with pytest.raises(ConnectionError, match=f"'{source}' is not in the cache, and the Hub cannot be reached"):
            load_images(source)


def test_a_hub_that_is_down(hub, versions):
    """Not declared offline, but nobody answers."""
    load_images(f"bob/OddPets@{versions[0]}")
    hub.fault("HEAD", "", 503, times=1000)
    hub.fault("GET", "", 503, times=1000)
    assert len(load_images(f"bob/OddPets@{versions[0]}")) == 4
    with pytest.raises(ConnectionError, match=f"'bob/OddPets@{versions[1]}' is not in the cache"):
        load_images(f"bob/OddPets@{versions[1]}")
    hub.fault("HEAD", "bob/other", "no answer", times=1000)
    with pytest.raises(OSError, match="bob/other"):
        load_images("bob/other")


def test_subsets(hub, make_dataset):
    cards = {name: dataset_files({"train": make_dataset(count)}, name) for name, count in {"a": 3, "b": 5}.items()}
    files = {path: content for parts in cards.values() for path, content in parts.items()}
    entries = [f"- config_name: {name}\n  data_files: {name}/train-*\n" for name in cards]
    files["README.md"] = f"---\nconfigs:\n{''.join(entries)}---\n".encode()
    hub.add_dataset("bob/two", files)
    for name, count in {"a": 3, "b": 5}.items():
        assert len(load_images("bob/two", subset=name)) == count
    with pytest.raises(ValueError, match="a.*b"):
        load_images("bob/two")


# Columns


FIELDS = {"i": Image(), "c": datasets.ClassLabel(names=["x"]), "n": datasets.Value("int64")}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("image:i label:c", ("image", "label")),
        ("img:i fine_label:c", ("img", "fine_label")),
        ("jpg:i cls:n extra:n", ("jpg", "cls")),
        ("photo:i labels:n", ("photo", "labels")),
        ("image:i mask:i variant:c", ("image", "variant")),
        ("image:n label:n", ("image", "label")),
        ("IMG:i", ("IMG", None)),
        ("image:i family:n", ("image", None)),
    ],
)
def test_guessed_columns(columns, expected):
    assert guess_columns(_dataset(columns)) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("a:i b:i", r"image_column could be a or b \(columns: a, b\): pass image_column="),
        ("image:i img:i", "image_column could be image or img"),
        ("text:n label:c", "no image column found among text, label: pass image_column="),
        ("image:i label:c fine_label:c", "label_column could be label or fine_label"),
        ("image:i family:c variant:c", "label_column could be family or variant"),
        ("", "dataset is empty"),
    ],
)
def test_columns_that_cannot_be_guessed(columns, message):
    with pytest.raises(ValueError, match=message):
        guess_columns(_dataset(columns))


def test_given_columns_are_checked():
    dataset = _dataset("a:i b:i family:c variant:c")
    assert guess_columns(dataset, "b", "variant") == ("b", "variant")
    with pytest.raises(ValueError, match="no column 'z'; the columns are a, b, family, variant"):
        guess_columns(dataset, "z", "variant")


def _dataset(columns: str) -> Dataset:
    fields = dict(column.split(":") for column in columns.split())
    types = Features({name: FIELDS[kind] for name, kind in fields.items()})
    return Dataset.from_dict({name: [] for name in fields}, features=types)
