"""The models of the demo app: which sources give which panels, what they answer, and which pictures they take."""

import shutil
from pathlib import Path

import demo_folder
import numpy as np
import pytest
import torch
from PIL import Image

from hf_transmiter import panels
from hf_transmiter.anchors import Anchors
from hf_transmiter.backbone import load_encoder
from hf_transmiter.catalog import load_classifier
from hf_transmiter.classifier import AnchorClassifier
from hf_transmiter.panels import demo_sources, example_pictures, load_panels, open_picture, predictions
from hf_transmiter.sandbox import load_dataset
from hf_transmiter.transfers import TeacherFacts


NAMES = ("red disc", "blue ring")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return demo_folder.make(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def sources(demo):
    return demo_sources(demo)[0]


@pytest.fixture(scope="module")
def picture():
    return load_dataset(demo_folder.TASK, "test")[3]["image"]


def answers(shown, picture):
    return dict(zip(shown, predictions(picture, [panel.classifier for panel in shown.values()], 3), strict=True))


def test_all_four_from_what_a_demo_leaves(sources, picture):
    shown = load_panels(**sources)
    assert list(shown) == ["weak", "tuned", "strong", "upgraded"]
    assert [panel.about for panel in shown.values()] == [
        "sandbox:weak, zero-shot",
        "sandbox:weak with a COOP adapter",
        "sandbox:strong, zero-shot",
        "sandbox:strong with a TransMiter adapter",
    ]
    facts = TeacherFacts.read(sources["teacher"])
    names = {"class_names": facts.class_names, "templates": facts.zero_shot_templates}
    expected = {
        "weak": load_classifier("sandbox:weak", **names),
        "tuned": load_classifier(sources["teacher"]),
        "strong": load_classifier("sandbox:strong", **names),
        "upgraded": AnchorClassifier.from_pretrained(sources["upgraded"]),
    }
    found = answers(shown, picture)
    for name, classifier in expected.items():
        assert found[name] == classifier.predict(picture, top_k=3)[0]
        assert len(found[name]) == 3 and found[name][0]["score"] > found[name][1]["score"]
    assert shown["strong"].classifier.encoder is shown["upgraded"].classifier.encoder  # loaded once


@pytest.mark.parametrize(
    "given, shown",
    [
        (("teacher",), ["weak", "tuned"]),
        (("adapter",), ["weak", "tuned"]),
        (("upgraded",), ["strong", "upgraded"]),
        (("adapter", "upgraded"), ["weak", "tuned", "strong", "upgraded"]),
    ],
)
def test_any_of_the_sources(sources, picture, given, shown):
    found = load_panels(**{name: sources[name] for name in given})
    assert list(found) == shown
    assert all(len(answer) == 3 for answer in answers(found, picture).values())


def test_plain_models_with_given_names(picture, model_dir):
    found = load_panels("sandbox:weak", strong=model_dir("siglip"), class_names=NAMES, templates=["a {}."])
    assert list(found) == ["weak", "strong"]
    expected = AnchorClassifier(load_encoder("sandbox:weak"), Anchors(NAMES, (), ("a {}.",)))
    assert answers(found, picture)["weak"] == expected.predict(picture, top_k=3)[0]
    assert found["strong"].about == f"{Path(model_dir('siglip')).name}, zero-shot"  # no path of this machine


def test_a_whole_tuned_model(picture, model_dir):
    found = load_panels(model_dir("clip"), model_dir("clip", seed=1), class_names=NAMES)
    assert list(found) == ["weak", "tuned"]
    expected = load_classifier(model_dir("clip", seed=1), class_names=NAMES).predict(picture, top_k=2)[0]
    assert answers(found, picture)["tuned"] == expected


def test_an_adapter_is_carried_over(sources, picture, tmp_path):
    """By text alone."""
    adapter = tmp_path / "adapter"
    shutil.copytree(sources["adapter"], adapter)
    given = {"adapter": str(adapter), "strong": "sandbox:strong"}
    by_text = load_panels(**given)
    saved = answers(load_panels(upgraded=sources["upgraded"]), picture)["upgraded"]
    assert by_text["upgraded"].about.endswith("over a bridge from text alone")
    for found, expected in zip(answers(by_text, picture)["upgraded"], saved, strict=True):
        assert found["label"] == expected["label"] and found["score"] == pytest.approx(expected["score"], abs=1e-4)


def test_class_vectors_are_there_before_the_first_visitor(sources):
    shown = load_panels(**sources)
    assert all(shown[name].classifier._text_embeds is not None for name in ("weak", "tuned", "strong"))


def test_bad_sources(sources, tmp_path):
    with pytest.raises(ValueError, match="name at least one of weak, teacher"):
        load_panels()
    with pytest.raises(ValueError, match="no class names are saved"):
        load_panels("sandbox:weak")
    with pytest.raises(ValueError, match="say nothing about new pictures"):
        load_panels(teacher=str(Path(sources["adapter"]) / "calibration.safetensors"))
    with pytest.raises(ValueError, match=r"the weak and the tuned model answer about different classes \(2 and 36\)"):
        load_panels(adapter=sources["adapter"], class_names=NAMES)
    with pytest.raises(FileNotFoundError, match="no model or adapter './nothing'"):
        load_panels(teacher="./nothing")


def test_demo_folders(demo, tmp_path):
    sources, pictures = demo_sources(demo)
    assert sources == {
        "teacher": str(demo / "jargon" / "tuned"),
        "adapter": str(demo / "jargon" / "adapter"),
        "upgraded": str(demo / "jargon" / "strong_adapter"),
    }
    assert demo_sources(demo / "jargon") == (sources, "sandbox:jargon") and pictures == "sandbox:jargon"
    without = tmp_path / "without"
    shutil.copytree(demo, without)
    shutil.rmtree(without / "jargon" / "tuned")
    assert set(demo_sources(without)[0]) == {"adapter", "upgraded"}
    with pytest.raises(FileNotFoundError, match="run hf-transmiter demo --output-dir"):
        demo_sources(tmp_path / "nowhere")


def test_examples_are_always_the_same_pictures_with_their_labels(make_dataset, tmp_path):
    images = make_dataset(40)
    images.save_to_disk(tmp_path / "labelled")
    known = {row["image"].tobytes(): images.features["label"].names[row["label"]] for row in images}
    first, second = (example_pictures(str(tmp_path / "labelled"), 5) for _ in range(2))
    assert len(first) == 5
    for (image, label), (again, _) in zip(first, second, strict=True):
        assert image.tobytes() == again.tobytes() and known[image.tobytes()] == label
    make_dataset(6).remove_columns("label").save_to_disk(tmp_path / "plain")
    assert [label for _, label in example_pictures(str(tmp_path / "plain"))] == [None] * 6


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


def test_predictions_of_several(model_dir, picture):
    classifiers = [AnchorClassifier(load_encoder(model_dir("clip", seed)), Anchors(NAMES)) for seed in (0, 1)]
    found = predictions(picture, classifiers)
    for answer, classifier in zip(found, classifiers, strict=True):
        logits = classifier(pixel_values=classifier.encoder.preprocess([picture])).logits_per_image[0]
        order = logits.argsort(descending=True)
        assert [row["label"] for row in answer] == [NAMES[i] for i in order]
        assert torch.allclose(torch.tensor([row["score"] for row in answer]), logits.softmax(-1)[order])
    assert [len(answer) for answer in predictions(picture, classifiers, 1)] == [1, 1]
    assert panels.TOP_K == 5
