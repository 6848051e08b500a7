"""[`label_tune`]: TransMiter+, a few labelled steps on a transferred adapter (arXiv 2508.08604, section 4)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.embeddings import embed_dataset
from ..data.table import FeatureTable, align_labels
from ..hub.provenance import library_versions
from ..settings import LabelTuningConfig, check_kind, check_read, config_of
from ..training.loop import fit
from .classifier import AnchorClassifier, seen_columns


logger = logging.getLogger(__name__)


def label_tune(
    adapter: AnchorClassifier,
    dataset,
    *,
    seen_classes: Sequence[str] | None = None,
    config: LabelTuningConfig | None = None,
    accelerator=None,
    checkpoint=None,
    progress: bool = True,
    **embedding,
) -> AnchorClassifier:
    """Improves an adapter on its frozen model with a few labelled images: cross-entropy on the adapted logits.

    The towers never run backwards: images are embedded once, only the adapter's weights learn: of a linear one the
    image side (and the bias), or class vectors where there is no image side. An identity adapter
    (`AnchorClassifier(...).add_adapter(TransMiterConfig(...))`) works too: adapter tuning from zero-shot.

    Args:
        adapter (`AnchorClassifier`): a classifier with an adapter; a tuned copy is returned, this one stays.
        dataset (`datasets.Dataset` or `FeatureTable`):
            Labelled images; labels are matched by name or, without names, index the adapter's class names.
        seen_classes (`Sequence[str]`, *optional*):
            Only these names' columns enter the loss (base classes in base-to-novel runs). Defaults to all.
        **embedding: passed to `embed_dataset`.

    Raises:
        ValueError: no adapter, or its model was changed since; no labels, unknown names in `seen_classes`, or a label
            outside them.
    """
    check_kind("adapter", adapter, AnchorClassifier)
    config, source = config_of(LabelTuningConfig, config), adapter.adapter_config
    if source is None:
        raise ValueError("there is no adapter to tune: attach one with add_adapter, or pass what transfer returned.")
    adapter.check_model()
    table = dataset
    if not isinstance(dataset, FeatureTable):
        options = {"tower": adapter.reads_tower, "accelerator": accelerator, "progress": progress}
        table = embed_dataset(adapter.encoder, dataset, **options, **embedding)
    if table.labels is None or not len(table):
        raise ValueError("label_tune needs labelled images: pass a dataset with a label column (label_column=...).")
    columns = seen_columns(source.class_names, seen_classes)
    places = {column: place for place, column in enumerate(columns)}
    named = table.labels if table.class_names is None else align_labels(table, source.class_names)
    labels = [places.get(label, -1) for label in named.tolist()]
    if -1 in labels:
        row = labels.index(-1)
        raise ValueError(
            f"image {row} has label {int(table.labels[row])}, which is not one of the {len(columns)} classes tuned "
            "here: select the images of those classes first, or pass seen_classes."
        )
    absent = len(columns) - len(set(labels))
    if absent:
        logger.warning(
            "%d of the %d classes have no image here and will be unlearnt: pass some of each, or seen_classes.",
            *(absent, len(columns)),
        )
    if source.form != "mlp":
        check_read(config, "a linear adapter", ("train_basis",))
    moved = source.train_basis or config.train_basis  # such a basis is no longer orthonormal
    told = {"train_basis": moved, "inference_mode": False}
    if source.image_side and source.text_side:
        told["open_names"] = False  # the image side learns together with these class vectors, and leaves other texts
    tuned_config = type(source)(**{**source.to_dict(), **told})
    tuned = AnchorClassifier(adapter.encoder, adapter.anchors).add_adapter(
        tuned_config, adapter.transmiter.tensors("default")
    )
    learnable = tuned.transmiter.learnable("default").items()
    parameters = [p for part, p in learnable if part != "basis" or config.train_basis]
    device = adapter.encoder.device
    x = torch.cat(list(table.batches(4096))).to(device)
    columns, labels = torch.tensor(columns, device=device), torch.tensor(labels, device=device)

    def step(rows: Tensor, generator: torch.Generator) -> Tensor:
        rows = rows.to(device)
        return cross_entropy(tuned.classify(x[rows])[:, columns], labels[rows])

    for p in parameters:
        p.requires_grad_()
    about = {"model": adapter.encoder.fingerprint, "images": x, "labels": labels, "columns": columns}
    options = {"about": about, "accelerator": accelerator, "checkpoint": checkpoint, "progress": progress}
    fit(parameters, step, len(x), config, description="Label tuning", **options)
    facts = {"step": "label_tune", "num_images": len(x), "before": source.provenance}
    tuned_config.provenance = {**facts, "versions": library_versions()}
    return tuned.requires_grad_(False)
