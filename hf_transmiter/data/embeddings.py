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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from huggingface_hub import cached_assets_path
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..encoders.dual_encoder import DualEncoder
from ..hub.files import LOCK, beside, claim, digest, file_digest, file_state, replace_file
from ..settings import PRECISIONS, check_choice, check_kind, check_number
from .images import guess_columns, label_indices, stored_pictures
from .pixels import pixel_batches, usual_workers
from .table import FeatureTable, StoredRows, stored_rows


logger = logging.getLogger(__name__)

PART_ROWS = 1024
_NOT_SHARED = (
    "processes do not find each other's embeddings: where they run on several machines, pass `cache_dir`, a folder "
    "that all of them see."
)
ALIKE = 0.9  # least cosine of what a model makes of one picture, read by whatever decoder


def embed_dataset(
    encoder: DualEncoder,
    dataset: Dataset,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: bool = True,
    tower: bool = False,
    embedding_columns: Mapping[str, str] | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    precision: str = "float32",
    cache_dir: str | os.PathLike | None = None,
    accelerator=None,
    progress: bool = True,
) -> FeatureTable:
    """Unit image rows of every picture in `dataset`: those that are there already, from the cache, or computed and
    cached.

    Under `accelerate launch` every process calls this with the same arguments, its encoder on its own device, and
    gets the same table; `cache_dir` must be a folder that all of them see.

    Args:
        encoder ([`DualEncoder`]): the model. Its fingerprint, with the processor's settings, is part of the key.
        dataset (`datasets.Dataset` or [`FeatureTable`]):
            One split. Formats and transforms set on it are not applied: the pictures are taken as stored. A table of
            this model is returned as it is.
        image_column, label_column (`str`, *optional*): guessed when omitted; without labels the table has none.
        labels (`bool`, *optional*, defaults to `True`): read them; whoever does not need them takes any column.
        tower (`bool`, *optional*, defaults to `False`):
            Rows ``[x | h]`` (N, d + 2D) of [`DualEncoder.embed_pixels`], in a file of their own, of which a later call
            without takes the unit rows.
        embedding_columns (`Mapping[str, str]`, *optional*):
            Columns with embeddings that are there already, by model: ``{"openai/clip-vit-base-patch32": "b32"}``. When
            omitted, a column that is called as the model is. Its rows are taken as they are, unit rows (N, d) or
            ``[x | h]``; of pictures beside them only the first and the last are embedded, to be sure.
        batch_size (`int`, *optional*, defaults to 64):
            Pictures per forward pass; fewer where the device has not enough memory for them.
        num_workers (`int`, *optional*):
            Processes that decode and shrink pictures while the model looks at those before; 0 for none. As many as
            there are cores, 8 at most, when omitted; none for fewer than 1,024 pictures.
        precision (`str`, *optional*, defaults to `"float32"`):
            `"bfloat16"` runs the image tower in autocast, for GPUs that are made for it; the rows are close to those
            of float32, and kept apart from them.
        cache_dir (`str` or `os.PathLike`, *optional*): defaults to a folder among the Hub's cached assets.
        accelerator (`accelerate.Accelerator`, *optional*): defaults to the state of the launched processes.
        progress (`bool`, *optional*, defaults to `True`): show a bar on the main process.

    Raises:
        ValueError: no or several columns could be meant, the dataset is empty, labels are no indices, a picture cannot
            be read, a file is changed meanwhile, or the model answers with infinite or undefined numbers; embeddings
            that are there are another model's, or no unit rows. Rows are named by their index.
    """
    check_kind("encoder", encoder, DualEncoder)
    batch_size = check_number("batch_size", batch_size, least=1)
    if num_workers is not None:
        num_workers = check_number("num_workers", num_workers, least=0)
    check_choice("precision", precision, PRECISIONS)
    if isinstance(dataset, FeatureTable):
        return dataset.of(encoder, tower)
    image_column, label_column = guess_columns(dataset, image_column, label_column, labels=labels, pictures=False)
    if not len(dataset):
        raise ValueError("the dataset is empty: there is no image to embed.")
    found = None if label_column is None else label_indices(dataset, label_column)
    class_names = None if found is None else getattr(dataset.features[label_column], "names", None)
    # Only AcceleratorState reads this flag by itself, and making one here would fix the caller's settings.
    state = accelerator or PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    fingerprint = content = content_fingerprint(dataset, image_column, state)
    if state.num_processes > 1:  # a dataset that was made in memory has another one in every process
        (fingerprint,) = broadcast_object_list([fingerprint])
    pictures = None if image_column is None else stored_pictures(dataset, image_column)
    embeds = stored_rows(dataset, encoder, embedding_columns)
    if embeds is not None and pictures is not None:
        _check_stored(encoder, embeds, pictures)
    if embeds is None and pictures is None:
        raise ValueError(
            f"there are neither pictures nor embeddings of {encoder} among the columns "
            f"{', '.join(dataset.column_names)}: call the column with what this very model makes of pictures as the "
            f"model, or pass embedding_columns={{{encoder.name_or_path!r}: ...}} (--embedding-columns). Of a tuned "
            "model that is elsewhere the logits will do: pass them as teacher."
        )
    if embeds is None:
        facts = [encoder.cache_key, fingerprint, str(dataset.split), image_column, PART_ROWS]
        facts += [precision] if precision != PRECISIONS[0] else []
        keys = [hashlib.sha256(json.dumps(each).encode()).hexdigest()[:32] for each in (facts, [*facts, "tower"])]
        root = Path(cache_dir) if cache_dir else _usual_cache()
        unit, wide = (root / f"{key}.npy" for key in keys)
        tower = tower and encoder.tower_dim > 0
        path = wide if tower else unit
        embeds = _open(path) if tower or unit.exists() else _open(wide)

        def changed() -> bool:
            return content_fingerprint(dataset, image_column, state) != content

        there = embeds is not None
        if state.num_processes > 1:  # the first decides: what others see may be of another moment, or machine
            (there,) = broadcast_object_list([there])
        if not there:
            if embedding_columns and state.is_main_process:
                said = "embedding_columns name no column of %r, only of %s: its pictures are embedded"
                logger.warning(said, encoder.name_or_path, ", ".join(map(str, embedding_columns)))
            how = {"batch_size": batch_size, "num_workers": num_workers, "precision": precision, "progress": progress}
            embeds = _embedded(encoder, pictures, tower, path, state, changed, **how)
        elif state.is_main_process and (_folder(path).exists() or beside(path, LOCK).exists()):
            with suppress(OSError), claim(path):  # killed when it was as good as finished
                shutil.rmtree(_folder(path), ignore_errors=True)
        with _together(state):
            if embeds is None:
                embeds = _open(path) if tower or unit.exists() else _open(wide)
            if embeds is None:
                raise ValueError(_NOT_SHARED)
    table = FeatureTable(embeds, found, class_names, fingerprint, encoder)
    return table if tower else table.narrow(encoder.embed_dim)


def _embedded(
    encoder: DualEncoder, pictures: Dataset, tower: bool, path: Path, state, changed: Callable, **how
) -> Tensor:  # fmt: skip
    """The rows, part by part into one file; `changed` says whether pictures are others than before."""
    folder = _folder(path)
    with ExitStack() as held:
        with suppress(OSError):  # another run of the very same job: both go on, with the same parts
            held.enter_context(claim(path) if state.is_main_process else nullcontext())
        with _together(state):
            while not _make_parts(encoder, pictures, tower, folder, state, **how):
                how["batch_size"] //= 2
                clear_device_cache(garbage_collection=True)
        if changed():  # which all processes ask together
            shutil.rmtree(folder, ignore_errors=True)
            raise ValueError("pictures were changed while they were embedded: start again when all are there.")
        with _together(state):
            if state.is_main_process:
                try:
                    _join(folder, path, (len(pictures), encoder.embed_dim + (encoder.tower_dim if tower else 0)))
                except (OSError, SafetensorError) as error:
                    # The other run may have finished meanwhile and cleared the parts.
                    if _open(path) is None and isinstance(error, FileNotFoundError) and state.num_processes > 1:
                        raise ValueError(_NOT_SHARED) from error
                    if _open(path) is None:
                        raise
                shutil.rmtree(folder, ignore_errors=True)
    return _open(path)


def _check_stored(encoder: DualEncoder, stored: StoredRows, pictures: Dataset) -> None:
    """Whether the rows are what the model makes of the first and the last picture, as far as these can be read here.

    Raises:
        ValueError: they are not.
    """
    (column,) = pictures.column_names
    for row in {0, len(pictures) - 1}:
        try:
            (own,) = encoder.embed_images([pictures[row][column]]).cpu()
        except ValueError:
            continue
        cosine = float(own @ stored[row : row + 1][0, : len(own)])
        if cosine < ALIKE:
            raise ValueError(
                f"{stored} is not what {encoder.name_or_path!r} makes of the pictures beside it (in row {row} the "
                f"cosine is {cosine:.2f}): name the right column (embedding_columns=), or leave that column out."
            )


def _usual_cache() -> Path:
    try:
        return cached_assets_path("hf_transmiter", namespace="features")
    except OSError as error:
        raise OSError(
            f"there is no place for embeddings ({error}): pass cache_dir, or set HF_ASSETS_CACHE."
        ) from error


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


def content_fingerprint(dataset: Dataset, image_column: str | None, state=None) -> str:
    """What identifies a dataset's pictures: the content of files that the column only names, so that a copy of them
    is the same, or else the dataset's own fingerprint. The processes of `state` share the reading."""
    if image_column is None:
        return dataset._fingerprint
    stored, found = dataset.data.column(image_column), []
    inside = pa.types.is_struct(stored.type) and {"path", "bytes"} <= {part.name for part in stored.type}
    if inside and not any(chunk.field("bytes").null_count for chunk in stored.chunks):
        return dataset._fingerprint
    if not (inside or pa.types.is_string(stored.type) or pa.types.is_large_string(stored.type)):
        return dataset._fingerprint
    column, rank, world = dataset.with_format("arrow").select_columns([image_column]), 0, 1
    if state is not None:
        rank, world = state.process_index, state.num_processes
    for start in range(rank * PART_ROWS, len(column), world * PART_ROWS):
        block = hashlib.sha256()
        for row in column[start : start + PART_ROWS][image_column].to_pylist():
            name = row["path"] if inside and row and row["bytes"] is None else row
            try:
                block.update(file_digest(name).encode())
            except (OSError, ValueError, TypeError):  # no file: nothing is known of anything else
                block.update(dataset._fingerprint.encode())
        found.append((start, block.hexdigest()))
    if world > 1:
        found = gather_object(found)
    return hashlib.sha256(f"{dataset.features[image_column]} {sorted(found)}".encode()).hexdigest()


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
    encoder: DualEncoder, pictures: Dataset, tower: bool, folder: Path, state, *, batch_size: int, progress: bool,
    num_workers: int | None, precision: str,
) -> bool:  # fmt: skip
    """Writes this process's missing parts; false where a batch does not fit the device's memory."""
    hidden = not (progress and state.is_main_process) or None  # None: only a terminal or a notebook shows it
    about = {"desc": "Embedding images", "unit": "img", "leave": False, "name": "hf_transmiter.data.embeddings"}
    parts = [range(start, min(start + PART_ROWS, len(pictures))) for start in range(0, len(pictures), PART_ROWS)]
    mine = range(state.process_index, len(parts), state.num_processes)
    missing = [index for index in mine if not _is_whole(_part_path(folder, index))]
    batches = [parts[index][k : k + batch_size] for index in missing for k in range(0, len(parts[index]), batch_size)]
    if num_workers is None:
        num_workers = usual_workers(encoder, batches, state)
    prepared = closing(pixel_batches(encoder, pictures, batches, num_workers))  # its workers end with it
    with prepared as prepared, tqdm(total=len(pictures), disable=hidden, **about) as bar:
        bar.update(len(pictures) - sum(map(len, batches)))
        blocks = []
        for rows, pixels in prepared:
            try:
                with torch.autocast(encoder.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    blocks.append(encoder.embed_pixels(pixels, tower, rows.start).cpu())
            except RuntimeError as error:
                if batch_size == 1 or not should_reduce_batch_size(error):
                    raise
                return False
            bar.update(len(rows))
            if rows.stop == parts[index := rows.start // PART_ROWS].stop:
                made = {"embeds": torch.cat(blocks)}
                blocks = []
                write = partial(save_file, made, metadata={"digest": digest(made)})
                replace_file(_part_path(folder, index), write)
    return True


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


def _folder(path: Path) -> Path:
    return path.with_suffix(".parts")


def _part_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.safetensors"


def _is_whole(path: Path) -> bool:
    """Whether a part of an earlier run still has the values that it was written with."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("digest") == digest({"embeds": file.get_tensor("embeds")})
    except (OSError, SafetensorError):
        return False
