"""The command `bench`: grids of experiments from one YAML file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import hf_transmiter as ht

from ..settings import check_number
from .options import ModelOptions, Result, RunOptions


def bench(
    models: ModelOptions,
    run: RunOptions,
    config: Annotated[str | None, "YAML file of a bench, or the name of a ready one (see --list)."] = None,
    output_dir: Annotated[
        Path | None, "Folder for cells, tuned models and the report; a second run goes on there."
    ] = None,
    datasets: Annotated[list[str] | None, "Only these datasets, or others; may be repeated."] = None,
    seeds: Annotated[list[int] | None, "These seeds instead; may be repeated."] = None,
    shots: Annotated[list[int] | None, "These numbers of shots instead; may be repeated."] = None,
    dry_run: Annotated[bool, "Only say what is to be done and what it takes."] = False,
    report: Annotated[bool, "Only write the report of finished cells."] = False,
    list_ready: Annotated[bool, typer.Option("--list", help="Only list the ready configurations.")] = False,
    embed_batch_size: Annotated[int, "Pictures per forward pass."] = 64,
    cache_dir: Annotated[str | None, "Where embeddings are kept; a folder in the Hugging Face cache if unset."] = None,
) -> Result:
    """Papers' experiments: models, datasets, tunings, shots and seeds in one YAML file, scored and reported.

    Every finished cell of the grid is kept, so that an interrupted run goes on, and a failed cell is tried again. The
    exit code is 1 while cells are missing.

    [bold]Example:[/bold] hf-transmiter bench --config sandbox-smoke --output-dir out/bench
    """
    if list_ready:
        ready = ht.ready_configs()
        return Result(ready, "\n".join(f"{name}: {title}" for name, title in ready.items()))
    if config is None or output_dir is None:
        raise ValueError("--config and --output-dir are needed; --list names the ready configurations.")
    if dry_run and report:
        raise ValueError("--dry-run or --report, not both.")
    wanted = ht.BenchConfig.read(config).with_overrides(datasets, seeds, shots)
    if dry_run:
        plan = ht.make_plan(wanted, output_dir)
        missing = plan["total"] - plan["done"]
        lines = [f"{plan['total']} cells: {plan['done']} done, {missing} to do ({plan['failed']} failed before)."]
        lines += [f"Tune {model} ({name}) on {data}: {runs} runs" for model, name, data, runs in plan["tunings"]]
        return Result(plan, "\n".join(lines))
    if report:
        path = ht.write_bench_report(wanted, output_dir) if run.main_process else output_dir / "report.md"
        return Result({"report": str(path)}, f"Report: {path}")
    check_number("embed_batch_size", embed_batch_size, least=1)
    embedding = {"batch_size": embed_batch_size, "cache_dir": cache_dir}
    options = {"models": models.load(run), "embedding": embedding, "progress": run.progress}
    found = ht.run_bench(wanted, output_dir, accelerator=run.accelerator, **options)
    lines = [f"{found.done} of {found.total} cells are done, {found.made} of them now."]
    lines += [f"Failed: {cell}: {message}" for cell, message in found.failed.items()]
    lines += [f"Report: {found.report}"] if found.report else []
    missing = found.total - found.done
    return Result(asdict(found), "\n".join(lines), failed=f"{missing} cells are missing." if missing else "")
