"""The command `app`: its page is in `app_page`."""

from __future__ import annotations

from typing import Annotated

import hf_transmiter as ht

from .options import IMAGES, MODEL, TEST, DataOptions, ModelOptions, NameOptions, Result, RunOptions


NUM_EXAMPLES = 8


def app(
    names: NameOptions,
    models: ModelOptions,
    run: RunOptions,
    weak: Annotated[str | None, f"The weak model, if --tuned does not name it: {MODEL}"] = None,
    tuned: Annotated[str | None, "The tuned weak model, or its adapter: folder or Hub id."] = None,
    strong: Annotated[str | None, f"The strong model, if --upgraded does not name it: {MODEL}"] = None,
    upgraded: Annotated[str | None, "Adapter of the strong model: folder or Hub id."] = None,
    examples: Annotated[str | None, f"Pictures to try: {IMAGES}"] = None,
) -> Result:
    """Drop a picture in the browser: what the weak, tuned, strong and upgraded models say of it, side by side.

    Any of the models may be left out. Needs gradio: pip install 'hf-transmiter\\[app]'. Where it listens is gradio's
    GRADIO_SERVER_NAME and GRADIO_SERVER_PORT; only this machine, from port 7860, if unset.

    [bold]Example:[/bold] hf-transmiter app --tuned out/jargon/tuned --upgraded out/jargon/strong_adapter --examples sandbox:jargon
    """  # noqa: E501
    if run.accelerator is not None:
        raise ValueError("the app runs in one process: start it without accelerate launch.")
    templates = ht.read_templates(names.template) if names.template else None
    options = {"class_names": ht.read_names(names.class_names), "templates": templates, **models.load(run)}
    shown = ht.load_models(weak, tuned, strong, upgraded, **options)
    page = ht.build_app(shown, DataOptions(max_images=NUM_EXAMPLES).load(examples, TEST))
    return Result({"address": ht.launch(page)}, "Ended.")
