"""Odd pictures and folders, many of them: each is read as what it is, or refused in one sentence that names it.

The right answers are computed here, from the rule and not from the code: 8 bits of red, green and blue of the pixels
that were written, upright; the folders at the top as classes. ``--slow`` tries many more.
"""

import io
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as Stored
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_transmiter.data.folders import SPLIT_WORDS
from hf_transmiter.data.images import list_splits, load_images, stored_pictures
from hf_transmiter.encoders.pictures import UnreadablePicture, read_picture


FEW, MANY = 50, 1000

# Pictures

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
# What can hold a mode without loss, and how its pixels are told from 8 bits of RGB.
FORMATS = {
    "1": ("PNG", "TIFF", "PPM", "BMP"),
    "L": ("PNG", "TIFF", "PPM", "BMP", "TGA", "GIF", "WEBP", "JPEG2000"),
    "LA": ("PNG", "TIFF", "TGA"),
    "P": ("PNG", "TIFF", "GIF", "BMP"),
    "RGB": ("PNG", "TIFF", "PPM", "BMP", "TGA", "WEBP", "JPEG2000", "ICO"),
    "RGBA": ("PNG", "TIFF", "TGA", "WEBP"),
    "CMYK": ("TIFF",),
    "I;16": ("PNG", "TIFF", "JPEG2000"),
    "F": ("TIFF",),
}


@st.composite
def pictures(draw):
    """A file's content and the pixels (H, W, 3) that it shows."""
    mode = draw(st.sampled_from(sorted(FORMATS)))
    kind = draw(st.sampled_from(FORMATS[mode]))
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    if kind == "ICO":
        width = height = 32
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grey = rng.integers(0, 256, (height, width), dtype=np.uint8)
    colours = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    alpha = np.full((height, width, 1), draw(st.sampled_from([255, 255, 128, 1])), np.uint8)
    if kind == "WEBP":
        alpha[:] = 255  # nothing is kept of what is clear
    made, shown = {
        "1": lambda: (Image.fromarray(grey > 127), 255 * (grey > 127).astype(np.uint8)),
        "L": lambda: (Image.fromarray(grey), grey),
        "LA": lambda: (Image.fromarray(np.concatenate([grey[..., None], alpha], -1)), grey),
        "RGB": lambda: (Image.fromarray(colours), colours),
        "RGBA": lambda: (Image.fromarray(np.concatenate([colours, alpha], -1)), colours),
        "I;16": lambda: (Image.fromarray(grey.astype(np.uint16) * 257), grey),
        "F": lambda: (Image.fromarray((grey / 255).astype(np.float32)), grey),
    }.get(mode, lambda: (Image.fromarray(colours).convert(mode), None))()
    if mode == "F":
        assume(((grey > 0) & (grey < 255)).any())  # else nobody knows what is white
    shown = np.asarray(made.convert("RGB")) if shown is None else shown
    shown = np.stack([shown] * 3, -1) if shown.ndim == 2 else shown
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}.get(kind, {})
    if kind in ("PNG", "TIFF", "WEBP") and draw(st.booleans()):
        turn = draw(st.sampled_from(sorted(TURNS)))
        tags = Image.Exif()
        tags[0x0112], shown = turn, TURNS[turn](shown)
        options["exif"] = tags
    content = io.BytesIO()
    made.save(content, kind, **options)
    return content.getvalue(), shown


def check_picture(one) -> None:
    content, shown = one
    with Image.open(io.BytesIO(content)) as opened, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.x"
        path.write_bytes(content)
        rows = Dataset.from_dict({"image": [content]}, features=Features(image=Stored()))
        row = stored_pictures(rows.with_format("numpy"), "image")[0]["image"]
        decoded = read_picture(rows[0]["image"])  # before the others, which read the open file
        found = [read_picture(each) for each in (content, path, {"bytes": None, "path": str(path)}, row, opened)]
        with Image.open(path) as by_name:
            found.append(read_picture(by_name))
            assert by_name.filename == str(path)
    for each in (decoded, *found, read_picture(found[0]), read_picture(np.asarray(found[0]))):
        assert each.mode == "RGB" and np.array_equal(np.asarray(each), shown)


def check_damage(one, data) -> None:
    """Cut, or some bytes changed: any pixels, or one sentence; never another kind of error."""
    content = bytearray(one[0])
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 8))):
        if content:
            content[data.draw(st.integers(0, min(len(content) - 1, 200)))] = data.draw(st.integers(0, 255))
    try:
        assert read_picture({"bytes": bytes(content), "path": "cat/7.png"}, "the image in row 3").mode == "RGB"
    except UnreadablePicture as error:
        assert str(error).startswith("cannot read the image in row 3 (cat/7.png): ") and "\n" not in str(error)
        assert error.fault.startswith(" (cat/7.png): ")


@given(pictures())
@settings(max_examples=FEW)
def test_pictures(one):
    check_picture(one)


@given(pictures(), st.data())
@settings(max_examples=FEW)
@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures(one, data):
    check_damage(one, data)


@pytest.mark.slow
@given(pictures())
@settings(max_examples=MANY)
def test_many_pictures(one):
    check_picture(one)


@pytest.mark.slow
@given(pictures(), st.data())
@settings(max_examples=MANY)
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_pictures(one, data):
    check_damage(one, data)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.sampled_from("biHfcUSO"), st.integers(0, 2**32 - 1))
@settings(max_examples=2 * FEW)
def test_arrays(shape, kind, seed):
    """Any array is a picture, or one sentence."""
    values = 300 * np.random.default_rng(seed).standard_normal(shape)
    array = values.astype({"f": float, "O": object, "U": str, "S": bytes}.get(kind, kind))
    try:
        assert read_picture(array, "image 3").mode == "RGB"
    except UnreadablePicture as error:
        assert str(error).startswith("cannot read image 3: ") and "\n" not in str(error)


# Folders

WORDS = [word for words in SPLIT_WORDS.values() for word in words]
PIXEL = io.BytesIO()
Image.new("RGB", (2, 2)).save(PIXEL, "PNG")
letters = st.characters(exclude_characters="/\0", exclude_categories=["Cs", "Cn"])
name = st.one_of(
    st.sampled_from(
        [*WORDS, "Test", "a [1]", "*", "**", "{x}", "?", "a.b", "x, y", "test tube", "train-1", "~", "$HOME"]
    ),
    st.text(letters, min_size=1, max_size=12),
)


def usable(text: str) -> bool:
    spelt = unicodedata.normalize("NFC", text).strip()
    return bool(spelt) and not text.startswith(".") and text not in ("__MACOSX", "__pycache__") and len(text) < 50


def differ(names: list[str]) -> bool:
    return len({unicodedata.normalize("NFC", each).strip() for each in names}) == len(names)


names = st.lists(name.filter(usable), min_size=2, max_size=5, unique=True).filter(differ)


@st.composite
def folders(draw):
    """{split: {class folder: pictures}} and the folders around it all."""
    around, classes = draw(st.lists(name.filter(usable), max_size=2)), draw(names)
    counts = st.integers(1, 2)
    if draw(st.booleans()):
        splits = draw(st.lists(st.sampled_from(sorted(SPLIT_WORDS)), min_size=1, max_size=3, unique=True))
        words = {split: draw(st.sampled_from(SPLIT_WORDS[split])) for split in splits}
        return around, {(split, word): {each: draw(counts) for each in classes} for split, word in words.items()}
    assume(not all(each.strip().lower() in WORDS for each in classes))
    return around, {("train", ""): {each: draw(counts) for each in classes}}


def check_folder(made) -> None:
    around, splits = made
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, *around)
        for (_, word), classes in splits.items():
            for each, count in classes.items():
                folder = root / word / each
                folder.mkdir(parents=True)
                for i in range(count):
                    (folder / f"{i}.png").write_bytes(PIXEL.getvalue() + word.encode() + bytes([i]))
                    (folder / f"{i}.txt").write_text("beside it")
        assert sorted(list_splits(str(root))) == sorted(split for split, _ in splits)
        for (split, _), classes in splits.items():
            images = load_images(str(root), split)
            spelt = {unicodedata.normalize("NFC", each).strip(): count for each, count in classes.items()}
            labels = images.features["label"].names
            assert labels == sorted(spelt)
            assert {each: images["label"][:].count(i) for i, each in enumerate(labels)} == spelt
            assert read_picture(stored_pictures(images, "image")[0]["image"]).size == (2, 2)


@given(folders())
@settings(max_examples=FEW // 2)
def test_folders(made):
    check_folder(made)


@pytest.mark.slow
@given(folders())
@settings(max_examples=MANY)
def test_many_folders(made):
    check_folder(made)
