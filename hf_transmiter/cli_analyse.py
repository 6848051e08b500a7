"""`analyse`: what an adapter changes on one's own pictures; `cli` adds it. Heavy imports are inside, as there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .cli_arguments import TEST, UNLABELLED, Images
from .cli_options import DataOptions, ModelOptions, OutputOptions, Result, RunOptions, command


if TYPE_CHECKING:
    from .classifier import AnchorClassifier
    from .teachers import Teacher


def add_commands(app: typer.Typer) -> None:
    """Registers the command of this module."""
    command(app)(analyse)


def analyse(
    adapter: Annotated[str, typer.Argument(help="A TransMiter adapter: folder or Hub id.")],
    dataset: Images,
    output: OutputOptions,
    data: DataOptions,
    models: ModelOptions,
    run: RunOptions,
    values: dict,
    base_model: Annotated[
        str | None, typer.Option(help="The model under the adapter, if it is not where the adapter says.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="The tuned weak model or its logits on these pictures (.safetensors), for the temperature."),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(help="Auxiliary names to explain class vectors by: a shipped list, or a file with one per line."),
    ] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Auxiliary names per class.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Rows per table of analysis.md; analysis.json has all.")] = 10,
) -> Result:
    """What an adapter changes, against zero-shot: classes, corrected and broken predictions, confidence, in figures.

    Pictures without labels will do: then it says what changed, not whether for the better.

    [bold]Example:[/bold] hf-transmiter analyse out/strong --dataset mteb/dtd --teacher out/tuned --output-dir out/analysis
    """  # noqa: E501
    output.check(run)
    from .backbone import load_encoder
    from .catalog import load_classifier
    from .hub import SANDBOX, public_name, read_json
    from .knowledge import analyse
    from .knowledge_figures import write_analysis

    config = None if adapter.startswith(SANDBOX) else read_json(adapter, "adapter_config.json")
    if config is None or config.get("peft_type") != "TRANSMITER":
        raise ValueError(f"{adapter!r} is not a TransMiter adapter: pass what extract or transfer wrote.")
    options = models.load(run)
    classifier = load_classifier(adapter, load_encoder(base_model, **options) if base_model else None, **options)
    images = data.load(dataset, (*TEST, *UNLABELLED), data.split)
    found = analyse(
        classifier,
        images,
        vocabulary=vocabulary,
        neighbours=neighbours,
        teacher=None if teacher is None else _load_teacher(teacher, classifier, options),
        **data.embedding(run),
    )
    title = f"What the adapter {public_name(adapter)} changes on {public_name(dataset)} ({images.split})"
    details = {"title": title, "image_column": data.image_column, "count": rows}
    output.write(lambda folder: write_analysis(folder, found, images, **details), values, run)
    said = {key: value for key, value in found.to_dict().items() if key not in ("classes", "moves", "confusions")}
    text = found.to_markdown().split("\n", 1)[0]
    return Result({"output_dir": str(output.output_dir), **said}, f"{text}\nReport: {output.output_dir}/analysis.md")


def _load_teacher(source: str, classifier: AnchorClassifier, options: dict) -> Teacher:
    """The tuned model by itself: which weak model is under it is noted beside it."""
    from .calibration import CalibrationPack
    from .catalog import load_classifier

    if source.endswith(".safetensors"):
        return CalibrationPack.load(source)
    names, templates = classifier.class_names, classifier.adapter_config.templates
    return load_classifier(source, class_names=names, templates=templates, **options)
