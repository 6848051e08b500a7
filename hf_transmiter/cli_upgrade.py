"""Commands about an upgrade of the base model; `cli` adds them to the others. Heavy imports are inside, as there."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from .cli_arguments import IMAGES, LABELLED, MODEL, TEST
from .cli_options import (
    DataOptions,
    ModelOptions,
    NameOptions,
    OutputOptions,
    Result,
    RunOptions,
    check_new,
    command,
)


NUM_NAMES = 200
_ADAPTER = "adapter_config.json"

Old = Annotated[str, typer.Option(help=f"The model before the upgrade: {MODEL}")]
New = Annotated[str, typer.Option(help=f"The model after the upgrade: {MODEL}")]


def add_commands(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    command(app)(compat)
    command(app)(drift)


def compat(
    adapters: Annotated[
        list[str],
        typer.Option(help="A prompt adapter of `tune`: folder, folder of such folders (seeds), Hub id; repeated."),
    ],
    old: Old,
    new: New,
    dataset: Annotated[str, typer.Option(help=f"Labelled test pictures: {IMAGES}")],
    output_dir: Annotated[Path, typer.Option(help="Folder for compat.md, compat.json, compat.png and retrained/.")],
    data: DataOptions,
    models: ModelOptions,
    run: RunOptions,
    train: Annotated[
        str | None, typer.Option(help="What the tunings drew from: re-train each on the new model, for the ceiling.")
    ] = None,
    class_names: Annotated[
        list[str] | None, typer.Option(help="Class names in label order, if the dataset does not name them.")
    ] = None,
    seen_classes: Annotated[
        list[str] | None, typer.Option(help="Base classes, which the tuning saw; adds base, novel and their mean.")
    ] = None,
    map_tokens: Annotated[
        bool, typer.Option("--map-tokens", help="Add contexts that went through a map of the token tables.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing report; what was re-trained stays in use.")
    ] = False,
) -> Result:
    """What prompts are worth before and after an upgrade: on the old model, on the new one unchanged, re-trained there.

    Adapters of one method and settings but different seeds make one row. What the new model cannot take stays a row,
    with the reason. An interrupted run goes on where it was.

    [bold]Example:[/bold] hf-transmiter compat --old sandbox:weak --new sandbox:weak-upgraded --output-dir out/compat --adapters out/coop --adapters out/contcoop --dataset sandbox:jargon --train sandbox:jargon
    """  # noqa: E501
    if run.main_process:
        check_new(output_dir / "compat.json", overwrite)
    from .backbone import load_encoder
    from .class_names import read_names
    from .compatibility import score_upgrade, upgrade_table

    folders = _adapter_folders(adapters)
    before, after = (load_encoder(model, **models.load(run)) for model in (old, new))
    test = data.load(dataset, TEST, data.split)
    whole = replace(data, max_images=None)  # the tunings' own draws are to be repeated
    rows = score_upgrade(
        folders,
        before,
        after,
        test,
        train=whole.load(train, LABELLED),
        class_names=read_names(class_names),
        seen_classes=read_names(seen_classes),
        mapped=map_tokens,
        output_dir=output_dir,
        **data.embedding(run),
    )
    found = {"old": old, "new": new, "dataset": dataset, "split": str(test.split), "num_images": len(test)}
    found |= {"seen_classes": list(read_names(seen_classes) or ()), "rows": [asdict(row) for row in rows]}
    table = upgrade_table(rows)
    if run.main_process:
        _write_compat(output_dir, found, rows, table)
    return Result({"output_dir": str(output_dir), **found}, f"{table}\nReport: {output_dir / 'compat.md'}")


def _adapter_folders(sources: list[str]) -> list[str]:
    """Folders that hold adapters in subfolders, such as one per seed, taken apart; the rest as it is."""
    found = []
    for source in sources:
        folder = Path(source)
        if not folder.is_dir() or (folder / _ADAPTER).is_file():
            found.append(source)
            continue
        inside = sorted(str(path.parent) for path in folder.glob(f"[!.]*/{_ADAPTER}"))
        if not inside:
            raise ValueError(f"there is no adapter in {source!r}, nor in a folder in it: no {_ADAPTER}.")
        found += inside
    return found


def _write_compat(folder: Path, found: dict, rows: list, table: str) -> None:
    from .files import replace_file
    from .upgrade_figures import compatibility_figure

    folder.mkdir(parents=True, exist_ok=True)
    learnt, floors = [row for row in rows if row.seeds], [row for row in rows if not row.seeds]
    lines = {f"{row.method}, {model} model": getattr(row, model)[0] for row in floors for model in ("old", "upgraded")}
    figure = compatibility_figure(learnt, folder / "compat.png", lines)
    link = f"\n![compatibility]({figure.name})\n" if figure else ""
    title = f"# Prompts from {found['old']} to {found['new']}, on {found['dataset']}"
    text = f"{title}\n\n{found['num_images']} images ({found['split']}).\n\n{table}{link}"
    replace_file(folder / "compat.md", lambda path: path.write_text(text, encoding="utf-8"))
    # Last: its being there says that the rest is.
    content = json.dumps(found, indent=2) + "\n"
    replace_file(folder / "compat.json", lambda path: path.write_text(content, encoding="utf-8"))


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
    from .anchors import read_templates
    from .backbone import load_encoder
    from .class_names import read_names
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
