"""The demo app: a picture in, what the weak, tuned, strong and upgraded models say of it side by side.

Gradio comes with `pip install hf-transmiter[app]` and is imported only to build the page; it is told to ask nobody on
the network for anything.

```python
from hf_transmiter.app import build_app, launch
from hf_transmiter.panels import load_panels

launch(build_app(load_panels(teacher="me/tuned-clip-b32", upgraded="me/upgraded-clip-l14")))
```
"""

from __future__ import annotations

import html
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from .panels import TITLES, TOP_K, Panel, open_picture, predictions


if TYPE_CHECKING:
    import gradio

_STYLE = Path(__file__).parent / "assets" / "app" / "answers.css"
_ASK = "Drop a picture to see what each model answers."
_TITLE = "# What a fine-tuning changed, and what an upgrade keeps of it"
_UPGRADED = "*Upgraded* is the strong model with what the weak one learnt."
_PAGE_STYLE = """
#picture img { width: 100%; height: 100%; object-fit: contain; }
#answers .html-container { padding: 0; }
"""
# Gradio's example buttons have no names for those who cannot see them.
_NAME_EXAMPLES = """() => document.querySelectorAll("#examples button.gallery-item").forEach(
  (button, index) => button.setAttribute("aria-label", `Example ${index + 1}`))"""


def what_changed(found: Mapping[str, Sequence[dict]]) -> str:
    """The answers in words: what tuning changed, what the upgrade changed, and whether the two results agree.

    Args:
        found (`Mapping[str, Sequence[dict]]`):
            What [`predictions`] returned, by ``"weak"``, ``"tuned"``, ``"strong"``, ``"upgraded"``, some of them.
    """
    best = {name: answers[0] for name, answers in found.items()}
    labels = {name: answer["label"] for name, answer in best.items()}
    if len(best) == 1:
        return f"The {next(iter(best))} model answers {_said(*best.values())}."
    if len(set(labels.values())) == 1:
        everyone = "Both models answer" if len(best) == 2 else f"All {len(best)} models answer"
        return f"{everyone} “{next(iter(labels.values()))}”."
    pairs = (("weak", "tuned", "Tuning"), ("strong", "upgraded", "The upgrade"))
    sentences = [_moved(best[a], best[b], a, who) for a, b, who in pairs if a in best and b in best]
    paired = {name for a, b, _ in pairs if a in best and b in best for name in (a, b)}
    sentences += [f"The {name} model answers {_said(best[name])}." for name in best if name not in paired]
    if "tuned" in best and "upgraded" in best:
        agree = labels["tuned"] == labels["upgraded"]
        sentences.append(f"The upgraded and the tuned model {'agree' if agree else 'do not agree'}.")
    return " ".join(sentences)


def _said(answer: Mapping) -> str:
    return f"“{answer['label']}” ({_percent(answer['score'])})"


def _moved(before: Mapping, after: Mapping, model: str, who: str) -> str:
    if before["label"] == after["label"]:
        return f"{who} leaves the {model} model at {_said(before)}, now {_percent(after['score'])}."
    return f"{who} moves the {model} model from {_said(before)} to {_said(after)}."


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f}%"


def answers_html(panels: Mapping[str, Panel], found: Mapping[str, Sequence[dict]], label: str | None = None) -> str:
    """The answers as a page fragment: the sentence of [`what_changed`], and a list with bars per model. Every class
    that is some model's first answer has a colour, the same on all models. Names are escaped.

    Args:
        panels (`Mapping[str, Panel]`): the models.
        found (`Mapping[str, Sequence[dict]]`): their answers, by the same names.
        label (`str`, *optional*): the picture's class, where it is known.
    """
    firsts = dict.fromkeys(answers[0]["label"] for answers in found.values())
    colours = {name: f' class="colour-{number}"' for number, name in enumerate(firsts, start=1)}
    rows = {
        name: "".join(_row(answer, colours.get(answer["label"], ""), answer["label"] == label) for answer in answers)
        for name, answers in found.items()
    }
    said = html.escape(what_changed(found))
    if label is not None:
        said += f" The picture is labelled “{html.escape(label)}” ✓."
    return f'<p class="changed">{said}</p>{_sections(panels, rows)}'


def note_html(panels: Mapping[str, Panel], text: str, kind: str = "note") -> str:
    """The page fragment where there are no answers: why, and which models would give some."""
    return f'<p class="changed {kind}">{html.escape(text)}</p>{_sections(panels, {})}'


def _sections(panels: Mapping[str, Panel], rows: Mapping[str, str]) -> str:
    sections = [
        f'<section class="panel" data-model="{name}" aria-label="{TITLES[name]}"><h2>{TITLES[name]}</h2>'
        f'<p class="about">{html.escape(panel.about)}</p><ol>{rows.get(name, "")}</ol></section>'
        for name, panel in panels.items()
    ]
    return f'<div class="grid">{"".join(sections)}</div>'


def _row(answer: Mapping, colour: str, right: bool) -> str:
    share, mark = _percent(answer["score"]), ' <span class="right" aria-label="the label">✓</span>' if right else ""
    return (
        f'<li{colour}><span class="name">{html.escape(answer["label"])}</span>{mark}<span class="share">{share}</span>'
        f'<span class="bar" aria-hidden="true"><span style="width: {share}"></span></span></li>'
    )


def build_app(
    panels: Mapping[str, Panel],
    *,
    examples: Sequence[tuple[Image.Image, str | None]] = (),
    top_k: int = TOP_K,
) -> gradio.Blocks:
    """The page.

    Args:
        panels (`Mapping[str, Panel]`): what [`load_panels`] returned.
        examples (`Sequence[tuple[PIL.Image.Image, str or None]]`, *optional*): pictures to try, with their labels.
        top_k (`int`, *optional*, defaults to 5): names per model.

    Raises:
        ValueError: gradio is not installed, or `top_k` is less than 1.
    """
    gr = _gradio()
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    labels = {_pixels(image): label for image, label in examples}

    def answer(file: dict | None) -> str:
        if file is None:
            return note_html(panels, _ASK)
        try:
            picture = open_picture(file["path"])
        except ValueError as error:
            return note_html(panels, str(error), "problem")
        found = predictions(picture, [panel.classifier for panel in panels.values()], top_k)
        return answers_html(panels, dict(zip(panels, found, strict=True)), labels.get(_pixels(picture)))

    # Visitors' pictures are removed after an hour.
    with gr.Blocks(title="hf_transmiter", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"{_TITLE}\n\n{_UPGRADED}" if "upgraded" in panels else _TITLE)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                # Lossless, so that an example reaches the models as it is.
                settings = {"type": "filepath", "format": "png", "sources": ["upload", "clipboard"], "height": 320}
                picture = gr.Image(label="Picture", elem_id="picture", **settings)
                if examples:
                    gr.Examples(
                        [[image] for image, _ in examples], picture, elem_id="examples", api_visibility="private"
                    )
                    page.load(js=_NAME_EXAMPLES)
            with gr.Column(scale=2, min_width=300):
                answers = gr.HTML(
                    note_html(panels, _ASK),
                    elem_id="answers",
                    css_template=_STYLE.read_text(encoding="utf-8"),
                    js_on_load="element.setAttribute('aria-live', 'polite')",
                )
        # Not preprocessed by gradio, which would fail on what is no picture before a message can be shown.
        picture.change(answer, picture, answers, preprocess=False, show_progress="minimal", api_name="answers")
    return page


def _pixels(image: Image.Image) -> tuple:
    return image.size, image.convert("RGB").tobytes()


def launch(page: gradio.Blocks, *, host: str | None = None, port: int | None = None, block: bool = True) -> str:
    """Serves the page until interrupted.

    Args:
        page (`gradio.Blocks`): what [`build_app`] returned.
        host (`str`, *optional*): address to listen on; this machine only when omitted (gradio reads
            `GRADIO_SERVER_NAME`, which Spaces set).
        port (`int`, *optional*): the first free one from 7860 when omitted.
        block (`bool`, *optional*, defaults to `True`): wait here.

    Returns:
        `str`: the page's address.

    Raises:
        OSError: the port is taken.
    """
    gr = _gradio()
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        max_file_size="20mb",
        footer_links=[],
        css=_PAGE_STYLE,
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
    )
    if block:
        print(f"Open {address} in a browser; Ctrl+C ends it.", file=sys.stderr, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            page.close(verbose=False)
    return address


def _gradio():
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the app needs gradio: pip install 'hf-transmiter[app]'.") from error
    return gradio
