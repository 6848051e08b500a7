"""[`Embed`]: the image tower as a function of a batch of rows, for engines that spread them over many processes.

What it makes is read where a dataset is: a column with a model's name holds the model's unit rows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from datasets.formatting.formatting import LazyBatch

from ..encoders.dual_encoder import DualEncoder, load_encoder
from ..encoders.pictures import UnreadablePicture
from ..hub.files import file_digest
from ..hub.repo import OPEN_CLIP, split_revision
from ..settings import check_kind, check_number, shortened
from .class_names import listed
from .images import guess_columns, stored_pictures


_LOADED: dict[tuple, DualEncoder] = {}  # once per process, whoever asks for it
_LOCK = threading.Lock()
_STARTED = os.getpid()


class Embed:
    """A function that gives a batch of rows back with unit image embeddings x (d,), lists of float32, in place of the
    pictures. What is passed on is a few options; the model is loaded once in every process that calls it.

    ```python
    name = "openai/clip-vit-base-patch32"
    dataset.map(Embed(name), batched=True, batch_size=256, num_proc=4)  # datasets
    ray.data.read_images(folder).map_batches(Embed(name), batch_size=256, concurrency=4)  # Ray
    columns = f"path string, `{name}` array<float>"  # Spark: what is left, and what is new
    spark.read.format("binaryFile").load(folder).select("path", "content").mapInPandas(Embed(name, "content"), columns)
    ```

    Args:
        model (`str`): as [`load_encoder`] takes it, ``user/name@revision`` too; wherever it runs, it is found there.
        image_column (`str`, *optional*): of whatever [`read_picture`] reads; guessed as in [`load_images`].
        column (`str`, *optional*): where the rows go; defaults to the model's name without the revision.
        keep_images (`bool`, *optional*, defaults to `False`): for another model that follows. Streamed or formatted,
            `datasets` itself puts the pictures back: it has `remove_columns`.
        batch_size (`int`, *optional*, defaults to 64): pictures per forward pass.
        device, dtype (*optional*): default to a GPU, if there is one, and float32.

    Raises:
        TypeError: the model is no text, or what it is called with is no batch: a mapping from columns to values, a
            DataFrame of pandas, or an iterator of such (an iterator comes back).
        ValueError: no or several columns could hold the pictures, or one cannot be read; its row is named.
    """

    def __init__(
        self,
        model: str,
        image_column: str | None = None,
        *,
        column: str | None = None,
        keep_images: bool = False,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ):
        self.model, self.image_column = check_kind("model", model, str), image_column
        name = split_revision(model)[0]
        self.column, self.keep_images = column or name, keep_images
        self.batch_size = check_number("batch_size", batch_size, least=1)
        self.device, self.dtype = device, dtype
        # A folder that is written again is another model, to a cache of results, too.
        folder = Path(name.removeprefix(OPEN_CLIP))
        files = sorted(folder.iterdir()) if folder.is_dir() else ()
        self.content = [(path.name, file_digest(path)) for path in files if path.suffix in (".json", ".safetensors")]

    @property
    def encoder(self) -> DualEncoder:
        """The model, loaded on the first call in this process."""
        if os.getpid() != _STARTED:  # a fork, as of `num_proc=`: it hangs with as many threads as its parent had
            torch.set_num_threads(1)
        key = (self.model, str(self.device), str(self.dtype), *self.content)
        with _LOCK:
            if key not in _LOADED:
                device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
                _LOADED[key] = load_encoder(self.model, device=device, dtype=self.dtype)
            return _LOADED[key]

    def __call__(self, batch):
        if isinstance(batch, Iterator):
            return map(self, batch)
        if not isinstance(batch, (Mapping, pd.DataFrame)):
            wanted = "columns and their values, a DataFrame of pandas, or an iterator of such"
            raise TypeError(f"a batch must be {wanted}, not of the type {type(batch).__name__}.")
        if isinstance(batch, LazyBatch):  # of `datasets`: pictures as they are stored, other columns are not touched
            table = Dataset(batch.pa_table, fingerprint="batch")
            name, _ = guess_columns(table, self.image_column, labels=False)
            pictures = stored_pictures(table, name)[:][name]
        else:
            batch = batch.copy() if isinstance(batch, pd.DataFrame) else dict(batch)
            table = Dataset.from_dict({str(name): [] for name in batch})
            name, _ = guess_columns(table, self.image_column, labels=False)
            pictures = list(batch[name])
        rows = self._rows(pictures, batch)
        if not self.keep_images:
            del batch[name]
        batch[self.column] = rows
        return batch

    def _rows(self, pictures: list, batch) -> list[list]:
        encoder, rows, row = self.encoder, [], 0

        def read(start: int) -> Iterator:
            nonlocal row
            for row in range(start, min(start + self.batch_size, len(pictures))):
                yield pictures[row]

        try:
            for start in range(0, len(pictures), self.batch_size):
                block = encoder.embed_pixels(encoder.preprocess(read(start)), first=start)
                # Numbers of NumPy in a list: of an array Ray makes a tensor, which `datasets` cannot read.
                rows += map(list, block.cpu().numpy())
        except UnreadablePicture as error:
            lazy = isinstance(batch, LazyBatch)
            values = batch.pa_table.slice(row, 1).to_pylist()[0] if lazy else {n: list(batch[n])[row] for n in batch}
            known = [f"{n}={shortened(str(v))}" for n, v in values.items() if isinstance(v, (str, Integral))]
            beside = f" ({listed(known)})" if known else ""
            raise ValueError(f"the image in row {row} of a batch{beside} cannot be read{error.fault}.") from error
        return rows
