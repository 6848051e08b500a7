"""Pre-train the sandbox's CLIP models from nothing, on pictures drawn as training goes.

    python tests/making/pretrain.py --output-dir sandbox_models

Processes with one thread each: `strong`, then `independent` (the widths of weak-upgraded, and nothing in common with
weak) in one; `weak`, then `weak-upgraded` (whose text tower starts from the weak one's) in another; `deep` and
`deep-upgraded` (six text layers, image towers of one shape) in the last. The recipe, for budgets of about 10^5
pictures:

* Each step pairs 96 pictures (studio and street, with colour jitter and flips) with phrases for every single
  attribute value and captions of 64 of the pictures. Captions may leave attributes out, so several fit one picture:
  the loss is cross-entropy against all of them, ``-sum_j p_ij log softmax_j(z_ij)`` with ``p_i`` uniform over the
  captions that are true of picture i (Khosla et al., 2020, arXiv 2004.11362, the form outside the logarithm); so no
  true pair ever counts as a negative.
* Patch and position embeddings get larger initial values than transformers' 0.02, which this budget cannot outgrow.
* Muon on the matrices of the layers, AdamW on the rest, warm-up over 5 %, linear decay over the last half.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import TEMPLATES, TRADE_NAMES, Description, held_out_classes, phrase
from huggingface_hub.utils import tqdm
from muon import Muon
from sandbox_tokenizer import CONTEXT_LENGTH, PIXEL_MEAN, PIXEL_STD, build_processor, build_tokenizer
from torch import Generator, Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from hf_transmiter.sandbox import words
from hf_transmiter.sandbox.world import IMAGE_SIZE, render


BATCH_SIZE = 96
CAPTIONED = 64
PATCH_SIZE = 8
HEAD_WIDTH = 32


@dataclass(frozen=True)
class Recipe:
    """How one model is built and trained.

    Attributes:
        vision_width, vision_layers, text_width (`int`): the towers; the projection is as wide as the text.
        steps (`int`): optimiser steps of 96 pictures.
        street (`float`): share of street pictures, the others are studio pictures.
        jitter (`float`): strength of the brightness and tint jitter.
        lr, muon_lr (`float`): peak learning rates of AdamW and Muon.
        seed (`int`): seeds the initialisation, the pictures and the captions.
        text_from (`str`, *optional*): the model whose text tower and projection this one starts from.
        text_lr_scale (`float`): factor on the learning rates of the text tower; low where it was already trained.
        text_layers (`int`): depth of the text tower.
    """

    vision_width: int
    vision_layers: int
    text_width: int
    steps: int
    street: float
    jitter: float
    lr: float
    muon_lr: float
    seed: int
    text_from: str | None = None
    text_lr_scale: float = 1.0
    text_layers: int = 2


RECIPES = {
    "weak": Recipe(64, 3, 64, steps=600, street=0.4, jitter=0.2, lr=4e-3, muon_lr=8e-3, seed=0),
    "strong": Recipe(160, 5, 96, steps=1000, street=0.5, jitter=0.3, lr=3e-3, muon_lr=6e-3, seed=1),
    "weak-upgraded": Recipe(
        128, 4, 64, steps=800, street=0.5, jitter=0.3, lr=3e-3, muon_lr=6e-3, seed=2, text_from="weak",
        text_lr_scale=0.1,
    ),
    "independent": Recipe(128, 4, 64, steps=800, street=0.5, jitter=0.3, lr=3e-3, muon_lr=6e-3, seed=3),
    "deep": Recipe(64, 3, 64, steps=600, street=0.4, jitter=0.2, lr=3e-3, muon_lr=6e-3, seed=4, text_layers=6),
    "deep-upgraded": Recipe(
        64, 3, 64, steps=1200, street=0.5, jitter=0.3, lr=3e-3, muon_lr=6e-3, seed=5, text_from="deep",
        text_lr_scale=0.1, text_layers=6,
    ),
}  # fmt: skip
LANES = (("strong", "independent"), ("weak", "weak-upgraded"), ("deep", "deep-upgraded"))


# ---- the model -----------------------------------------------------------------------------------------------------


def build_model(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A freshly initialised `CLIPModel` of the recipe's shape; torch's global seed decides the values."""
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": recipe.text_width,
            "intermediate_size": 4 * recipe.text_width,
            "num_hidden_layers": recipe.text_layers,
            "num_attention_heads": recipe.text_width // HEAD_WIDTH,
            "max_position_embeddings": CONTEXT_LENGTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": recipe.vision_width,
            "intermediate_size": 4 * recipe.vision_width,
            "num_hidden_layers": recipe.vision_layers,
            "num_attention_heads": recipe.vision_width // HEAD_WIDTH,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        projection_dim=recipe.text_width,
        logit_scale_init_value=math.log(10.0),
    )
    model = CLIPModel(config)
    embeddings = model.vision_model.embeddings
    with torch.no_grad():
        embeddings.patch_embedding.weight.normal_(std=(3 * PATCH_SIZE**2) ** -0.5)
        embeddings.position_embedding.weight[1:] = 0.7 * _sine_positions(IMAGE_SIZE // PATCH_SIZE, recipe.vision_width)
    return model


def _sine_positions(side: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    frequencies = math.pi / side * 4.0 ** torch.linspace(0, 1, width // 4 + 1)[:-1]
    waves = [wave(axis.reshape(-1, 1) * frequencies) for axis in (x, y) for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, 1)


def _copy_text_tower(source: Path, model: CLIPModel) -> None:
    start = CLIPModel.from_pretrained(source)
    model.text_model.load_state_dict(start.text_model.state_dict())
    model.text_projection.load_state_dict(start.text_projection.state_dict())
    with torch.no_grad():
        model.logit_scale.copy_(start.logit_scale)


def build_optimizers(model: CLIPModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW and Muon: Muon for the matrices of the layers, AdamW for everything else."""
    muon, adamw = [], []
    for tower, scale in (("text_", recipe.text_lr_scale), ("", 1.0)):
        named = [(n, p) for n, p in model.named_parameters() if n.startswith("text_") == bool(tower)]
        matrices = [p for n, p in named if p.ndim == 2 and ".layers." in n]
        others = [p for n, p in named if not (p.ndim == 2 and ".layers." in n)]
        muon.append({"params": matrices, "lr": recipe.muon_lr * scale})
        adamw.append({"params": [p for p in others if p.ndim > 1], "lr": recipe.lr * scale, "weight_decay": 0.05})
        adamw.append({"params": [p for p in others if p.ndim <= 1], "lr": recipe.lr * scale, "weight_decay": 0.0})
    return [torch.optim.AdamW(adamw, betas=(0.9, 0.98)), Muon(muon, lr=recipe.muon_lr)]


# ---- pictures and texts --------------------------------------------------------------------------------------------


def batches(recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: normalised pixels (96, 3, 32, 32) and classes (96, 3): texture, colour, shape."""
    generator = Generator().manual_seed(recipe.seed)
    held_out = held_out_classes()
    shown = torch.tensor([c for c in words.CLASSES if c not in held_out])
    streets = round(recipe.street * BATCH_SIZE)
    while True:
        classes = shown[torch.randint(len(shown), (BATCH_SIZE,), generator=generator)]
        order = torch.randperm(BATCH_SIZE, generator=generator)
        drawn = [render(classes[:streets], "street", generator), render(classes[streets:], "studio", generator)]
        yield normalise(_jitter(torch.cat(drawn), recipe.jitter, generator))[order], classes[order]


def normalise(pixels: Tensor) -> Tensor:
    """Pixels within 0 to 1 as the image processor hands them to the models."""
    return (pixels - PIXEL_MEAN) / PIXEL_STD


def _jitter(pixels: Tensor, strength: float, generator: Generator) -> Tensor:
    def noise(*shape: int) -> Tensor:
        return strength * (2 * torch.rand(len(pixels), *shape, generator=generator) - 1)

    flipped = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    pixels = torch.where(flipped, pixels.flip(-1), pixels) / 255
    return (pixels * (1 + noise(1, 1, 1)) + 0.25 * noise(3, 1, 1)).clamp(0, 1)


def attribute_groups() -> list[list[Description]]:
    """One group per attribute, in the order of `Description`: every value of it and nothing else."""
    sizes = (len(words.TEXTURES), len(words.COLOURS), len(words.SHAPES))
    fields = Description._fields
    return [[Description(**{name: i}) for i in range(n)] for name, n in zip(fields, sizes, strict=True)]


def draw_captions(classes: Tensor, rng: random.Random) -> list[Description]:
    """Distinct descriptions of the pictures: 85 % name the full class, the others leave one attribute out."""
    captions = {}
    for said in itertools.starmap(Description, classes.tolist()):
        if rng.random() < 0.15:
            said = said._replace(**{rng.choice(said._fields): None})
        captions[said] = None
    return list(captions)


def write(said: Description, rng: random.Random) -> str:
    """A sentence for `said`, at times with a trade name that means nothing, most often in the texture's place."""
    named = rng.random() < (0.5 if said.texture is None and said.colour is not None else 0.15)
    return rng.choice(TEMPLATES).format(phrase(said, rng.choice(TRADE_NAMES) if named else ""))


def matches(classes: Tensor, captions: Sequence[Description]) -> Tensor:
    """Which captions are true of which pictures: bool of shape (pictures, captions)."""
    said = torch.tensor([[-1 if value is None else value for value in caption] for caption in captions])
    return ((classes[:, None] == said) | (said < 0)).all(-1)


# ---- training ------------------------------------------------------------------------------------------------------


def contrastive_loss(
    model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, classes: Tensor, rng: random.Random
) -> tuple[Tensor, float]:
    """The loss of one batch, and the share of pictures whose best caption is a true one."""
    groups = attribute_groups()
    captions = draw_captions(classes[:CAPTIONED], rng)
    texts = [write(said, rng) for group in [*groups, captions] for said in group]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    # The calls users will make: pooled outputs are already projected, but not normalised.
    text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    logits = image @ text.T * model.logit_scale.exp()
    *parts, caption_logits = logits.split([len(group) for group in [*groups, captions]], dim=1)
    loss = sum(F.cross_entropy(z, value) for z, value in zip(parts, classes.unbind(1), strict=True)) / 3
    true = matches(classes, captions)
    described = true.any(1)
    loss = loss + _soft_cross_entropy(caption_logits[described], true[described])
    loss = loss + 0.5 * _soft_cross_entropy(caption_logits.T, true.T)
    hit = true.gather(1, caption_logits.argmax(1, keepdim=True))[described]
    return loss, hit.float().mean().item()


def _soft_cross_entropy(logits: Tensor, true: Tensor) -> Tensor:
    return F.cross_entropy(logits, true / true.sum(1, keepdim=True))


def train(name: str, recipe: Recipe, output_dir: Path, position: int = 0) -> None:
    """Train one model and save it to `output_dir / name` in one move.

    Args:
        name (`str`): what to call it.
        recipe (`Recipe`): how to build and train it; it uses one thread.
        output_dir (`Path`): also where the model is looked for whose text tower this one starts from.
        position (`int`, *optional*, defaults to 0): line of the progress bar.

    Raises:
        FileNotFoundError: if the model starts from another one that is not in `output_dir`.
    """
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    if recipe.text_from is not None:
        source = output_dir / recipe.text_from
        if not source.is_dir():
            raise FileNotFoundError(
                f"{name!r} starts from the text tower of {recipe.text_from!r}, and there is no {source}. "
                f"Train both: --models {recipe.text_from} {name}."
            )
        _copy_text_tower(source, model)
    optimizers = build_optimizers(model, recipe)

    def warm_up_and_decay(step: int) -> float:
        return min(1, (step + 1) / (0.05 * recipe.steps), 2 - 2 * step / recipe.steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_decay) for optimizer in optimizers]
    data = batches(recipe)
    smoothed = 0.0
    with tqdm(total=recipe.steps, desc=name, unit="step", position=position, mininterval=5) as bar:
        for _ in range(recipe.steps):
            loss, accuracy = contrastive_loss(model, tokenizer, *next(data), rng)
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in [*optimizers, *schedules]:
                stepper.step()
            smoothed += 0.05 * (accuracy - smoothed)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.2f}", accuracy=f"{smoothed:.2f}", refresh=False)
    save(model, output_dir / name)


def save(model: CLIPModel, folder: Path) -> None:
    """Write half-precision weights, tokenizer and processor, replacing `folder` in one move."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / folder.name
        # Half precision in the file only: config.json keeps saying float32, and from_pretrained follows it.
        half = {key: value.half() for key, value in model.state_dict().items() if not key.endswith("position_ids")}
        model.save_pretrained(made, state_dict=half)
        build_processor().save_pretrained(made)
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        os.replace(made, folder)


def _train_lane(names: Sequence[str], output_dir: Path, position: int) -> None:
    for name in names:
        train(name, RECIPES[name], output_dir, position)


def pretrain(names: Sequence[str], output_dir: Path, overwrite: bool = False) -> list[str]:
    """Train the models that `output_dir` does not hold yet; returns the names of those trained.

    Args:
        names (`Sequence[str]`): keys of [`RECIPES`].
        output_dir (`Path`): each model goes to a folder of its name in here.
        overwrite (`bool`, *optional*, defaults to `False`): train again what is there already.

    Raises:
        RuntimeError: if a training process failed.
    """
    wanted = [name for name in RECIPES if name in names and (overwrite or not (output_dir / name).exists())]
    lanes = [lane for lane in ([n for n in lane if n in wanted] for lane in LANES) if lane]
    spawn = multiprocessing.get_context("spawn")
    jobs = [spawn.Process(target=_train_lane, args=(lane, output_dir, i)) for i, lane in enumerate(lanes)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    failed = [", ".join(lane) for lane, job in zip(lanes, jobs, strict=True) if job.exitcode != 0]
    if failed:
        raise RuntimeError(f"Training failed for: {'; '.join(failed)}. The traceback is above.")
    return wanted


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python tests/making/pretrain.py",
        description="Pre-train the sandbox's tiny CLIP models from nothing.",
        epilog="example: python tests/making/pretrain.py --output-dir sandbox_models --models weak strong",
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="each model goes to a folder of its name here")
    parser.add_argument(
        "--models", nargs="+", choices=list(RECIPES), default=["weak", "strong", "weak-upgraded"], metavar="NAME",
        help=f"which to train, of {', '.join(RECIPES)} (default: the three that are shipped)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="train again what the folder holds already")
    arguments = parser.parse_args()
    trained = pretrain(arguments.models, arguments.output_dir, arguments.overwrite)
    kept = [name for name in arguments.models if name not in trained]
    if kept:
        print(f"Kept what was there: {', '.join(kept)}. --overwrite trains it again.", file=sys.stderr)
    print(*(arguments.output_dir / name for name in trained), sep="\n")


if __name__ == "__main__":
    main()
