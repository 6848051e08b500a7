"""The command `app`; `cli` adds it to the others. Heavy imports are inside, as there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_arguments import MODEL
from .cli_options import ModelOptions, NameOptions, Result, RunOptions, command


_ADAPTER = "folder or Hub id."


def add_commands(app: typer.Typer) -> None:
    """Registers the command of this module."""
    command(app)(app_command)


def app_command(
    names: NameOptions,
    models: ModelOptions,
    run: RunOptions,
    demo: Annotated[
        Path | None, typer.Option(help="Show what `demo` left in this folder, or in a task's folder in it.")
    ] = None,
    weak: Annotated[str | None, typer.Option(help=f"The weak model, if no other source names it: {MODEL}")] = None,
    teacher: Annotated[str | None, typer.Option(help=f"The tuned weak model: {_ADAPTER}")] = None,
    strong: Annotated[
        str | None, typer.Option(help=f"The strong model, if --upgraded does not name it: {MODEL}")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help=f"Adapter of the weak model, carried over to --strong without --upgraded: {_ADAPTER}"),
    ] = None,
    upgraded: Annotated[str | None, typer.Option(help=f"Adapter of the strong model: {_ADAPTER}")] = None,
    examples: Annotated[
        str | None, typer.Option(help="Pictures to try: a data set on the Hub, a folder, or sandbox:DOMAIN.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Names per model.")] = 5,
    host: Annotated[str | None, typer.Option(help="Address to listen on; only this machine if unset.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; the first free one from 7860 if unset.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Do not run: write a folder that is ready to be a Space. Hub ids only.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier export.")] = False,
) -> Result:
    """Drop a picture in the browser: what the weak, tuned, strong and upgraded models say of it, side by side.

    Any of the models may be left out. Needs gradio: pip install 'hf-transmiter\\[app]'.

    [bold]Example:[/bold] hf-transmiter app --demo out
    """
    if run.accelerator is not None:
        raise ValueError("the app runs in one process: start it without accelerate launch.")
    from .anchors import read_templates
    from .app import build_app, launch
    from .class_names import read_names
    from .panels import demo_sources, example_pictures, load_panels
    from .space import export_space

    named = {"weak": weak, "teacher": teacher, "strong": strong, "adapter": adapter, "upgraded": upgraded}
    sources = {name: source for name, source in named.items() if source is not None}
    if demo is not None:
        if sources:
            raise ValueError(f"--demo has models of its own: leave out --{next(iter(sources))}.")
        sources, pictures = demo_sources(demo)
        examples = examples or pictures
    options = {
        "class_names": read_names(names.class_names),
        "templates": read_templates(names.template) if names.template else None,
    }
    if export is not None:
        export_space(export, sources, examples=examples, top_k=top_k, overwrite=overwrite, **options)
        return Result({"folder": str(export), **sources}, f"Ready to be a Space: {export}")
    panels = load_panels(**sources, **options, **models.load(run))
    page = build_app(panels, examples=example_pictures(examples) if examples else (), top_k=top_k)
    address = launch(page, host=host, port=port)
    return Result({"address": address}, "Ended.")
