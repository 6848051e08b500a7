"""[`OutputOptions`]: the place that a command writes, tried and claimed before its work."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import hf_transmiter as ht

from ..settings import setting
from .options import RunOptions


SETTINGS_FILE = "settings.yaml"
_MARKS = {"comparison.json": "comparison", "analysis.json": "analysis", "bridge.safetensors": "bridge"}


def _kind(folder: Path) -> str | None:
    """What a command left at a place: a "tuned model", an "adapter", a "demo" or one of `_MARKS`."""
    if not folder.is_dir():
        return "bridge" if ht.is_bridge(folder) else None
    if (folder / "adapter_config.json").exists():
        own = (folder / SETTINGS_FILE).is_file()
        return ("adapter" if ht.is_transmiter(folder) else "tuned model") if own else None
    known = next((kind for mark, kind in _MARKS.items() if (folder / mark).is_file()), None)
    return "demo" if known is None and (folder / SETTINGS_FILE).is_file() else known


@dataclass
class OutputOptions:
    """Where the result goes."""

    output_dir: Path = field(metadata={"help": "Folder to write; must not exist yet."})
    overwrite: bool = setting(False, "Replace what an earlier run wrote there.")

    @property
    def place(self) -> Path:
        """What is written, also where the path is a link to it."""
        return Path(os.path.realpath(self.output_dir))

    def check(self, run: RunOptions, kind: str, *, file: bool = False) -> None:
        """Claims the place for this run, and makes sure that a result of this `kind` (see [`_kind`]) can go there.

        Raises:
            FileExistsError: it holds something else, or an input of this run, or `overwrite` was not asked for.
            BlockingIOError: another run is writing there.
            OSError: nothing can be written there.
        """
        if not run.main_process:
            return
        path, place = self.output_dir, self.place
        if not file and ht.is_fixed(place):
            raise FileExistsError(
                f"{path} can be filled, but not written in one step (it is the current folder, a mount point, or "
                "nothing can be made beside it): choose a folder in it."
            )
        run.held.enter_context(ht.claim(path))
        done, left = place / SETTINGS_FILE, self.checkpoint
        if done.is_file() and left.is_file() and left.stat().st_mtime_ns <= done.stat().st_mtime_ns:
            left.unlink()  # of a run that was killed when all was done
        self.replaces = frozenset()
        if place.exists() and (file or not place.is_dir() or any(place.iterdir())):
            if place.is_dir() == file or _kind(place) != kind:
                raise FileExistsError(f"{path} exists and was not written by this command: choose another folder.")
            if not self.overwrite:
                raise FileExistsError(f"{path} exists: choose another place, or pass --overwrite.")
            read = next((name for name in run.inputs if place in _with_parents(name)), None)
            if read is not None:
                raise FileExistsError(f"{path} is read by this run ({read}): choose another folder.")
            self.replaces = frozenset(ht.entries(place))

    def holds(self, values: dict, made_from: str) -> bool:
        """Whether an earlier run with these settings, and of the same content, filled the folder."""
        path = self.output_dir / SETTINGS_FILE
        return path.is_file() and path.read_text(encoding="utf-8") == _settings(values, made_from)

    @property
    def checkpoint(self) -> Path:
        """Where an interrupted training goes on."""
        return ht.beside(self.place, ht.CHECKPOINT)

    def write(self, save: Callable[[Path], object], values: dict | None, run: RunOptions, made_from: str = "") -> None:
        """Fills the folder in one step by `save(folder)`, together with the settings; the main process only."""
        if not run.main_process:
            return

        def fill(folder: Path) -> None:
            save(folder)
            if values is not None:
                (folder / SETTINGS_FILE).write_text(_settings(values, made_from), encoding="utf-8")

        ht.replace_folder(self.place, fill, self.replaces)
        self.checkpoint.unlink(missing_ok=True)


def _settings(values: dict, made_from: str) -> str:
    return (f"# made from {made_from}\n" if made_from else "") + yaml.safe_dump(values, sort_keys=False)


def _with_parents(name: str) -> list[Path]:
    """An input, if it is something on disk, and all folders that it is in."""
    try:
        path = Path(os.path.realpath(name.removeprefix("open_clip:")))
        return [path, *path.parents] if path.exists() else []
    except (OSError, ValueError):  # no path at all
        return []
