"""[`tune`]: labelled images to a tuned weak model, by a prompt learner or by LoRA in the image tower.

What comes out is an ordinary model with an ordinary adapter in it: ``tune(...).save_pretrained(folder)`` writes
``adapter_config.json`` and ``adapter_model.safetensors``, and ``PeftModel.from_pretrained(model, folder)`` reads them.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, fields

import torch
from datasets import ClassLabel, Dataset
from peft import LoraConfig, PeftConfig
from torch import Tensor
from torch.nn.functional import normalize

from ..data.anchors import DEFAULT_TEMPLATES, PROMPTED, TEMPLATES, Anchors
from ..data.embeddings import embed_dataset
from ..data.images import guess_columns
from ..data.splits import few_shot
from ..encoders.dual_encoder import DualEncoder
from ..hub.adapter_files import TeacherFacts
from ..settings import TuningConfig
from ..training.batches import Pixels, forward_pass, frozen_images, trained_images
from ..training.loop import fit, gaussian_epoch_weights, project_gradient
from ..training.objectives import losses
from ..tuners import CoCoOpConfig, ContCoOpConfig, CoOpConfig, IVLPConfig, KgCoOpConfig, MaPLeConfig, PromptSRCConfig
from ..tuners.injection import inject
from ..tuners.prompts import layers, phrase_token_ids, prompt_layer
from .classifier import AnchorClassifier


logger = logging.getLogger(__name__)

CONFIGS = {
    "coop": CoOpConfig,
    "kgcoop": KgCoOpConfig,
    "prograd": CoOpConfig,
    "cocoop": CoCoOpConfig,
    "contcoop": ContCoOpConfig,
    "ivlp": IVLPConfig,
    "maple": MaPLeConfig,
    "promptsrc": PromptSRCConfig,
}
"""PEFT configuration of each prompt learner; ProGrad is a way to train CoOp's."""
DEPTH = 9  # published, of prompts in several layers


def tune(
    weak: DualEncoder,
    dataset: Dataset,
    class_names: Sequence[str] | None = None,
    config: TuningConfig | None = None,
    *,
    templates: Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    accelerator=None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> AnchorClassifier:
    """Few-shot tuning of a copy of the weak model.

    Minimises ``CE(z, y) + keep_near · pull`` with ``z = s · x wᵀ`` (B, C): x (B, d) are unit image rows and w (C, d)
    unit class vectors, learnt or as they were, by method. The pull goes back to the weak model's zero-shot answers
    (see [`TuningConfig`]); `prograd` follows the gradient of CE where it does not oppose that of the pull.

    Args:
        weak ([`DualEncoder`]): stays untouched.
        dataset (`datasets.Dataset`): one split with an image and a label column.
        class_names (`Sequence[str]`, *optional*): C names in label order; those of the label column when omitted.
        config ([`TuningConfig`], *optional*): settings.
        templates (`Sequence[str]`, *optional*):
            Prompts of the zero-shot class vectors; `"a photo of a {}."` when omitted, or PromptSRC's 60.
        image_column, label_column (`str`, *optional*): guessed when omitted.
        accelerator (`accelerate.Accelerator`, *optional*): for several processes.
        checkpoint (`str` or `os.PathLike`, *optional*): see [`fit`].
        progress (`bool`, *optional*, defaults to `True`): show bars.
        cache_dir (`str` or `os.PathLike`, *optional*): of the image embeddings, see [`embed_dataset`].

    Returns:
        [`AnchorClassifier`]: the tuned model (`.encoder`, its PEFT adapter named "default") and the names it was tuned
        on, with the templates its class vectors are made with: `templates` after LoRA, ``"{}."`` after a prompt
        learner, whose context takes the place of the template.

    Raises:
        ValueError: no or unusable labels, a class without images, duplicate names, a name too long for the context,
            an unknown option of the adapter, or a weak model that has adapters already.

    ```python
    >>> weak = DualEncoder.from_pretrained("openai/clip-vit-base-patch32")
    >>> tuned = tune(weak, load_dataset("mteb/dtd", split="train"), config=TuningConfig(method="contcoop"))
    >>> tuned.save_pretrained("dtd-contcoop")
    ```
    """
    config = config or TuningConfig()
    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset must be one split of a datasets.Dataset, not a {type(dataset).__name__}.")
    columns = guess_columns(dataset, image_column, label_column)
    templates = starting_templates(config.method) if templates is None else templates
    anchors = Anchors(tuple(_class_names(dataset, columns[1], class_names)), (), tuple(templates))
    rows, labels = _few_shot(dataset, columns[1], anchors.task, config)
    examples, labels = dataset.select(rows), labels.to(weak.device)
    embedding = {"accelerator": accelerator, "progress": progress, "cache_dir": cache_dir}
    try:
        table = embed_dataset(weak, examples, image_column=columns[0], label_column=columns[1], **embedding)
    except ValueError as error:
        raise ValueError(f"{error} (Rows are counted among the {len(rows)} drawn examples.)") from error
    embeds, zero_shot = table.embeds.to(weak.device), _zero_shot(weak, anchors, config)
    tuned = _with_adapter(weak, anchors.task, config)
    pixels = functools.partial(Pixels, tuned, examples, columns[0])
    if _moves_images(tuned, config):
        images = trained_images(weak, tuned, embeds, pixels, config)
    else:
        images = frozen_images(weak, embeds, pixels, config)
    answers = forward_pass(tuned, anchors.task, zero_shot, images, config)
    projects = config.method == "prograd"

    def step(drawn: Tensor, generator: torch.Generator) -> Tensor | tuple[Tensor, Tensor]:
        main, pull = losses(*answers(drawn, generator), labels[drawn.to(weak.device)], config.pull)
        return (main, pull) if projects else main + config.keep_near * pull

    found = fit(
        list(tuned.model.parameters()),
        step,
        len(rows),
        config,
        combine=functools.partial(project_gradient, strength=config.keep_near) if projects else None,
        epoch_weights=_epoch_weights(config),
        accelerator=accelerator,
        checkpoint=checkpoint,
        description=f"Tuning ({config.method})",
        progress=progress,
    )
    hits = ((embeds @ zero_shot.T).argmax(1) == labels).float().mean()
    logger.info(
        "tuned %s on %d images of %d classes; zero-shot accuracy on them %.1f %%, losses %s",
        weak.name_or_path, len(rows), len(anchors.task), 100 * hits, found,
    )  # fmt: skip
    _note(tuned, len(rows), dataset, config)
    tuned.model.requires_grad_(False)
    templates = anchors.templates if config.method == "lora" else PROMPTED
    classifier = AnchorClassifier(tuned, Anchors(anchors.task, (), templates))
    classifier.facts = TeacherFacts(
        weak=weak.name_or_path,
        revision=weak.revision,
        fingerprint=weak.fingerprint,
        class_names=list(anchors.task),
        templates=list(templates),
        zero_shot_templates=list(anchors.templates),
        settings=asdict(config),
    )
    return classifier


def starting_templates(method: str, usual: Sequence[str] = DEFAULT_TEMPLATES) -> tuple[str, ...]:
    """Prompts of the zero-shot class vectors a method is pulled back to, where nobody chose others: PromptSRC's 60, or
    the usual ones of the pictures."""
    return TEMPLATES["promptsrc"] if method == "promptsrc" else tuple(usual)


def _zero_shot(weak: DualEncoder, anchors: Anchors, config: TuningConfig) -> Tensor:
    """(C, d) unit class vectors of the frozen model; PromptSRC's are of features that were averaged as they come."""
    if config.method != "promptsrc":
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


def _moves_images(tuned: DualEncoder, config: TuningConfig) -> bool:
    """Whether what is learnt changes image embeddings."""
    layer = prompt_layer(tuned.model)
    return config.method == "lora" or layer.vision_prompt(layer.active_name, 0) is not None


def _epoch_weights(config: TuningConfig) -> list[float] | None:
    if config.gaussian_mean is None:
        return None
    return gaussian_epoch_weights(config.epochs, config.gaussian_mean, config.gaussian_std)


def _note(tuned: DualEncoder, num_images: int, dataset: Dataset, config: TuningConfig) -> None:
    """Where the prompts come from, into the adapter's configuration."""
    adapter = tuned.model.peft_config["default"]
    if hasattr(adapter, "provenance"):
        settings = {
            key: value for key, value in asdict(config).items() if key not in ("target_modules", "rank", "alpha")
        }
        adapter.provenance = {
            "base_model": {"name": tuned.name_or_path, "revision": tuned.revision},
            "num_images": num_images,
            "dataset_fingerprint": dataset._fingerprint,
            "split": None if dataset.split is None else str(dataset.split),
            "settings": {**settings, "adapter": list(config.adapter)},
        }


def _class_names(dataset: Dataset, label_column: str | None, given: Sequence[str] | None) -> list[str]:
    if label_column is None:
        raise ValueError(f"tuning needs labels; pass label_column=, one of {', '.join(dataset.column_names)}.")
    feature = dataset.features[label_column]
    if given is not None:
        return list(given)
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"column {label_column!r} does not name its classes: pass class_names in label order.")
    return list(feature.names)


def _few_shot(dataset: Dataset, label_column: str, names: Sequence[str], config: TuningConfig):
    """Rows of the drawn examples, and their labels (N,)."""
    values = dataset[label_column][:]  # at once: one by one takes a minute for a million
    odd = next((value for value in values if not isinstance(value, int)), None)
    if odd is not None:
        raise ValueError(
            f"column {label_column!r} holds {odd!r}, not class indices: encode it with "
            f"dataset.class_encode_column({label_column!r}), or pass another label_column=."
        )
    rows = few_shot(values, config.shots, config.seed, len(names), allow_fewer=True)
    labels = torch.tensor([values[row] for row in rows], dtype=torch.long)
    counts = labels.bincount(minlength=len(names)).tolist()
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        raise ValueError(f"{len(empty)} of {len(names)} classes have no image, first {empty[0]!r}: leave them out.")
    if min(counts) < config.shots:
        logger.warning("%d classes have fewer than %d images.", sum(n < config.shots for n in counts), config.shots)
    return rows, labels


def _with_adapter(weak: DualEncoder, names: Sequence[str], config: TuningConfig) -> DualEncoder:
    """A copy of the weak model with a fresh adapter, the only part of it that trains."""
    if getattr(weak.model, "peft_config", None):
        raise ValueError("the weak model has adapters already: merge or unload them before tuning.")
    adapter = _adapter_config(weak, names, config)
    model = copy.deepcopy(weak.model).eval().requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # LoRA draws its start from the global generator
        inject(model, adapter)
    return DualEncoder(model, weak.processor, weak.name_or_path, weak.revision)


def _adapter_config(weak: DualEncoder, names: Sequence[str], config: TuningConfig) -> PeftConfig:
    if config.method == "lora":
        return LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=config.target_modules, revision=weak.revision
        )
    kind = CONFIGS[config.method]
    own = {item.name for item in fields(kind)} - {item.name for item in fields(PeftConfig)}
    unknown = sorted(set(config.adapter_options) - own)
    if unknown:
        raise ValueError(f"{kind.__name__} has no option {unknown[0]!r}; it has {', '.join(sorted(own))}.")
    options = {"init_phrase": config.init_phrase, "seed": config.seed, "class_names": list(names)}
    if config.n_ctx is not None:
        options["n_ctx"] = config.n_ctx
    depths = {"text_depth": weak.model.text_model, "vision_depth": weak.model.vision_model, "depth": None}
    for name, tower in depths.items():
        if name in own:
            towers = [weak.model.text_model, weak.model.vision_model] if tower is None else [tower]
            options[name] = min(DEPTH, *(len(layers(tower)) for tower in towers))
    options |= config.adapter_options
    if options["init_phrase"] is not None and "init_token_ids" not in options:
        options["init_token_ids"] = phrase_token_ids(weak.processor.tokenizer, options["init_phrase"])
    return kind(**options, revision=weak.revision)
