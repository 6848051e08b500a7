"""What the refit of `transfer` is worth: its parts and cures one by one, few images, pools that lack classes, costs.

    python tests/studies/refits.py [--tables main ablations pools text linear labels] [--tasks neon:lora ...]
    python tests/studies/refits.py --data FOLDER [--seeds 3 4 5]

The sandbox without `--data`: 1,500 unlabelled and 1,500 test pictures of 36 classes, the weak model tuned with 16
shots anew for each seed. With it OpenAI's RN50 to ViT-B/32 on real embeddings, from `caltech101_clip_features` and
`clip_text_embeddings` in that folder: the classes whose names have real text embeddings, and all 100 with an image of
each in the place of its text; class vectors tuned on 3 labelled images per class, 9 unlabelled, 4 (3) test. The
settings were chosen on seeds 0 and 1 of the first and 0 to 2 of the second. Mean ± deviation over seeds.

Pools: `quarter` has images of every fourth part of the classes only, `tail` class frequencies that fall to a fiftieth.
"""

import argparse
import contextlib
import json
import logging
import re
import statistics
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from hf_transmiter import sandbox
from hf_transmiter.cli.demo import SANDBOX_TUNING, Task
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.splits import few_shot
from hf_transmiter.data.table import FeatureTable
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.evaluation.baselines import linear_head
from hf_transmiter.evaluation.reliability import expected_calibration_error
from hf_transmiter.method import experts
from hf_transmiter.method import refit as refitting
from hf_transmiter.method import transfer as transferring
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.extract import extract
from hf_transmiter.method.label_tune import label_tune
from hf_transmiter.method.moments import sum_pairs
from hf_transmiter.method.refit import fewest_images, refit
from hf_transmiter.method.teacher import teacher_logits
from hf_transmiter.method.transfer import interpolate, transfer
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import FitConfig, TransferConfig, TuningConfig
from hf_transmiter.tuners import TransMiterConfig


PAIRS = ("neon:lora", "night:lora", "print:lora", "neon:coop", "night:coop", "print:coop", "jargon:coop")
COUNTS = (10, 50, 100, 200, 400)


class Table:
    """Mean ± standard deviation over seeds, rows by columns, printed as markdown."""

    def __init__(self, title: str):
        self.title, self.cells = title, defaultdict(lambda: defaultdict(list))

    def add(self, row: str, column: str, value: float) -> None:
        self.cells[row][column].append(value)

    def __str__(self) -> str:
        columns = list(dict.fromkeys(column for row in self.cells.values() for column in row))
        lines = [f"| {self.title} | {' | '.join(columns)} |", "|:---" + "|---:" * len(columns) + "|"]
        for row, values in self.cells.items():
            cells = (_cell(values[column]) if column in values else "" for column in columns)
            lines.append(f"| {row} | {' | '.join(cells)} |")
        return "\n".join(lines)


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).double().mean())


def pools(labels: torch.Tensor, seed: int, least: float = 0.02) -> dict[str, torch.Tensor]:
    """Rows by name of the pool."""
    generator = torch.Generator().manual_seed(100 + seed)
    classes, order = int(labels.max()) + 1, torch.randperm(len(labels), generator=generator)
    kept = torch.rand(len(labels), generator=generator) < least ** (labels / (classes - 1))
    found = {str(count): order[:count].sort().values for count in COUNTS if count < len(labels)}
    found |= {"all": torch.arange(len(labels)), "quarter": (labels < classes // 4).nonzero()[:, 0]}
    return found | {"tail": kept.nonzero()[:, 0]}


def from_identity(*arguments, start, **options):
    """[`refit`], whatever start it is given."""
    return refit(*arguments, **options)


ABLATIONS = {
    "as it is": [],
    "labels not made even": [(experts, "class_pull", lambda logits: torch.zeros(logits.shape[1]))],
    "one step in place of three": [(refitting, "ROUNDS", 1)],
    "from the identity, not the carried map": [(transferring, "refit", from_identity)],
    "one step from the identity": [(transferring, "refit", from_identity), (refitting, "ROUNDS", 1)],
    "ridge penalty 0.3 in place of 1": [(refitting, "PENALTY", 0.3)],
    "ridge penalty 3 in place of 1": [(refitting, "PENALTY", 3.0)],
    "embeddings alone, no tower features": [
        (transferring, "embed_dataset", lambda *a, tower, **k: embed_dataset(*a, **k))
    ],
    "no carried class vectors in the labels": [(TransMiterConfig, "own_class_vectors", False)],
}


class Sandbox:
    """One task and seed."""

    def __init__(self, pair: str, seed: int, cache: dict):
        domain, method = pair.split(":")
        self.seed = seed
        self.task, self.cache, self.pair = Task.load(domain), {"progress": False, **cache}, pair
        self.images, self.test = self.task.images("unlabelled"), self.task.images("test")
        config = TuningConfig(seed=seed, **SANDBOX_TUNING)
        self.tuned = tune(self.task.weak, self.task.images("train"), method, config=config, progress=False)
        self.names, self.labels = self.tuned.class_names, torch.tensor(self.test["label"])
        since = time.perf_counter()
        self.adapter = extract(self.task.weak, self.tuned, self.images, **self.cache)
        self.seconds = time.perf_counter() - since

    def said(self, classifier, names=None) -> torch.Tensor:
        return teacher_logits(classifier, self.test, names or self.names, **self.cache)

    def zero_shot(self, model) -> torch.Tensor:
        table = embed_dataset(model, self.test, **self.cache)
        return model.logits(table.embeds, model.embed_names(self.names))

    def moved(self, images=None, **options):
        return transfer(self.adapter, self.task.strong, images, **options, **self.cache)


def table_main(run: Sandbox, tables: dict) -> None:
    def add(row: str, logits: torch.Tensor, seconds: float | None = None) -> None:
        tables["accuracy, %"].add(row, run.pair, accuracy(logits, run.labels))
        tables["ECE, %"].add(row, run.pair, expected_calibration_error(logits, run.labels))
        if seconds is not None:
            tables["seconds"].add(row, run.pair, seconds)

    weak, strong, tuned = run.zero_shot(run.task.weak), run.zero_shot(run.task.strong), run.said(run.tuned)
    add("zero-shot strong", strong)
    add("tuned weak", tuned)
    add("EFT †", strong + tuned - weak)
    for name, config in {
        "**refit**": TransferConfig(),
        "image map (`parts: image`)": TransferConfig(parts="image"),
        "text side (`parts: text`)": TransferConfig(parts="text"),
    }.items():
        since = time.perf_counter()
        moved = run.moved(run.images, config=config)
        add(name, run.said(moved), time.perf_counter() - since)


def table_text(run: Sandbox, tables: dict) -> None:
    """No image of the task for the strong model: over a bridge from names."""
    names = {"its models' own names": Anchors((), tuple(sandbox.vocabulary())), "1,024 common nouns": None}
    for name, anchors in names.items():
        bridge = Bridge.build(
            run.task.weak, run.task.strong, anchors=anchors, names=run.adapter.adapter_config.anchors
        )
        moved = run.moved(bridge=bridge)
        tables["bridge from text, accuracy, %"].add(name, run.pair, accuracy(run.said(moved), run.labels))


def table_ablations(run: Sandbox, tables: dict) -> None:
    for name, patches in ABLATIONS.items():
        with contextlib.ExitStack() as stack:
            for owner, attribute, value in patches:
                stack.enter_context(mock.patch.object(owner, attribute, value))
            moved = run.moved(run.images)
            said = run.said(moved)
            alone = run.said(run.moved(run.images, config=TransferConfig(parts="image")))
        tables["accuracy, %"].add(name, run.pair, accuracy(said, run.labels))
        tables["image map alone, accuracy, %"].add(name, run.pair, accuracy(alone, run.labels))
        tables["ECE, %"].add(name, run.pair, expected_calibration_error(said, run.labels))


def table_linear(run: Sandbox, tables: dict) -> None:
    """How much of a change is linear in the embeddings, of stored logits: of the teacher, and of a tuned head."""
    weak, names, images = run.task.weak, run.names, run.images
    x, text = embed_dataset(weak, images, **run.cache).embeds, weak.embed_names(names)
    fit = FitConfig(epochs=10, lr=2e-3, weight_decay=0.0)
    head = linear_head(x, torch.tensor(images["label"]), text, float(weak.logit_scale), fit, progress=False)
    said = {"the teacher": teacher_logits(run.tuned, images, names, **run.cache), "a tuned head": weak.logits(x, head)}
    for name, logits in said.items():
        for count in (100, 1500):
            few = images.select(range(count))
            found = extract(weak, logits[:count].half().float(), few, class_names=names, **run.cache)
            share = found.adapter_config.provenance["linear"]
            tables["linear in x, %"].add(f"{name}, {count} images", run.pair, 100 * share)


def table_labels(run: Sandbox, tables: dict) -> None:
    """A few labelled steps on a refit."""
    train = run.task.images("train")
    drawn = train.select(few_shot(train["label"], 16, run.seed))
    moved = run.moved(run.images)
    for name, found in (("refit", moved), ("label_tune after it", label_tune(moved, drawn, **run.cache))):
        tables["16 labels per class, accuracy, %"].add(name, run.pair, accuracy(run.said(found), run.labels))


def table_pools(run: Sandbox, tables: dict) -> None:
    """Each pool also with the adapter carried over as it is."""
    bridge = Bridge.build(run.task.weak, run.task.strong, names=run.adapter.adapter_config.anchors)
    tables["images"].add("0", run.pair, accuracy(run.said(run.moved(bridge=bridge)), run.labels))
    for name, rows in pools(torch.tensor(run.images["label"]), run.seed).items():
        images = run.images.select(rows.tolist())
        fitted = run.moved(images, teacher=run.tuned)
        tables["images"].add(name, run.pair, accuracy(run.said(fitted), run.labels))
        if name in ("100", "quarter"):
            with mock.patch.object(transferring, "refit", from_identity):
                cold = run.moved(images, teacher=run.tuned)
            row = f"{name}, from the identity"
            tables["images"].add(row, run.pair, accuracy(run.said(cold), run.labels))
        carried = run.moved(images, config=TransferConfig(refit=False))
        tables["images, carried as it is"].add(name, run.pair, accuracy(run.said(carried), run.labels))


class Real:
    """RN50 to ViT-B/32 on one split of the embeddings; `text`: the classes with real text embeddings."""

    def __init__(self, folder: Path, text: bool, seed: int):
        data = load_file(folder / "caltech101_clip_features" / "train_16shot.safetensors")
        names = json.loads((folder / "caltech101_clip_features" / "class_names.json").read_text())
        known = json.loads((folder / "clip_text_embeddings" / "names.json").read_text())
        texts = load_file(folder / "clip_text_embeddings" / "lvis_1203_names.safetensors")
        plain = lambda name: re.sub(r"\(.*\)", "", name.lower().replace("_", " ")).strip()  # noqa: E731
        places = {plain(name): row for row, name in reversed(list(enumerate(known)))}
        chosen = [row for row, name in enumerate(names) if plain(name) in places] if text else range(len(names))
        unit = lambda rows: normalize(rows.float(), dim=1)  # noqa: E731
        self.weak, self.strong = unit(data["rn50_image_embeds"]), unit(data["vitb_image_embeds"])
        self.names = unit(texts["openai_rn50"]), unit(texts["openai_vit_b32"])
        generator, labels = torch.Generator().manual_seed(seed), data["labels"].long()
        drawn = [(labels == kind).nonzero()[:, 0][torch.randperm(16, generator=generator)] for kind in chosen]
        first, labelled, unlabelled, test = torch.stack(drawn).split([0, 3, 9, 4] if text else [1, 3, 9, 3], dim=1)
        rows = [places[plain(names[kind])] for kind in chosen] if text else first.flatten()
        self.text = [own[rows] for own in (self.names if text else (self.weak, self.strong))]
        self.rows = {"labelled": labelled, "unlabelled": unlabelled, "test": test}
        self.labels = {
            name: torch.arange(len(drawn)).repeat_interleave(part.shape[1]) for name, part in self.rows.items()
        }
        self.rows = {name: part.flatten() for name, part in self.rows.items()}
        fit = FitConfig(epochs=75, lr=1e-3, weight_decay=0.0)
        x, y = self.weak[self.rows["labelled"]], self.labels["labelled"]
        self.tuned = linear_head(x, y, self.text[0], 100.0, fit, progress=False)

    def carried(self, rows: torch.Tensor | None) -> torch.Tensor:
        """Class vectors over the bridge that [`transfer`] builds from these images, or from names."""
        size, nobody = (512, 1024), ModelId(None, None, "")
        (texts, held_out), (task, _) = (sum_pairs([own[::-1]], *size) for own in (self.names, self.text))
        known = held_out.centred().alignment((texts - held_out).solve("embedding")[0])
        moment, joined = texts, [(1 / known, task)]
        if rows is not None:
            moment, _ = sum_pairs([(self.strong[rows], self.weak[rows])], *size)
            few = 1024 / len(rows)
            enough = len(rows) >= fewest_images(len(self.text[0]))
            joined = [(0.3, task)] if enough else [(few, task), (few * known, texts)]
        made = Bridge.from_moment(moment, nobody, nobody, space="embedding", joined=joined)
        return interpolate(made.carry_class_vectors(self.tuned, *self.text), self.text[1], 0.0)

    def moved(self, rows: torch.Tensor) -> torch.Tensor:
        """What [`transfer`] makes of unlabelled images, and its logits on the test images."""
        x, test = self.strong[rows], self.strong[self.rows["test"]]
        carried = self.carried(rows)
        if len(rows) < fewest_images(len(carried)):
            return 100 * test @ carried.T
        labels = 100 * (x @ (self.text[1] + carried).T + self.weak[rows] @ (2 * self.tuned - self.text[0]).T)
        side, head, facts = refit(FeatureTable(x), labels, carried, 100.0, zero_shot=self.text[1])
        if not facts["even"]:
            return 100 * test @ carried.T
        if head is None:
            return 100 * side(test) @ carried.T
        return 100 * torch.cat([side(test), test], 1) @ head[0].T + head[1]


def table_real(run: Real, name: str, seed: int, tables: dict) -> None:
    test, labels = run.rows["test"], run.labels["test"]
    weak, strong = (100 * x[test] @ own.T for x, own in zip((run.weak, run.strong), run.text, strict=True))
    tuned = 100 * run.weak[test] @ run.tuned.T
    rows = {"zero-shot strong": strong, "tuned weak": tuned, "EFT †": strong + tuned - weak}
    rows["0 images"] = 100 * run.strong[test] @ run.carried(None).T
    for pool, chosen in pools(run.labels["unlabelled"], seed, 0.05).items():
        images = run.rows["unlabelled"][chosen]
        rows[f"{pool} images"] = run.moved(images)
        rows[f"{pool} images, carried as it is"] = 100 * run.strong[test] @ run.carried(images).T
    for row, logits in rows.items():
        tables["accuracy, %"].add(row, name, accuracy(logits, labels))
        tables["ECE, %"].add(row, name, expected_calibration_error(logits, labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = {"main": table_main, "text": table_text, "ablations": table_ablations, "pools": table_pools}
    named |= {"linear": table_linear, "labels": table_labels}
    parser.add_argument("--tables", nargs="+", choices=named, default=list(named))
    parser.add_argument("--tasks", nargs="+", default=PAIRS, help="TASK:METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--data", type=Path, help="folder with the real embeddings")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if arguments.data is not None:
        tables = {title: Table(title) for title in ("accuracy, %", "ECE, %")}
        for seed in arguments.seeds:
            for text in (True, False):
                table_real(Real(arguments.data, text, seed), "real text" if text else "images for text", seed, tables)
        print(*tables.values(), sep="\n\n")
        return
    found = {name: defaultdict(lambda: None) for name in arguments.tables}
    for pair in arguments.tasks:
        for seed in arguments.seeds:
            run = Sandbox(pair, seed, {})
            for name in arguments.tables:
                tables = _Tables(found[name])
                named[name](run, tables)
    for name, tables in found.items():
        print(f"\n## {name}\n")
        print(*tables.values(), sep="\n\n")


class _Tables(dict):
    """Tables made when first named."""

    def __init__(self, kept: dict):
        self.kept = kept

    def __getitem__(self, title: str) -> Table:
        return self.kept.setdefault(title, Table(title))


if __name__ == "__main__":
    main()
