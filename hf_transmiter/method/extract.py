"""[`extract`]: what a fine-tuning changed, as an adapter of the weak model. No labels.

The published solver goes by gradients (arXiv 2508.08604, section 3). Those in closed form put the change where the
tuning put it: a tuned image tower becomes an image side, a prompt or a head becomes class vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize
from torch.nn.utils.parametrizations import orthogonal

from ..algebra import check_finite, discriminant_head, ridge, total
from ..data.anchors import DEFAULT_TEMPLATES, Anchors
from ..data.embeddings import embed_dataset
from ..data.table import FeatureTable
from ..encoders.dual_encoder import DualEncoder
from ..encoders.identity import ModelId
from ..hub.provenance import library_versions, named_dataset
from ..settings import ExtractionConfig, check_kind, config_of
from ..training.draws import per_example
from ..training.loop import fit
from ..tuners import TransMiterConfig, TransMiterLayer
from ..tuners.transmiter.layer import refine
from .classifier import AnchorClassifier, seen_columns
from .experts import SoftLabels
from .refit import fit_image_side
from .stored_logits import CalibrationPack
from .teacher import (
    Teacher,
    as_classifier,
    check_teacher,
    check_weak,
    is_untuned,
    same_image_tower,
    task_names,
    teacher_class_vectors,
    teacher_logits,
)


logger = logging.getLogger(__name__)

IMAGE_PENALTY = 3.0  # of the ridge, in mean variances: directions that only the weak model has do not carry over
# Share of a change that is linear in x: of a tuned head all of it, of a tuned image tower 0.45 to 0.67
# (`tests/studies/refits.py --tables linear`).
LINEAR = 0.98


def extract(
    weak: DualEncoder,
    teacher: Teacher,
    dataset=None,
    *,
    class_names: Sequence[str] | None = None,
    anchors: Anchors | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    seen_classes: Sequence[str] | None = None,
    config: ExtractionConfig | None = None,
    dataset_name: str | None = None,
    accelerator=None,
    checkpoint=None,
    keep_checkpoint: bool = False,
    progress: bool = True,
    **embedding,
) -> AnchorClassifier:
    """An adapter that turns the weak model's predictions into its fine-tuned version's, on the weak model, with the
    teacher's logits as its calibration pack.

    What it is for is to be carried over. Of a tuned image tower it keeps the directions that carry over and gives up
    others, so that on the weak model itself it stays short of the tuned one.

    Args:
        weak (`DualEncoder`): the pre-trained model the teacher was tuned from.
        teacher: any fine-tuned version of it, see [`Teacher`].
        dataset (`datasets.Dataset`, *optional*):
            Unlabelled images of the task's domain, or their embeddings (see [`embed_dataset`]); labels are not read.
            Not needed for the closed form when the teacher has class vectors on the weak model's own embeddings
            (prompt methods).
        class_names (`Sequence[str]`, *optional*): the C names; the teacher's or the dataset's when omitted.
        anchors (`Anchors`, *optional*): names the published adapter reads; 1,024 with random common nouns if omitted.
        templates (`Sequence[str]`, *optional*): prompts of the anchors made here.
        seen_classes (`Sequence[str]`, *optional*):
            The names the tuning saw; all of them when omitted. An image map is fitted to these alone: what the teacher
            says of the others it was never taught.
        dataset_name (`str`, *optional*): what the images are, for the card: Hub id or a few words.
        checkpoint (`str`, *optional*), keep_checkpoint (`bool`, *optional*): of the gradient solver, see [`fit`].
        accelerator, progress, **embedding: as in [`embed_dataset`].

    Raises:
        ValueError: a weak model that is tuned already, see [`check_weak`]; no class names or images where they are
            needed, more classes than anchors, anchors that do not begin with the class names, unknown names in
            `seen_classes`, or logits that are not finite.
    """
    check_kind("weak", weak, DualEncoder)
    check_teacher(teacher)
    config = config_of(ExtractionConfig, config)
    check_weak(weak, teacher)
    if is_untuned(weak, teacher):
        logger.warning("the teacher answers as the weak model does: nothing was tuned, so nothing to extract.")
    given = anchors.task or None if class_names is None and anchors is not None else class_names
    class_names = task_names(given, teacher, dataset, embedding)
    if class_names is None:
        raise ValueError("no class names: pass class_names, or a dataset whose label column is a ClassLabel.")
    if anchors is None:
        published = config.solver == "gradient"
        anchors = Anchors.build(class_names, templates=templates) if published else Anchors(class_names, (), templates)
    if anchors.task != class_names:
        raise ValueError("the anchors' task names are not the class names, or in another order.")
    table = logits = None
    if dataset is not None:
        options = {"accelerator": accelerator, "progress": progress, **embedding, "labels": False}
        table = embed_dataset(weak, dataset, **options)
        options |= {"templates": anchors.templates, "weak": weak, "table": table}
        logits = teacher_logits(teacher, dataset, class_names, **options)
    text = weak.embed_names(anchors.names, anchors.templates)
    facts = {
        "step": "extract",
        "solver": config.solver,
        "weak": asdict(ModelId.of(weak)),
        "num_images": 0 if table is None else len(table),
        "dataset_fingerprint": None if table is None else table.dataset_fingerprint,
        "versions": library_versions(),
    }
    if config.solver != "gradient":
        vectors = teacher_class_vectors(teacher, weak, class_names, anchors.templates)
        if config.solver is None and vectors is None and _moves_images(teacher, weak, class_names):
            config = replace(config, solver="image_map")  # no need to ask its logits
        prior = text[: len(class_names)].cpu()
        seen = slice(None) if seen_classes is None else seen_columns(class_names, seen_classes)
        tensors, solved = closed_form(table, logits, prior, weak, vectors, config, accelerator, seen)
        anchors, text = Anchors(class_names, (), anchors.templates), text[: len(class_names)]
        sides = {"image_side": weak.embed_dim} if "image_map" in tensors else {"open_names": False}
        adapter = TransMiterConfig.for_anchors(anchors, form="linear", **sides)
    else:
        if table is None:
            raise ValueError("the gradient solver needs unlabelled images: pass a dataset.")
        kept = {"checkpoint": checkpoint, "keep_checkpoint": keep_checkpoint}
        tensors, solved = gradient(table, logits, text, weak, config, accelerator, progress, **kept)
        adapter = TransMiterConfig.for_anchors(anchors, form="mlp", width=config.width, seed=config.seed)
    adapter.provenance = {**facts, **solved, **named_dataset(dataset, dataset_name)}
    classifier = AnchorClassifier(weak, anchors, text).add_adapter(adapter, tensors)
    if logits is not None:
        own = torch.cat([weak.logits(x.to(text.device), text[: len(class_names)]).cpu() for x in table.batches(4096)])
        about = {"dataset_fingerprint": table.dataset_fingerprint, "dataset": adapter.provenance.get("dataset")}
        classifier.calibration = CalibrationPack(logits, class_names, **about, weak_logits=own)
    return classifier


def closed_form(
    table: FeatureTable | None,
    logits: Tensor | None,
    text: Tensor,
    weak: DualEncoder,
    vectors: Tensor | None,
    config: ExtractionConfig,
    accelerator=None,
    seen: Sequence[int] | slice = slice(None),
) -> tuple[dict[str, Tensor], dict]:
    """A linear adapter of the weak model that says what the teacher says: its tensors, and facts for its provenance.

    Image map: `fit_image_side` to the teacher's soft labels, ridge penalty `IMAGE_PENALTY`. Discriminant:
    ``T ∝ W / σ_W + T₀ / σ_{T₀}`` with W the linear discriminant of the teacher's soft labels (see
    [`discriminant_head`]), unit rows. Ridge: ``argmin_{T,b} Σ_i ‖x_i Tᵀ + b - t_i‖² + λ‖T - T₀‖²`` around the
    zero-shot vectors T₀ (delta form), ``t_i = x_i T₀ᵀ + centred(teacher_i / s - x_i T₀ᵀ)``: only differences between
    classes count, so residuals are centred per image; λ by leave-one-out error. All from streamed sums.

    Args:
        table (`FeatureTable` or `None`), logits (`Tensor` or `None`): N image embeddings and teacher logits (N, C).
        text (`Tensor`): T₀ (C, d).
        vectors (`Tensor` or `None`): the teacher's own class vectors, taken as they are but for an image map.
        seen: columns of the classes that an image map is fitted to.

    Raises:
        ValueError: neither images nor vectors.
    """
    scale, bias, solver = float(weak.logit_scale), torch.zeros(len(text)), config.solver
    if vectors is not None and solver != "image_map":
        tensors = {"class_vectors": vectors.float().cpu(), "bias": bias}
        return {"anchors": text, **tensors}, {"solver": None, "own_class_vectors": True}
    if table is None:
        raise ValueError(
            "this teacher has no class vectors on the weak model's embeddings (its image tower was tuned, or only "
            "its logits are stored): pass unlabelled images as dataset."
        )

    def labelled():
        return ((x, logits[rows]) for rows, x in table.share(accelerator))

    def targets():
        for x, said in labelled():
            own = x @ text.T
            change = said / scale - own
            yield x, own + change - change.mean(1, keepdim=True)

    facts = {}
    if solver in (None, "ridge"):
        lambdas = config.lambdas if solver or len(config.lambdas) > 1 else (*config.lambdas, 10 * config.lambdas[0])
        solution = ridge(targets, text.T, lambdas, accelerator)
        error = solution.errors.get(solution.lam)
        facts = {"lambda": solution.lam, "leave_one_out_error": error}
        if solver is None:
            facts["linear"] = 1 - error / _variance(targets, text, accelerator)
        if solver == "ridge" or facts["linear"] > LINEAR:
            tensors = {"class_vectors": solution.weight.T.contiguous(), "bias": solution.bias * scale}
            # Linear in the embeddings: what was tuned is a head, and these are its class vectors.
            facts |= {"solver": "ridge", "own_class_vectors": solver is None}
            return {"anchors": text, **tensors}, facts
    if solver == "discriminant":
        vectors = normalize(discriminant_head(labelled, text, config.shrinkage, accelerator), dim=-1)
        tensors = {"class_vectors": vectors, "bias": bias}
        return {"anchors": text, **tensors}, {"shrinkage": config.shrinkage}
    labels = SoftLabels(logits[:, seen], even=False)
    side = fit_image_side(table, labels, text[seen], scale, IMAGE_PENALTY, accelerator)
    tensors = {"image_map": check_finite(side.matrix, "the image map"), "image_shift": side.shift}
    return {"anchors": text, **tensors}, {**facts, "solver": "image_map"}


def _moves_images(teacher: Teacher, weak: DualEncoder, class_names: Sequence[str]) -> bool:
    """Whether a teacher is known to embed pictures in another way than the weak model; of logits that is not known."""
    classifier = None if isinstance(teacher, (list, tuple)) else as_classifier(teacher, class_names)
    if classifier is None:
        return False
    return (
        classifier.reads_tower
        or (classifier.transmiter is not None and classifier.transmiter.has_image_side)
        or not same_image_tower(weak, classifier.encoder)
    )


def _variance(targets, text: Tensor, accelerator) -> float:
    """Mean square of what the teacher changed, per image and class, beside its mean over images."""
    sums = torch.zeros(3, len(text), dtype=torch.float64)
    for x, target in targets():
        change = (target - x @ text.T).double()
        sums += torch.stack([torch.full_like(change[0], len(change)), change.sum(0), change.square().sum(0)])
    count, mean, square = total(sums, accelerator)
    return float((square / count - (mean / count).square()).mean().clamp(min=1e-18))


def gradient(
    table: FeatureTable,
    logits: Tensor,
    text: Tensor,
    weak: DualEncoder,
    config: ExtractionConfig,
    accelerator=None,
    progress: bool = True,
    **kept,
) -> tuple[dict[str, Tensor], dict]:
    """The published adapter by its published training (arXiv 2508.08604, section 3): its tensors, and facts for its
    provenance.

    Minimises ``τ · KL(softmax(teacher / τ) ‖ softmax(ẑ))`` over the C task classes, batch mean, with Gaussian noise
    on the weak logits in some batches; W stays orthonormal by a parametrisation, or fixed.

    Args:
        table (`FeatureTable`), logits (`Tensor`): N image embeddings and teacher logits (N, C).
        text (`Tensor`): (K, d) anchor embeddings.

    Raises:
        ValueError: more anchors than the basis is wide, or a loss that is not finite.
    """
    k, classes, device = len(text), logits.shape[1], weak.device
    layer_config = TransMiterConfig(
        class_names=[str(i) for i in range(k)], width=config.width, seed=config.seed, embed_dim=text.shape[1]
    )
    layer = TransMiterLayer.holding(layer_config, device=text.device)
    basis = nn.Linear(k, config.width or k, bias=False, device=device)
    basis.weight.data.copy_(layer.transmiter_basis["default"])
    if config.basis == "learned":
        orthogonal(basis, orthogonal_map="cayley")  # "matrix_exp" is slower, "householder" keeps signs that decay to 0
    basis.requires_grad_(config.basis == "learned")
    parts = [layer.transmiter_norm["default"], layer.transmiter_up["default"], layer.transmiter_down["default"]]
    x = torch.cat(list(table.batches(4096))).to(device)
    target = (logits / config.teacher_temperature).softmax(1).to(device)

    def step(rows: Tensor, generator: torch.Generator) -> Tensor:
        rows = rows.to(device)
        z = weak.logits(x[rows], text)
        if torch.rand((), generator=generator) < config.noise_probability:
            noise = per_example(generator, len(z), lambda count: torch.randn(count, k, generator=generator))
            z = z + config.noise_std * z.std(1, keepdim=True) * noise.to(device)
        said = refine(z, basis.weight, *parts)[:, :classes].log_softmax(1)
        return config.teacher_temperature * kl_div(said, target[rows], reduction="batchmean")

    parameters = [p for module in (basis, *parts) for p in module.requires_grad_().parameters()]
    if config.basis == "fixed":
        parameters.remove(basis.weight)
    about = {"model": weak.fingerprint, "images": x, "logits": logits, "text": text}
    options = {"about": about, "accelerator": accelerator, "progress": progress, **kept}
    losses = fit(parameters, step, len(x), config, description="Extracting", **options)
    layer.transmiter_basis["default"].data.copy_(basis.weight)
    facts = {"loss": losses[-1] if losses else None, "settings": {**asdict(config), "lambdas": list(config.lambdas)}}
    return {**layer.tensors("default"), "anchors": text}, facts
