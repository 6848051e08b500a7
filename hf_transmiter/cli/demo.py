"""[`run_demo`]: the whole chain on the embedded sandbox, offline: tune a weak CLIP, upgrade a strong one, compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import sandbox
from ..data.anchors import Anchors
from ..data.splits import few_shot
from ..encoders.dual_encoder import DualEncoder
from ..evaluation import figures, methods
from ..evaluation.compare import Comparison, compare
from ..evaluation.methods import STRONG
from ..evaluation.report import Section, draw_ways, write_report
from ..hub.adapter_files import SCORES
from ..hub.scores import THIS, aggregate, markdown_table, write_scores
from ..method.bridge import Bridge
from ..method.classifier import AnchorClassifier
from ..method.extract import extract
from ..method.saved import teacher_facts
from ..method.tune import tune
from ..settings import SHOTS, ExtractionConfig, TuningConfig


METHODS = {"print": "lora", "night": "lora", "neon": "lora", "jargon": "coop"}
"""How the weak model is tuned: the image tower where pictures changed, a prompt where words are unknown."""
DOMAINS = ("print", "jargon")
SANDBOX_TUNING = {
    **{"optimizer": "adamw", "schedule": "cosine", "warmup": 0.05, "lr": 1e-2, "weight_decay": 1e-3},
    **{"epochs": 20, "batch_size": 64, "keep_near": 0.1},
}
"""Its models are tiny; what TuningConfig does of itself is published for CLIPs of usual size."""
GENERAL = ("street", "unlabelled")
NUM_ANCHORS = 320  # enough for the sandbox's few hundred phrases


@dataclass
class Task:
    """One sandbox task, ready to be compared."""

    domain: str
    weak: DualEncoder
    strong: DualEncoder

    @classmethod
    def load(cls, domain: str, strong: str = "strong") -> Task:
        return cls(domain, *map(DualEncoder.from_pretrained, ("sandbox:weak", f"sandbox:{strong}")))

    def images(self, split: str):
        return sandbox.load_dataset(self.domain, split)

    def compare(
        self, seed: int, method: str, rows: Sequence = tuple(methods.METHODS), *, progress: bool = True
    ) -> tuple[Comparison, AnchorClassifier]:
        """Tunes the weak model by `method` (`"lora"`, `"coop"`) with 16 shots per class drawn by `seed`, then scores
        the ways to upgrade; the tuned model comes second."""
        config = TuningConfig(seed=seed, **SANDBOX_TUNING)
        train, test = self.images("train"), self.images("test")
        seen, names = (tuple(images.features["label"].names) for images in (train, test))
        models = (self.weak, self.strong) if "tuned strong" in rows else (self.weak,)
        tuned = [tune(model, train, method, config=config, progress=progress) for model in models]
        if seen != names:
            tuned = [AnchorClassifier(t.encoder, Anchors(names, (), t.anchors.templates)) for t in tuned]
        found = compare(
            self.weak,
            self.strong,
            tuned[0],
            test,
            unlabelled=self.images("unlabelled"),
            labelled=train.select(few_shot(train["label"], SHOTS, seed)),
            general=sandbox.load_dataset(*GENERAL),
            tuned_strong=tuned[1] if len(tuned) > 1 else None,
            variants=rows,
            tuning=SANDBOX_TUNING,
            seen_classes=None if seen == names else seen,
            vocabulary=sandbox.vocabulary(),
            num_anchors=NUM_ANCHORS,
            gradient=ExtractionConfig(solver="gradient", basis="fixed", seed=seed),
            progress=progress,
        )
        return found, tuned[0]


def run_demo(
    folder: str | os.PathLike,
    *,
    domains: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    progress: bool = True,
) -> dict:
    """Tunes, extracts, bridges, transfers and scores on the sandbox, and leaves a report behind.

    Args:
        folder: gets `report.md`, `scores.json`, `figures/`, and per task `tuned/`, `adapter/`, `bridge.safetensors`
            and `strong_adapter/`.
        domains: sandbox tasks; `DOMAINS` when omitted.
        seeds: draws of the few shots and of the tuning.

    Returns:
        `dict`: `scores` (`list[Score]` over all tasks, `split` names the task), `recommended` (by task), `table`, and
        `verdict`: per task what to take, and by how much it beats the strong model as it is.

    Raises:
        ValueError: an unknown task.
    """
    domains, folder = tuple(domains or DOMAINS), Path(folder)
    unknown = [domain for domain in domains if domain not in METHODS]
    if unknown:
        raise ValueError(f"there is no sandbox task {unknown[0]!r}; there are {', '.join(METHODS)}.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more threads bring little, and cost much on cores that are shared
    try:
        found = [_run_task(domain, seeds, folder, progress) for domain in domains]
    finally:
        torch.set_num_threads(threads)
    sections, said = zip(*found, strict=True)
    scores = [score for one in said for score in one["scores"]]
    write_scores(folder / "scores.json", scores)
    write_report(folder, sections, title="Sandbox demo", intro=_INTRO)
    recommended = {domain: one["recommended"] for domain, one in zip(domains, said, strict=True)}
    texts = {part: "\n\n".join(one[part] for one in said) for part in ("table", "verdict")}
    return {"scores": scores, "recommended": recommended, **texts}


_INTRO = (
    "A weak CLIP was tuned on a few labelled pictures; every way to carry that over to a stronger CLIP, without "
    "labels, is scored on 1,500 test pictures. Written by `hf-transmiter demo`."
)


def _run_task(domain: str, seeds: Sequence[int], folder: Path, progress: bool) -> tuple[Section, dict]:
    """A section of the report, and what [`run_demo`] returns of this task. All but the scores is of the first seed."""
    task = Task.load(domain)
    runs = [task.compare(seed, METHODS[domain], progress=progress) for seed in seeds]
    found, teacher = runs[0]
    _save(task, found, teacher, folder / domain, progress)
    by_seed = {method: [run.value(method) for run, _ in runs] for method in found.rows}
    scores = aggregate([[replace(score, split=domain) for score in run.scores] for run, _ in runs])
    drawn = _figures(domain, found, by_seed, folder / "figures")
    title = f"Task: {domain} ({METHODS[domain]})"
    table, verdict = markdown_table(scores, notes=found.notes), found.advice
    section = Section(title, f"{verdict}\n\n{markdown_table(scores, baseline=STRONG, notes=found.notes)}", drawn)
    said = {"table": f"{title}\n\n{table}", "verdict": f"{title}. {verdict}", "recommended": found.recommended}
    return section, {"scores": scores, **said}


def _save(task: Task, found: Comparison, teacher: AnchorClassifier, folder: Path, progress: bool) -> None:
    """Tuned model, adapter, bridge and strong adapter."""
    teacher.save_pretrained(folder / "tuned")
    adapter = extract(task.weak, teacher, task.images("unlabelled"), progress=progress)
    adapter.adapter_config.provenance["teacher"] = teacher_facts(str(folder / "tuned"))
    adapter.save_pretrained(folder / "adapter")
    bridge = Bridge.build(task.weak, task.strong, sandbox.load_dataset(*GENERAL), progress=progress)
    bridge.save(folder / "bridge.safetensors")
    upgraded = found.rows[found.recommended].classifier
    if upgraded is None:  # the strong model is as good as it is
        return
    named = {found.recommended: THIS}
    on = {"dataset": f"sandbox:{task.domain}", "num_images": len(found.labels)}
    rows = [replace(score, method=named.get(score.method, score.method), **on) for score in found.scores]
    write_scores(folder / "strong_adapter" / SCORES, rows)
    upgraded.save_pretrained(folder / "strong_adapter")


def _figures(domain: str, found: Comparison, by_seed: dict[str, list[float]], folder: Path) -> list[Path | None]:
    lines = {name: sum(by_seed[name]) / len(by_seed[name]) for name in (STRONG, "tuned weak")}
    title, path = f"{domain}: every way to upgrade", folder / f"{domain}_methods.png"
    bars = figures.bars(by_seed, path, title=title, reference=lines)
    before, after = (found.rows[row].logits for row in (STRONG, found.recommended))
    title, path = f"{domain}: {STRONG} to {found.recommended}", folder / f"{domain}_confusion.png"
    ways = draw_ways(folder / f"{domain}_ways.png", found, title=f"{domain}: which way to upgrade")
    return [bars, ways, figures.confusion_change(before, after, found.labels, found.class_names, path, title=title)]
