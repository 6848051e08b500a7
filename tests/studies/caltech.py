"""Upgrades on real OpenAI CLIP embeddings: RN50 (weak) to ViT-B/32 (strong), Caltech-101, no labels at the transfer.

    python tests/studies/caltech.py --data FOLDER [--seeds 5] [--tables all novel]

FOLDER holds `train_16shot.safetensors` with `rn50_image_embeds` (1600, 1024), `vitb_image_embeds` (1600, 512) and
`labels`: 100 classes, 16 images each. There are no text embeddings of RN50, so images stand in for them. Per class and
seed: 1 image is the task anchor ("zero-shot" vector), 3 are auxiliary anchors (K = 400), 4 labelled, 5 unlabelled and
3 test. Tables:

- all: 100 classes, every way to upgrade; and 50 classes with a bridge that only saw the other 50 (zero task images);
- novel: tuned on the first 50 classes by a low-rank change of all class vectors (so that the others are partly
  forgotten), unlabelled images of base classes only; base, novel, harmonic mean, and the joint space of all 100.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from hf_transmiter.data.splits import few_shot
from hf_transmiter.data.table import FeatureTable
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.evaluation.baselines import emulated_fine_tuning, linear_head, logit_ensemble
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.extract import gradient
from hf_transmiter.method.moments import CrossMoment, image_pairs, sum_pairs
from hf_transmiter.method.refit import refit
from hf_transmiter.method.transfer import interpolate
from hf_transmiter.settings import ExtractionConfig, FitConfig
from hf_transmiter.tuners.transmiter.layer import refine


SPLIT = {"task": 1, "auxiliary": 3, "labelled": 4, "unlabelled": 5, "test": 3}
SCALE = 100.0  # exp(logit_scale) of both models


class Recorded:
    """The part of a `DualEncoder` that the solvers read, for embeddings without a model."""

    logit_scale, logit_bias, device = torch.tensor(SCALE), 0.0, torch.device("cpu")

    def __init__(self, embeds: Tensor):
        self.x = normalize(embeds.float(), dim=-1)
        self.embed_dim = self.x.shape[1]

    def logits(self, x: Tensor, a: Tensor) -> Tensor:
        return SCALE * x @ a.T


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).float().mean())


def tune_class_vectors(x: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    return linear_head(x, labels, start, SCALE, FitConfig(epochs=75, lr=1e-3, weight_decay=0.0), progress=False)


def tune_shared(x: Tensor, labels: Tensor, start: Tensor, rank: int = 16, steps: int = 300) -> Tensor:
    """All class vectors moved by one low-rank map learnt on the first classes: the others are changed along."""
    d, classes = start.shape[1], int(labels.max()) + 1
    down = (torch.randn(d, rank, generator=torch.Generator().manual_seed(0)) * d**-0.5).requires_grad_()
    up, shift = torch.zeros(rank, d, requires_grad=True), torch.zeros(d, requires_grad=True)
    optimizer = torch.optim.AdamW([down, up, shift], lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        vectors = normalize(start + start @ down @ up + shift, dim=-1)
        loss = cross_entropy(SCALE * x @ vectors[:classes].T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return vectors.detach()


class Run:
    """One seed: the split, and the steps of the library on recorded embeddings."""

    def __init__(self, data: dict[str, Tensor], seed: int):
        self.labels = data["labels"].long()
        self.weak, self.strong = Recorded(data["rn50_image_embeds"]), Recorded(data["vitb_image_embeds"])
        each = sum(SPLIT.values())
        drawn = torch.tensor(few_shot(self.labels, each, seed)).view(-1, each)
        parts = drawn.split(list(SPLIT.values()), dim=1)
        self.rows = {name: rows.flatten() for name, rows in zip(SPLIT, parts, strict=True)}
        order = self.rows["task"][self.labels[self.rows["task"]].argsort()]
        self.text = {model: model.x[order] for model in (self.weak, self.strong)}
        self.seed = seed

    def of(self, part: str, low: int = 0, high: int = 100) -> Tensor:
        rows = self.rows[part]
        return rows[(self.labels[rows] >= low) & (self.labels[rows] < high)]

    def bridge(self, rows: Tensor, anchors: tuple[Tensor, Tensor] | None = None, beta: float = 500.0) -> Bridge:
        if anchors is None:
            moment = CrossMoment.zeros(self.strong.embed_dim, self.weak.embed_dim)
            moment.update(self.strong.x[rows], self.weak.x[rows])
        else:
            tables = [FeatureTable(model.x[rows]) for model in (self.weak, self.strong)]
            moment, _ = sum_pairs(image_pairs(self.weak, self.strong, tables, anchors), *map(len, anchors[::-1]))
        nobody = ModelId(None, None, "")
        return Bridge.from_moment(moment, nobody, nobody, space="embedding" if anchors is None else "logit", beta=beta)

    def carry(self, bridge: Bridge, tuned: Tensor, anchors=None) -> dict[str, Tensor]:
        c = len(tuned)
        return bridge.carry_class_vectors(tuned, self.text[self.weak][:c], self.text[self.strong][:c], anchors)

    def refit(self, rows: Tensor, vectors: Tensor, tuned: Tensor, test: Tensor, text: bool = True) -> Tensor:
        """Logits on the test images of the refit that [`transfer`] makes of carried class vectors, to what the models
        say of images; `text`: with its text side."""
        x, c = self.strong.x[rows], len(tuned)
        labels = SCALE * x @ (self.text[self.strong][:c] + vectors[:c]).T
        labels = labels + SCALE * self.weak.x[rows] @ (2 * tuned - self.text[self.weak][:c]).T
        own = {"zero_shot": self.text[self.strong][:c], "text": text}
        side, head, _ = refit(FeatureTable(x), labels, vectors[:c], SCALE, **own)
        if head is None:
            return SCALE * side(test) @ vectors.T
        return SCALE * torch.cat([side(test), test], 1) @ head[0].T + head[1]

    def published(self, tuned_logits: Tensor, rows: Tensor, test: Tensor, classes: int) -> dict[str, Tensor]:
        """Gradient extraction, then the basis change; logits on the weak and the strong test embeddings."""
        texts = [torch.cat([self.text[m][:classes], m.x[self.rows["auxiliary"]]]) for m in (self.weak, self.strong)]
        config = ExtractionConfig(solver="gradient", seed=self.seed)
        found, _ = gradient(FeatureTable(self.weak.x[rows]), tuned_logits, texts[0], self.weak, config, progress=False)
        k = len(texts[0])
        norm, up, down = torch.nn.LayerNorm(k), torch.nn.Linear(k, 4 * k), torch.nn.Linear(4 * k, k)
        for name, module in (("norm", norm), ("up", up), ("down", down)):
            module.load_state_dict({key: found[f"{name}.{key}"] for key in ("weight", "bias")})
        out = {}
        with torch.no_grad():
            z = self.weak.logits(self.weak.x[test], texts[0])
            out["weak"] = refine(z, found["basis"], norm, up, down)[:, :classes]
            z = self.strong.logits(self.strong.x[test], texts[1])
            for name, beta in (("beta 500", 500.0), ("beta 0.1 N", 0.1 * len(rows))):
                basis = self.bridge(rows, texts, beta).carry_basis(found["basis"])
                out[name] = refine(z, basis, norm, up, down)[:, :classes]
        return out


def table_all(run: Run, out: dict) -> None:
    """Every way to upgrade, 100 classes."""
    weak, strong = run.weak, run.strong
    test, unlabelled, labelled = run.of("test"), run.of("unlabelled"), run.of("labelled")
    y, x, xw = run.labels[test], strong.x[test], weak.x[test]

    def add(name: str, logits: Tensor, since: float | None = None) -> None:
        out[name].append(accuracy(logits, y))
        if since is not None:
            out[f"{name} [s]"].append(time.perf_counter() - since)

    zero_weak, zero_strong = weak.logits(xw, run.text[weak]), strong.logits(x, run.text[strong])
    tuned = tune_class_vectors(weak.x[labelled], run.labels[labelled], run.text[weak])
    teacher, teacher_test = weak.logits(weak.x[unlabelled], tuned), weak.logits(xw, tuned)
    add("zero-shot weak", zero_weak)
    add("zero-shot strong", zero_strong)
    add("tuned weak", teacher_test)
    ceiling = tune_class_vectors(strong.x[labelled], run.labels[labelled], run.text[strong])
    add("tuned strong (ceiling, labels)", strong.logits(x, ceiling))
    add("EFT", emulated_fine_tuning(zero_strong, teacher_test, zero_weak))
    add("logit ensemble", logit_ensemble(zero_strong, teacher_test))
    since = time.perf_counter()
    head = linear_head(strong.x[unlabelled], teacher.softmax(1), run.text[strong], SCALE, progress=False)
    add("distilled linear head", strong.logits(x, head), since)
    since = time.perf_counter()
    for name, logits in run.published(teacher, unlabelled, test, 100).items():
        add(f"TransMiter published, {name}", logits, since)
    anchors = [torch.cat([run.text[m], m.x[run.rows["auxiliary"]]]) for m in (weak, strong)]
    since = time.perf_counter()
    carried = run.carry(run.bridge(unlabelled, anchors, 0.1 * len(unlabelled)), tuned, anchors)
    add("class vectors, logit-space bridge (task images)", strong.logits(x, carried["delta"]), since)
    since = time.perf_counter()
    carried = run.carry(run.bridge(unlabelled), tuned)
    vectors = interpolate(carried, run.text[strong], 0.0)
    add("class vectors, embedding bridge (task images)", strong.logits(x, vectors), since)
    since = time.perf_counter()
    add("refit", run.refit(unlabelled, vectors, tuned, x), since)
    table_zero_images(run, out)


def table_zero_images(run: Run, out: dict) -> None:
    """50 classes; the bridge saw only images of the other 50."""
    weak, strong = run.weak, run.strong
    test, labelled = run.of("test", 0, 50), run.of("labelled", 0, 50)
    others = torch.cat([run.of(part, 50) for part in ("auxiliary", "labelled", "unlabelled")])
    y, x, xw = run.labels[test], strong.x[test], weak.x[test]
    text_weak, text_strong = run.text[weak][:50], run.text[strong][:50]
    tuned = tune_class_vectors(weak.x[labelled], run.labels[labelled], text_weak)
    zero, said = strong.logits(x, text_strong), weak.logits(xw, tuned)
    rows = {"zero-shot strong": zero, "tuned weak": said}
    rows["EFT"] = emulated_fine_tuning(zero, said, weak.logits(xw, text_weak))
    for name, images in (("other classes, zero task images", others), ("task images", run.of("unlabelled", 0, 50))):
        carried = run.carry(run.bridge(images), tuned)
        rows[f"class vectors, bridge from {name}"] = strong.logits(x, interpolate(carried, text_strong, 0.0))
    for name, logits in rows.items():
        out[f"50 classes: {name}"].append(accuracy(logits, y))


def table_novel(run: Run, out: dict) -> None:
    """Base-to-novel after a tuning that forgets; the images at hand show base classes only."""
    weak, strong = run.weak, run.strong
    test, images, labelled = run.of("test"), run.of("unlabelled", 0, 50), run.of("labelled", 0, 50)
    y, x, xw = run.labels[test], strong.x[test], weak.x[test]
    base = y < 50

    def add(name: str, logits: Tensor) -> None:
        b = accuracy(logits[base][:, :50], y[base])
        n = accuracy(logits[~base][:, 50:], y[~base] - 50)
        for metric, value in zip(
            ("base", "novel", "HM", "joint"), (b, n, 2 * b * n / (b + n), accuracy(logits, y)), strict=True
        ):
            out[f"{name} | {metric}"].append(value)

    zero_weak, zero = weak.logits(xw, run.text[weak]), strong.logits(x, run.text[strong])
    tuned = tune_shared(weak.x[labelled], run.labels[labelled], run.text[weak])
    teacher, said = weak.logits(weak.x[images], tuned), weak.logits(xw, tuned)
    add("zero-shot strong", zero)
    add("tuned weak", said)
    add(
        "tuned strong (ceiling, labels)",
        strong.logits(x, tune_shared(strong.x[labelled], run.labels[labelled], run.text[strong])),
    )
    add("EFT", emulated_fine_tuning(zero, said, zero_weak))
    add("TransMiter published", run.published(teacher, images, test, 100)["beta 500"])
    carried = run.carry(run.bridge(images), tuned)
    for weight in (0.0, 0.2, 1 / 3, 0.5):
        vectors = interpolate(carried, run.text[strong], weight)
        add(f"class vectors, zero-shot weight {weight:.2f}", strong.logits(x, vectors))
        logits = run.refit(images, vectors, tuned[:50], x, text=False)
        add(f"class vectors, zero-shot weight {weight:.2f}, image map", logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tables", nargs="+", default=["all", "novel"], choices=["all", "novel"])
    arguments = parser.parse_args()
    data = load_file(arguments.data / "train_16shot.safetensors")
    for name in arguments.tables:
        out: dict[str, list[float]] = defaultdict(list)
        for seed in range(arguments.seeds):
            {"all": table_all, "novel": table_novel}[name](Run(data, seed), out)
        print(f"\n{name} ({arguments.seeds} seeds: mean, std)")
        for row, values in out.items():
            values = torch.tensor(values)
            print(f"{row:70s} {values.mean():6.2f} {values.std():5.2f}")


if __name__ == "__main__":
    main()
