"""[`tune`]: images, labelled or with a teacher, to a tuned model, by a prompt learner, LoRA or another PEFT method.

What comes out is an ordinary model with an ordinary adapter in it: ``tune(...).save_pretrained(folder)`` writes
``adapter_config.json`` and ``adapter_model.safetensors``, and ``PeftModel.from_pretrained(model, folder)`` reads them.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, replace

import torch
from datasets import Dataset
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig, PromptLearningConfig
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..data.anchors import DEFAULT_TEMPLATES, PROMPTED, TEMPLATES, Anchors
from ..data.images import guess_columns
from ..encoders.dual_encoder import DualEncoder
from ..hub.adapter_files import TeacherFacts
from ..hub.checks import did_you_mean
from ..settings import METHODS, VISION_LINEARS, TuningConfig, check_kind, check_number, config_of
from ..training.batches import Pixels, forward_pass, frozen_images, learns, trained_images
from ..training.loop import fit, gaussian_epoch_weights, project_gradient
from ..training.objectives import losses
from ..tuners import CoOpConfig, TransMiterConfig
from ..tuners.injection import inject
from ..tuners.prompts import PromptConfig, layers, phrase_token_ids, prompt_layer
from .classifier import AnchorClassifier
from .lessons import draw_few_shot, held_out_loss, labelled_lesson, taught_by, taught_lesson, what_was_learnt
from .stored_logits import CalibrationPack
from .teacher import Teacher, as_classifier, check_teacher, same_image_tower, task_names


logger = logging.getLogger(__name__)

DEPTH = 9  # published, of prompts in several layers


def tune(
    model: DualEncoder,
    dataset: Dataset,
    adapter: str | Mapping | PeftConfig | None = None,
    *,
    teacher: Teacher | None = None,
    weak: DualEncoder | None = None,
    class_names: Sequence[str] | None = None,
    config: TuningConfig | None = None,
    templates: Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    accelerator=None,
    checkpoint: str | os.PathLike | None = None,
    keep_checkpoint: bool = False,
    progress: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> AnchorClassifier:
    """Tuning of a copy of a model: few-shot from labels, or label-free from a teacher.

    Minimises ``CE(z, y) + keep_near · pull`` with ``z = s · x wᵀ`` (B, C): x (B, d) are unit image rows and w (C, d)
    unit class vectors, learnt or as they were, by method. The pull goes back to the model's own zero-shot answers (see
    [`TuningConfig`]). y are labels or, with a teacher, probabilities: those of the product of experts
    ``softmax(2 t + z - w)`` (see [`expert_logits`]), in which the tuned weak model t teaches the strong one, without a
    label. A tenth of the images is then held out, at most 1,000, and the epoch that agrees best with the experts on
    them is kept.

    What was learnt is measured on held-out images (`.facts.learnt`; with a teacher those that choose the epoch), and a
    warning says where that is nothing.

    Args:
        model ([`DualEncoder`]): stays untouched. With a teacher, the strong model.
        dataset (`datasets.Dataset`): one split with an image column, and a label column unless a teacher labels it.
        adapter (`str`, `Mapping` or `PeftConfig`, *optional*):
            What is learnt: a method of [`TuningConfig`]'s table, or another one of PEFT that changes layers
            (`"loha"`, `"lokr"`, ...); with options, ``{"method": "coop", "n_ctx": 8}``, the fields of its PEFT
            configuration; or that configuration itself. By name, LoRA has ``r=8, lora_alpha=16``, and contexts start
            from ``"a photo of a"``. Where `target_modules` is left open, they are the linear layers of the image
            tower (of open_clip's own vision transformers the MLPs, of its ResNets the convolutions). Prompts in
            several layers reach the published 9, or as deep as the tower is. `seed` is that of `config`. When omitted,
            a prompt of the teacher's method where its prompts were tuned, `"coop"` where only its words changed
            otherwise, and else `"lora"`.
        teacher ([`Teacher`], *optional*): the tuned weak model or its stored logits; the labels are not read then.
        weak ([`DualEncoder`], *optional*): what the teacher was before its tuning, see [`expert_logits`].
        class_names (`Sequence[str]`, *optional*):
            The C names; the teacher's, or those of the label column, when omitted. The label column's names are
            matched with them by name, in any order; where it has none, its numbers are positions in them.
        config ([`TuningConfig`], *optional*): how it is trained.
        templates (`Sequence[str]`, *optional*):
            Prompts of the zero-shot class vectors; `"a photo of a {}."` when omitted, or PromptSRC's 60.
        image_column, label_column (`str`, *optional*): guessed when omitted.
        checkpoint (`str` or `os.PathLike`, *optional*), keep_checkpoint (`bool`, *optional*): see [`fit`].
        accelerator, progress, cache_dir: as in [`embed_dataset`].

    Returns:
        [`AnchorClassifier`]: the tuned model (`.encoder`, its PEFT adapter named "default") and the names it was tuned
        on, with the templates its class vectors are made with: `templates` after LoRA, ``"{}."`` after a prompt
        learner, whose context takes the place of the template.

    Raises:
        ValueError: no or unusable labels, a class without images or without a name, duplicate names, a name too long
            for the context, an unknown method or option of it, or a model that has adapters already; with a teacher,
            fewer than two images, `shots`, or what [`expert_logits`] raises.

    ```python
    >>> weak = DualEncoder.from_pretrained("openai/clip-vit-base-patch32")
    >>> tuned = tune(weak, load_dataset("mteb/dtd", split="train"), "contcoop")
    >>> tuned.save_pretrained("dtd-contcoop")
    >>> strong = DualEncoder.from_pretrained("openai/clip-vit-large-patch14")
    >>> upgraded = tune(strong, load_dataset("mteb/dtd", split="train"), teacher=tuned, weak=weak)  # no label is read
    ```
    """
    check_kind("model", model, DualEncoder)
    if weak is not None:
        check_kind("weak", weak, DualEncoder)
        if teacher is None:
            raise ValueError("weak is what a teacher was before its tuning: pass the teacher, too, or leave weak out.")
    if teacher is not None:
        check_teacher(teacher)
    if isinstance(teacher, (str, os.PathLike)):
        teacher = CalibrationPack.load(teacher)
    wanted = True if teacher is None else None
    image_column, label_column = guess_columns(dataset, image_column, label_column, labels=wanted)
    columns = {"image_column": image_column, "label_column": label_column}
    names = _class_names(dataset, columns, class_names, teacher)
    adapter = adapter_settings(_fitting(teacher, weak, names) if adapter is None else adapter)
    method, given = adapter["method"], config_of(TuningConfig, config)
    config = given.of(method, taught=teacher is not None)
    anchors = Anchors(names, (), starting_templates(method) if templates is None else templates)
    embedding = {"accelerator": accelerator, "progress": progress, "cache_dir": cache_dir}
    options = {**columns, "labels": False, **embedding}
    drawn = None if teacher is not None else draw_few_shot(dataset, label_column, names, config)
    tuned = _with_adapter(model, names, adapter, config)
    moves_images = _moves_images(tuned)
    if moves_images and config.views:
        raise ValueError("views are of images that are embedded once; here the image tower is tuned: leave views out.")
    if not moves_images and prompt_layer(tuned.model) is None and given.augment is None:
        config = replace(config, augment="none")  # text alone is tuned
    if teacher is None:
        lesson = labelled_lesson(model, dataset, drawn, options)
    else:
        lesson = taught_lesson(teacher, weak, model, dataset, anchors, config.seed, options)
    embeds, zero_shot = lesson.table.embeds.to(model.device), _zero_shot(model, anchors, method, config)
    targets = lesson.targets.to(model.device)
    pixels = functools.cache(functools.partial(Pixels, tuned, lesson.examples, image_column))
    source = trained_images if moves_images else frozen_images

    def forward(config: TuningConfig):
        towers = (model, tuned) if moves_images else (model,)
        images = source(*towers, embeds, pixels, config)
        return forward_pass(tuned, names, anchors.templates, zero_shot, images, config)

    answers = forward(config)
    droppers = [module for module in tuned.model.modules() if isinstance(module, nn.Dropout) and module.training]

    def step(drawn: Tensor, generator: torch.Generator) -> Tensor | tuple[Tensor, Tensor]:
        with torch.random.fork_rng(enabled=bool(droppers)):
            if droppers:  # an adapter's dropout draws from the global generator
                torch.manual_seed(generator.initial_seed())
            main, pull = losses(*answers(drawn, generator), targets[drawn.to(model.device)], config.pull)
        return (main, pull) if config.project else main + config.keep_near * pull

    weights = None
    if config.gaussian_mean is not None:
        weights = gaussian_epoch_weights(config.epochs, config.gaussian_mean, config.gaussian_std)
    held_out = None
    if teacher is not None and weights is None:
        plain = forward(replace(config, augment="none", views=0))
        held_out = functools.partial(held_out_loss, plain, targets, lesson.seen, droppers, accelerator)
    found = fit(
        list(tuned.model.parameters()),
        step,
        lesson.seen,
        config,
        combine=functools.partial(project_gradient, strength=config.keep_near) if config.project else None,
        epoch_weights=weights,
        held_out=held_out,
        about={
            **{"adapter": adapter, "model": model.fingerprint, "class_names": names, "templates": anchors.templates},
            **{"images": lesson.table.embeds, "targets": lesson.targets, "zero_shot": zero_shot},
        },
        accelerator=accelerator,
        checkpoint=checkpoint,
        keep_checkpoint=keep_checkpoint,
        description=f"Tuning ({method})",
        progress=progress,
    )
    where = (model.name_or_path, lesson.seen, len(names), len(found))
    logger.info("tuned %s on %d images of %d classes; loss of %d epochs %.3g to %.3g", *where, found[0], found[-1])
    settings = {**adapter, **asdict(config)}
    _note(tuned, lesson.seen, dataset, settings)
    tuned.model.requires_grad_(False).eval()
    templates = anchors.templates if prompt_layer(tuned.model) is None else PROMPTED
    classifier = AnchorClassifier(tuned, Anchors(names, (), templates))
    classifier.facts = TeacherFacts(
        weak=model.name_or_path,
        revision=model.revision,
        fingerprint=model.fingerprint,
        class_names=list(names),
        templates=list(templates),
        zero_shot_templates=list(anchors.templates),
        settings=settings,
        taught_by=None if teacher is None else taught_by(teacher, weak, lesson.seen),
        learnt=what_was_learnt(classifier, zero_shot, moves_images, lesson, options),
    )
    return classifier


def starting_templates(method: str, usual: Sequence[str] = DEFAULT_TEMPLATES) -> tuple[str, ...]:
    """Prompts of the zero-shot class vectors a method is pulled back to, where nobody chose others: PromptSRC's 60, or
    the usual ones of the pictures."""
    return TEMPLATES["promptsrc"] if method == "promptsrc" else tuple(usual)


def _zero_shot(weak: DualEncoder, anchors: Anchors, method: str, config: TuningConfig) -> Tensor:
    """(C, d) unit class vectors of the frozen model; PromptSRC's are of features that were averaged as they come."""
    if method != "promptsrc":
        return weak.embed_names(anchors.names, anchors.templates)
    blocks = []
    for start in range(0, len(anchors.names), config.text_batch_size):
        names = [name.replace("_", " ") for name in anchors.names[start : start + config.text_batch_size]]
        total = 0.0
        for template in anchors.templates:
            inputs = weak.tokenize([template.replace("{}", name) for name in names])
            with torch.no_grad():
                total = total + weak.model.get_text_features(**inputs).pooler_output.float()
        blocks.append(normalize(total, dim=-1))
    return torch.cat(blocks)


def _moves_images(tuned: DualEncoder) -> bool:
    """Whether what is learnt changes image embeddings."""
    layer = prompt_layer(tuned.model)
    if layer is not None:
        return layer.moves_images
    return learns(tuned.model, text=False)


def _note(tuned: DualEncoder, num_images: int, dataset: Dataset, settings: dict) -> None:
    """Where the prompts come from, into the adapter's configuration."""
    adapter = tuned.model.peft_config["default"]
    if hasattr(adapter, "provenance"):
        adapter.provenance = {
            "base_model": {"name": tuned.name_or_path, "revision": tuned.revision},
            "num_images": num_images,
            "dataset_fingerprint": dataset._fingerprint,
            "split": None if dataset.split is None else str(dataset.split),
            "settings": settings,
        }


def _class_names(
    dataset: Dataset, columns: Mapping, given: Sequence[str] | None, teacher: Teacher | None
) -> tuple[str, ...]:
    label_column = columns["label_column"]
    if teacher is None and label_column is None:
        others = ", ".join(name for name in dataset.column_names if name != columns["image_column"])
        how = f"pass label_column=, one of {others}" if others else "of folders, one per class and at least two"
        raise ValueError(f"tuning needs labels: {how}.")
    names = task_names(given, teacher, dataset, columns)
    if names is None:
        where = "the teacher" if label_column is None else f"column {label_column!r}"
        raise ValueError(f"{where} does not name its classes: pass class_names in label order.")
    return names


def _fitting(teacher: Teacher | None, weak: DualEncoder | None, names: Sequence[str]) -> str | Mapping:
    """An adapter of the kind that the teacher's tuning was: of words or of pictures."""
    teacher = teacher[0] if isinstance(teacher, (list, tuple)) and teacher else teacher
    tuned = None if teacher is None else as_classifier(teacher, names)
    if tuned is None:  # stored logits do not say what was tuned
        return "lora"
    layer = prompt_layer(tuned.encoder.model)
    if layer is not None and layer.active_name is not None:
        learnt = adapter_settings(layer.active_config)
        return {key: value for key, value in learnt.items() if not key.endswith("depth")}  # of the weak towers
    if tuned.adapter_config is not None:
        words = tuned.adapter_config.own_class_vectors
    else:
        words = weak is not None and same_image_tower(weak, tuned.encoder)
    return "coop" if words else "lora"


def _with_adapter(weak: DualEncoder, names: Sequence[str], adapter: Mapping, config: TuningConfig) -> DualEncoder:
    """A copy of the model with a fresh adapter, the only part of it that trains."""
    model = copy.deepcopy(weak.model).eval().requires_grad_(False)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # LoRA draws its start from the global generator
            inject(model, _peft_config(weak, names, adapter, config.seed))
    except ValueError:
        raise
    except Exception as error:  # whatever PEFT and torch run into with these options
        raise ValueError(f"the options of {adapter['method']} make no adapter of this model: {error}") from error
    return DualEncoder(model, weak.processor, weak.name_or_path, weak.revision)


def adapter_settings(adapter: str | Mapping | PeftConfig) -> dict:
    """An adapter of [`tune`] as its `method` and the options of its PEFT configuration that somebody chose.

    Raises:
        TypeError: none of the kinds that [`tune`] takes.
        ValueError: an unknown method, or an option that it does not have.
    """
    if isinstance(adapter, PeftConfig):
        adapter = {"method": str(adapter.peft_type.value).lower(), **_chosen(adapter)}
    elif isinstance(adapter, str):
        adapter = {"method": adapter}
    elif not isinstance(adapter, Mapping):
        raise TypeError(f"an adapter is a method, a mapping or a PeftConfig, not a {type(adapter).__name__}.")
    method = str(adapter.get("method", "lora")).lower()
    kind = _kind(method)
    own = [item.name for item in _options(kind)]
    for name in adapter:
        if name in TuningConfig.__dataclass_fields__ and name not in own:
            raise ValueError(f"{name} is how to train, not what: pass config=TuningConfig({name}=...).")
        if name not in ("method", *own):
            near = did_you_mean(str(name), [*own, *TuningConfig.__dataclass_fields__])
            raise ValueError(f"neither {kind.__name__} nor TuningConfig has an option {name!r}; {near}")
    for item in _options(kind):
        if item.name in adapter and item.type in ("int", "float", int, float):
            check_number(item.name, adapter[item.name], float)
    found = {**_usual(kind), **adapter, "method": method}
    found = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in found.items()}
    if found.get("init_phrase") is not None:
        found.pop("init_token_ids", None)  # they are of a tokenizer
    try:
        json.dumps(found)
    except TypeError as error:
        raise ValueError(f"options of an adapter are saved as JSON, which this one is not: {error}.") from error
    return {"method": found.pop("method"), **found}


def _usual(kind: type[PeftConfig]) -> dict:
    """Options that differ from PEFT's own where nobody chose them."""
    if issubclass(kind, PromptConfig):
        return {"init_phrase": "a photo of a"}
    return {"r": 8, "lora_alpha": 16} if kind is LoraConfig else {}


def _chosen(config: PeftConfig) -> dict:
    """The options of a configuration that are not as by default, or would not be that."""
    options = {}
    for item in _options(type(config)):
        value = getattr(config, item.name)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if value != default or item.name in _usual(type(config)):
            options[item.name] = value
    return options


def _kind(method: str) -> type[PeftConfig]:
    """PEFT configuration of a method."""
    kind = CoOpConfig if method == "prograd" else PEFT_TYPE_TO_CONFIG_MAPPING.get(method.upper())
    if kind is None or issubclass(kind, (PromptLearningConfig, TransMiterConfig)):
        known = ", ".join(METHODS)
        raise ValueError(f"method must be one of {known}, or another of PEFT that changes layers, got {method!r}.")
    return kind


def _options(kind: type[PeftConfig]) -> list[Field]:
    """The fields that are a method's own, and up to the user."""
    filled_in = {item.name for item in fields(PeftConfig)} | {"base", "provenance", "class_names"}
    filled_in |= {"period_id", "end_id", "seed"}
    return [item for item in fields(kind) if item.init and item.name not in filled_in]


def _peft_config(weak: DualEncoder, names: Sequence[str], adapter: Mapping, seed: int) -> PeftConfig:
    kind, options = _kind(adapter["method"]), {key: value for key, value in adapter.items() if key != "method"}
    own = {item.name for item in _options(kind)}
    if not issubclass(kind, PromptConfig):
        everywhere = {"target_modules": VISION_LINEARS} if "target_modules" in own else {}
        return kind(**{**everywhere, **options}, revision=weak.revision)
    options = {**options, "class_names": list(names), "seed": seed}
    depths = {"text_depth": weak.model.text_model, "vision_depth": weak.model.vision_model, "depth": None}
    for name, tower in depths.items():
        if name in own:
            towers = [weak.model.text_model, weak.model.vision_model] if tower is None else [tower]
            options.setdefault(name, min(DEPTH, *(len(layers(tower)) for tower in towers)))
    if options["init_phrase"] is not None and "init_token_ids" not in options:
        options["init_token_ids"] = phrase_token_ids(weak.processor.tokenizer, options["init_phrase"])
    return kind(**options, revision=weak.revision)
