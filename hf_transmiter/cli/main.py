"""The command line: `hf-transmiter COMMAND --help`. Which commands there are, the demo, and the entry point.

Several GPUs or machines: `accelerate launch -m hf_transmiter COMMAND ...`. Commands take what they need from the
package's own lazy names, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import hf_transmiter as ht

from . import app as page
from . import bench, compare, hub, method
from .options import Result, RunOptions, command
from .output import OutputOptions


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
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # no work ends in an error for want of a letter
    try:
        app()
    except OSError as error:  # of the help, which is printed before a command begins
        if "--debug" in sys.argv:
            raise
        sys.exit(f"Error: {error.strerror or error}.")


def demo(
    run: RunOptions,
    values: dict,
    output_dir: Annotated[Path, "Folder for the report, figures and adapters."] = Path("out"),
    domains: Annotated[list[str] | None, "Sandbox task, may be repeated; two if unset."] = None,
    seeds: Annotated[list[int] | None, "Seed of tuning, may be repeated; 0 if unset."] = None,
    overwrite: Annotated[bool, "Replace an existing output."] = False,
) -> Result:
    """The whole method offline, on tiny models and drawn pictures: scores, figures and adapters.

    [bold]Example:[/bold] hf-transmiter demo --output-dir out
    """
    if run.accelerator is not None:
        raise ValueError("the demo runs in one process: start it without accelerate launch.")
    output, found = OutputOptions(output_dir, overwrite), {}
    output.check(run, "demo")
    options = {"domains": domains or None, "seeds": seeds or (0,), "progress": run.progress}
    output.write(lambda folder: found.update(ht.run_demo(folder, **options)), values, run)
    data = {**found, "output_dir": str(output_dir), "scores": [asdict(score) for score in found["scores"]]}
    return Result(data, f"{found['verdict']}\n\n{found['table']}\nReport: {output_dir / 'report.md'}")


_FIRST, _METHOD, _WORTH, _OTHERS = "To try", "To upgrade", "To see what it is worth", "To show others"
command(app, _FIRST)(demo)
for _step in (method.tune, method.extract, method.bridge, method.transfer):
    command(app, _METHOD)(_step)
command(app, _WORTH)(method.evaluate)
command(app, _WORTH)(compare.compare)
command(app, _WORTH, config_file=False)(bench.bench)
command(app, _OTHERS)(hub.push)
command(app, _OTHERS)(page.app)
