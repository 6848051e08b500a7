"""Four models in a real browser: what they answer there is what the API answers, and the page can be read."""

import json
import os
from pathlib import Path

import demo_folder
import numpy as np
import pytest
from PIL import Image
from reading import expected, shown, upload, wait_for

from hf_transmiter.cli.app_page import build_app, load_models
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.saved import load_classifier
from hf_transmiter.sandbox import load_dataset
from hf_transmiter.tuners import TransMiterConfig


WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
EXAMPLES = f"sandbox:{demo_folder.TASK}"


@pytest.fixture(scope="module")
def served(serve, sources):
    models = [part for name, source in sources.items() for part in (f"--{name}", source)]
    return serve("-m", "hf_transmiter", "app", *models, "--examples", EXAMPLES, "--device", "cpu")


@pytest.fixture(scope="module")
def classifiers(sources):
    """Loaded apart from the app's own code, where that is possible."""
    models = load_models(**sources)
    models["tuned"] = load_classifier(sources["tuned"])
    models["upgraded"] = AnchorClassifier.from_pretrained(sources["upgraded"])
    return models


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    load_dataset(demo_folder.TASK, "test")[3]["image"].save(path)
    return path


def test_what_the_page_answers_is_what_predict_answers(served, page, classifiers, picture):
    page.goto(served.url)
    page.wait_for_selector("#upgraded")
    assert shown(page) == {name: [] for name in classifiers}
    answers = expected(classifiers, picture)
    assert len({tuple(rows) for rows in answers.values()}) == 4  # no two models alike, so none can pass for another
    upload(page, picture)
    wait_for(page, answers)
    assert shown(page) == answers
    assert page.problems == []


def test_an_example_is_answered_as_it_is_and_its_label_is_known(served, page, classifiers, picture):
    images = load_dataset(demo_folder.TASK, "test").shuffle(seed=0, keep_in_memory=True).select(range(8))
    page.goto(served.url)
    rows = page.locator("tbody tr")
    rows.nth(7).wait_for()
    assert rows.count() == 8
    for number in (0, 3):
        rows.nth(number).click()
        answers = expected(classifiers, images[number]["image"])
        wait_for(page, answers)
        assert shown(page) == answers
        label = page.get_by_label("Its label")
        assert label.input_value() == images.features["label"].int2str(images[number]["label"])
    upload(page, picture)
    wait_for(page, expected(classifiers, picture))
    assert label.input_value() == ""


def test_pictures_of_any_kind(served, page, classifiers, tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (300, 200, 4), dtype=np.uint8), "RGBA")
    for name, image in {
        "grey.png": noise.convert("L"),
        "transparent.png": noise,
        "photo.jpg": noise.convert("RGB").resize((1200, 900)),
        "large.png": Image.linear_gradient("L").resize((5000, 4000)),
    }.items():
        image.save(tmp_path / name)
        page.goto(served.url)
        page.wait_for_selector("#upgraded")
        upload(page, tmp_path / name)
        answers = expected(classifiers, tmp_path / name)
        wait_for(page, answers)
        assert shown(page) == answers


def test_what_is_no_picture(served, page, picture, classifiers, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60))
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    page.goto(served.url)
    page.wait_for_selector("#upgraded")
    for name, message in {
        "broken.png": "This file cannot be read as a picture. PNG, JPEG and WebP work.",
        "huge.png": "This picture is too large: 9000 x 9000 pixels. At most 64 megapixels are read.",
    }.items():
        upload(page, picture)
        wait_for(page, expected(classifiers, picture))
        page.get_by_label("Remove Image").click()  # no picture, no answers
        wait_for(page, {"weak": []})
        upload(page, tmp_path / name)
        page.get_by_text(message).wait_for()
        assert shown(page) == {model: [] for model in classifiers}
        page.get_by_label("Remove Image").click()
    upload(page, picture)  # and the page still works
    wait_for(page, expected(classifiers, picture))


@pytest.mark.parametrize("device", WIDTHS)
def test_the_page_can_be_read(served, page, picture, classifiers, device, tmp_path):
    """Nothing wider than the window, no name cut off; a screenshot to look at."""
    width, height = WIDTHS[device]
    page.set_viewport_size({"width": width, "height": height})
    page.goto(served.url)
    page.wait_for_selector("#upgraded")
    upload(page, picture)
    wait_for(page, expected(classifiers, picture))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [page.locator(f"#{name}") for name in classifiers]
    titles = ("Weak, zero-shot (sandbox:weak)", "Tuned (sandbox:weak)")
    titles += ("Strong, zero-shot (sandbox:strong)", "Upgraded (sandbox:strong)")
    assert all(title in box.inner_text() for title, box in zip(titles, boxes, strict=True))
    tops = [round(box.bounding_box()["y"]) for box in boxes]
    assert len(set(tops)) == (2 if device == "desktop" else 4)  # two by two, or one below the other
    for name in page.query_selector_all(".label .text"):
        box = name.bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= width
        assert name.evaluate("e => e.scrollWidth <= e.clientWidth + 1 || getComputedStyle(e).display === 'inline'")
    assert page.get_by_label("Remove Image").count() == 1
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"app-{device}.png", full_page=True)
    with Image.open(folder / f"app-{device}.png") as image:
        assert image.width == width and len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_no_word_to_anybody_else(served, page, picture, classifiers):
    page.goto(served.url)
    page.wait_for_selector("#upgraded")
    upload(page, picture)
    wait_for(page, expected(classifiers, picture))
    assert page.outside == []
    assert served.asked and served.asked <= {"127.0.0.1", "::1", "localhost"}


def test_the_command_ends_with_its_result(serve):
    names = ("--class-names", "red disc,blue ring", "--device", "cpu")
    served = serve("-m", "hf_transmiter", "app", "--weak", "sandbox:weak", *names, "--json")
    assert json.loads(served.end()) == {"address": served.url}
    assert served.process.returncode == 0 and "Traceback" not in "".join(served.said)


def test_examples_outlive_the_removal_of_visitors_pictures(classifiers):
    from gradio.route_utils import delete_files_created_by_app

    images = load_dataset(demo_folder.TASK, "test").select(range(2))
    page = build_app({"weak": classifiers["weak"]}, images)
    (examples,) = [block for block in page.blocks.values() if block.get_block_name() == "dataset"]
    files = [Path(sample[0]["path"]) for sample in examples.samples]
    delete_files_created_by_app(page, age=0)
    assert len(files) == 2 and all(file.is_file() for file in files)


def test_a_box_for_other_names_where_any_can_be_asked(classifiers):
    weak, names = classifiers["weak"], ["red disc", "blue ring"]
    config = TransMiterConfig(class_names=names, form="linear", image_side=weak.encoder.embed_dim)
    opened = AnchorClassifier(weak.encoder, Anchors(tuple(names))).add_adapter(config)
    for upgraded, boxes in ((opened, 1), (classifiers["upgraded"], 0)):
        page = build_app({"weak": weak, "upgraded": upgraded})
        assert [block.get_block_name() for block in page.blocks.values()].count("textbox") == boxes
