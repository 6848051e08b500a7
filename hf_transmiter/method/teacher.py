"""What the tuned model says: task logits of any kind of teacher on a set of images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..algebra import check_finite
from ..data.anchors import DEFAULT_TEMPLATES, PROMPTED, Anchors
from ..data.embeddings import embed_dataset
from ..data.images import guess_columns
from ..data.table import FeatureTable
from ..encoders.dual_encoder import DualEncoder
from ..encoders.families import is_dual_encoder, unwrap
from ..encoders.identity import active_adapters, check_untuned
from ..hub.checks import as_list
from ..hub.repo import same_name
from ..tuners.prompts import image_conditioned, prompt_layer
from .classifier import AnchorClassifier
from .stored_logits import CalibrationPack


Teacher = AnchorClassifier | DualEncoder | nn.Module | CalibrationPack | Tensor | str | os.PathLike | Sequence
"""A classifier, a tuned dual encoder (plain, or with LoRA or prompts inside), stored logits (a pack, its file, or an
(N, C) tensor), or several of these, whose logits are averaged."""


def as_classifier(
    teacher: Teacher, class_names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
) -> AnchorClassifier | None:
    """The teacher as a classifier over `class_names`, `None` when it only has stored logits.

    `templates` are for a bare dual encoder; where a prompt learner answers, its context takes their place (``"{}."``).

    Raises:
        ValueError: a classifier that does not know one of the names, or a bare model with a TransMiter adapter on it.
        TypeError: not a kind of teacher.
    """
    if isinstance(teacher, AnchorClassifier):
        _columns(teacher, class_names)
        return teacher
    if isinstance(teacher, nn.Module) and is_dual_encoder(teacher):
        if hasattr(unwrap(teacher), "transmiter"):
            raise ValueError("a model with a TransMiter adapter on it is read by AnchorClassifier.from_pretrained.")
        teacher = DualEncoder(teacher)
    if isinstance(teacher, DualEncoder):
        layer = prompt_layer(teacher.model)
        if layer is not None and layer.active_name is not None:
            templates = PROMPTED
        return AnchorClassifier(teacher, Anchors(class_names, (), templates))
    check_teacher(teacher)
    return None


def check_teacher(teacher: Teacher) -> None:
    """
    Raises:
        TypeError: not a kind of [`Teacher`], or a folder, which has to be loaded first.
    """
    if isinstance(teacher, (list, tuple)):
        for one in teacher:
            check_teacher(one)
        return
    named = isinstance(teacher, (str, os.PathLike)) and not os.fspath(teacher).endswith(".safetensors")
    if named and not os.path.isfile(teacher):
        said = f"a teacher is a model and not the name of one: load {os.fspath(teacher)!r} first"
        raise TypeError(f"{said}, with load_teacher of hf_transmiter.method.saved.")
    known = (AnchorClassifier, DualEncoder, CalibrationPack, Tensor, str, os.PathLike)
    if not isinstance(teacher, known) and not (isinstance(teacher, nn.Module) and is_dual_encoder(teacher)):
        raise TypeError(
            "a teacher is an AnchorClassifier, a tuned dual encoder, a CalibrationPack or its file, logits (N, C), or "
            f"a list of these, not {type(teacher).__name__}."
        )


def task_names(
    given: Sequence[str] | None, teacher: Teacher | None, dataset=None, columns: Mapping | None = None
) -> tuple[str, ...] | None:
    """The C class names: those given, the teacher's own, or those of the label column of `dataset`; `columns` may name
    that. `None` where nobody says them.

    Raises:
        BareString: one string is given.
        ValueError: several columns could be meant.
    """
    if given is not None:
        return tuple(as_list(given, "class_names"))
    first = teacher[0] if isinstance(teacher, (list, tuple)) and teacher else teacher
    if isinstance(first, (AnchorClassifier, CalibrationPack)):
        return tuple(first.class_names)
    model = first.model if isinstance(first, DualEncoder) else first
    layer = prompt_layer(model) if isinstance(model, nn.Module) else None
    if layer is not None and layer.active_name is not None and layer.active_config.class_names:
        return tuple(layer.active_config.class_names)  # PEFT saves them with a prompt
    if dataset is None or isinstance(dataset, FeatureTable):
        names = getattr(dataset, "class_names", None)
        return names and tuple(names)
    columns = {key: (columns or {}).get(key) for key in ("image_column", "label_column")}
    _, label_column = guess_columns(dataset, **columns, pictures=False)
    names = getattr(dataset.features.get(label_column), "names", None)
    return names and tuple(names)


def check_weak(weak: DualEncoder, teacher: Teacher) -> None:
    """Whether `weak` is what the teacher was before its tuning, as far as that can be told.

    Raises:
        ValueError: adapters are switched on in the weak model, or a bare teacher has its very weights.
    """
    check_untuned(weak)
    own = {id(parameter) for parameter in weak.model.parameters()}
    for one in teacher if isinstance(teacher, (list, tuple)) else [teacher]:
        if isinstance(one, AnchorClassifier) or not isinstance(one, (DualEncoder, nn.Module)):
            continue  # names are asked as its maker chose, or an adapter is on it
        model = one.model if isinstance(one, DualEncoder) else unwrap(one)
        if all(id(parameter) in own for parameter in model.parameters()):
            raise ValueError(
                "the teacher and the weak model are one and the same model in memory, so that nothing was tuned "
                "between them (PEFT changes a model in place): load the weak model anew, "
                f"DualEncoder.from_pretrained({weak.name_or_path!r})."
            )


def is_untuned(weak: DualEncoder, teacher: Teacher) -> bool:
    """Whether a teacher is a copy of the weak model, or what that says by itself."""
    encoder = teacher if isinstance(teacher, DualEncoder) else getattr(teacher, "encoder", None)
    chosen = isinstance(teacher, AnchorClassifier) and (teacher.adapter_config or teacher.text_embeds_given)
    if encoder is None or chosen or active_adapters(encoder.model):
        return False
    return encoder.fingerprint == weak.fingerprint


def _columns(teacher: AnchorClassifier | CalibrationPack, class_names: Sequence[str]) -> list[int]:
    """Where the teacher has these names; an error where it has not."""
    missing = [name for name in class_names if name not in teacher.class_names]
    if missing:
        raise ValueError(
            f"the teacher does not know {len(missing)} of the class names, first {missing[0]!r}: pass the names it "
            f"was tuned on, such as {teacher.class_names[0]!r}."
        )
    return [teacher.class_names.index(name) for name in class_names]


@torch.no_grad()
def same_image_tower(a: DualEncoder, b: DualEncoder) -> bool:
    """Whether two encoders embed images alike, as a prompt method and its base do: they are shown the same noise."""
    if a.model is b.model:
        return True
    if a.embed_dim != b.embed_dim or a.family != b.family or a.image_size != b.image_size:
        return False
    noise = torch.rand(2, 3, a.image_size, a.image_size, generator=torch.Generator().manual_seed(0))
    return bool(torch.allclose(a.embed_pixels(noise).cpu(), b.embed_pixels(noise).cpu(), atol=1e-6))


def teacher_class_vectors(
    teacher: Teacher, weak: DualEncoder, class_names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
) -> Tensor | None:
    """Class vectors T (C, d) with ``logits = s · x Tᵀ`` on the *weak* model's own image embeddings, where the teacher
    has them (class vectors or prompts were tuned, images are embedded as before); `None` for any other teacher."""
    if isinstance(teacher, (list, tuple)):
        return None
    classifier = as_classifier(teacher, class_names, templates)
    if classifier is None or image_conditioned(classifier.encoder.model) is not None:
        return None
    if not same_image_tower(weak, classifier.encoder):
        return None
    if classifier.transmiter is None:
        vectors = classifier.text_embeds
    else:
        tensors = classifier.transmiter.tensors("default")
        if "image_map" in tensors or "class_vectors" not in tensors or tensors["bias"].any():
            return None
        vectors = tensors["class_vectors"]
        if vectors.shape[1] != weak.embed_dim:  # they read more than the embeddings
            return None
    return vectors[_columns(classifier, class_names)] * (classifier.encoder.logit_scale / weak.logit_scale)


@torch.no_grad()
def teacher_logits(
    teacher: Teacher,
    dataset,
    class_names: Sequence[str],
    *,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    weak: DualEncoder | None = None,
    table: FeatureTable | None = None,
    **embedding,
) -> Tensor:
    """Task logits (N, C) of a teacher, scale included, columns in the order of `class_names`.

    Args:
        dataset (`datasets.Dataset`): the images; not read for stored logits.
        templates (`Sequence[str]`, *optional*):
            Prompts of a teacher given as a bare dual encoder, unless its prompts were learnt.
        weak (`DualEncoder`, *optional*), table (`FeatureTable`, *optional*):
            Embeddings at hand: used instead of embedding again when the teacher's image tower equals `weak`'s.
        **embedding: passed to `embed_dataset`.

    Raises:
        ValueError: stored logits do not fit the names or the images, or are not finite; an empty list.
    """
    if isinstance(teacher, (list, tuple)):
        if not teacher:
            raise ValueError("the list of teachers is empty.")
        options = {"templates": templates, "weak": weak, "table": table, **embedding}
        return torch.stack([teacher_logits(one, dataset, class_names, **options) for one in teacher]).mean(0)
    classifier = as_classifier(teacher, class_names, templates)
    if classifier is None:
        return _stored(teacher, class_names, table)
    at_hand = table is not None and weak is not None and not classifier.reads_tower
    if not at_hand or not same_image_tower(weak, classifier.encoder):
        own = {**embedding, "tower": classifier.reads_tower, "labels": False}
        if weak not in (None, classifier.encoder) and same_name(weak.name_or_path, classifier.encoder.name_or_path):
            own["embedding_columns"] = {}  # a tuned model that kept the name: the column is not what it sees
        table = embed_dataset(classifier.encoder, dataset, **own)
    columns, device = _columns(classifier, class_names), classifier.encoder.device
    found = torch.empty(len(table), len(columns))  # the one copy: of a million images and a thousand classes 4 GB
    for rows, x in table.share():
        found[rows] = classifier.classify(x.to(device))[:, columns].cpu()
    return check_finite(found, "the teacher's logits")


def _stored(
    teacher: CalibrationPack | Tensor | str | os.PathLike, class_names: Sequence[str], table: FeatureTable | None
) -> Tensor:
    if isinstance(teacher, (str, os.PathLike)):
        teacher = CalibrationPack.load(teacher)
    if isinstance(teacher, CalibrationPack):
        if table is not None:
            teacher.check_images(len(table), table.dataset_fingerprint or None)
        columns = _columns(teacher, class_names)
        logits = teacher.logits if columns == list(range(teacher.logits.shape[1])) else teacher.logits[:, columns]
    else:
        logits = teacher.float()
    count = len(logits) if table is None else len(table)
    if logits.ndim != 2 or logits.shape[1] != len(class_names) or count != len(logits):
        raise ValueError(
            f"stored teacher logits must be ({count}, {len(class_names)}): one row per image, one column per "
            f"class name; got {tuple(logits.shape)}."
        )
    return check_finite(logits, "the teacher's logits")
