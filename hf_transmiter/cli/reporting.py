"""What a command says on stderr: remarks, foreseen errors as one line, and nothing at all with `--quiet`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import typer


if TYPE_CHECKING:
    from .options import RunOptions


def fail(message: str, quiet: bool = False) -> None:
    if not quiet:
        print(f"Error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(1)


@contextmanager
def reporting(run: RunOptions) -> Iterator[None]:
    """Remarks go to stderr; foreseen errors become one line there and exit code 1."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger(__package__)
    before = logger.level
    logger.addHandler(handler)
    quiet = run.quiet or not run.main_process
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        with _silence() if quiet else nullcontext():
            yield
    except (ValueError, OSError) as error:
        if run.debug or isinstance(error, BrokenPipeError):  # `| head` closed the pipe: typer leaves quietly
            raise
        fail(str(error) or type(error).__name__)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def _silence() -> Iterator[None]:
    """No bars and remarks of the libraries either: they read these variables when a command imports them."""
    variables = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
