"""What a model in training, and the frozen model it started from, say about drawn training images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..data.images import stored_pictures
from ..encoders.dual_encoder import DualEncoder
from ..encoders.families import image_inputs
from ..settings import TuningConfig
from ..tuners.prompts import class_inputs, class_vectors, image_conditioned, image_conditioned_logits, prompt_layer
from .augmentation import augment
from .draws import per_example
from .objectives import Answers


# Pixels of the training images stay in memory up to this many bytes; more are read and scaled again batch by batch.
PIXEL_MEMORY = 2 * 2**30
_BATCH = 64

Images = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""Rows (B,) to unit image embeddings (B, d) of the model in training and of the frozen one."""


class Pixels:
    """Normalised pixels (3, S, S) of the examples by row."""

    def __init__(self, encoder: DualEncoder, examples: Dataset, column: str):
        self.encoder, self.column = encoder, column
        self.examples = stored_pictures(examples, column)
        self.kept = None
        if 4 * 3 * encoder.image_size**2 * len(examples) <= PIXEL_MEMORY:
            self.kept = torch.cat([self._read(rows) for rows in torch.arange(len(examples)).split(256)])

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._read(rows) if self.kept is None else self.kept[rows]

    def _read(self, rows: Tensor) -> Tensor:
        return self.encoder.preprocess(self.examples[row][self.column] for row in rows.tolist())


def frozen_images(weak: DualEncoder, embeds: Tensor, pixels: Callable[[], Pixels], config: TuningConfig) -> Images:
    """Image embeddings where the image tower stays as it is: each image once (`embeds` (N, d), on the model's device),
    K views of it once, or views anew. `pixels` is called only where pixels are needed."""
    if config.augment == "none":
        return lambda rows, generator: (embeds[rows.to(embeds.device)],) * 2
    source = pixels()

    def embed(rows: Tensor, generator: torch.Generator) -> Tensor:
        return weak.embed_pixels(augment(source[rows], generator, config.augment))

    if not config.views:
        return lambda rows, generator: (embed(rows, generator),) * 2
    generator = torch.Generator().manual_seed(config.seed)
    rows = torch.arange(len(source)).repeat(config.views)
    views = torch.cat([embed(part, generator) for part in rows.split(_BATCH)]).unflatten(0, (config.views, -1))

    def draw(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = per_example(
            generator, len(rows), lambda count: torch.randint(config.views, (count,), generator=generator)
        )
        return (views[drawn.to(views.device), rows.to(views.device)],) * 2

    return draw


def trained_images(
    weak: DualEncoder, tuned: DualEncoder, embeds: Tensor, pixels: Callable[[], Pixels], config: TuningConfig
) -> Images:
    """Image embeddings where the image tower is tuned: of augmented pixels, through the tower in every step.

    The frozen model sees the images as they are, but for PromptSRC's pull, which compares embeddings of one picture.
    """
    source = pixels()

    def embed(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch = augment(source[rows], generator, config.augment)
        inputs = image_inputs(tuned.model, batch.to(tuned.device, tuned.dtype))
        images = normalize(tuned.model.get_image_features(**inputs).pooler_output.float(), dim=-1)
        if config.pull == "promptsrc" and config.keep_near and config.augment != "none":
            return images, weak.embed_pixels(batch)
        return images, embeds[rows.to(embeds.device)]

    return embed


def learns(model: nn.Module, *, text: bool) -> bool:
    """Whether something that trains is on the text side of a dual encoder, or else on its image side."""
    return any(p.requires_grad and name.startswith("text_") == text for name, p in model.named_parameters())


def forward_pass(
    tuned: DualEncoder,
    names: tuple[str, ...],
    templates: tuple[str, ...],
    zero_shot: Tensor,
    images: Images,
    config: TuningConfig,
) -> Callable[[Tensor, torch.Generator], tuple[Answers, Answers]]:
    """Drawn rows (B,) and a generator to the answers of the model in training and of the frozen one.

    Class vectors follow the prompt learner on the model, or the text tower in training over all the templates; where
    there is neither they are the zero-shot ones (C, d).

    Raises:
        ValueError: a name too long for the text tower beside the context.
    """
    model, layer, inputs = tuned.model, prompt_layer(tuned.model), None
    if layer is not None:
        context = len(layer.slot_ids(layer.active_config))
        inputs = class_inputs(names, tuned.processor.tokenizer, tuned.family, tuned.context_length, context)
        inputs = {key: value.to(tuned.device) for key, value in inputs.items()}
    elif learns(model, text=True):
        inputs = tuned.tokenize([t.replace("{}", name.replace("_", " ")) for t in templates for name in names])
    scale, conditioned = tuned.logit_scale, image_conditioned(model)

    def answers(rows: Tensor, generator: torch.Generator) -> tuple[Answers, Answers]:
        with torch.autocast(tuned.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            x, frozen = images(rows, generator)
            vectors = None
            if conditioned is not None:
                z = image_conditioned_logits(model, conditioned, x, inputs, config.text_batch_size)
            else:
                vectors = zero_shot if inputs is None else class_vectors(model, inputs, config.text_batch_size)
            if layer is None and inputs is not None:
                vectors = normalize(vectors.unflatten(0, (len(templates), -1)).mean(0), dim=-1)
        if vectors is not None:  # outside autocast, which would round the logits
            z = scale * x @ vectors.T
        return Answers(z.float(), vectors, x), Answers(scale * frozen @ zero_shot.T, zero_shot, frozen)

    return answers
