"""The demo app without gradio: its words and its page fragments. With gradio and a browser: tests/app."""

import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from hf_transmiter.app import answers_html, build_app, launch, note_html, what_changed
from hf_transmiter.panels import TITLES, Panel


def said(*answers):
    return [{"label": label, "score": score} for label, score in answers]


CAT, DOG, CAR = (said((label, 0.625), ("ship", 0.25)) for label in ("cat", "dog", "car"))


@pytest.mark.parametrize(
    "found, text",
    [
        ({"weak": CAT}, "The weak model answers “cat” (62.5%)."),
        ({"weak": CAT, "tuned": CAT}, "Both models answer “cat”."),
        ({"weak": CAT, "tuned": CAT, "strong": CAT, "upgraded": CAT}, "All 4 models answer “cat”."),
        (
            {"weak": CAT, "tuned": DOG},
            "Tuning moves the weak model from “cat” (62.5%) to “dog” (62.5%).",
        ),
        (
            {"weak": CAT, "tuned": DOG, "strong": DOG, "upgraded": said(("dog", 0.9996))},
            "Tuning moves the weak model from “cat” (62.5%) to “dog” (62.5%). The upgrade leaves the strong model at "
            "“dog” (62.5%), now 100.0%. The upgraded and the tuned model agree.",
        ),
        (
            {"weak": CAT, "tuned": DOG, "strong": DOG, "upgraded": CAR},
            "Tuning moves the weak model from “cat” (62.5%) to “dog” (62.5%). The upgrade moves the strong model from "
            "“dog” (62.5%) to “car” (62.5%). The upgraded and the tuned model do not agree.",
        ),
        (
            {"weak": CAT, "strong": DOG},
            "The weak model answers “cat” (62.5%). The strong model answers “dog” (62.5%).",
        ),
        (
            {"tuned": DOG, "strong": CAT, "upgraded": DOG},
            "The upgrade moves the strong model from “cat” (62.5%) to “dog” (62.5%). The tuned model answers “dog” "
            "(62.5%). The upgraded and the tuned model agree.",
        ),
    ],
)
def test_what_changed(found, text):
    assert what_changed(found) == text


class Page(HTMLParser):
    """Elements with their attributes, checked to be closed in order, and the text."""

    def __init__(self, fragment):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(fragment)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def having(self, name, value):
        return [attrs for _, attrs in self.elements if value in attrs.get(name, "").split()]


def models(*names):
    return {name: Panel(SimpleNamespace(), f"about {name}") for name in names}


def test_answers():
    found = {"weak": CAT, "tuned": said(("dog", 0.625), ("cat", 0.25))}
    page = Page(answers_html(models("weak", "tuned"), found))
    assert [attrs["aria-label"] for attrs in page.having("class", "panel")] == ["Weak", "Tuned"]
    assert [text for text in page.text if text.endswith("%")] == ["62.5%", "25.0%"] * 2
    widths = [attrs["style"] for _, attrs in page.elements if "style" in attrs]
    assert widths == ["width: 62.5%", "width: 25.0%"] * 2
    # cat is the weak model's first answer, dog the tuned one's: these have colours, on both; ship has none.
    assert [attrs.get("class") for tag, attrs in page.elements if tag == "li"] == [
        "colour-1",
        None,
        "colour-2",
        "colour-1",
    ]
    assert page.text[0] == what_changed(found) and "about tuned" in page.text
    assert not page.having("class", "right")


def test_the_right_answer_is_marked():
    found = {"weak": CAT, "tuned": said(("dog", 0.625), ("cat", 0.25))}
    fragment = answers_html(models("weak", "tuned"), found, "dog")
    page = Page(fragment)
    assert page.text[0].endswith("The picture is labelled “dog” ✓.")
    assert len(page.having("class", "right")) == 1
    assert re.search(r'<span class="name">dog</span> <span class="right"', fragment)


def test_names_are_escaped():
    evil = '<script>alert("1")</script>'
    panel = {"weak": Panel(SimpleNamespace(), f"about {evil}")}
    for fragment in (
        answers_html(panel, {"weak": said((evil, 0.625))}, evil),
        note_html(panel, f"cannot read {evil}"),
    ):
        page = Page(fragment)
        assert "script" not in [tag for tag, _ in page.elements] and evil in "".join(page.text)


def test_notes_name_the_models():
    page = Page(note_html(models(*TITLES), "Drop a picture."))
    assert page.text == ["Drop a picture.", *(part for name in TITLES for part in (TITLES[name], f"about {name}"))]


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for call in (lambda: build_app(models("weak")), lambda: launch(None)):
        with pytest.raises(ValueError, match=r"pip install 'hf-transmiter\[app\]'"):
            call()
