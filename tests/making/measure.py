"""What the sandbox models score, as a markdown table: zero-shot on every domain, tuned on 16 pictures per class.

    python tests/making/measure.py
    python tests/making/measure.py --models sandbox_models/weak sandbox_models/strong --zero-shot-only

*fine-tuned*: the vision tower and its projection on cross-entropy, class vectors frozen at zero-shot. *class vectors*:
unit class vectors trained on frozen image embeddings, pulled towards zero-shot, as prompt learning amounts to.
"""

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from huggingface_hub.utils import tqdm
from torch import Generator, Tensor
from transformers import CLIPModel, CLIPProcessor

from hf_transmiter.hub.repo import SANDBOX_MODELS
from hf_transmiter.sandbox.data import domains, load_dataset, model_path
from hf_transmiter.sandbox.words import CLASSES


TEMPLATE = "a photo of a {}."
SHOTS = 16
_BATCH_SIZE = 64


def pixel_values(processor: CLIPProcessor, dataset: Dataset) -> Tensor:
    """What the processor makes of all images, float32 of shape `(N, 3, 32, 32)`."""
    return processor(images=list(dataset["image"]), return_tensors="pt")["pixel_values"]


@torch.no_grad()
def class_vectors(model: CLIPModel, processor: CLIPProcessor, names: list[str]) -> Tensor:
    """Unit text embeddings of the class names, shape `(C, d)`."""
    tokens = processor(text=[TEMPLATE.format(name) for name in names], padding=True, return_tensors="pt")
    return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)


def image_embeddings(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit image embeddings of shape `(N, d)`."""
    return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


@torch.no_grad()
def accuracy(model: CLIPModel, vectors: Tensor, pixels: Tensor, labels: Tensor) -> float:
    """Share of the images nearest to their class vector, in percent."""
    nearest = [(image_embeddings(model, part) @ vectors.T).argmax(1) for part in pixels.split(500)]
    return 100 * (torch.cat(nearest) == labels).float().mean().item()


def few_shot(dataset: Dataset, generator: Generator) -> list[int]:
    """Indices of `SHOTS` pictures of each class."""
    labels = torch.tensor(dataset["label"])
    picked = [(labels == c).nonzero()[:, 0] for c in range(dataset.features["label"].num_classes)]
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:SHOTS]] for rows in picked]).tolist()


def fine_tune(
    model: CLIPModel, vectors: Tensor, pixels: Tensor, labels: Tensor, generator: Generator, epochs: int, lr: float
) -> CLIPModel:
    """A copy of the model with its vision tower trained, AdamW and a cosine schedule."""
    model = copy.deepcopy(model)
    trained = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    steps = epochs * math.ceil(len(labels) / _BATCH_SIZE)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(_BATCH_SIZE):
            flipped = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
            images = torch.where(flipped, pixels[rows].flip(-1), pixels[rows])
            logits = image_embeddings(model, images) @ vectors.T * model.logit_scale.exp()
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model


def tune_class_vectors(model: CLIPModel, vectors: Tensor, pixels: Tensor, labels: Tensor, pull: float = 0.5) -> Tensor:
    """Unit class vectors `t` minimising ``CE + pull * mean_c |t_c - zero-shot t_c|^2``, shape `(C, d)`."""
    with torch.no_grad():
        images = image_embeddings(model, pixels) * 2 * model.logit_scale.exp()
    free = vectors.clone().requires_grad_()
    optimizer = torch.optim.AdamW([free], lr=5e-3, weight_decay=0)
    for _ in range(400):
        unit = F.normalize(free, dim=-1)
        loss = F.cross_entropy(images @ unit.T, labels, label_smoothing=0.05)
        loss = loss + pull * (unit - vectors).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.normalize(free.detach(), dim=-1)


def measure(folder: Path, domain: str, tune: bool, seeds: int) -> dict[str, list[float]]:
    """Accuracies in percent of one model on one domain's test split, one value per seed."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    test = load_dataset(domain, "test")
    labels, pixels = torch.tensor(test["label"]), pixel_values(processor, test)
    names = test.features["label"].names
    vectors = class_vectors(model, processor, names)
    scores = {"zero-shot": [accuracy(model, vectors, pixels, labels)]}
    if not tune or len(names) == len(CLASSES):
        return scores
    pool = load_dataset(domain, "train")
    # The larger towers need fewer passes and smaller steps.
    epochs, lr = (25, 5e-4) if model.config.vision_config.hidden_size < 100 else (12, 3e-4)
    for seed in range(seeds):
        generator = Generator().manual_seed(seed)
        shots = pool.select(few_shot(pool, generator))
        seen, truth = pixel_values(processor, shots), torch.tensor(shots["label"])
        tuned = fine_tune(model, vectors, seen, truth, generator, epochs, lr)
        scores.setdefault("fine-tuned", []).append(accuracy(tuned, vectors, pixels, labels))
        learned = tune_class_vectors(model, vectors, seen, truth)
        scores.setdefault("class vectors", []).append(accuracy(model, learned, pixels, labels))
    return scores


def table(scores: Callable[[Path, str], dict[str, list[float]]], folders: list[Path], names: list[str]) -> str:
    """The scores as markdown, one row per model and way of tuning, mean (± standard deviation) over seeds."""
    rows = {}
    for folder in folders:
        for domain in tqdm(names, desc=folder.name, unit="domain"):
            for way, values in scores(folder, domain).items():
                spread = f" ± {torch.tensor(values).std():.1f}" if len(values) > 1 else ""
                cells = rows.setdefault((folder.name, way), dict.fromkeys(names, ""))
                cells[domain] = f"{sum(values) / len(values):.1f}{spread}"
    lines = [f"| model | | {' | '.join(names)} |", "|" + "---|" * (len(names) + 2)]
    lines += [f"| {model} | {way} | {' | '.join(cells.values())} |" for (model, way), cells in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python tests/making/measure.py", description="Accuracies of sandbox models as a markdown table."
    )
    parser.add_argument(
        "--models", type=Path, nargs="+", default=[model_path(name) for name in SANDBOX_MODELS], metavar="DIR"
    )
    parser.add_argument("--domains", nargs="+", choices=list(domains()), default=list(domains()), metavar="NAME")
    parser.add_argument("--zero-shot-only", action="store_true", help="skip tuning")
    parser.add_argument("--seeds", type=int, default=3, help="few-shot draws to tune on (default: 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tune = not arguments.zero_shot_only
    print(table(lambda f, d: measure(f, d, tune, arguments.seeds), arguments.models, arguments.domains))


if __name__ == "__main__":
    main()
