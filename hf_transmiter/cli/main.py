"""The command line: `hf-transmiter COMMAND --help`. Commands in the order of the work; all do little but call the API.

Several GPUs or machines: `accelerate launch -m hf_transmiter COMMAND ...`. Heavy imports are inside the commands, so
that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..settings import ExtractionConfig, TuningConfig
from .app import add_commands as add_app_command
from .arguments import LABELLED, MODEL, TEST, UNLABELLED, Images, OptionalImages, Seen, Teacher, Weak
from .bench import add_commands as add_bench_command
from .compare import add_commands as add_compare_commands
from .hub import add_commands as add_hub_commands
from .options import DataOptions, ModelOptions, NameOptions, OutputOptions, Result, RunOptions, check_new, command
from .transfer import add_commands as add_transfer_commands


if TYPE_CHECKING:
    from ..method.classifier import AnchorClassifier
    from ..method.teacher import Teacher as TunedModel

app = typer.Typer(
    name="hf-transmiter",
    help="Carry a fine-tuned CLIP over to a stronger CLIP: logit-space adapters and bridges, in closed form.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    # Typer imports pydantic to find out that nobody asked for the overview, which costs every --help 0.3 s.
    context_settings={"default_map": {"help": False}},
)


def main() -> None:
    """Entry point of the console script."""
    app()


@command(app)
def demo(
    run: RunOptions,
    values: dict,
    output_dir: Annotated[Path, typer.Option(help="Folder for the report, figures and adapters.")] = Path("out"),
    domains: Annotated[list[str] | None, typer.Option(help="Sandbox task, may be repeated; two if unset.")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Seed of tuning, may be repeated; 0 if unset.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> Result:
    """The whole method offline, on tiny models and drawn pictures: scores, figures and adapters.

    [bold]Example:[/bold] hf-transmiter demo --output-dir out
    """
    if run.accelerator is not None:
        raise ValueError("the demo runs in one process: start it without accelerate launch.")
    output, found = OutputOptions(output_dir, overwrite), {}
    output.check(run)
    from .demo import run_demo

    options = {"domains": domains or None, "seeds": seeds or (0,), "progress": run.progress}
    output.write(lambda folder: found.update(run_demo(folder, **options)), values, run)
    data = {**found, "output_dir": str(output_dir), "scores": [asdict(score) for score in found["scores"]]}
    return Result(data, f"{found['table']}\n{found['verdict']}\n\nReport: {output_dir / 'report.md'}")


@command(app)
def tune(
    weak: Weak,
    dataset: Images,
    output: OutputOptions,
    data: DataOptions,
    names: NameOptions,
    config: TuningConfig,
    models: ModelOptions,
    run: RunOptions,
    values: dict,
    seeds: Annotated[
        list[int] | None, typer.Option(help="Tune once with each of these, into OUTPUT_DIR/seed-N; may be repeated.")
    ] = None,
) -> Result:
    """Labelled pictures to a tuned weak model, saved as a PEFT adapter.

    With several seeds, adapters that are there already are kept: an interrupted run goes on.

    [bold]Example:[/bold] hf-transmiter tune --weak openai/clip-vit-base-patch16 --dataset mteb/dtd --method contcoop --output-dir out/tuned
    """  # noqa: E501
    if not seeds:
        output.check(run)
    elif output.overwrite:
        raise ValueError("--overwrite does nothing with --seeds: remove the folders that are to be tuned again.")
    from ..data.anchors import read_templates
    from ..data.catalogue import usual_templates
    from ..data.class_names import read_names
    from ..encoders.dual_encoder import load_encoder
    from ..method.tune import starting_templates, tune

    encoder, images = load_encoder(weak, **models.load(run)), data.load(dataset, LABELLED, data.split)
    usual = starting_templates(config.method, usual_templates(dataset))
    templates = read_templates(names.template) if names.template else usual
    columns = {"image_column": data.image_column, "label_column": data.label_column}
    options = {"class_names": read_names(names.class_names), "templates": templates, **columns}
    options |= {"accelerator": run.accelerator, "progress": run.progress, "cache_dir": data.cache_dir}
    if seeds:
        from ..evaluation.upgrade import tune_seeds

        folders = [str(folder) for folder in tune_seeds(encoder, images, config, seeds, output.output_dir, **options)]
        return Result({"output_dirs": folders, "method": config.method}, "Tuned: " + ", ".join(folders))
    tuned = tune(encoder, images, config=config, checkpoint=output.checkpoint, **options)
    output.write(tuned.save_pretrained, values, run)
    count = len(tuned.class_names)
    found = {"output_dir": str(output.output_dir), "method": config.method, "num_classes": count}
    return Result(found, f"Tuned {weak} ({config.method}) on {count} classes: {output.output_dir}")


@command(app)
def extract(
    weak: Weak,
    teacher: Teacher,
    output: OutputOptions,
    data: DataOptions,
    names: NameOptions,
    config: ExtractionConfig,
    models: ModelOptions,
    run: RunOptions,
    values: dict,
    dataset: OptionalImages = None,
) -> Result:
    """What the tuning changed, as an adapter of the weak model, from unlabelled pictures.

    Pictures are not needed when a prompt was tuned.

    [bold]Example:[/bold] hf-transmiter extract --weak openai/clip-vit-base-patch16 --teacher out/tuned --dataset mteb/dtd --output-dir out/adapter
    """  # noqa: E501
    output.check(run)
    from ..data.catalogue import usual_templates
    from ..data.class_names import read_names
    from ..encoders.dual_encoder import load_encoder
    from ..method.extract import extract
    from ..method.saved import load_teacher, teacher_facts, teacher_templates

    encoder = load_encoder(weak, **models.load(run))
    images = data.load(dataset, UNLABELLED, data.split)
    adapter = extract(
        encoder,
        load_teacher(teacher, encoder),
        images,
        class_names=read_names(names.class_names),
        templates=teacher_templates(teacher, names.template, usual_templates(dataset)),
        config=config,
        dataset_name=dataset,
        checkpoint=output.checkpoint,
        **data.embedding(run),
    )
    facts = adapter.adapter_config.provenance
    facts["teacher"] = teacher_facts(teacher)
    output.write(adapter.save_pretrained, values, run)
    found = {"output_dir": str(output.output_dir), "form": adapter.adapter_config.form, "provenance": facts}
    return Result(found, f"Extracted from {facts['num_images']} images ({config.solver}): {output.output_dir}")


add_transfer_commands(app)


@command(app)
def evaluate(
    model: Annotated[
        str, typer.Argument(help=f"Adapter or tuned model (folder or Hub id), or a plain model: {MODEL}")
    ],
    dataset: Images,
    data: DataOptions,
    names: NameOptions,
    models: ModelOptions,
    run: RunOptions,
    base_model: Annotated[
        str | None, typer.Option(help="The model under an adapter, if it is not where the adapter says.")
    ] = None,
    seen_classes: Seen = None,
    record: Annotated[
        bool, typer.Option("--record", help="Note the scores in the adapter's folder, beside zero-shot, for its card.")
    ] = False,
    analyse: Annotated[
        bool,
        typer.Option("--analyse", help="What the adapter changed against zero-shot; pictures without labels will do."),
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(help="Analysis: the tuned weak model or its logits on these pictures, to compare with."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Analysis: folder for report.md, analysis.json, figures.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
) -> Result:
    """Accuracy on labelled pictures; with seen classes also base, novel, their harmonic mean, and joint.

    With --analyse also which classes an adapter prefers now, what it corrected and broke, and how sure it is.

    [bold]Example:[/bold] hf-transmiter evaluate out/strong --dataset mteb/dtd --analyse --output-dir out/analysis
    """
    if not analyse and (teacher or output_dir):
        raise ValueError("--teacher and --output-dir are for an analysis: pass --analyse, too.")
    if output_dir is not None and run.main_process:
        check_new(output_dir / "report.md", overwrite)
    if record and not (Path(model) / "adapter_config.json").is_file():
        raise ValueError(f"--record needs the folder of an adapter, {model!r} is none.")
    from ..data.anchors import read_templates
    from ..data.catalogue import usual_templates
    from ..data.class_names import read_names
    from ..data.images import guess_columns
    from ..encoders.dual_encoder import load_encoder
    from ..evaluation.evaluate import evaluate
    from ..hub.scores import markdown_table
    from ..method.saved import load_classifier

    options = models.load(run)
    images = data.load(dataset, TEST, data.split)
    _, label = guess_columns(images, data.image_column, data.label_column)
    classifier = load_classifier(
        model,
        load_encoder(base_model, **options) if base_model else None,
        class_names=read_names(names.class_names) or getattr(images.features.get(label), "names", None),
        templates=read_templates(names.template) if names.template else usual_templates(dataset),
        **options,
    )
    seen = read_names(seen_classes)
    split = str(images.split)
    about = {"seen_classes": seen, "split": split, "dataset_name": dataset, **data.embedding(run)}
    unscored = analyse and not record and label is None
    scores = [] if unscored else evaluate(classifier, images, method=model, **about)
    if record and run.main_process:
        from ..evaluation.evaluate import record_scores

        record_scores(model, classifier, images, scores, **about)
    found = {"model": model, "dataset": dataset, "num_images": len(images), "scores": [asdict(s) for s in scores]}
    result = Result(found, markdown_table(scores) if scores else "")
    if analyse:
        from ..evaluation import analyse as analysis
        from ..evaluation.report import write_analysis
        from ..hub.repo import public_name

        own = None if teacher is None else _own_teacher(teacher, classifier, options)
        changed = analysis.analyse(classifier, images, teacher=own, **data.embedding(run))
        result.data["analysis"] = changed.to_dict()
        result.text = f"{result.text}\n{analysis.markdown(changed)}".strip()
        if output_dir is not None and run.main_process:
            title = f"What the adapter {public_name(model)} changes on {public_name(dataset)} ({split})"
            path = write_analysis(output_dir, changed, title=title)
            result.text += f"\n\nReport: {path}"
    return result


def _own_teacher(source: str, classifier: AnchorClassifier, options: dict) -> TunedModel:
    """The tuned model by itself: which weak model is under it is noted beside it."""
    from ..method.saved import load_classifier
    from ..method.stored_logits import CalibrationPack

    if source.endswith(".safetensors"):
        return CalibrationPack.load(source)
    names, templates = classifier.class_names, classifier.adapter_config.templates
    return load_classifier(source, class_names=names, templates=templates, **options)


add_compare_commands(app)


add_hub_commands(app)
add_app_command(app)
add_bench_command(app)
