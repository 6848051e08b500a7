"""The app without a page: which sources give which models, and which pictures they take. With gradio and a browser:
tests/app."""

import sys
from types import SimpleNamespace

import demo_folder
import numpy as np
import pytest
import torch
from PIL import Image

from hf_transmiter.cli import app_page
from hf_transmiter.cli.app_page import build_app, launch, load_models, open_picture
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import load_encoder
from hf_transmiter.hub.adapter_files import TeacherFacts
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.saved import load_classifier
from hf_transmiter.sandbox import load_dataset


NAMES = ("red disc", "blue ring")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return demo_folder.make(tmp_path_factory.mktemp("demo")) / demo_folder.TASK


@pytest.fixture(scope="module")
def sources(task):
    return {"tuned": str(task / "tuned"), "upgraded": str(task / "strong_adapter")}


@pytest.fixture(scope="module")
def picture():
    return load_dataset(demo_folder.TASK, "test")[3]["image"]


def answers(models, picture):
    return {name: model.predict(picture, top_k=3)[0] for name, model in models.items()}


def test_all_four_from_what_a_demo_leaves(sources, picture):
    models = load_models(**sources)
    assert list(models) == ["weak", "tuned", "strong", "upgraded"]
    facts = TeacherFacts.read(sources["tuned"])
    names = {"class_names": facts.class_names, "templates": facts.zero_shot_templates}
    expected = {
        "weak": load_classifier("sandbox:weak", **names),
        "tuned": load_classifier(sources["tuned"]),
        "strong": load_classifier("sandbox:strong", **names),
        "upgraded": AnchorClassifier.from_pretrained(sources["upgraded"]),
    }
    found = answers(models, picture)
    assert found == answers(expected, picture)
    assert all(len(rows) == 3 and rows[0]["score"] > rows[1]["score"] for rows in found.values())
    assert models["strong"].encoder is models["upgraded"].encoder  # loaded once


@pytest.mark.parametrize(
    "given, shown",
    [
        ({"tuned": "tuned"}, ["weak", "tuned"]),
        ({"tuned": "adapter"}, ["weak", "tuned"]),
        ({"upgraded": "strong_adapter"}, ["strong", "upgraded"]),
        ({"tuned": "adapter", "upgraded": "strong_adapter"}, ["weak", "tuned", "strong", "upgraded"]),
    ],
)
def test_any_of_the_sources(task, picture, given, shown):
    models = load_models(**{name: str(task / folder) for name, folder in given.items()})
    assert list(models) == shown
    assert all(len(rows) == 3 for rows in answers(models, picture).values())


def test_plain_models_with_given_names(picture, model_dir):
    models = load_models("sandbox:weak", strong=model_dir("siglip"), class_names=NAMES, templates=["a {}."])
    assert list(models) == ["weak", "strong"]
    expected = AnchorClassifier(load_encoder("sandbox:weak"), Anchors(NAMES, (), ("a {}.",)))
    assert answers(models, picture)["weak"] == expected.predict(picture, top_k=3)[0]


def test_a_whole_tuned_model(picture, model_dir):
    models = load_models(model_dir("clip"), model_dir("clip", seed=1), class_names=NAMES)
    assert list(models) == ["weak", "tuned"]
    expected = load_classifier(model_dir("clip", seed=1), class_names=NAMES).predict(picture, top_k=2)[0]
    assert answers(models, picture)["tuned"] == expected


def test_models_in_half_precision(sources):
    models = load_models(upgraded=sources["upgraded"], dtype=torch.bfloat16)
    assert {model.encoder.dtype for model in models.values()} == {torch.bfloat16}


def test_class_vectors_are_there_before_the_first_visitor(sources):
    models = load_models(**sources)
    assert all(models[name]._embedded is not None for name in ("weak", "tuned", "strong"))


def test_bad_sources(task):
    with pytest.raises(ValueError, match="name at least one of weak, tuned"):
        load_models()
    with pytest.raises(ValueError, match="no class names are saved"):
        load_models("sandbox:weak")
    with pytest.raises(ValueError, match="say nothing about new pictures"):
        load_models(tuned=str(task / "adapter" / "calibration.safetensors"))
    with pytest.raises(ValueError, match=r"answer about different classes \(weak: 2, tuned: 36\)"):
        load_models(tuned=str(task / "adapter"), class_names=NAMES)
    with pytest.raises(FileNotFoundError, match="no model or adapter './nothing'"):
        load_models(tuned="./nothing")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_any_kind(tmp_path, mode, make_images):
    image = (
        make_images(1)[0].convert("L").convert("I").convert(mode)
        if mode == "I;16"
        else make_images(1)[0].convert(mode)
    )
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    image.save(path)
    with Image.open(path) as file:
        expected = file.convert("RGB")
    opened = open_picture(path)
    assert opened.mode == "RGB" and opened.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats_that_are_read(tmp_path, make_images, kind):
    make_images(1)[0].save(tmp_path / "picture", kind)
    assert open_picture(tmp_path / "picture").size == (20, 20)


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "PPM", "ICO"])
def test_other_formats_are_not_opened(tmp_path, make_images, kind):
    """Whatever the file is called: EPS would start Ghostscript."""
    make_images(1)[0].save(tmp_path / "picture.png", kind)
    with pytest.raises(ValueError, match="cannot be read as a picture. PNG, JPEG and WebP work"):
        open_picture(tmp_path / "picture.png")


def test_pictures_are_turned_upright(tmp_path):
    image = Image.fromarray(np.uint8([[[255, 0, 0], [0, 0, 255]]]).repeat(8, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[274] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    assert open_picture(tmp_path / "turned.png").getpixel((0, 0)) == (0, 0, 255)


def test_what_is_no_picture(tmp_path, monkeypatch, make_images):
    path = tmp_path / "picture.png"
    for content in (b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a picture. PNG, JPEG and WebP work"):
            open_picture(path)
    make_images(1, size=200)[0].save(path)
    path.write_bytes(path.read_bytes()[:2000])  # cut off
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        open_picture(path)
    Image.new("1", (9000, 9000)).save(path)
    with pytest.raises(ValueError, match="too large: 9000 x 9000 pixels. At most 64 megapixels"):
        open_picture(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # where Pillow itself gives up
    with pytest.raises(ValueError, match="too large"):
        open_picture(path)
    assert str(tmp_path) not in str(pytest.raises(ValueError, open_picture, path).value)


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for call in (lambda: build_app({}), lambda: launch(None)):
        with pytest.raises(ValueError, match=r"pip install 'hf-transmiter\[app\]'"):
            call()


def test_ctrl_c_ends_it_with_its_address_at_any_time(monkeypatch, capsys):
    """Also between the address and the moment from which gradio waits for it."""

    class Page:
        closed = False

        def launch(self, **options):
            return None, "http://here", None

        def block_thread(self):
            raise KeyboardInterrupt

        def close(self):
            self.closed = True

    themes = SimpleNamespace(Default=lambda **fonts: None)
    monkeypatch.setattr(app_page, "_gradio", lambda: SimpleNamespace(themes=themes))
    page = Page()
    assert launch(page) == "http://here" and page.closed
    said = capsys.readouterr()
    assert said.out == "" and said.err == "Open http://here in a browser; Ctrl+C ends it.\n"
