"""[`run_bench`]: a grid of experiments, cell by cell; what is finished is kept, what fails does not stop the others.

Under `accelerate launch` pictures are embedded by all processes together. Then the cells are dealt out, and each is
made by one process alone, so that its scores are those of a run in one process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list
from huggingface_hub.utils import tqdm

from ..data.embeddings import embed_dataset
from ..hub.files import claim
from ..settings import check_kind
from .cells import CELLS, Alone, Cell, Workshop, cells, is_done, read_cell, read_failure, write_cell, write_failure
from .config import BenchConfig
from .report import write_bench_report


logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What [`run_bench`] leaves behind: the numbers of cells, of finished ones and of those made by this call, cells
    that could not be made and why, and `report.md`, where there is something to report."""

    total: int
    done: int
    made: int
    failed: dict[str, str]
    report: Path | None


def run_bench(
    config: BenchConfig,
    output_dir: str | os.PathLike,
    *,
    models: dict | None = None,
    embedding: dict | None = None,
    accelerator=None,
    progress: bool = True,
) -> Outcome:
    """Makes the cells that are missing, and the report of all that are finished.

    A cell is a file in `cells/`, written in one step; one whose models, images, rows or settings are others than those
    it was made from is made again. Tuned models are kept in `tuned/`; a tuning that was killed goes on from its last
    epoch. A cell that fails is noted in `failed/`, and tried again by the next call.

    Args:
        output_dir (`str` or `os.PathLike`): a new folder, or that of an earlier run.
        models (`dict`, *optional*): `device` and `dtype`, see [`load_encoder`].
        embedding (`dict`, *optional*): `cache_dir` and `batch_size` of [`embed_dataset`].
        accelerator (`accelerate.Accelerator`, *optional*): for several processes, which must see the same folders.

    Raises:
        FileExistsError: `output_dir` holds something else.
        BlockingIOError: another run is writing there.
    """
    check_kind("config", config, BenchConfig)
    state = accelerator or Alone("cpu")
    with claim(output_dir) if state.is_main_process else nullcontext():
        return _run(config, Path(output_dir), state, models, embedding, progress)


def _run(config: BenchConfig, output: Path, state, models, embedding, progress: bool) -> Outcome:
    progress = progress and state.is_main_process
    shop = Workshop(config, output, models=models, embedding=embedding, progress=progress)
    every, todo = list(cells(config)), []
    if state.is_main_process:
        if output.exists() and not (output / CELLS).is_dir() and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(f"{output} exists and was not written by a bench: choose another folder.")
        (output / CELLS).mkdir(parents=True, exist_ok=True)
        todo = _unfinished(every, shop, output)
    if state.num_processes > 1:
        broadcast_object_list(received := [todo])
        todo = received[0]
    _embed([every[place] for place in todo], shop, state)
    mine = deal(todo, every, state.num_processes)[state.process_index]
    with tqdm(mine, desc="Cells", unit="cell", disable=not progress or None, name="hf_transmiter.bench.run") as bar:
        for place in bar:
            bar.set_postfix_str(str(every[place]))
            _make(every[place], shop, output)
    state.wait_for_everyone()
    done = [is_done(read_cell(output, cell)) for cell in every]
    failed = [cell for cell, good in zip(every, done, strict=True) if not good]
    if state.is_main_process and any(done):
        write_bench_report(config, output)
    state.wait_for_everyone()
    return Outcome(
        total=len(every),
        done=sum(done),
        made=sum(done[place] for place in todo),
        failed={str(cell): read_failure(output, cell) or "it was not finished" for cell in failed},
        report=output / "report.md" if any(done) else None,
    )


def deal(todo: Sequence[int], every: Sequence[Cell], num_processes: int) -> list[list[int]]:
    """Places of cells by process: those that may share a tuned model go to the same one."""
    hands: list[list[int]] = [[] for _ in range(num_processes)]
    groups: dict[str, int] = {}
    for place in todo:
        hands[groups.setdefault(every[place].shared, len(groups) % num_processes)].append(place)
    return hands


def _unfinished(every: Sequence[Cell], shop: Workshop, output: Path) -> list[int]:
    """Places of what is to be made; cells whose models or images cannot be loaded are noted as failed here."""
    todo = []
    for place, cell in enumerate(every):
        content = read_cell(output, cell)
        try:
            made_from = shop.made_from(cell)
        except (ValueError, OSError) as error:
            if is_done(content):
                logger.warning("%s is finished, but what it was made from cannot be loaded: %s", cell, error)
            else:
                write_failure(output, cell, error)
            continue
        if not is_done(content) or content.get("made_from") != made_from:
            todo.append(place)
    return todo


def _embed(missing: Sequence[Cell], shop: Workshop, state) -> None:
    """Fills the cache of embeddings. What goes wrong here goes wrong again in its cells, and is noted there."""
    jobs = {(model, images._fingerprint): images for cell in missing for model, images in shop.to_embed(cell)}
    for (model, _), images in jobs.items():
        try:
            embed_dataset(shop.encoder(model), images, accelerator=state, **shop.embedding)
        except (ValueError, OSError) as error:
            logger.info("embedding images with %s: %s", model, error)


def _make(cell: Cell, shop: Workshop, output: Path) -> None:
    """Makes a cell and writes it, or notes why not."""
    try:
        found = shop.make(cell)
        write_cell(output, cell, found)
        lost = [f"{name}: {row['failed']}" for name, row in found["rows"].items() if "failed" in row]
        if lost:
            raise OSError("; ".join(lost))
    except Exception as error:  # whatever it is, it is this cell's: the others go on
        write_failure(output, cell, error)
