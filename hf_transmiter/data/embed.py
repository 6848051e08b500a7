"""[`Embed`]: image towers as a function of a batch of rows, for engines that spread rows over many processes.

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
from datasets.formatting.formatting import LazyBatch, LazyRow

from ..encoders.dual_encoder import DualEncoder, load_encoder
from ..encoders.pictures import UnreadablePicture, read_picture
from ..hub.files import file_digest
from ..hub.repo import OPEN_CLIP, split_revision
from ..settings import check_kind, check_number, shortened
from .class_names import listed
from .images import guess_columns, stored_pictures


_LOADED: dict[tuple, DualEncoder] = {}  # once per process, whoever asks for it
_LOCK = threading.Lock()
_STARTED = os.getpid()


class Embed:
    """A function that gives a batch of rows back with unit image embeddings x (d,) in place of the pictures: for each
    model a column of its name, of lists of float32. Passed on are a few options; a process that calls it loads the
    models once.

    ```python
    b32, l14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
    dataset.map(Embed(b32, l14), batched=True, batch_size=256, num_proc=4)  # datasets
    rows = ray.data.read_images(folder, include_paths=True)  # Ray: actors, for a task with a GPU ends its worker
    actors = ray.data.ActorPoolStrategy(size=4)
    rows.map_batches(Embed, fn_constructor_args=(b32, l14), batch_size=256, compute=actors, num_gpus=1)
    rows = spark.read.format("binaryFile").load(folder).select("path", "content")  # Spark
    rows.mapInPandas(Embed(b32, image_column="content"), f"path string, `{b32}` array<float>")
    ```

    Args:
        models (`str`): as [`load_encoder`] takes them; found wherever they run. A revision is no part of the column.
        image_column (`str`, *optional*): of whatever [`read_picture`] reads; guessed as in [`load_images`].
        keep_images (`bool`, *optional*, defaults to `False`): leave the pictures there. Of a stream or with a format
            `datasets` keeps them itself: pass it `remove_columns`.
        batch_size (`int`, *optional*, defaults to 64): pictures per forward pass.
        device, dtype (*optional*): default to a GPU, if there is one, and float32.

    Raises:
        TypeError: a model is no text, or what it is called with is no batch: a mapping from columns to values, a
            DataFrame of pandas, or an iterator of such (an iterator comes back).
        ValueError: no model, or two of one name; no or several columns could hold the pictures, or one cannot be
            read: its row in the batch and the texts and whole numbers beside it are named.
    """

    def __init__(
        self,
        *models: str,
        image_column: str | None = None,
        keep_images: bool = False,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ):
        names = [split_revision(check_kind("a model", model, str))[0] for model in models]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"pass the names of one or more models, each once; got {', '.join(models) or 'none'}.")
        self.models, self.columns, self.image_column, self.keep_images = models, names, image_column, keep_images
        self.batch_size = check_number("batch_size", batch_size, least=1)
        self.device, self.dtype = device, dtype
        # A folder that is written again is another model, to a cache of results, too.
        folders = [Path(name.removeprefix(OPEN_CLIP)) for name in names]
        files = [sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]) for folder in folders]
        self.content = [tuple((path.name, file_digest(path)) for path in each) for each in files]

    @property
    def encoders(self) -> list[DualEncoder]:
        """The models, loaded on the first call in this process."""
        if os.getpid() != _STARTED:  # a fork, as of `num_proc=`: it hangs with as many threads as its parent had
            torch.set_num_threads(1)
        found, device = [], self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with _LOCK:
            for model, content in zip(self.models, self.content, strict=True):
                key = (model, content, str(device), str(self.dtype))
                if key not in _LOADED:
                    _LOADED[key] = load_encoder(model, device=device, dtype=self.dtype)
                found.append(_LOADED[key])
        return found

    def __call__(self, batch):
        if isinstance(batch, Iterator):
            return map(self, batch)
        if not isinstance(batch, (Mapping, pd.DataFrame)) or isinstance(batch, LazyRow):
            wanted = "columns and their values, a DataFrame of pandas, or an iterator of such"
            wanted += " (pass batched=True to map)" * isinstance(batch, LazyRow)
            raise TypeError(f"a batch must be {wanted}, not of the type {type(batch).__name__}.")
        if isinstance(batch, LazyBatch):  # of `datasets`: pictures as they are stored, other columns are not touched
            table = Dataset(batch.pa_table, fingerprint="batch")
            column, _ = guess_columns(table, self.image_column, labels=False)
            pictures = stored_pictures(table, column)[:][column]
        else:
            batch = batch.copy() if isinstance(batch, pd.DataFrame) else dict(batch)
            table = Dataset.from_dict({str(name): [] for name in batch})
            column, _ = guess_columns(table, self.image_column, labels=False)
            pictures = list(batch[column])
        rows = self._rows(pictures, batch)
        if not self.keep_images:
            del batch[column]
        for name, embeds in zip(self.columns, rows, strict=True):
            batch[name] = embeds
        return batch

    def _rows(self, pictures: list, batch) -> list[list]:
        encoders, rows = self.encoders, [[] for _ in self.models]
        for start in range(0, len(pictures), self.batch_size):
            pixels = [[] for _ in encoders]
            for row in range(start, min(start + self.batch_size, len(pictures))):
                try:
                    picture = read_picture(pictures[row])
                except UnreadablePicture as error:
                    raise ValueError(f"the image in {_named(batch, row)} cannot be read{error.fault}.") from error
                for encoder, made in zip(encoders, pixels, strict=True):
                    made.append(encoder.preprocess(picture))
            for encoder, made, found in zip(encoders, pixels, rows, strict=True):
                block = encoder.embed_pixels(torch.cat(made), first=start)
                # Numbers of NumPy in a list: of an array Ray makes a tensor, which `datasets` cannot read.
                found += map(list, block.cpu().numpy())
        return rows


def _named(batch, row: int) -> str:
    lazy = isinstance(batch, LazyBatch)
    values = batch.pa_table.slice(row, 1).to_pylist()[0] if lazy else {name: list(batch[name])[row] for name in batch}
    known = {name: str(value) for name, value in values.items() if isinstance(value, (str, Integral))}
    beside = listed(f"{name}={shortened(value)}" for name, value in known.items())
    return f"row {row} of a batch" + (f" ({beside})" if beside else "")
