"""The app: a picture in, what the weak, tuned, strong and upgraded models say of it side by side.

Gradio comes with `pip install hf-transmiter[app]` and is imported only to build the page; it is told to ask nobody on
the network for anything.

```python
from hf_transmiter.cli.app_page import build_app, launch, load_models

launch(build_app(load_models(tuned="me/tuned-clip-b32", upgraded="me/upgraded-clip-l14")))
```
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from datasets import Dataset
from PIL import Image

from ..data.anchors import DEFAULT_TEMPLATES, Anchors
from ..data.images import guess_columns
from ..encoders.dual_encoder import load_encoder
from ..encoders.pictures import UnreadablePicture, read_picture
from ..hub.checks import as_list
from ..hub.repo import public_name, read_json, split_revision
from ..method.classifier import AnchorClassifier
from ..method.saved import load_classifier, teacher_templates


if TYPE_CHECKING:
    import gradio

TITLES = {"weak": "Weak, zero-shot", "tuned": "Tuned", "strong": "Strong, zero-shot", "upgraded": "Upgraded"}
TOP_K = 5
MAX_PIXELS = 64_000_000  # a decoded picture of that size takes about 200 MB
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_TITLE = """# What a fine-tuning changed, and what an upgrade keeps of it

Drop a picture to see what each model answers. *Upgraded* is the strong model with what the weak one learnt."""


def load_models(
    weak: str | None = None,
    tuned: str | None = None,
    strong: str | None = None,
    upgraded: str | None = None,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    **options,
) -> dict[str, AnchorClassifier]:
    """The models to show; any of them may be left out.

    Args:
        weak, strong: models; those that `tuned` and `upgraded` were made for when omitted.
        tuned: the tuned weak model, or an adapter of the weak model.
        upgraded: adapter of the strong model.
        class_names: needed where neither of these has them saved with it.
        templates: prompts of zero-shot class vectors; those the tuning started from when omitted.
        **options: `device` and `dtype` of [`load_encoder`].

    Returns:
        Those that there are, by name, in the order of the arguments.

    Raises:
        FileNotFoundError, OSError: a source is not there.
        ValueError: no source, no class names, models that answer about different classes, or damaged files.
    """
    if not (weak or tuned or strong or upgraded):
        raise ValueError("there is no model to show: name at least one of weak, tuned, strong, upgraded.")
    class_names = class_names and as_list(class_names, "class_names")
    if tuned is not None and tuned.endswith(".safetensors"):
        raise ValueError(f"{tuned!r} holds logits, which say nothing about new pictures: pass the tuned model.")
    weak, strong = weak or _base(tuned), strong or _base(upgraded)
    encoders = {name: load_encoder(name, **options) for name in (weak, strong) if name}
    found, usual = {}, templates or DEFAULT_TEMPLATES
    for name, source, base in (("upgraded", upgraded, strong), ("tuned", tuned, weak)):
        if source:
            named = {"class_names": class_names, "templates": usual}
            found[name] = load_classifier(source, encoders.get(base), **named, **options)
            class_names = class_names or found[name].class_names
            usual = templates or teacher_templates(source, usual=found[name].anchors.templates)
    if not class_names:
        raise ValueError("no class names are saved with these models: pass class names.")
    for name, base in (("weak", weak), ("strong", strong)):
        if base:
            found[name] = AnchorClassifier(encoders[base], Anchors(class_names, (), usual))
    found = {name: found[name] for name in TITLES if name in found}
    counts = ", ".join(f"{name}: {len(model.class_names)}" for name, model in found.items())
    if len({frozenset(model.class_names) for model in found.values()}) > 1:
        raise ValueError(f"these models answer about different classes ({counts}): choose models of one task.")
    for classifier in found.values():  # class vectors are computed now, not under the first visitor's eyes
        classifier.predict(Image.new("RGB", (32, 32)))
    return found


def _base(source: str | None) -> str | None:
    """The model that an adapter was made for."""
    config = source and read_json(source, "adapter_config.json") or {}
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return f"{name}@{revision}" if name and revision else name


def open_picture(path: str | os.PathLike) -> Image.Image:
    """A picture from a file, upright, in RGB.

    Raises:
        ValueError: not a picture, damaged, or of more than `MAX_PIXELS` pixels; the message is for visitors.
    """
    try:
        # Every other format of Pillow is code that strangers would reach; EPS even starts Ghostscript.
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(
                    f"This picture is too large: {file.width} x {file.height} pixels. "
                    f"At most {MAX_PIXELS // 1_000_000} megapixels are read."
                )
            return read_picture(file)
    except Image.DecompressionBombError as error:
        raise ValueError("This picture is too large.") from error
    except (OSError, SyntaxError, TypeError, AttributeError, UnreadablePicture) as error:  # of damaged files
        raise ValueError("This file cannot be read as a picture. PNG, JPEG and WebP work.") from error


def build_app(models: Mapping[str, AnchorClassifier], examples: Dataset | None = None) -> "gradio.Blocks":
    """The page for what [`load_models`] returned, with a few pictures to try, and their labels if they have some.

    Raises:
        ValueError: gradio is not installed.
    """
    gr = _gradio()

    def answer(file: dict | None, asked: str | None = None) -> dict:
        if file is None:
            return dict.fromkeys(shown.values())
        options = {"top_k": TOP_K, "class_names": [part.strip() for part in (asked or "").split(",") if part.strip()]}
        try:
            picture = open_picture(file["path"])
            found = {name: model.predict(picture, **options)[0] for name, model in models.items()}
        except ValueError as error:
            gr.Warning(str(error))
            return dict.fromkeys(shown.values())
        return {shown[name]: {row["label"]: row["score"] for row in rows} for name, rows in found.items()}

    # Visitors' pictures are removed after an hour.
    with gr.Blocks(title="hf_transmiter", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(_TITLE)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                # Lossless, so that an example reaches the models as it is.
                picture = gr.Image(
                    label="Picture", type="filepath", format="png", sources=["upload", "clipboard"], height=320
                )
                asked = []
                if all(model.open_vocabulary for model in models.values()):
                    names = {"label": "Class names", "placeholder": "any others, with commas between them"}
                    asked = [gr.Textbox(**names, max_length=1000)]
                if examples is not None:
                    label = gr.Textbox(label="Its label", interactive=False)
            with gr.Column(scale=2, min_width=300), gr.Row():
                shown = {
                    name: gr.Label(label=_label(name, model), elem_id=name, num_top_classes=TOP_K, min_width=280)
                    for name, model in models.items()
                }
        if examples is not None:
            gr.Examples(
                _with_labels(examples), [picture, label], examples_per_page=len(examples), api_visibility="private"
            )
            picture.input(lambda: "", None, label, api_visibility="private")  # nobody knows a visitor's
        # Not preprocessed by gradio, which would fail on what is no picture before a message can be shown.
        given, outputs = [picture, *asked], list(shown.values())
        picture.change(answer, given, outputs, preprocess=False, api_name="answers")
        for box in asked:
            box.submit(answer, given, outputs, preprocess=False, api_visibility="private")
    return page


def _label(name: str, model: AnchorClassifier) -> str:
    """What stands above a model's answers: no path of this machine, no commit."""
    source = model.encoder.name_or_path
    return f"{TITLES[name]} ({public_name(split_revision(source)[0])})" if source else TITLES[name]


def _with_labels(images: Dataset) -> list[list]:
    image, label = guess_columns(images)
    names = getattr(images.features.get(label), "names", None)
    return [[read_picture(row[image]), names[row[label]] if names and row[label] >= 0 else ""] for row in images]


def launch(page: "gradio.Blocks") -> str:
    """Serves the page until interrupted, on this machine only and at the first free port from 7860 unless the
    environment's `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT` say otherwise. Returns its address.
    """
    # The usual theme would ask for fonts on the network.
    theme = _gradio().themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    options = {"share": False, "quiet": True, "ssr_mode": False, "max_file_size": "20mb", "footer_links": []}
    _, address, _ = page.launch(prevent_thread_lock=True, theme=theme, **options)
    with redirect_stdout(sys.stderr):
        try:
            print(f"Open {address} in a browser; Ctrl+C ends it.", flush=True)
            page.block_thread()
        except KeyboardInterrupt:  # before gradio waits for it
            page.close()
    return address


def _gradio():
    try:
        import gradio  # of the extra `app`
    except ImportError as error:
        raise ValueError("the app needs gradio: pip install 'hf-transmiter[app]'.") from error
    return gradio
