"""[`FeatureTable`]: unit image rows of one model with their labels; in memory, on disk, or a column of a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, LargeList, List, Value
from datasets.features.features import FeatureType
from torch import Tensor
from torch.nn.functional import normalize

from ..algebra import check_finite
from ..encoders.dual_encoder import DualEncoder
from ..encoders.identity import ModelId, active_adapters, moves_images
from ..hub.checks import as_list
from ..hub.repo import same_name
from ..settings import check_kind
from .class_names import label_places


BLOCK = 4096
UNIT = 0.02  # so far may the length of a row be from 1: rows kept in 8 bits of mantissa are within 0.01


class StoredRows:
    """Unit rows (N, d), or ``[x | h]`` (N, d + 2D), in a column of lists; read, checked and made float32 when asked
    for, so that a million of them need no memory.

    Raises:
        ValueError: while they are read: a row of another width, that is not finite, or whose first d numbers are no
            unit row; its number is told.
    """

    def __init__(self, dataset: Dataset, column: str, encoder: DualEncoder):
        self._arrow, self._column = dataset.with_format("arrow").select_columns([column]), column
        first, self._width = self._arrow[:1][column].to_pylist()[0] or (), encoder.embed_dim
        if len(first) != self._width and len(first) != self._width + encoder.tower_dim:
            raise ValueError(
                f"{self} has {len(first)} numbers a row, and the model's embeddings have {self._width}: they "
                "are of another model, or of another layer than the one that is compared with texts."
            )
        self.ndim, self.shape = 2, (len(dataset), len(first))

    def __len__(self) -> int:
        return self.shape[0]

    def __str__(self) -> str:
        return f"column {self._column!r}"

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        if not len(numbers):
            return torch.empty(0, self.shape[1])
        values = self._arrow[rows if isinstance(rows, slice) else numbers][self._column].combine_chunks()
        short = np.flatnonzero(pc.fill_null(pc.list_value_length(values), 0).to_numpy() != self.shape[1])
        if len(short):
            raise ValueError(f"{self}: row {numbers[short[0]]} has not {self.shape[1]} numbers.")
        found = np.array(values.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
        found = torch.from_numpy(found.reshape(-1, self.shape[1]))
        _check_rows(found, self._width, str(self), numbers)
        return torch.cat([normalize(found[:, : self._width], dim=1), found[:, self._width :]], dim=1)

    def float(self) -> Tensor:
        """All rows, in memory."""
        return torch.cat([self[start : start + BLOCK] for start in range(0, len(self), BLOCK)] or [self[:0]])


def _check_rows(rows: Tensor, width: int, whose: str, numbers: Sequence[int]) -> None:
    """
    Raises:
        ValueError: the first `width` numbers of a row are no unit row, or one is not finite.
    """
    lengths = rows[:, :width].norm(dim=1)
    bad = (~((lengths - 1).abs() < UNIT)).nonzero()
    if len(bad):
        raise ValueError(
            f"{whose}: row {numbers[int(bad[0])]} has length {float(lengths[bad[0]]):.4g}, and embeddings are unit "
            "rows: divide each by its length, or look at that picture."
        )
    check_finite(rows, whose)


def stored_rows(dataset: Dataset, encoder: DualEncoder, columns: Mapping[str, str] | None) -> StoredRows | None:
    """A model's embeddings that a dataset has already: the column that `columns` names for it or, without these, the
    one that is called as the model is. `None` where there is none, or an adapter in the model changed what it sees.

    Raises:
        ValueError: no such column, two of the model, one that holds no lists of numbers, or rows of another width.
    """
    given = {} if columns is None else check_kind("embedding_columns", columns, Mapping)
    for column in given.values():
        if column not in dataset.column_names:
            raise ValueError(f"there is no column {column!r}; the columns are {', '.join(dataset.column_names)}.")
    named = dataset.column_names if columns is None else given
    found = [given.get(name, name) for name in named if same_name(name, encoder.name_or_path)]
    if len(found) > 1:
        raise ValueError(f"columns {' and '.join(map(repr, found))} are both of {encoder.name_or_path!r}: name one.")
    if not found or moves_images(encoder.model):
        return None
    (column,) = found
    if not holds_rows(dataset.features[column]):
        raise ValueError(
            f"column {column!r} must hold lists of floating-point numbers, not {dataset.features[column]}."
        )
    return StoredRows(dataset, column, encoder)


def holds_rows(kind: FeatureType) -> bool:
    """Whether a column of this type may hold embeddings."""
    return (
        isinstance(kind, (List, LargeList))
        and isinstance(kind.feature, Value)
        and kind.feature.dtype.startswith("float")
    )


class FeatureTable:
    """Unit image rows ``x`` (N, d), or ``[x | h]`` (N, d + 2D), in any float type, with their labels (N,): indices of
    the class names. Wherever pictures are asked for and one model looks at them, a table of that model will do.

    Those of [`embed_dataset`] are mapped from disk, not loaded. `dataset_fingerprint` identifies the images.

    Args:
        model ([`DualEncoder`] or [`ModelId`], *optional*): whose rows they are, for a table in place of pictures.

    Raises:
        ValueError: the labels do not fit the rows or the class names.
        TypeError: something else than a model, such as its name: of that nobody knows the weights.
    """

    def __init__(
        self,
        embeds: Tensor | np.ndarray | StoredRows,
        labels: Tensor | Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        dataset_fingerprint: str = "",
        model: DualEncoder | ModelId | None = None,
    ):
        embeds = embeds if isinstance(embeds, StoredRows) else torch.as_tensor(embeds).detach()
        if embeds.ndim != 2:
            raise ValueError(f"embeds must be (N, d), not {tuple(embeds.shape)}.")
        if labels is not None and len(labels) and np.asarray(labels).dtype.kind not in "iub":
            raise ValueError(f"labels must be indices of the class names, not such as {list(labels)[0]!r}.")
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.long)
        self.class_names = None if class_names is None else as_list(class_names, "class_names")
        if self.labels is not None and self.labels.shape != embeds.shape[:1]:
            raise ValueError(f"{tuple(self.labels.shape)} labels for {len(embeds)} rows.")
        if self.labels is not None and self.class_names is not None and len(embeds):
            if self.labels.max() >= len(self.class_names):
                raise ValueError(f"label {int(self.labels.max())} has no name: there are {len(self.class_names)}.")
        named = model is None or isinstance(model, ModelId)
        self.model = model if named else ModelId.of(check_kind("model", model, DualEncoder))
        self._stored, self.dataset_fingerprint, self._width = embeds, dataset_fingerprint, embeds.shape[1]

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def embeds(self) -> Tensor:
        """All rows, (N, d) float32; for large tables see [`batches`]."""
        return self._stored.float()[:, : self._width]

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Blocks of at most `batch_size` rows in order, (B, d) float32; only one block is in memory at a time."""
        for start in range(0, len(self), batch_size):
            yield self._stored[start : start + batch_size][:, : self._width].float()

    def share(self, accelerator=None) -> Iterator[tuple[slice, Tensor]]:
        """Of [`batches`] of `BLOCK` rows those that fall to this process of several, each with the rows it holds."""
        rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
        for number, start in enumerate(range(0, len(self), BLOCK)):
            if number % world == rank:
                x = self._stored[start : start + BLOCK][:, : self._width].float()
                yield slice(start, start + len(x)), x

    def select(self, indices: Tensor | Sequence[int]) -> FeatureTable:
        """The rows `indices`, in that order, copied to memory."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        labels = None if self.labels is None else self.labels[indices]
        rows = self._stored[indices][:, : self._width]
        return FeatureTable(rows, labels, self.class_names, self.dataset_fingerprint, self.model)

    def of(self, encoder: DualEncoder, tower: bool = False) -> FeatureTable:
        """This table, if its rows are what `encoder` makes of pictures; without `tower` the unit rows alone.

        Raises:
            ValueError: nobody said whose rows they are, or they are another model's; another width; no rows; one that
                is no unit row, or not finite.
        """
        d = encoder.embed_dim
        whose = f"these embeddings are {'of ' + repr(self.model.name) if self.model else 'of no model that is named'}"
        known = self.model is not None and not moves_images(encoder.model)
        # An adapter in the text tower makes another model of it, which sees pictures as before.
        words = known and active_adapters(encoder.model) and same_name(self.model.name, encoder.name_or_path)
        if not words and not (known and self.model.is_of(encoder)):
            raise ValueError(
                f"{whose}, and those of {encoder} are asked for: pass FeatureTable(rows, model=encoder) of that very "
                "model, its pictures, or a dataset with a column for each model, called as the model is."
            )
        if self._width != d and self._width != d + encoder.tower_dim:
            raise ValueError(f"rows of {encoder.name_or_path!r} are (N, {d}), these are (N, {self._width}).")
        if not len(self):
            raise ValueError(f"{whose}, and there are none.")
        for rows, x in self.share():
            _check_rows(x, d, whose, range(rows.start, rows.stop))
        return self if tower else self.narrow(d)

    def narrow(self, width: int) -> FeatureTable:
        """The same rows, of each the first `width` numbers."""
        found = copy(self)
        found._width = min(width, self._width)
        return found

    def to_dataset(self) -> Dataset:
        """The rows in a column that is called as the model is, and the labels, as [`embed_dataset`] reads them again.

        With `datasets.concatenate_datasets([a, b], axis=1)` the columns of several models come into one dataset.

        Raises:
            ValueError: nobody said whose rows they are.
        """
        if self.model is None or not self.model.name:
            raise ValueError(
                "the column is called as the model is: pass FeatureTable(..., model=encoder) with a name."
            )
        rows = self.embeds.contiguous()  # of a mapped file no copy
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.view(-1).numpy()), rows.shape[1])
        about = f"{self.dataset_fingerprint} {self.model.fingerprint} {rows.shape}"
        known = hashlib.sha256(about.encode()).hexdigest()
        dataset = Dataset(pa.table({self.model.name: column}), fingerprint=known if self.dataset_fingerprint else None)
        if self.labels is None:
            return dataset
        kind = ClassLabel(names=self.class_names) if self.class_names else Value("int64")
        return dataset.add_column("label", self.labels.numpy(), feature=kind)


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
