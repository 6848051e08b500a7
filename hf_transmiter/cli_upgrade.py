"""Commands about an upgrade of the base model; `cli` adds them to the others. Heavy imports are inside, as there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import ModelOptions, NameOptions, OutputOptions, Result, RunOptions, command


NUM_NAMES = 200
_MODEL = "Hub id (id@revision), folder, or sandbox:weak, sandbox:weak-upgraded, sandbox:strong."

Old = Annotated[str, typer.Option(help=f"The model before the upgrade: {_MODEL}")]
New = Annotated[str, typer.Option(help=f"The model after the upgrade: {_MODEL}")]


def add_commands(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    command(app)(drift)


def drift(
    old: Old,
    new: New,
    output: OutputOptions,
    names: NameOptions,
    models: ModelOptions,
    run: RunOptions,
    values: dict,
) -> Result:
    """What an upgrade changed in the text tower, layer by layer: parameters and hidden states.

    Without class names, both models are asked about 200 common nouns, always the same. Models of other sizes are
    compared by the similarity of their hidden states.

    [bold]Example:[/bold] hf-transmiter drift --old sandbox:weak --new sandbox:weak-upgraded --output-dir out/drift
    """
    output.check(run)
    from .catalog import load_encoder, read_names, read_templates
    from .drift import feature_drift, parameter_drift
    from .vocabulary import universal_vocabulary

    before, after = (load_encoder(model, **models.load(run)) for model in (old, new))
    class_names = read_names(names.class_names) or universal_vocabulary(NUM_NAMES)
    templates = read_templates(names.template)
    remark = parameters = None
    try:
        parameters = parameter_drift(before, after)
    except ValueError as error:
        remark = str(error)
    features = feature_drift(before, after, class_names, templates)
    found = {
        "old": old,
        "new": new,
        "parameters": parameters and [asdict(row) for row in parameters],
        "features": [asdict(row) for row in features],
        "remark": remark,
        "class_names": list(class_names),
        "templates": list(templates),
    }
    tables = _tables(parameters, features, remark)

    def save(folder: Path) -> None:
        from .upgrade_figures import drift_figure

        (folder / "drift.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        figure = drift_figure(parameters, features, folder / "drift.png")
        link = f"\n![drift]({figure.name})\n" if figure else ""
        title = f"# The text tower from {old} to {new}\n\n"
        (folder / "drift.md").write_text(title + tables + link, encoding="utf-8")

    output.write(save, values, run)
    return Result(
        {"output_dir": str(output.output_dir), **found}, f"{tables}\nReport: {output.output_dir / 'drift.md'}"
    )


def _tables(parameters: list | None, features: list, remark: str | None) -> str:
    from .drift import drift_table

    shown = drift_table(parameters) if parameters is not None else f"{remark[0].upper()}{remark[1:]}\n"
    texts = (
        "Change: root mean square per parameter, mean distance of hidden states at the pooled token. Relative: as a "
        "share of the old size. Similarity: linear CKA over the texts.\n"
    )
    return f"## Parameters\n\n{shown}\n## Hidden states\n\n{drift_table(features)}\n{texts}"
