"""Pictures of every kind, by every entrance: the same pixels, or one sentence that names the picture."""

import io
import re
import warnings
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as Stored
from PIL import Image, ImageCms, ImageOps

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.encoders.pictures import MAX_RATIO, UnreadablePicture, read_picture
from hf_transmiter.method.classifier import AnchorClassifier


@pytest.fixture(scope="module")
def colours() -> np.ndarray:
    """(20, 30, 3): smooth, so that what a format changes stays small."""
    y, x = np.mgrid[:20, :30]
    return np.stack([8 * x, 12 * y, 255 - 4 * (x + y)], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def grey(colours) -> np.ndarray:
    return colours[..., 0]


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def same(picture, expected: np.ndarray, within: int = 0) -> None:
    found = np.asarray(read_picture(picture)).astype(int)
    if expected.ndim == 2:
        expected = np.stack([expected] * 3, -1)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= within


# Sixteen bits, floats: white is what the type says


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_in_files(grey, kind, mode):
    for factor in (257, 1):  # 1: 8 bits in the place of 16
        picture = Image.fromarray(grey.astype(np.uint16) * factor)
        try:
            content = encoded(picture if mode == "I;16" else picture.convert("I"), kind)
        except OSError:
            pytest.skip(f"this Pillow writes no {kind} of mode {mode}")
        same(content, grey)


def test_sixteen_bits_of_either_order(grey):
    for order in ("<", ">"):
        same(grey.astype(f"{order}u2") * 257, grey)
    for mode in ("I;16", "I;16B", "I;16L"):
        same(Image.fromarray(grey.astype(np.uint16) * 257).convert("I").convert(mode), grey)


def test_wider_types_say_it_by_their_values(grey, colours):
    same(Image.fromarray(grey / np.float32(255)), grey)
    same(Image.fromarray(grey).convert("F"), grey)
    same(Image.fromarray(grey).convert("I"), grey)
    same(encoded(Image.fromarray(grey / np.float32(255)), "TIFF"), grey)
    for kind in (np.float16, np.float32, np.float64):
        same((colours / 255).astype(kind), colours, within=kind is np.float16)
        same(colours.astype(kind), colours)
    for kind in (np.int16, np.int32, np.int64, np.uint32):
        same(colours.astype(kind), colours)
    same(grey.astype(np.int64) * 257, grey)
    same(torch.tensor(colours / 255, dtype=torch.bfloat16), colours, within=1)
    same(grey > 100, np.uint8(255) * (grey > 100))


@pytest.mark.parametrize(
    "values, said",
    [
        (np.full((4, 4), 1.5), "values must be uint8, uint16, or fractions from 0 to 1 .* not float64, 1.5 to 1.5"),
        (np.linspace(-2, 2, 48).reshape(4, 4, 3), "-2.0 to 2.0"),
        (np.zeros((4, 4)), "float64, 0.0 to 0.0"),
        (np.eye(4, dtype=np.float32), "float32, 0.0 to 1.0"),
        (np.full((4, 4), np.nan), "nan to nan"),
        (np.array([[0.5, np.inf]]), "to inf"),
        (np.full((4, 4), -1), "-1 to -1"),
        (np.full((4, 4), 70_000), "to 70000"),
        (np.zeros((4, 4), complex), "not complex128"),
        (np.array([["a"]]), "not <U1"),
        (np.zeros(7), r"shape \(7,\) is no picture"),
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (np.zeros((5, 6, 7)), "neither end has 1 to 4 channels"),
        (torch.zeros(1, 1, 3, 4), r"shape \(1, 1, 3, 4\)"),
    ],
)
def test_what_nobody_can_know_is_refused(values, said):
    with pytest.raises(UnreadablePicture, match=f"^cannot read image 3: .*{said}"):
        read_picture(values, "image 3")


def test_axes(colours, grey):
    same(colours.transpose(2, 0, 1), colours)
    same(torch.tensor(colours).permute(2, 0, 1), colours)
    same(torch.tensor(colours), colours)
    same(grey[..., None], grey)
    same(grey[None], grey)
    same(colours.tolist(), colours)
    square = np.random.default_rng(0).integers(0, 256, (3, 9, 3), dtype=np.uint8)  # could be either
    same(square, square)
    same(torch.tensor(square), square.transpose(1, 2, 0))
    for alpha in (0, 128):
        clear = np.full((20, 30, 1), alpha, np.uint8)
        same(np.concatenate([colours, clear], -1), colours)
        same(np.concatenate([grey[..., None], clear], -1), grey)
    same(np.asfortranarray(colours)[::-1], colours[::-1])


# Colour modes


@pytest.mark.parametrize("mode", "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr HSV".split())
def test_modes(colours, mode):
    base = Image.fromarray(colours)
    picture = base.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    back = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    expected = (picture.convert(back) if back else picture).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(picture, np.asarray(expected))
        grey = mode[0] in "1L"
        if mode != "1":
            same(picture, np.asarray(base.convert("L") if grey else base), 60 if "P" in mode else 6)


def test_lab(colours):
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.fromarray(colours // 2 + 64), to_lab)
    same(lab, colours // 2 + 64, within=15)
    same(encoded(lab, "TIFF"), colours // 2 + 64, within=15)


def test_transparent_palettes_are_read_without_a_warning(colours):
    palette = Image.fromarray(colours).quantize(16)
    for clear in (3, bytes(range(16))):
        content = encoded(palette, "PNG", transparency=clear)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(content, np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind, within", [("GIF", 40), ("WEBP", 0), ("PNG", 0), ("TIFF", 0)])
def test_of_several_frames_the_first(colours, kind, within):
    frames = [Image.fromarray(colours), Image.fromarray(255 - colours)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    same(content, colours, within)


# EXIF, and every entrance


@pytest.mark.parametrize("kind, turn", [("PNG", 6), ("JPEG", 5), ("WEBP", 8), ("TIFF", 1), ("TIFF", 7)])
def test_every_entrance_gives_the_same_answer(encoder, colours, tmp_path, kind, turn):
    """A file that a camera turned: by path, content, row of a dataset, or as Pillow opened it."""
    tags = Image.Exif()
    tags[0x0112] = turn
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / f"photo.{kind.lower()}"
    path.write_bytes(encoded(Image.fromarray(colours), kind, exif=tags, **options))
    content = path.read_bytes()
    with Image.open(path) as file:
        upright = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    assert upright.shape[:2] == ((30, 20) if turn > 4 else (20, 30))
    rows = {
        "image": Dataset.from_dict({"image": [str(path)]}, features=Features(image=Stored())),
        "bytes": Dataset.from_dict({"image": [{"bytes": content, "path": "a.x"}]}, features=Features(image=Stored())),
        "mode": Dataset.from_dict({"image": [content]}, features=Features(image=Stored(decode=False))),
        "raw": Dataset.from_dict({"image": [content]}),
        "struct": Dataset.from_dict({"image": [{"bytes": content, "path": None}]}),
        "path": Dataset.from_dict({"image": [str(path)]}, features=Features(image=Value("string"))),
        "torch": Dataset.from_dict({"image": [str(path)]}, features=Features(image=Stored())).with_format("torch"),
    }
    plain = rows["image"].with_transform(lambda rows: {"image": [0 for _ in rows["image"]]})
    with Image.open(path) as opened, Image.open(path) as converted:
        entrances = [str(path), path, content, bytearray(content), {"bytes": content, "path": None}, opened]
        entrances += [{"bytes": None, "path": str(path)}, converted.convert("RGB"), upright, torch.tensor(upright)]
        entrances += [rows["image"][0]["image"], rows["torch"][0]["image"]]
        expected = encoder.preprocess(upright)
        for one in entrances:
            assert torch.equal(encoder.preprocess(one), expected), type(one)
        assert torch.equal(encoder.preprocess(entrances), expected.repeat(len(entrances), 1, 1, 1))
        classifier = AnchorClassifier(encoder, Anchors(("cat", "dog")))
        assert len({one["score"] for entrance in entrances for (one,) in classifier.predict(entrance)}) == 1
        assert len(classifier.predict(entrances)) == len(entrances)
    unit = encoder.embed_images(path)
    for dataset in (*rows.values(), plain):
        table = embed_dataset(encoder, dataset, image_column="image", cache_dir=tmp_path, progress=False)
        assert torch.equal(table.embeds, unit)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_all_orientations(colours, kind, turn):
    """What is stored, as the camera held it; the tag says how to turn it back."""
    over, around = colours[::-1], colours[::-1, ::-1]
    upright = [colours, colours[:, ::-1], around, over, np.swapaxes(colours, 0, 1), np.rot90(colours, -1)]
    upright += [np.swapaxes(around, 0, 1), np.rot90(colours)]
    tags = Image.Exif()
    tags[0x0112] = turn
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(colours), kind, exif=tags, **options)
    same(content, upright[turn - 1])
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        once = read_picture(opened)
        same(once, np.asarray(read_picture(once)))  # not turned once more


def test_several_pictures_in_one_array(encoder, colours):
    stack = np.stack([colours, 255 - colours])
    expected = encoder.preprocess([colours, 255 - colours])
    assert torch.equal(encoder.preprocess(stack), expected)
    assert torch.equal(encoder.preprocess(torch.tensor(stack).permute(0, 3, 1, 2)), expected)
    assert torch.equal(encoder.preprocess(iter([colours, 255 - colours])), expected)


# What cannot be read


def unreadable(tmp_path, colours) -> dict[str, str]:
    """{path: why}"""
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)), "PNG")
    header = bytearray(whole)
    header[16:24] = (50_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    tags = encoded(Image.fromarray(colours), "PNG", exif=b"Exif\0\0no tags at all")
    contents = {
        "empty.jpg": (b"", "cannot identify image file"),
        "text.jpg": (b"hello", "cannot identify image file"),
        "cut.png": (whole[:-900], "truncated"),
        "cut.jpg": (encoded(Image.fromarray(colours), "JPEG")[:-200], "[Tt]runcated"),
        "bomb.png": (bytes(header), "2500000000 pixels"),
        "thin.png": (
            encoded(Image.new("L", (1, MAX_RATIO + 1)), "PNG"),
            "1 x 201 pixels, and one side may be 200 times",
        ),
        "tags.png": (tags, "not a TIFF file"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nothing.png").symlink_to(tmp_path / "gone.png")
    found = {str(tmp_path / name): said for name, (_, said) in contents.items()}
    return found | {str(tmp_path / "nothing.png"): "No such file", str(tmp_path / "folder.png"): "directory"}


def test_unreadable_pictures_are_named(encoder, colours, tmp_path):
    for path, said in unreadable(tmp_path, colours).items():
        name = path.rsplit("/", 1)[1]
        with pytest.raises(ValueError, match=f"^cannot read '{path}': .*{said}"):
            encoder.preprocess([colours, path])
        with pytest.raises(ValueError, match=f"^cannot read image 1 .*{name}.: .*{said}"):
            encoder.preprocess([colours, {"bytes": None, "path": path}])
        rows = Dataset.from_dict({"image": [colours, path]}, features=Features(image=Stored()))
        with pytest.raises(ValueError, match=rf"row 1 cannot be read \(.*/{name}\): .*{said}.*--skip-unreadable"):
            embed_dataset(encoder, rows, cache_dir=tmp_path, progress=False)


@pytest.mark.parametrize(
    "odd", [None, 7, 1.5, {}, {"path": None, "bytes": None}, object(), "https://example.com/a.png"]
)
def test_things_that_are_no_pictures(encoder, odd):
    classifier = AnchorClassifier(encoder, Anchors(("cat", "dog")))
    for call in (encoder.preprocess, encoder.embed_images, classifier.predict):
        for given in (odd, [odd]):
            with pytest.raises(ValueError, match="^cannot read (image 0|'https)"):
                call(given)


def test_rows_in_the_place_of_pictures(encoder, make_dataset):
    with pytest.raises(ValueError, match="image 0: it is a row of image, label: pass its picture alone"):
        AnchorClassifier(encoder, Anchors(("cat", "dog"))).predict(make_dataset(3))


def test_small_and_long_pictures(encoder):
    for size in ((1, 1), (1, 2), (1, MAX_RATIO), (3 * MAX_RATIO, 3)):
        assert encoder.preprocess(Image.new("RGB", size, (9, 9, 9))).shape == (1, 3, 16, 16)


# Memory


def test_one_picture_at_a_time(encoder, make_images, monkeypatch):
    """Of a batch of photographs one is decoded at a time."""
    alive, most, photos = [], [], [photo.resize((1600, 1400)) for photo in make_images(4)]

    def read(picture, name):
        most.append(sum(one() is not None for one in alive))
        found = read_picture(picture, name)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr("hf_transmiter.encoders.pictures.read_picture", read)
    found = encoder.preprocess([encoded(photo, "PPM") for photo in photos])
    assert len(most) == 4 and max(most) <= 1
    assert torch.equal(found, encoder.preprocess(photos))


def peak_memory(forget: bool = False) -> float:
    """MB that were resident at most; with `forget` from now on."""
    try:
        if forget:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        pytest.skip("only Linux tells the peak memory since now")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def test_a_batch_of_photographs_does_not_fill_the_memory(encoder, tmp_path):
    """Twenty of 6 megapixels: 360 MB, decoded at once."""
    content = encoded(Image.new("RGB", (3000, 2000), (90, 20, 30)), "JPEG")
    photos = Dataset.from_dict({"image": [content] * 20}, features=Features(image=Stored()))
    encoder.preprocess(content)
    before = peak_memory(forget=True)
    table = embed_dataset(encoder, photos, cache_dir=tmp_path, progress=False)
    assert len(table) == 20 and peak_memory() - before < 180
