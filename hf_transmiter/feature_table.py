"""[`FeatureTable`]: embeddings of a dataset in one safetensors file, read in blocks."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hf_transmiter.files import replace_file


_FORMAT = "1"
_BLOCK = 1024
_SAFETENSORS_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class FeatureTable:
    """Unit image rows ``x`` (N, d) with their labels.

    Args:
        embeds (`Tensor`): (N, d) in any float type; a table read from disk is mapped, not loaded.
        labels (`Tensor` or `Sequence[int]`, *optional*): (N,) class indices.
        class_names (`Sequence[str]`, *optional*): names of the indices.
        key (`str`, *optional*): digest of all that the table depends on.
        encoder_fingerprint (`str`, *optional*): [`DualEncoder.fingerprint`] of the encoder that made it.
        dataset_fingerprint (`str`, *optional*): identifies the images.

    Raises:
        ValueError: the labels do not fit the rows or the class names.
    """

    def __init__(
        self,
        embeds: Tensor,
        labels: Tensor | Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        key: str = "",
        encoder_fingerprint: str = "",
        dataset_fingerprint: str = "",
    ):
        if embeds.ndim != 2:
            raise ValueError(f"embeds must be (N, d), not {tuple(embeds.shape)}.")
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.long)
        self.class_names = None if class_names is None else list(class_names)
        if self.labels is not None and self.labels.shape != embeds.shape[:1]:
            raise ValueError(f"{tuple(self.labels.shape)} labels for {len(embeds)} rows.")
        if self.labels is not None and self.class_names is not None and len(embeds):
            if self.labels.max() >= len(self.class_names):
                raise ValueError(f"label {int(self.labels.max())} has no name: there are {len(self.class_names)}.")
        self._stored = embeds
        self.key, self.encoder_fingerprint, self.dataset_fingerprint = key, encoder_fingerprint, dataset_fingerprint

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def embed_dim(self) -> int:
        return self._stored.shape[1]

    @property
    def embeds(self) -> Tensor:
        """All rows, (N, d) float32. Converts the whole table; for large ones see [`batches`]."""
        return self._stored.float()

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Blocks of at most `batch_size` rows in order, (B, d) float32; only one block is in memory at a time."""
        for start in range(0, len(self), batch_size):
            yield self._stored[start : start + batch_size].float()

    def select(self, indices: Tensor | Sequence[int]) -> "FeatureTable":
        """The rows `indices`, in that order, copied to memory in the type they are stored in."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        labels = None if self.labels is None else self.labels[indices]
        # The key identifies the whole table, so a part of it has none.
        return FeatureTable(
            self._stored[indices],
            labels,
            self.class_names,
            encoder_fingerprint=self.encoder_fingerprint,
            dataset_fingerprint=self.dataset_fingerprint,
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as one safetensors file.

        Raises:
            FileExistsError: `path` exists.
        """
        if os.path.exists(path):
            raise FileExistsError(f"{os.fspath(path)!r} exists; remove it or choose another name.")
        blocks = (self._stored[start : start + _BLOCK] for start in range(0, len(self), _BLOCK))
        write_table(
            Path(path),
            blocks,
            shape=tuple(self._stored.shape),
            dtype=self._stored.dtype,
            labels=self.labels,
            class_names=self.class_names,
            key=self.key,
            encoder_fingerprint=self.encoder_fingerprint,
            dataset_fingerprint=self.dataset_fingerprint,
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureTable":
        """Open a table written by [`save`] or [`embed_dataset`]; the rows stay on disk until they are read.

        Raises:
            ValueError: the file is not a feature table of this format.
            FileNotFoundError, SafetensorError: the file is missing or damaged.
        """
        with safe_open(os.fspath(path), "pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != _FORMAT or "embeds" not in file.keys():
                raise ValueError(f"{os.fspath(path)!r} is not a feature table of format {_FORMAT}.")
            labels = file.get_tensor("labels") if "labels" in file.keys() else None
            names = json.loads(facts["class_names"])
            # A view of the mapped file: pages are read when touched and may be dropped again.
            embeds = file.get_tensor("embeds")
        return cls(embeds, labels, names, facts["key"], facts["encoder_fingerprint"], facts["dataset_fingerprint"])


def write_table(
    path: Path,
    blocks: Iterable[Tensor],
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    labels: Tensor | None,
    class_names: Sequence[str] | None,
    key: str,
    encoder_fingerprint: str,
    dataset_fingerprint: str,
) -> None:
    """Write a table block by block, so that a table larger than memory can be joined from its parts.

    safetensors' own writer wants every tensor in memory; its format is a length, a JSON header and the raw values.
    """
    metadata = {"format": _FORMAT, "class_names": json.dumps(class_names and list(class_names)), "key": key}
    metadata |= {"encoder_fingerprint": encoder_fingerprint, "dataset_fingerprint": dataset_fingerprint}
    header, end = {"__metadata__": metadata}, 0
    if labels is not None:  # first, so that their eight bytes stay aligned
        end = 8 * shape[0]
        header["labels"] = {"dtype": "I64", "shape": shape[:1], "data_offsets": [0, end]}
    size = shape[0] * shape[1] * dtype.itemsize
    header["embeds"] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [end, end + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if labels is not None:
                file.write(_raw(labels))
            written = sum(file.write(_raw(block.to(dtype))) for block in blocks)
            if written != size:
                raise ValueError(f"the blocks hold {written} bytes; {shape[0]} rows of {shape[1]} need {size}.")

    replace_file(path, write)


def _raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
