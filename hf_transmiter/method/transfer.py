"""[`transfer`]: an adapter of the weak model becomes one of the strong model. No labels, no gradients.

What is at hand decides how: a bridge and no image; text alone; a few unlabelled images; enough of them for a refit to
what the tuned model and the strong one say together. Every closed form ends in a linear adapter of the strong model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..data.anchors import Anchors
from ..data.embeddings import embed_dataset
from ..data.images import check_dataset
from ..data.table import FeatureTable
from ..encoders.dual_encoder import DualEncoder
from ..encoders.identity import ModelId
from ..hub.adapter_files import without_paths
from ..hub.provenance import library_versions, named_dataset
from ..settings import TransferConfig, check_kind, check_read, config_of
from ..tuners import TransMiterConfig
from .bridge import Bridge
from .classifier import AnchorClassifier, seen_columns
from .experts import expert_logits
from .refit import ImageSide, fewest_images, refit
from .teacher import Teacher, check_teacher


logger = logging.getLogger(__name__)

_BRIDGE_FACTS = ("space", "source", "dataset", "num_pairs", "alignment", "held_out", "held_out_on", "derived", "beta")


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
    how it was made, which `parts` it has, why (`because`), and what is known of it without labels (see [`refit`]).

    A change of pictures (an image side) ends as one, so that any names can be asked; a change of words (class vectors)
    ends as class vectors. With enough images either is fitted to the labels ``q`` of [`expert_logits`], to which the
    carried class vectors c are added where words changed, and gets a text side for the class names beside it.

    Args:
        adapter (`AnchorClassifier`): what [`extract`] returned, or `AnchorClassifier.from_pretrained(...)`.
        strong (`DualEncoder`): any dual encoder; family, width, tokenizer and image size may differ.
        dataset (`datasets.Dataset`, *optional*):
            Unlabelled images of the task, or their embeddings (see [`embed_dataset`]): of both models for a bridge of
            them, of `strong` alone beside a given one; without tower features an image side reads embeddings alone.
        bridge (`Bridge`, *optional*):
            Between the adapter's model and `strong`. Without one it is built from `dataset`, or from text alone, and
            from the class names.
        teacher (*optional*):
            The tuned model, or its logits on `dataset`, see [`Teacher`]. Defaults to the adapter's calibration pack
            when that belongs to these images, else the adapter stands in for it.
        seen_classes (`Sequence[str]`, *optional*): the names the tuning saw; all of them when omitted.
        dataset_name (`str`, *optional*): what the images are, for the card: Hub id or a few words.
        accelerator, progress, **embedding: as in [`embed_dataset`].

    Raises:
        ValueError: no adapter, or its model was changed since; a bridge of another pair or space, an adapter that
            needs images without any, unknown names in `seen_classes`, too few images for a refit that was asked for,
            or a calibration pack of other class names.
    """
    check_kind("adapter", adapter, AnchorClassifier)
    check_kind("strong", strong, DualEncoder)
    if dataset is not None and not isinstance(dataset, FeatureTable):
        check_dataset(dataset)
    if bridge is not None:
        check_kind("bridge", bridge, Bridge)
    config, source = config_of(TransferConfig, config), adapter.adapter_config
    if source is None:
        raise ValueError("there is no adapter to transfer: pass what extract returned, or load a saved one.")
    if teacher is not None:
        check_teacher(teacher)
        if dataset is None or config.refit is False:
            raise ValueError("a teacher labels the images of a refit: pass unlabelled images, or leave teacher out.")
    adapter.check_model()
    seen = seen_columns(source.class_names, seen_classes)
    all_seen = len(set(seen)) == len(source.class_names)
    weak, options = adapter.encoder, {"accelerator": accelerator, "progress": progress, **embedding, "labels": False}
    space = "logit" if source.form == "mlp" else "embedding"
    if config.refit and (dataset is None or space == "logit"):
        raise ValueError("a refit is of a linear adapter, to unlabelled images: pass images, or leave refit out.")
    if space == "logit":
        check_read(config, "the transfer of a published adapter", ("zero_shot_weight",))
    wanted = space == "embedding" and dataset is not None and config.refit is not False
    few = dataset is not None and len(dataset) < fewest_images(len(seen))
    if wanted and few and config.refit is None:
        wanted = False
        logger.info("%d images are too few for a refit: the adapter is carried over as it is.", len(dataset))
    if not wanted:
        check_read(config, "a transfer without a refit", ("parts", "even"))
    # First, since a table with tower features serves whoever asks for the embeddings alone.
    table = embed_dataset(strong, dataset, tower=config.parts != "text", **options) if wanted else None
    bridge = _bridge(adapter, strong, dataset, bridge, config, few, options)
    weight = config.zero_shot_weight
    if weight is None:
        weight = 0.0 if all_seen else 1 / 2
    carried, text = _carried(adapter, strong, bridge, weight, needed=not wanted)
    words = "class_vectors" in carried
    facts = {
        "step": "transfer",
        "strong": asdict(ModelId.of(strong)),
        "bridge": without_paths({key: getattr(bridge, key) for key in _BRIDGE_FACTS}),
        "extracted": source.provenance,
        "versions": library_versions(),
        **named_dataset(dataset, dataset_name),
    }
    if space == "embedding":
        facts |= {"because": f"{_CHANGED[words]}, and is carried over as it is."}
    if table is not None:
        asked = {"weak": weak, "templates": source.templates, "table": table, **options}
        teacher = _teacher_on(table, adapter) if teacher is None else teacher
        labels = expert_logits(teacher, strong, dataset, source.class_names, **asked)
        if words and source.own_class_vectors:
            for rows, x in table.share():
                labels[rows] += float(strong.logit_scale) * x[:, : strong.embed_dim] @ carried["class_vectors"].T
        fitted, known = _refitted(table, labels, carried, text, seen, float(strong.logit_scale), config, accelerator)
        facts |= known
        if fitted is not None:
            carried, facts["refit_on"] = fitted, len(table)
    if words and space == "embedding":
        facts["zero_shot_weight"] = weight
    shape = {"form": source.form, "width": source.width, "mlp_ratio": source.mlp_ratio}
    if space == "embedding":
        sides = {"image_side": "image_map", "text_side": "class_vectors"}
        shape = {side: carried[part].shape[1] if part in carried else None for side, part in sides.items()}
        shape |= {"form": "linear", "open_names": source.open_names and not words}
        facts["parts"] = "both" if all(shape[side] for side in sides) else "image" if shape["image_side"] else "text"
    upgraded = TransMiterConfig.for_anchors(source.anchors, **shape, provenance=facts)
    text = text.to(strong.device)
    return AnchorClassifier(strong, source.anchors, text).add_adapter(upgraded, {**carried, "anchors": text})


def _bridge(
    adapter: AnchorClassifier, strong: DualEncoder, dataset, given: Bridge | None, config: TransferConfig, few: bool,
    options: dict,
) -> Bridge:  # fmt: skip
    """The given bridge, checked, and measured where there are images; or one of them, joined by names if they are few,
    or of names alone."""
    weak, source = adapter.encoder, adapter.adapter_config
    if given is None:
        if source.form == "mlp" and dataset is None:
            raise ValueError("a published adapter needs unlabelled images or a logit-space bridge: pass one of them.")
        build = {"beta": config.beta, "beta_per_image": config.beta_per_image, **options}
        if source.form == "mlp":
            return Bridge.build(weak, strong, dataset, space="logit", anchors=source.anchors, **build)
        joined = Anchors.universal() if few else None
        return Bridge.build(weak, strong, dataset, anchors=joined, names=source.anchors, **build)
    check_read(config, "a transfer over a finished bridge", ("beta", "beta_per_image"))
    given.weak.check(weak, "weak")
    given.strong.check(strong, "strong")
    if dataset is not None and given.source == "text":
        given = replace(given)
        given.measure(weak, strong, dataset, **options)
    doubt = given.doubt()
    if doubt is not None:
        logger.warning("%s", doubt)
    return given


_CHANGED = {True: "the tuning changed what words mean", False: "the tuning changed what pictures look like"}


def _carried(
    adapter: AnchorClassifier, strong: DualEncoder, bridge: Bridge, zero_shot_weight: float, needed: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of the adapter over a bridge, without an image, and the anchors' texts on the strong model. Nothing, if
    that is not `needed`, of an adapter that no bridge carries: it reads the vision tower."""
    weak, source, (_, tensors) = adapter.encoder, adapter.adapter_config, adapter.adapter_tensors()
    if bridge.space == "embedding" and bridge.matrix.shape != (strong.embed_dim, weak.embed_dim):
        raise ValueError(
            f"the bridge's matrix is {tuple(bridge.matrix.shape)}, and the models' widths are {strong.embed_dim} and "
            f"{weak.embed_dim}: take a bridge of this pair."
        )
    text = strong.embed_names(source.anchors.names, source.templates).cpu()
    if source.form == "mlp":
        if bridge.space == "logit" and bridge.anchors is not None:
            bridge.anchors.check_same(source.anchors)
        return {**tensors, "basis": bridge.carry_basis(tensors["basis"].float())}, text
    if source.reads > weak.embed_dim and not needed:
        return {}, text
    found = {}
    if "image_map" in tensors:
        image_map, shift = bridge.carry_image_side(tensors["image_map"].float(), tensors["image_shift"].float())
        found = {"image_map": image_map, "image_shift": shift}
    if "class_vectors" not in tensors:
        return found, text
    anchor_texts = None
    if bridge.space == "logit":
        names, templates = bridge.anchors.names, bridge.anchors.templates
        anchor_texts = [model.embed_names(names, templates).cpu() for model in (weak, strong)]
    vectors, anchors = (tensors[part].float() for part in ("class_vectors", "anchors"))
    carried = bridge.carry_class_vectors(vectors, anchors, text, anchor_texts)
    if not source.own_class_vectors:
        # Vectors distilled from a tuned image tower: their change carries over, their place in space does not.
        carried = {"delta": carried["delta"]}
    found |= {"class_vectors": interpolate(carried, text, zero_shot_weight), "bias": torch.zeros(len(text))}
    return found, text


def interpolate(carried: dict[str, Tensor], zero_shot: Tensor, weight: float) -> Tensor:
    """``normalise((1 - w) · normalise(Σ carried) + w · zero_shot)``: class vectors on a line to the zero-shot ones.

    `carried` are unit rows (C, d) of each kind of transport: full and delta err in different ways, and their mean
    beats either (see `tests/studies`).
    """
    mean = normalize(torch.stack(list(carried.values())).sum(0), dim=-1)
    return normalize((1 - weight) * mean + weight * zero_shot, dim=-1)


def _refitted(
    table: FeatureTable,
    labels: Tensor,
    carried: dict[str, Tensor],
    text: Tensor,
    seen: Sequence[int],
    scale: float,
    config: TransferConfig,
    accelerator,
) -> tuple[dict[str, Tensor] | None, dict]:
    """Tensors of the refit of a carried adapter, `None` where that is left out, and facts for its provenance."""
    vectors, start, all_seen = carried.get("class_vectors"), None, len(set(seen)) == len(text)
    if "image_map" in carried:
        start = ImageSide(carried["image_map"], carried["image_shift"])
    parts = config.parts or ("both" if all_seen else "image")
    if parts != "image" and not all_seen:
        raise ValueError("a text side would not know the classes beside seen_classes: ask for parts='image'.")
    side, head, known = refit(
        table,
        labels if seen == list(range(len(text))) else labels[:, seen],  # which copies
        (text if vectors is None else vectors)[seen],
        scale,
        zero_shot=text[seen],
        start=start,
        image=parts != "text",
        text=parts != "image",
        even=config.even,
        accelerator=accelerator,
    )
    why = _CHANGED[vectors is not None]
    if vectors is not None and not known["even"] and config.even is None and config.parts is None:
        because = (
            f"{why}, and is carried over as it is: the images seem to hold few of the classes, and a refit would "
            "teach nothing about the others."
        )
        logger.warning("%s", because)
        return None, {"tried": known, "because": because}
    tensors = {}
    if side is not None:
        tensors |= {"image_map": side.matrix, "image_shift": side.shift}
    if head is not None:
        tensors |= {"class_vectors": head[0], "bias": head[1]}
        fit = "a text side for the class names joins it" if side is not None else "class vectors say the same"
    else:
        fit = "not all classes were seen" if not all_seen else "the images' labels name too few of the classes"
        fit = "the image side was asked for alone" if config.parts == "image" else f"{fit} for a text side"
        if vectors is not None:
            tensors |= {"class_vectors": vectors, "bias": torch.zeros(len(vectors))}
    because = (
        f"{why}; {fit}. Held-out images: KL {known['held_out_kl']:.3f} to the labels, "
        f"{known['held_out_kl_zero_shot']:.3f} zero-shot; {known['held_out_agreement']:.0f} % agreement."
    )
    return tensors, {**known, "because": because}


def _teacher_on(table: FeatureTable, adapter: AnchorClassifier) -> Teacher:
    """The adapter's calibration pack where that belongs to these images, else the adapter in its teacher's place."""
    pack, plain = adapter.calibration, AnchorClassifier(adapter.encoder, adapter.anchors)
    plain.transmiter = adapter.transmiter  # whatever names it is asked for just now
    if pack is None:
        return plain
    if pack.class_names != tuple(adapter.adapter_config.class_names):
        raise ValueError("the calibration pack's class names are not the adapter's: attach the pack saved with it.")
    try:
        pack.check_images(len(table), table.dataset_fingerprint)
    except ValueError:
        logger.warning(
            "the adapter's calibration pack belongs to other images (%s): the adapter stands in for the tuned model; "
            "pass teacher= or the dataset of the extraction.",
            pack.dataset or pack.dataset_fingerprint,
        )
        return plain
    return pack
