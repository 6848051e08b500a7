"""Commands about datasets; `cli` adds them to the others. Heavy imports are inside, as there."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .cli_options import Result, RunOptions, command


def add_commands(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    command(app, no_args_is_help=False)(datasets)


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
    """Rows that differ first in everyone's eyes: only what is not as expected gets lines of its own."""
    from .dataset_checks import check_spec

    found = {spec.name: check_spec(spec) for spec in specs}
    lines = []
    for name, findings in found.items():
        count = {status: sum(one.status == status for one in findings) for status in ("ok", "differs", "unknown")}
        lines.append(f"{name}: " + ", ".join(f"{number} {status}" for status, number in count.items() if number))
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
