"""What reaches the terminal: remarks, errors in one sentence, and nothing of strangers' that a terminal would obey."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import typer

import hf_transmiter as ht

from ..hub.checks import printable


LONGEST = 1500  # letters of an error: libraries list every tensor of a model
INTERRUPTED = 130  # the exit code that shells give a program that Ctrl+C ended
_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
_REMARKS = {**dict.fromkeys(("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"), "error")}
_PACKAGE = Path(ht.__file__).parent


def fail(message: str, quiet: bool = False) -> None:
    if not quiet:
        text = printable(" ".join(message.split()))
        print(f"Error: {text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}", file=sys.stderr)
    raise typer.Exit(1)


def in_options(text: str, options: Mapping[str, str]) -> str:
    """A message of the package as the command line says it: ``pass `unlabelled` `` becomes ``pass --unlabelled``.
    `options` are spellings by the name of the Python argument."""
    names = sorted(options, key=len, reverse=True)
    any_of = "|".join(names) or "(?!)"
    two_words = "|".join(name for name in names if "_" in name) or "(?!)"
    shown = "|".join(name for name in names if not options[name].startswith("--set")) or "(?!)"
    after = "|".join(f"(?<={word} )" for word in ("pass", "give", "leave", "as", "read", "among", "in", "or", "and"))

    for pattern in (
        rf"`(?P<name>{any_of})`",
        rf"(?<![\w./`(-])(?P<name>{any_of})=(?:True\b|(?=[\s,.;:)]|$))",
        rf"(?:{after})(?P<name>{two_words})(?=[\s,.;:]|$)",
        rf"^(?P<name>{shown})(?= (?:must|is|are|holds) )",
    ):
        text = re.sub(pattern, lambda match: options[match["name"]], text)
    return text


@contextmanager
def reporting(quiet: bool, debug: bool, options: Mapping[str, str] | None = None) -> Iterator[Callable[[str], str]]:
    """Remarks go to stderr; errors become one line there and exit code 1, Ctrl+C one line and 130. Yields what makes
    a text fit for the terminal of a command with these options, see [`in_options`]."""

    def said(text: str) -> str:
        return printable(in_options(text, options or {}))

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return said(super().format(record))

    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger(ht.__name__)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        with _silence(quiet):
            yield said
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except (BrokenPipeError, typer.Exit, typer.Abort):  # `| head` closed the pipe: typer leaves quietly
        raise
    except Exception as error:
        if debug:
            raise
        fail(said(_sentence(error)))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _sentence(error: Exception) -> str:
    """What went wrong. What neither this package nor the system foresaw is named as what it is."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{str(error.filename)!r}: "
        return f"{where}{error.strerror}."
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, TypeError) and frames and Path(frames[-1].filename).is_relative_to(_PACKAGE):
        return text
    return f"{type(error).__name__}{f': {text}' if text else ''} (--debug shows where)"


@contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """No remarks of the libraries where all shall be quiet, and no bars there or where nobody sees them move: they
    read these variables when a command imports them."""
    wanted = dict.fromkeys(_BARS, "1") if quiet or not sys.stderr.isatty() else {}
    wanted |= _REMARKS if quiet else {}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        with warnings.catch_warnings() if quiet else nullcontext():
            if quiet:
                warnings.simplefilter("ignore")
            yield
    finally:
        for name in added:
            del os.environ[name]
