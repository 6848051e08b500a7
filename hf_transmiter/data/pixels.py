"""Pictures to pixels, in worker processes: the next ones are decoded and shrunk while a model looks at the last."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..encoders.dual_encoder import DualEncoder
from ..encoders.pictures import SKIP, UnreadablePicture, to_pixels


MOST_WORKERS, FEWEST_PICTURES = 8, 1024  # for fewer pictures no worker is worth its start
_AHEAD = 2  # batches that each worker has ready


class _Pixels(TorchDataset):
    """Pixels of some rows, or what is wrong with a picture among them: exceptions do not travel well."""

    def __init__(self, image_processor, pictures: Dataset):
        self.image_processor, self.pictures = image_processor, pictures

    def __getitem__(self, rows: range) -> Tensor | str:
        (column,) = self.pictures.column_names
        row = 0

        def stored() -> Iterator:
            nonlocal row
            for row in rows:
                yield self.pictures[row][column]

        try:
            return to_pixels(self.image_processor, stored())
        except UnreadablePicture as error:
            return f"the image in row {row} cannot be read{error.fault}{SKIP}."


def pixel_batches(
    encoder: DualEncoder, pictures: Dataset, batches: Sequence[range], num_workers: int
) -> Iterator[tuple[range, Tensor]]:
    """Rows of a dataset of stored pictures, batch by batch in order: which, and their pixels (B, 3, S, S).

    Raises:
        ValueError: a picture cannot be read; its row is told.
        OSError: the workers cannot hand over what they made.
    """
    if multiprocessing.current_process().daemon:  # which may have no children
        num_workers = 0
    loader = DataLoader(
        _Pixels(encoder.pixel_processor, pictures),
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        prefetch_factor=_AHEAD if num_workers else None,
        pin_memory=encoder.device.type == "cuda",
        generator=torch.Generator(),  # or the caller's random numbers would depend on how often this is asked
    )
    try:
        for rows, made in zip(batches, loader, strict=True):
            if isinstance(made, str):
                raise ValueError(made)
            yield rows, made
    except RuntimeError as error:
        if "shared memory" not in str(error) and "exited unexpectedly" not in str(error):
            raise
        raise OSError(
            f"a worker that prepares pictures was stopped, most likely for lack of (shared) memory: pass fewer, "
            f"num_workers={num_workers // 2} (--num-workers), or a smaller batch_size. ({error})"
        ) from error


def usual_workers(encoder: DualEncoder, batches: Sequence[range], state) -> int:
    """Workers for these batches of each process of `state`: as many as there are cores for it on this machine, up to
    `MOST_WORKERS`, and as their pixels fit into half of the shared memory; none for few pictures."""
    if sum(map(len, batches)) < FEWEST_PICTURES:
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(MOST_WORKERS, cores // processes)
    if os.path.isdir("/dev/shm"):
        space, batch_bytes = os.statvfs("/dev/shm"), 3 * 4 * encoder.image_size**2 * len(batches[0])
        workers = min(workers, space.f_bavail * space.f_frsize // 2 // (batch_bytes * (_AHEAD + 1) * processes))
    return workers if workers > 1 else 0
