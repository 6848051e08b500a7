"""Pictures that cannot be decoded: an error that names them, or left out of everything alike."""

import logging

import pytest
from datasets import Dataset, Features, Image

from hf_transmiter.backbone import DualEncoder
from hf_transmiter.catalog import load_images
from hf_transmiter.features import embed_dataset
from hf_transmiter.readable import readable


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
    skipped = []
    with caplog.at_level(logging.WARNING, "hf_transmiter"):
        images = load_images(folder, skip_unreadable=True, skipped=skipped)
    assert [name.split(":")[0] for name in skipped] == ["row 1 (cat/2.png)", "row 5 (dog/3.png)", "row 7 (dog/7.png)"]
    assert "truncated" in skipped[0] and "cannot identify image file" in skipped[1]
    (record,) = caplog.records
    assert "3 of 8 pictures cannot be read" in record.getMessage() and "dog/7.png" in record.getMessage()
    assert images["label"][:] == [0, 0, 0, 1, 1]
    tables = [
        embed_dataset(model, images, cache_dir=tmp_path / "cache", progress=False)
        for model in (encoder, DualEncoder.from_pretrained(model_dir("clip", 1)))
    ]
    assert [table.labels.tolist() for table in tables] == [[0, 0, 0, 1, 1]] * 2
    again = load_images(folder, skip_unreadable=True)
    assert again._fingerprint == images._fingerprint  # so embeddings are found again


def test_of_those_that_are_drawn(folder):
    skipped = []
    images = load_images(folder, max_images=6, skip_unreadable=True, skipped=skipped)
    assert len(images) == 6 - len(skipped) and 1 <= len(skipped) <= 3


def test_nothing_to_leave_out_and_nothing_left(make_dataset, make_images):
    good = make_dataset(3)
    same, names = readable(good)
    assert same is good and names == []
    features = Features(image=Image())
    missing = Dataset.from_dict({"image": [make_images(1)[0], None]}, features=features)
    rest, names = readable(missing)
    assert len(rest) == 1 and names == ["row 1: there is no picture"]
    with pytest.raises(ValueError, match="none of the 1 pictures can be read: row 0: there is no picture"):
        readable(missing.select([1]))
    with pytest.raises(ValueError, match="column 'label' holds .*, not pictures"):
        readable(good, "label")
