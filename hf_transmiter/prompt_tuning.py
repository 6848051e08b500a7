"""[`tune`]: labelled images to a tuned weak model, by a learnt prompt (CoOp) or by LoRA in the image tower.

What comes out is an ordinary model with an ordinary adapter in it: ``tune(...).model.save_pretrained(folder)`` writes
``adapter_config.json`` and ``adapter_model.safetensors``, and ``PeftModel.from_pretrained(model, folder)`` reads them.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence

import torch
from datasets import ClassLabel, Dataset
from peft import LoraConfig, PeftConfig
from torch import Tensor
from torch.nn.functional import normalize, pad

from .anchors import DEFAULT_TEMPLATES, Anchors
from .backbone import DualEncoder, image_inputs
from .classifier import AnchorClassifier
from .features import embed_dataset, guess_columns
from .settings import TuningConfig
from .splits import few_shot
from .training import fit
from .tuners.prompts import CoOpConfig, phrase_token_ids
from .tuners.prompts.objectives import classification_loss


logger = logging.getLogger(__name__)

PROMPTED = ("{}.",)  # template of class vectors whose context is learnt
# Pixels of the training images stay in memory up to this many bytes; more are read and scaled again batch by batch.
PIXEL_MEMORY = 2 * 2**30

Logits = Callable[[Tensor, torch.Generator], Tensor]


def tune(
    weak: DualEncoder,
    dataset: Dataset,
    class_names: Sequence[str] | None = None,
    config: TuningConfig | None = None,
    *,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    image_column: str | None = None,
    label_column: str | None = None,
    accelerator=None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> AnchorClassifier:
    """Few-shot tuning of a copy of the weak model.

    Minimises ``CE(z, y) + keep_near · KL(softmax(z₀) ‖ softmax(z))`` with ``z = s · x aᵀ`` (B, C), where ``z₀`` is
    zero-shot (of the images before augmentation) and, by method, either ``x`` (B, d), the unit image rows, or ``a``
    (C, d), the unit class vectors, is learnt while the other one stays as it was.

    Args:
        weak ([`DualEncoder`]): stays untouched.
        dataset (`datasets.Dataset`): one split with an image and a label column.
        class_names (`Sequence[str]`, *optional*): C names in label order; those of the label column when omitted.
        config ([`TuningConfig`], *optional*): settings.
        templates (`Sequence[str]`, *optional*): prompts of the zero-shot class vectors.
        image_column, label_column (`str`, *optional*): guessed when omitted.
        accelerator (`accelerate.Accelerator`, *optional*): for several processes.
        checkpoint (`str` or `os.PathLike`, *optional*): see [`fit`].
        progress (`bool`, *optional*, defaults to `True`): show bars.
        cache_dir (`str` or `os.PathLike`, *optional*): of the image embeddings, see [`embed_dataset`].

    Returns:
        [`AnchorClassifier`]: the tuned model (`.encoder`, its PEFT adapter named "default") and the names it was tuned
        on, with the templates its class vectors are made with: `templates` after LoRA, ``"{}."`` after CoOp, whose
        learnt context takes the place of the template.

    Raises:
        ValueError: no or unusable labels, a class without images, duplicate names, a name too long for the context,
            or a weak model that has adapters already.

    ```python
    >>> weak = DualEncoder.from_pretrained("openai/clip-vit-base-patch32")
    >>> tuned = tune(weak, load_dataset("mteb/dtd", split="train"), config=TuningConfig(method="coop"))
    >>> tuned.model.save_pretrained("dtd-coop")
    ```
    """
    config = config or TuningConfig()
    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset must be one split of a datasets.Dataset, not a {type(dataset).__name__}.")
    columns = guess_columns(dataset, image_column, label_column)
    names = _class_names(dataset, columns[1], class_names)
    anchors = Anchors(tuple(names), (), tuple(templates))
    rows, labels = _few_shot(dataset, columns[1], anchors.task, config)
    examples, labels = dataset.select(rows), labels.to(weak.device)
    embedding = {"accelerator": accelerator, "progress": progress, "cache_dir": cache_dir}
    try:
        table = embed_dataset(weak, examples, image_column=columns[0], label_column=columns[1], **embedding)
    except ValueError as error:
        raise ValueError(f"{error} (Rows are counted among the {len(rows)} drawn examples.)") from error
    images, class_vectors = table.embeds.to(weak.device), weak.embed_names(anchors.names, anchors.templates)
    zero_shot = weak.logits(images, class_vectors)
    tuned = _with_adapter(weak, config)
    if config.method == "coop":
        logits = _prompt_logits(tuned, anchors.task, images)
    else:
        logits = _image_logits(tuned, class_vectors, _Pixels(tuned, examples, columns[0]), config.augment)

    def step(drawn: Tensor, generator: torch.Generator) -> Tensor:
        z, drawn = logits(drawn, generator), drawn.to(weak.device)
        return classification_loss(z, labels[drawn], zero_shot[drawn], config.keep_near)

    losses = fit(
        list(tuned.model.parameters()),
        step,
        len(rows),
        config,
        accelerator=accelerator,
        checkpoint=checkpoint,
        description=f"Tuning ({config.method})",
        progress=progress,
    )
    hits = (zero_shot.argmax(1) == labels).float().mean()
    logger.info(
        "tuned %s on %d images of %d classes; zero-shot accuracy on them %.1f %%, losses %s",
        weak.name_or_path, len(rows), len(names), 100 * hits, losses,
    )  # fmt: skip
    tuned.model.requires_grad_(False)
    templates = PROMPTED if config.method == "coop" else anchors.templates
    return AnchorClassifier(tuned, Anchors(anchors.task, (), templates))


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images (B, 3, S, S) mirrored, each one shifted by up to S / 16 pixels; edges are repeated."""
    side = pixels.shape[-1]
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    reach = max(side // 16, 1)
    padded = pad(pixels, (reach,) * 4, mode="replicate")
    corners = torch.randint(2 * reach + 1, (len(pixels), 2), generator=generator).tolist()
    crops = [image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, corners, strict=True)]
    return torch.stack(crops)


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
    values = list(dataset[label_column])
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


def _with_adapter(weak: DualEncoder, config: TuningConfig) -> DualEncoder:
    """A copy of the weak model with a fresh adapter, the only part of it that trains."""
    if getattr(weak.model, "peft_config", None):
        raise ValueError("the weak model has adapters already: merge or unload them before tuning.")
    adapter = _adapter_config(weak, config)
    model = copy.deepcopy(weak.model).eval().requires_grad_(False)
    # transformers' own way to attach an adapter, so that the model saves it without its PeftModel at hand.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # LoRA draws its start from the global generator
        model.add_adapter(adapter)
    return DualEncoder(model, weak.processor, weak.name_or_path, weak.revision)


def _adapter_config(weak: DualEncoder, config: TuningConfig) -> PeftConfig:
    if config.method == "lora":
        return LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=config.target_modules, revision=weak.revision
        )
    phrase = config.init_phrase
    return CoOpConfig(
        n_ctx=config.n_ctx,
        init_phrase=phrase,
        init_token_ids=None if phrase is None else phrase_token_ids(weak.processor.tokenizer, phrase),
        seed=config.seed,
        revision=weak.revision,
    )


def _prompt_logits(tuned: DualEncoder, names: Sequence[str], images: Tensor) -> Logits:
    """Logits of image rows (N, d), made once, against class vectors that follow the context."""
    prompts = [f"{name.replace('_', ' ')}." for name in names]
    room = tuned.context_length - tuned.model.peft_config["default"].n_ctx
    lengths = [len(ids) for ids in tuned.processor.tokenizer(prompts, verbose=False)["input_ids"]]
    longest = max(range(len(names)), key=lengths.__getitem__)
    if lengths[longest] > room:
        raise ValueError(
            f"the prompt {prompts[longest]!r} has {lengths[longest]} tokens, but the context leaves room for {room}: "
            "shorten the name, or use a smaller n_ctx or a shorter init_phrase."
        )
    inputs, _ = tuned._tokenize(prompts)
    scale = tuned.logit_scale

    def logits(rows: Tensor, generator: torch.Generator) -> Tensor:
        class_vectors = normalize(tuned.model.get_text_features(**inputs).pooler_output.float(), dim=-1)
        return scale * images[rows.to(images.device)] @ class_vectors.T

    return logits


def _image_logits(tuned: DualEncoder, class_vectors: Tensor, pixels: _Pixels, augmented: bool) -> Logits:
    """Logits of pictures, embedded anew each time, against frozen class vectors (C, d)."""
    scale = tuned.logit_scale

    def logits(rows: Tensor, generator: torch.Generator) -> Tensor:
        batch = augment(pixels[rows], generator) if augmented else pixels[rows]
        inputs = image_inputs(tuned.model, batch.to(tuned.device, tuned.dtype))
        images = normalize(tuned.model.get_image_features(**inputs).pooler_output.float(), dim=-1)
        return scale * images @ class_vectors.T

    return logits


class _Pixels:
    """Normalised pixels (3, S, S) of the examples by row."""

    def __init__(self, encoder: DualEncoder, examples: Dataset, column: str):
        self.encoder, self.column = encoder, column
        self.examples = examples.with_format(None).select_columns([column])
        self.kept = None
        if 4 * 3 * encoder.image_size**2 * len(examples) <= PIXEL_MEMORY:
            self.kept = torch.cat([self._read(rows) for rows in torch.arange(len(examples)).split(256)])

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._read(rows) if self.kept is None else self.kept[rows]

    def _read(self, rows: Tensor) -> Tensor:
        return self.encoder.preprocess(self.examples[rows.tolist()][self.column])
