"""Image embeddings of a whole dataset, made once and read many times.

[`embed_dataset`] runs the image tower over a `datasets.Dataset` and keeps the unit rows on disk as a
[`FeatureTable`]. The work is cut into parts of `PART_ROWS` images. Each process of an `accelerate launch` makes whole
parts, an interrupted run goes on at the first missing part, and a finished table is never made again: its file name
is a digest of everything its content depends on (encoder, processor, data, split, type on disk).
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from datasets import ClassLabel, Dataset, Image, IterableDataset
from huggingface_hub import cached_assets_path
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .backbone import DualEncoder
from .feature_table import FeatureTable, write_table
from .files import replace_file
from .image_sources import guess_columns


logger = logging.getLogger(__name__)

__all__ = ["FeatureTable", "embed_dataset", "guess_columns"]

PART_ROWS = 1024
_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixels")
_LABEL_NAMES = ("label", "labels", "cls", "fine_label", "class", "target")


def embed_dataset(
    encoder: DualEncoder,
    dataset: Dataset | IterableDataset,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 64,
    dtype: str = "float32",
    cache_dir: str | os.PathLike | None = None,
    cache_key: str | None = None,
    overwrite: bool = False,
    accelerator=None,
    progress: bool = True,
    max_images: int | None = None,
) -> FeatureTable:
    """Unit image rows of every picture in `dataset`, from the cache or computed and cached.

    Under `accelerate launch` every process calls this with the same arguments, its encoder on its own device, and
    gets the same table; `cache_dir` must be a folder that all of them see.

    Args:
        encoder ([`DualEncoder`]): the model. Its fingerprint, with the processor's settings, is part of the key.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            One split. Formats and transforms set on a `Dataset` are not applied: the pictures are taken as stored.
        image_column (`str`, *optional*): guessed when omitted.
        label_column (`str`, *optional*): guessed when omitted; without any, the table has no labels.
        batch_size (`int`, *optional*, defaults to 64): pictures per forward pass.
        dtype (`str`, *optional*, defaults to `"float32"`): type on disk, `"float32"` or `"float16"`.
        cache_dir (`str` or `os.PathLike`, *optional*): defaults to a folder among the Hub's cached assets.
        cache_key (`str`, *optional*):
            Stands for the content of the dataset, which a streamed dataset does not know by itself: without one, the
            table of a streamed dataset is held in memory and not cached.
        overwrite (`bool`, *optional*, defaults to `False`): make a finished table again.
        accelerator (`accelerate.Accelerator`, *optional*): defaults to the state of the launched processes.
        progress (`bool`, *optional*, defaults to `True`): show a bar on the main process.
        max_images (`int`, *optional*): take only the first so many.

    Raises:
        ValueError: no or several columns could be meant, the dataset is empty, a picture cannot be read, or the
            model answers with infinite or undefined numbers; rows are named by their index.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}.")
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(f"dataset must be one split of a dataset, not a {type(dataset).__name__}.")
    columns = guess_columns(dataset, image_column, label_column)
    # Only AcceleratorState reads this flag by itself, and making one here would fix the caller's settings.
    state = accelerator or PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    streamed = isinstance(dataset, IterableDataset)
    content = cache_key or ("" if streamed else dataset._fingerprint)
    facts = [encoder.fingerprint, content, str(dataset.split), dtype, *columns, max_images, PART_ROWS]
    key = _from_main(hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32], state)
    root = Path(cache_dir or cached_assets_path("hf_transmiter", namespace="features"))
    root.mkdir(parents=True, exist_ok=True)
    job = _Embedding(encoder, dataset, columns, batch_size, _DTYPES[dtype], max_images, key, state, progress)
    if streamed and not cache_key:
        return job.in_memory(root, content)
    path = root / f"{key}.safetensors"
    if overwrite and state.is_main_process:
        path.unlink(missing_ok=True)
        shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)
    state.wait_for_everyone()
    return job.on_disk(path, content)


class _Embedding:
    """One run of [`embed_dataset`]: makes the missing parts of its share and joins all parts into a table."""

    def __init__(self, encoder, dataset, columns, batch_size, dtype, max_images, key, state, progress):
        self.encoder, self.batch_size, self.dtype = encoder, batch_size, dtype
        self.key, self.state, self.progress, self.max_images = key, state, progress, max_images
        self.image_column, self.label_column = columns
        features = dataset.features or {}
        label = features.get(self.label_column)
        self.class_names = label.names if isinstance(label, ClassLabel) else None
        self.decoder = None
        kept = [column for column in columns if column]
        if isinstance(dataset, IterableDataset):
            if isinstance(features.get(self.image_column), Image):
                # Pictures that belong to other processes or to finished parts pass by undecoded.
                self.decoder = Image()
                dataset = dataset.cast_column(self.image_column, Image(decode=False))
            self.dataset, self.rows = dataset.select_columns(kept), None
        else:
            dataset = dataset.with_format(None).select_columns(kept)
            self.rows = len(dataset) if max_images is None else min(len(dataset), max_images)
            self.dataset = dataset

    def on_disk(self, path: Path, content: str) -> FeatureTable:
        table = _load_finished(path)
        # Every process must have looked before the first of them can finish the table.
        self.state.wait_for_everyone()
        if table is None:
            folder = path.with_suffix(".parts")
            rows = self._make_parts_together(folder)
            if self.state.is_main_process:
                try:
                    self._join(folder, path, rows, content)
                except (OSError, RuntimeError, SafetensorError):
                    # Another run of the very same job may have finished meanwhile and cleared the parts.
                    if _load_finished(path) is None:
                        raise
                shutil.rmtree(folder, ignore_errors=True)
            self.state.wait_for_everyone()
            table = FeatureTable.load(path)
        return table

    def in_memory(self, root: Path, content: str) -> FeatureTable:
        # In the cache folder because processes on several machines share it.
        folder = _from_main(tempfile.mkdtemp(dir=root) if self.state.is_main_process else None, self.state)
        try:
            table = self.on_disk(Path(folder, "table.safetensors"), content)
            facts = (table.labels, table.class_names, table.key, table.encoder_fingerprint)
            table = FeatureTable(table.embeds.clone(), *facts)
            self.state.wait_for_everyone()
        finally:
            if self.state.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
        return table

    def _make_parts_together(self, folder: Path) -> int:
        """[`_make_parts`] of every process; what goes wrong on one is an error on all, so that none waits for ever."""
        rows, fault = 0, None
        try:
            rows = self._make_parts(folder)
        except Exception as error:
            fault = error
        if self.state.num_processes > 1:
            faults = [text for text in gather_object([None if fault is None else str(fault)]) if text is not None]
            fault = fault or (ValueError(faults[0]) if faults else None)
        if fault is not None:
            raise fault
        return rows

    def _make_parts(self, folder: Path) -> int:
        """Write this process's missing parts; returns the number of rows of the whole dataset."""
        hidden = not (self.progress and self.state.is_main_process)
        total = 0
        with tqdm(
            total=self.rows,
            desc="Embedding images",
            unit="img",
            leave=False,
            disable=hidden,
            name="hf_transmiter.features",
        ) as bar:
            for index, rows, load in self._parts():
                mine = index % self.state.num_processes == self.state.process_index
                if mine and not _part_is_good(_part_path(folder, index), self.key, rows):
                    self._make_part(_part_path(folder, index), index * PART_ROWS, load(), bar)
                else:
                    bar.update(rows)
                total += rows
        if not total:
            raise ValueError("the dataset is empty: there is no image to embed.")
        return total

    def _parts(self) -> Iterator[tuple]:
        """Yields ``(index, rows, load)``; ``load()`` gives the part's batches of (images, labels)."""
        if self.rows is not None:
            for index, start in enumerate(range(0, self.rows, PART_ROWS)):
                stop = min(start + PART_ROWS, self.rows)
                yield index, stop - start, lambda start=start, stop=stop: self._read(start, stop)
            return
        examples = self.dataset if self.max_images is None else self.dataset.take(self.max_images)
        for index, batch in enumerate(examples.iter(PART_ROWS)):
            yield index, len(batch[self.image_column]), lambda batch=batch: self._decode(batch)

    def _read(self, start: int, stop: int) -> Iterator[tuple]:
        for first in range(start, stop, self.batch_size):
            last = min(first + self.batch_size, stop)
            try:
                batch = self.dataset[first:last]
            except Exception:
                # Decoding fails for the batch as a whole; read row by row to say which picture it was.
                for row in range(first, last):
                    try:
                        self.dataset[row]
                    except Exception as error:
                        raise ValueError(f"the image in row {row} cannot be read: {error}") from error
                raise
            yield batch[self.image_column], batch.get(self.label_column)

    def _decode(self, batch: dict) -> Iterator[tuple]:
        images, labels = batch[self.image_column], batch.get(self.label_column)
        for first in range(0, len(images), self.batch_size):
            some = slice(first, first + self.batch_size)
            decoded = [self.decoder.decode_example(image) for image in images[some]] if self.decoder else images[some]
            yield decoded, None if labels is None else labels[some]

    def _make_part(self, path: Path, start: int, batches: Iterator[tuple], bar: tqdm) -> None:
        blocks, labels = [], []
        for images, some_labels in batches:
            first = start + sum(map(len, blocks))
            try:
                block = self.encoder.embed_pixels(self.encoder.preprocess(images)).cpu()
            except ValueError as error:
                raise ValueError(f"in the batch of rows {first} to {first + len(images) - 1}: {error}") from error
            finite = torch.isfinite(block).all(dim=1)
            if not finite.all():
                row = first + int((~finite).nonzero()[0])
                raise ValueError(f"the embedding of row {row} is not finite: try float32 or bfloat16 weights.")
            blocks.append(block.to(self.dtype))
            labels += some_labels or []
            bar.update(len(images))
        tensors = {"embeds": torch.cat(blocks)}
        if self.label_column:
            tensors["labels"] = _as_labels(labels, self.label_column)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"key": self.key, "digest": _part_digest(tensors)}
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))

    def _join(self, folder: Path, path: Path, rows: int, content: str) -> None:
        paths = [_part_path(folder, index) for index in range(-(-rows // PART_ROWS))]
        labels = torch.cat([_read_part(part, "labels") for part in paths]) if self.label_column else None
        width = _read_part(paths[0], "embeds").shape[1]
        write_table(
            path,
            (_read_part(part, "embeds") for part in paths),
            shape=(rows, width),
            dtype=self.dtype,
            labels=labels,
            class_names=self.class_names,
            key=self.key,
            encoder_fingerprint=self.encoder.fingerprint,
            dataset_fingerprint=content,
        )


def _from_main(value, state):
    """The main process's `value`, on every process."""
    values = [value]
    if state.num_processes > 1:
        broadcast_object_list(values)
    return values[0]


def _load_finished(path: Path) -> FeatureTable | None:
    try:
        return FeatureTable.load(path)
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError) as error:
        logger.warning("%s is damaged and will be made again: %s", path, error)
        return None


def _part_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.safetensors"


def _read_part(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _part_is_good(path: Path, key: str, rows: int) -> bool:
    """Whether a part of an earlier run is whole: its values still have the digest they were written with."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (FileNotFoundError, SafetensorError):
        return False
    whole = metadata.get("key") == key and metadata.get("digest") == _part_digest(tensors)
    return whole and len(tensors["embeds"]) == rows


def _part_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _as_labels(values: list, column: str) -> Tensor:
    if not all(isinstance(value, int) for value in values):
        odd = next(value for value in values if not isinstance(value, int))
        raise ValueError(
            f"column {column!r} holds {odd!r}, not class indices: "
            f"encode it with dataset.class_encode_column({column!r}), or pass another label_column=."
        )
    return torch.tensor(values, dtype=torch.long)
