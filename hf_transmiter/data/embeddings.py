"""Image embeddings of a whole dataset, made once and read many times.

[`embed_dataset`] runs the image tower over a `datasets.Dataset` and keeps the unit rows on disk. The work is cut into
parts of `PART_ROWS` images. Each process of an `accelerate launch` makes whole parts, an interrupted run goes on at
the first missing part, and finished embeddings are never made again: their file name is a digest of everything they
depend on (encoder, processor, data, split). Parts and finished files are verified before they are used.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from datasets import Dataset
from huggingface_hub import cached_assets_path
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..encoders.dual_encoder import DualEncoder
from ..encoders.pictures import SKIP, UnreadablePicture
from ..hub.checks import as_list
from ..hub.files import LOCK, beside, claim, digest, file_digest, file_state, replace_file
from ..settings import check_kind, check_number
from .class_names import label_places
from .images import guess_columns, label_indices, stored_pictures


logger = logging.getLogger(__name__)

PART_ROWS = 1024


class FeatureTable:
    """Unit image rows ``x`` (N, d), or ``[x | h]`` (N, d + 2D), in any float type, with their labels (N,): indices of
    the class names.

    Those of [`embed_dataset`] are mapped from disk, not loaded. `dataset_fingerprint` identifies the images.

    Raises:
        ValueError: the labels do not fit the rows or the class names.
    """

    def __init__(
        self,
        embeds: Tensor,
        labels: Tensor | Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        dataset_fingerprint: str = "",
    ):
        if embeds.ndim != 2:
            raise ValueError(f"embeds must be (N, d), not {tuple(embeds.shape)}.")
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.long)
        self.class_names = None if class_names is None else as_list(class_names, "class_names")
        if self.labels is not None and self.labels.shape != embeds.shape[:1]:
            raise ValueError(f"{tuple(self.labels.shape)} labels for {len(embeds)} rows.")
        if self.labels is not None and self.class_names is not None and len(embeds):
            if self.labels.max() >= len(self.class_names):
                raise ValueError(f"label {int(self.labels.max())} has no name: there are {len(self.class_names)}.")
        self._stored, self.dataset_fingerprint = embeds, dataset_fingerprint

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def embeds(self) -> Tensor:
        """All rows, (N, d) float32; for large tables see [`batches`]."""
        return self._stored.float()

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Blocks of at most `batch_size` rows in order, (B, d) float32; only one block is in memory at a time."""
        for start in range(0, len(self), batch_size):
            yield self._stored[start : start + batch_size].float()

    def share(self, accelerator=None) -> Iterator[tuple[slice, Tensor]]:
        """Of the [`batches`] of 4096 those that fall to this process of several, each with the rows it holds."""
        rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
        start = 0
        for number, x in enumerate(self.batches(4096)):
            if number % world == rank:
                yield slice(start, start + len(x)), x
            start += len(x)

    def select(self, indices: Tensor | Sequence[int]) -> "FeatureTable":
        """The rows `indices`, in that order, copied to memory."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        labels = None if self.labels is None else self.labels[indices]
        return FeatureTable(self._stored[indices], labels, self.class_names, self.dataset_fingerprint)


def embed_dataset(
    encoder: DualEncoder,
    dataset: Dataset,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: bool = True,
    tower: bool = False,
    batch_size: int = 64,
    cache_dir: str | os.PathLike | None = None,
    accelerator=None,
    progress: bool = True,
) -> FeatureTable:
    """Unit image rows of every picture in `dataset`, from the cache or computed and cached.

    Under `accelerate launch` every process calls this with the same arguments, its encoder on its own device, and
    gets the same table; `cache_dir` must be a folder that all of them see.

    Args:
        encoder ([`DualEncoder`]): the model. Its fingerprint, with the processor's settings, is part of the key.
        dataset (`datasets.Dataset`):
            One split. Formats and transforms set on it are not applied: the pictures are taken as stored.
        image_column, label_column (`str`, *optional*): guessed when omitted; without labels the table has none.
        labels (`bool`, *optional*, defaults to `True`): read them; whoever does not need them takes any column.
        tower (`bool`, *optional*, defaults to `False`):
            Rows ``[x | h]`` (N, d + 2D) of [`DualEncoder.embed_pixels`], in a file of their own, of which a later call
            without takes the unit rows.
        batch_size (`int`, *optional*, defaults to 64): pictures per forward pass.
        cache_dir (`str` or `os.PathLike`, *optional*): defaults to a folder among the Hub's cached assets.
        accelerator (`accelerate.Accelerator`, *optional*): defaults to the state of the launched processes.
        progress (`bool`, *optional*, defaults to `True`): show a bar on the main process.

    Raises:
        ValueError: no or several columns could be meant, the dataset is empty, labels are no indices, a picture cannot
            be read, a file is changed meanwhile, or the model answers with infinite or undefined numbers; rows are
            named by their index.
    """
    check_kind("encoder", encoder, DualEncoder)
    batch_size = check_number("batch_size", batch_size, least=1)
    image_column, label_column = guess_columns(dataset, image_column, label_column, labels=labels)
    if not len(dataset):
        raise ValueError("the dataset is empty: there is no image to embed.")
    found = None if label_column is None else label_indices(dataset, label_column)
    class_names = None if found is None else getattr(dataset.features[label_column], "names", None)
    # Only AcceleratorState reads this flag by itself, and making one here would fix the caller's settings.
    state = accelerator or PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    fingerprint = content = content_fingerprint(dataset, image_column)
    facts = [encoder.cache_key, fingerprint, str(dataset.split), image_column, PART_ROWS]
    keys = [hashlib.sha256(json.dumps(each).encode()).hexdigest()[:32] for each in (facts, [*facts, "tower"])]
    if state.num_processes > 1:  # a dataset that was made in memory has another fingerprint in every process
        *keys, fingerprint = broadcast_object_list([*keys, fingerprint])
    root, width = Path(cache_dir) if cache_dir else _usual_cache(), encoder.embed_dim
    tower = tower and encoder.tower_dim > 0
    path, folder = root / f"{keys[tower]}.npy", root / f"{keys[tower]}.parts"
    embeds = _open(path)
    if embeds is None and not tower and (wide := _open(root / f"{keys[True]}.npy")) is not None:
        embeds = wide[:, :width]
    # Every process must have looked before the first of them can finish the table.
    state.wait_for_everyone()
    if embeds is None:
        pictures = stored_pictures(dataset, image_column)
        with ExitStack() as held:
            with suppress(OSError):  # another run of the very same job: both go on, with the same parts
                held.enter_context(claim(path) if state.is_main_process else nullcontext())
            with _together(state):
                _make_parts(encoder, pictures, tower, batch_size, folder, state, progress)
                if content_fingerprint(dataset, image_column) != content:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise ValueError("pictures were changed while they were embedded: start again when all are there.")
            with _together(state):
                if state.is_main_process:
                    try:
                        _join(folder, path, (len(dataset), width + (encoder.tower_dim if tower else 0)))
                    except (OSError, SafetensorError):
                        # The other run may have finished meanwhile and cleared the parts.
                        if _open(path) is None:
                            raise
                    shutil.rmtree(folder, ignore_errors=True)
        embeds = _open(path)
    elif state.is_main_process and (folder.exists() or beside(path, LOCK).exists()):
        with suppress(OSError), claim(path):  # killed when it was as good as finished
            shutil.rmtree(folder, ignore_errors=True)
    return FeatureTable(embeds, found, class_names, fingerprint)


def _usual_cache() -> Path:
    try:
        return cached_assets_path("hf_transmiter", namespace="features")
    except OSError as error:
        raise OSError(
            f"there is no place for embeddings ({error}): pass cache_dir, or set HF_ASSETS_CACHE."
        ) from error


def align_labels(table: FeatureTable, class_names: Sequence[str]) -> Tensor:
    """Labels (N,) of a table as positions in `class_names`, matched by name (see [`match_names`]); numbers without
    names are positions.

    Raises:
        ValueError: no labels, labels that are no class (-1, say), or classes of the table that `class_names` lacks.
    """
    if table.labels is None:
        raise ValueError("scoring needs labels: pass a dataset with a label column (label_column=, --label-column).")
    count = len(table.class_names or class_names)
    outside = ((table.labels < 0) | (table.labels >= count)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"image {row} has label {int(table.labels[row])}, and there are {count} classes: leave such images out, "
            "or the whole column where it holds no labels."
        )
    return torch.tensor(label_places(table.class_names, table.labels.tolist(), class_names), dtype=torch.long)


def _open(path: Path) -> Tensor | None:
    """The rows of a finished file; `None` where there is none, or a damaged one."""
    try:
        if not _is_whole_table(path, *file_state(path)):
            raise ValueError("its rows are not those that were written")
        # Mapped: pages are read when touched and may be dropped again.
        return torch.from_numpy(np.load(path, mmap_mode="c"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s is damaged and will be made again: %s", path, error)
        return None


@lru_cache(maxsize=100_000)
def _is_whole_table(path: Path, *state: int) -> bool:
    """Whether a file ends with the SHA-256 of what stands before it; read once, as long as its `state` stays."""
    found, left = hashlib.sha256(), state[0] - 32
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 2**20))):
            found.update(block)
            left -= len(block)
        return file.read() == found.digest()


def content_fingerprint(dataset: Dataset, image_column: str) -> str:
    """What identifies a dataset's pictures: the content of files that the column only names, so that a copy of them
    is the same, or else the dataset's own fingerprint."""
    stored, found = dataset.data.column(image_column), hashlib.sha256(str(dataset.features[image_column]).encode())
    inside = pa.types.is_struct(stored.type) and {"path", "bytes"} <= {part.name for part in stored.type}
    if inside and not any(chunk.field("bytes").null_count for chunk in stored.chunks):
        return dataset._fingerprint
    if not (inside or pa.types.is_string(stored.type) or pa.types.is_large_string(stored.type)):
        return dataset._fingerprint
    column = dataset.with_format("arrow").select_columns([image_column])
    for start in range(0, len(column), PART_ROWS):
        for row in column[start : start + PART_ROWS][image_column].to_pylist():
            name = row["path"] if inside and row and row["bytes"] is None else row
            try:
                found.update(file_digest(name).encode())
            except (OSError, ValueError, TypeError):  # no file: nothing is known of anything else
                found.update(dataset._fingerprint.encode())
    return found.hexdigest()


@contextmanager
def _together(state) -> Iterator[None]:
    """Ends on all processes at once; what goes wrong on one is an error on all, so that none waits for ever."""
    fault = None
    try:
        yield
    except Exception as error:
        fault = error
    if state.num_processes > 1:
        faults = [text for text in gather_object([None if fault is None else str(fault)]) if text is not None]
        fault = fault or (ValueError(faults[0]) if faults else None)
    if fault is not None:
        raise fault


def _make_parts(
    encoder: DualEncoder, pictures: Dataset, tower: bool, batch_size: int, folder: Path, state, progress: bool
) -> None:
    """Writes this process's missing parts."""
    hidden = not (progress and state.is_main_process) or None  # None: only a terminal or a notebook shows it
    about = {"desc": "Embedding images", "unit": "img", "leave": False, "name": "hf_transmiter.data.embeddings"}
    with tqdm(total=len(pictures), disable=hidden, **about) as bar:
        for index, start in enumerate(range(0, len(pictures), PART_ROWS)):
            rows = range(start, min(start + PART_ROWS, len(pictures)))
            path = _part_path(folder, index)
            if index % state.num_processes != state.process_index or _is_whole(path):
                bar.update(len(rows))
                continue
            blocks = []
            for first in rows[::batch_size]:
                blocks.append(_embed(encoder, pictures, range(first, min(first + batch_size, rows.stop)), tower))
                bar.update(len(blocks[-1]))
            part = torch.cat(blocks)
            replace_file(path, partial(save_file, {"embeds": part}, metadata={"digest": digest({"embeds": part})}))


def _embed(encoder: DualEncoder, pictures: Dataset, rows: range, tower: bool) -> Tensor:
    """Rows of some pictures."""
    (column,) = pictures.column_names

    row = rows.start

    def stored() -> Iterator:
        nonlocal row
        for row in rows:
            yield pictures[row][column]

    try:
        pixels = encoder.preprocess(stored())
    except UnreadablePicture as error:
        raise ValueError(f"the image in row {row} cannot be read{error.fault}{SKIP}.") from error
    return encoder.embed_pixels(pixels, tower, rows.start).cpu()


def _join(folder: Path, path: Path, shape: tuple[int, int]) -> None:
    """One file of all parts, written part by part, as it may be larger than memory, and its digest."""

    def write(temporary: Path) -> None:
        head, found = BytesIO(), hashlib.sha256()
        facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, facts)
        parts = (load_file(_part_path(folder, index))["embeds"] for index in range(-(-shape[0] // PART_ROWS)))
        with open(temporary, "wb") as file:
            for block in chain([head.getvalue()], (part.numpy().tobytes() for part in parts)):
                file.write(block)
                found.update(block)
            file.write(found.digest())

    replace_file(path, write)


def _part_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.safetensors"


def _is_whole(path: Path) -> bool:
    """Whether a part of an earlier run still has the values that it was written with."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("digest") == digest({"embeds": file.get_tensor("embeds")})
    except (OSError, SafetensorError):
        return False
