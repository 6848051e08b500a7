"""[`transfer`]: an adapter of the weak model becomes one of the strong model. No labels, no gradients.

What is at hand decides how: a bridge and no image; text alone; unlabelled images; unlabelled images with the stored
teacher logits of an earlier extraction. Every closed form ends in C class vectors on the strong model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..algebra import discriminant_head
from ..data.anchors import Anchors
from ..data.embeddings import FeatureTable, embed_dataset
from ..encoders.dual_encoder import DualEncoder
from ..encoders.identity import ModelId
from ..hub.adapter_files import without_paths
from ..hub.provenance import library_versions, named_dataset
from ..settings import TransferConfig, check_read
from ..tuners import TransMiterConfig
from .bridge import Bridge
from .classifier import AnchorClassifier, seen_columns
from .stored_logits import CalibrationPack
from .teacher import Teacher, teacher_logits


logger = logging.getLogger(__name__)

_BRIDGE_FACTS = ("space", "source", "dataset", "num_pairs", "alignment", "held_out", "derived", "beta")


def transfer(
    adapter: AnchorClassifier,
    strong: DualEncoder,
    dataset=None,
    *,
    bridge: Bridge | None = None,
    teacher: Teacher | None = None,
    seen_classes: Sequence[str] | None = None,
    config: TransferConfig | None = None,
    dataset_name: str | None = None,
    accelerator=None,
    progress: bool = True,
    **embedding,
) -> AnchorClassifier:
    """Carries an adapter over to a stronger model, in closed form; `adapter_config.provenance` of what comes out says
    how it was made.

    Args:
        adapter (`AnchorClassifier`): what [`extract`] returned, or `AnchorClassifier.from_pretrained(...)`.
        strong (`DualEncoder`): any dual encoder; family, width, tokenizer and image size may differ.
        dataset (`datasets.Dataset`, *optional*): unlabelled images of the task.
        bridge (`Bridge`, *optional*):
            Between the adapter's model and `strong`. Without one it is built from `dataset`, or from text alone.
        teacher (*optional*):
            The tuned model's logits on `dataset`, see [`Teacher`]. Defaults to the adapter's calibration pack when
            that belongs to these images; without either, the refit relies on the carried class vectors.
        seen_classes (`Sequence[str]`, *optional*): the names the tuning saw; all of them when omitted.
        dataset_name (`str`, *optional*): what the images are, for the card: Hub id or a few words.
        accelerator, progress, **embedding: as in [`embed_dataset`].

    Raises:
        ValueError: no adapter, a bridge of another pair or space, a published adapter without images or bridge,
            unknown names in `seen_classes`, or a calibration pack of other class names.
    """
    config, source = config or TransferConfig(), adapter.adapter_config
    if source is None:
        raise ValueError("there is no adapter to transfer: pass what extract returned, or load a saved one.")
    all_seen = len(set(seen_columns(source.class_names, seen_classes))) == len(source.class_names)
    weak, options = adapter.encoder, {"accelerator": accelerator, "progress": progress, **embedding}
    space = "logit" if source.form == "mlp" else "embedding"
    if bridge is None:
        if space == "logit" and dataset is None:
            raise ValueError("a published adapter needs unlabelled images or a logit-space bridge: pass one of them.")
        beta = {"beta": config.beta, "beta_per_image": config.beta_per_image}
        anchors = source.anchors if space == "logit" else None
        bridge = Bridge.build(weak, strong, dataset, space=space, anchors=anchors, **beta, **options)
    else:
        check_read(config, "a transfer over a finished bridge", ("beta", "beta_per_image"))
        bridge.weak.check(weak, "weak")
        bridge.strong.check(strong, "strong")
    if config.refit and (dataset is None or space == "logit"):
        raise ValueError("a refit is of class vectors, to unlabelled images: pass images, or leave refit out.")
    weight = config.zero_shot_weight
    if weight is None:
        weight = 0.0 if all_seen else 1 / 3
    upgraded, tensors = _carried(adapter, strong, bridge, weight)
    upgraded.provenance.update(named_dataset(dataset, dataset_name))
    wanted = all_seen if config.refit is None else config.refit
    if source.form == "linear" and dataset is not None and wanted:
        table = embed_dataset(strong, dataset, **options)
        pack, own = _teacher_on(table, dataset, adapter, teacher, options), _has_own_vectors(source)
        vectors, text = tensors["class_vectors"], tensors["anchors"]
        tensors.update(refit(table, vectors, text, pack, strong, config, accelerator, ask_carried=own))
        upgraded.provenance.update(refit_on=len(table), teacher_logits=pack is not None)
    text = tensors["anchors"].to(strong.device)
    return AnchorClassifier(strong, source.anchors, text).add_adapter(upgraded, tensors)


def _carried(
    adapter: AnchorClassifier, strong: DualEncoder, bridge: Bridge, zero_shot_weight: float
) -> tuple[TransMiterConfig, dict[str, Tensor]]:
    """Configuration and tensors of the adapter over a bridge, without an image: what [`transfer`] starts from."""
    weak, source, (_, tensors) = adapter.encoder, adapter.adapter_config, adapter.adapter_tensors()
    if bridge.space == "embedding" and bridge.matrix.shape != (strong.embed_dim, weak.embed_dim):
        raise ValueError(
            f"the bridge's matrix is {tuple(bridge.matrix.shape)}, and the models' widths are {strong.embed_dim} and "
            f"{weak.embed_dim}: take a bridge of this pair."
        )
    text = strong.embed_names(source.anchors.names, source.templates).cpu()
    facts = {
        "step": "transfer",
        "strong": asdict(ModelId.of(strong)),
        "bridge": without_paths({key: getattr(bridge, key) for key in _BRIDGE_FACTS}),
        "extracted": source.provenance,
        "versions": library_versions(),
    }
    if source.form == "mlp":
        if bridge.space == "logit" and bridge.anchors is not None:
            bridge.anchors.check_same(source.anchors)
        tensors = {**tensors, "basis": bridge.carry_basis(tensors["basis"].float()), "anchors": text}
    else:
        anchor_texts = None
        if bridge.space == "logit":
            names, templates = bridge.anchors.names, bridge.anchors.templates
            anchor_texts = [model.embed_names(names, templates).cpu() for model in (weak, strong)]
        vectors, anchors = (tensors[part].float() for part in ("class_vectors", "anchors"))
        carried = bridge.carry_class_vectors(vectors, anchors, text, anchor_texts)
        if not _has_own_vectors(source):
            # Vectors distilled from a tuned image tower: their change carries over, their place in space does not.
            carried = {"delta": carried["delta"]}
        vectors = interpolate(carried, text, zero_shot_weight)
        tensors = {"anchors": text, "class_vectors": vectors, "bias": torch.zeros(len(text))}
        facts["zero_shot_weight"] = zero_shot_weight
    shape = {"form": source.form, "width": source.width, "mlp_ratio": source.mlp_ratio}
    return TransMiterConfig.for_anchors(source.anchors, **shape, provenance=facts), tensors


def _has_own_vectors(source: TransMiterConfig) -> bool:
    """Whether the teacher had class vectors of its own (a prompt), or a tuned image tower was distilled."""
    return bool(source.provenance.get("own_class_vectors"))


def interpolate(carried: dict[str, Tensor], zero_shot: Tensor, weight: float) -> Tensor:
    """``normalise((1 - w) · normalise(Σ carried) + w · zero_shot)``: class vectors on a line to the zero-shot ones.

    `carried` are unit rows (C, d) of each kind of transport: full and delta err in different ways, and their mean
    beats either (see `tests/studies`).
    """
    mean = normalize(torch.stack(list(carried.values())).sum(0), dim=-1)
    return normalize((1 - weight) * mean + weight * zero_shot, dim=-1)


def refit(
    table: FeatureTable,
    vectors: Tensor,
    zero_shot: Tensor,
    pack: CalibrationPack | None,
    strong: DualEncoder,
    config: TransferConfig,
    accelerator=None,
    *,
    ask_carried: bool = True,
) -> dict[str, Tensor]:
    """Class vectors (C, d) and bias (C,) fitted to unlabelled images around the carried ones, from two passes of
    streamed sums.

    Soft labels are a product of experts, ``q = softmax(c + t + (z + t - w))``: the carried vectors c on the strong
    embeddings, the tuned model t, and emulated fine-tuning (z, w zero-shot strong and weak). A linear discriminant of
    them is blended with the carried vectors ([`discriminant_head`]), which count as `carried_images` images per
    class, and given the mean spread of one expert, so that probabilities stay meaningful.

    Args:
        table (`FeatureTable`): N image embeddings of the strong model.
        vectors, zero_shot (`Tensor`): T (C, d), carried, unit rows, and the strong model's own.
        pack (`CalibrationPack` or `None`): t and w on these images; without it q = softmax(c).
        ask_carried (`bool`, *optional*, defaults to `True`):
            Whether c is one of the experts. [`transfer`] leaves it out where an image tower was tuned: class vectors
            hold only part of that, and where zero-shot is systematically wrong (neon) they repeat the error.
    """
    scale = float(strong.logit_scale)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, x in table.share(accelerator):
            labels = scale * x @ vectors.T if ask_carried or pack is None else torch.zeros(len(x), len(vectors))
            if pack is not None:
                labels = labels + pack.logits[rows]
                if pack.weak_logits is not None:
                    labels = labels + scale * x @ zero_shot.T + pack.logits[rows] - pack.weak_logits[rows]
            yield x, labels

    ratio = config.carried_images * len(vectors) / len(table)
    fitted, bias, spread = discriminant_head(
        blocks, vectors, ratio, config.shrinkage, config.pseudo_count, accelerator
    )
    experts = 1 if pack is None else ask_carried + (1 if pack.weak_logits is None else 2)
    return {"class_vectors": fitted * spread / experts / scale, "bias": bias * spread / experts}


def _teacher_on(
    table: FeatureTable, dataset, adapter: AnchorClassifier, teacher: Teacher | None, options: dict
) -> CalibrationPack | None:
    """Tuned and weak logits on the images of `table`, `None` when they are not to be had."""
    config = adapter.adapter_config
    names, pack = tuple(config.class_names), adapter.calibration
    if teacher is not None:
        weak_table = embed_dataset(adapter.encoder, dataset, **options)
        zero_shot = AnchorClassifier(adapter.encoder, Anchors(names, (), config.templates))
        options = {"templates": config.templates, "weak": adapter.encoder, "table": weak_table, **options}
        said, own = (teacher_logits(one, dataset, names, **options) for one in (teacher, zero_shot))
        return CalibrationPack(said, names, weak_logits=own)
    if pack is None:
        return None
    if pack.class_names != names:
        raise ValueError("the calibration pack's class names are not the adapter's: attach the pack saved with it.")
    try:
        pack.check_images(len(table), table.dataset_fingerprint)
    except ValueError:
        logger.warning(
            "the adapter's calibration pack belongs to other images (%s): the refit goes without the teacher's "
            "logits; pass teacher= or the dataset of the extraction.",
            pack.dataset or pack.dataset_fingerprint,
        )
        return None
    return pack
