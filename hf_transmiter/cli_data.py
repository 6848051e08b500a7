"""Commands about datasets and what else a job reads; `cli` adds them to the others. Heavy imports are inside, as
there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from .cli_arguments import IMAGES, MODEL
from .cli_options import Result, RunOptions, command


def add_commands(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    command(app, no_args_is_help=False)(datasets)
    command(app, config_file=False)(prepare_command)


def datasets(
    run: RunOptions,
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Rows to show in full: names of the catalogue, or any source of pictures."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the rows with what the Hub serves (all of them if none is named).")
    ] = False,
) -> Result:
    """The datasets of the papers: where they are, their classes, splits and prompts, and what to beware of.

    [bold]Example:[/bold] hf-transmiter datasets dtd --check
    """
    from .dataset_specs import catalogue, find_spec

    specs = [find_spec(name) for name in names] if names else list(catalogue().values())
    if check:
        return _checked(specs)
    data = {spec.name: _as_data(spec) for spec in specs}
    text = "\n\n".join(_in_full(spec) for spec in specs) if names else _listed(specs)
    return Result(data, text)


def _as_data(spec) -> dict:
    return {key: dict(value) if key in ("counts", "rows", "aliases") else value for key, value in asdict(spec).items()}


def _listed(specs) -> str:
    rows = [("name", "source", "classes", "pictures", "template")]
    for spec in specs:
        pictures = ", ".join(f"{role} {spec.counts[role]:,}" if role in spec.counts else role for role in spec.splits)
        rows.append((spec.name, spec.source, str(len(spec.class_names or ()) or ""), pictures, spec.templates[0]))
    more = "One in full: hf-transmiter datasets NAME. Against the Hub: hf-transmiter datasets --check."
    return f"{_table(rows)}\n\n{more}"


def _in_full(spec) -> str:
    names = spec.class_names
    lines = [
        f"{spec.name}: {spec.title}",
        f"source: {spec.source}",
        f"revision: {spec.revision or 'not pinned'}",
        f"columns: picture {spec.image_column or '(guessed)'}, label {spec.label_column or '(guessed)'}",
    ]
    if spec.frame_column:
        lines.append(f"videos: the middle {spec.frame_column} of each {', '.join(spec.clip_columns)}")
    for role, split in spec.splits.items():
        counts = [f"{spec.counts[role]:,} pictures"] if role in spec.counts else []
        rows = spec.rows.get(role)
        counts += [f"of {rows:,} rows"] if rows and rows != spec.counts.get(role) else []
        lines.append(f"{role}: split {split}{', ' if counts else ''}{' '.join(counts)}")
    lines.append(f"templates: {'; '.join(spec.templates)}")
    if names is None:
        lines.append("classes: those of the data, in their order")
    else:
        half = (len(names) + 1) // 2
        lines.append(f"base classes ({half}): {_ends(names[:half])}")
        lines.append(f"novel classes ({len(names) - half}): {_ends(names[half:])}")
    if spec.left_out:
        lines.append(f"left out: {', '.join(spec.left_out)}")
    return "\n".join([*lines, *([f"notes: {spec.notes}"] if spec.notes else [])])


def _ends(names) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"


def _checked(specs) -> Result:
    """One line per row that is as expected; more for what is not."""
    from .dataset_checks import UNREACHABLE, check_spec

    found, lines = {}, []
    for spec in specs:
        findings = found[spec.name] = check_spec(spec)
        if findings[0].what == UNREACHABLE:  # nor would it answer for the others
            lines.append(f"{spec.name}: the Hub did not answer, so nothing more was checked. {findings[0].found}")
            break
        count = {status: sum(one.status == status for one in findings) for status in ("ok", "differs", "unknown")}
        lines.append(f"{spec.name}: " + ", ".join(f"{number} {status}" for status, number in count.items() if number))
        lines += [
            f"  {one.status}: {one.what}: expected {one.expected}, found {one.found}"
            for one in findings
            if one.status != "ok"
        ]
    return Result({name: [asdict(one) for one in findings] for name, findings in found.items()}, "\n".join(lines))


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def prepare_command(
    run: RunOptions,
    models: Annotated[list[str] | None, typer.Option("--model", help=f"{MODEL} Repeated.")] = None,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", help="Adapter or tuned model: Hub id (id@revision). Repeated.")
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Also the models that the adapters belong to.")
    ] = False,
    bridges: Annotated[list[str] | None, typer.Option("--bridge", help="Hub id of a bridge. Repeated.")] = None,
    datasets: Annotated[list[str] | None, typer.Option("--dataset", help=f"{IMAGES} Repeated.")] = None,
    subset: Annotated[
        str | None, typer.Option(help="Configuration of the Hub datasets that are named here by their id.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="All that a bench reads: YAML file, or the name of a ready one.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it again without a network, in a process of its own.")
    ] = False,
) -> Result:
    """Fetches all that a job reads, so that it runs with HF_HUB_OFFLINE=1: here, or on a machine without a network.

    What is there is not fetched again; an interrupted download goes on. With HF_HUB_OFFLINE=1 nothing is fetched: it
    says whether the caches are complete. The exit code is 1 if anything is missing.

    [bold]Example:[/bold] hf-transmiter prepare --adapter me/textures-b32 --with-base --model openai/clip-vit-large-patch14 --dataset dtd
    """  # noqa: E501
    from huggingface_hub import constants

    from .dataset_specs import catalogue
    from .download_sizes import in_words
    from .preparing import Prepared, cache_folders, prepare, prepared_table

    names, rows_there = datasets or [], catalogue()
    if subset is not None:
        names = [name if name in rows_there else {"source": name, "subset": subset} for name in names]
    options = {"with_base": with_base, "progress": run.progress}
    rows = prepare(models or (), adapters or (), bridges or (), names, config, **options)
    if verify and not constants.HF_HUB_OFFLINE:
        given = {"model": models, "adapter": adapters, "bridge": bridges, "dataset": datasets}
        given |= {"subset": subset and [subset], "config": config and [config]}
        words = [word for key, values in given.items() for value in values or () for word in (f"--{key}", value)]
        again = _verified([*words, "--with-base"] if with_base else words)
        _note_missing(rows, [Prepared(**row) for row in again])
    missing = [row for row in rows if row.status == "failed"]
    folders = [str(folder) for folder in cache_folders()]
    size = in_words(sum(row.num_bytes for row in rows))
    if missing:
        said = "Missing: " + ", ".join(f"{row.kind} {row.name}" for row in missing) + "."
    elif constants.HF_HUB_OFFLINE:
        said = f"Complete: {size} in the caches, read without a network."
    else:
        said = (
            f"Complete: {size}{', read again without a network' if verify else ''}. The same job runs with "
            "HF_HUB_OFFLINE=1. For another machine copy these folders with their links (rsync -a) into its HF_HOME:\n"
            + "\n".join(f"  {folder}" for folder in folders)
        )
    found = {"complete": not missing, "rows": [asdict(row) for row in rows], "folders": folders}
    return Result(found, f"{prepared_table(rows)}\n{said}", exit_code=int(bool(missing)))


def _verified(words: list[str]) -> list[dict]:
    """Rows of `prepare` with these options in a process that has no network."""
    command = [sys.executable, "-m", __package__, "prepare", *words, "--json", "--quiet"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise OSError(f"reading it again failed with exit code {done.returncode}; see above.")
    return json.loads(done.stdout)["rows"]


def _note_missing(rows: list, without_network: list) -> None:
    """Rows that could not be read without a network are failed ones."""
    found = {(row.kind, row.name): row for row in without_network}
    for row in rows:
        again = found.get((row.kind, row.name))
        if row.status != "failed" and (again is None or again.status == "failed"):
            row.status = "failed"
            row.remark = f"without a network: {'not read' if again is None else again.remark}"
