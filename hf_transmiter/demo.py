"""[`run_demo`]: the whole chain on the embedded sandbox, offline: tune a weak CLIP, upgrade a strong one, compare."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import ClassLabel
from huggingface_hub.utils import tqdm
from peft import PeftModel
from transformers import CLIPModel

from . import figures, methods, report, sandbox
from .anchors import Anchors
from .backbone import DualEncoder
from .bridge import Bridge
from .catalog import teacher_facts
from .classifier import AnchorClassifier
from .comparison import Comparison, compare
from .evaluation import evaluate
from .extraction import ExtractionConfig, extract
from .features import embed_dataset
from .fingerprint import ModelId
from .hub import model_location
from .moments import image_moment
from .prompt_tuning import TuningConfig, tune
from .scores import THIS, Score, aggregate, markdown_table, write_scores
from .splits import base_novel, few_shot
from .transferring import transfer
from .transfers import SCORES


logger = logging.getLogger(__name__)

METHODS = {"print": "lora", "night": "lora", "neon": "lora", "jargon": "coop"}
"""How the weak model is tuned: the image tower where pictures changed, a prompt where words are unknown."""
DOMAINS = ("print", "jargon")
SANDBOX_TUNING = {
    **{"optimizer": "adamw", "schedule": "cosine", "warmup": 0.05, "lr": 1e-2, "weight_decay": 1e-3},
    **{"epochs": 20, "batch_size": 64, "keep_near": 0.1},
}
"""Its models are tiny; what TuningConfig does of itself is published for CLIPs of usual size."""
NUM_ANCHORS = 320  # enough for the sandbox's few hundred phrases


@dataclass
class Task:
    """One sandbox task, ready to be compared."""

    domain: str
    weak: DualEncoder
    strong: DualEncoder
    anchors: Anchors
    text_anchors: Anchors

    @classmethod
    def load(cls, domain: str, strong: str = "strong") -> Task:
        names = sandbox.load_dataset(domain, "test").features["label"].names
        vocabulary = sandbox.vocabulary()
        return cls(
            domain,
            DualEncoder.from_pretrained("sandbox:weak"),
            DualEncoder.from_pretrained(f"sandbox:{strong}"),
            Anchors.build(names, vocabulary=vocabulary, num_anchors=min(NUM_ANCHORS, len(vocabulary))),
            Anchors((), tuple(vocabulary)),
        )

    def images(self, split: str):
        return sandbox.load_dataset(self.domain, split)

    def compare(
        self,
        seed: int,
        method: str,
        *,
        ceiling: bool = True,
        novel: bool = False,
        rows: Sequence = tuple(methods.METHODS),
        progress: bool = True,
        cache_dir: str | os.PathLike | None = None,
    ) -> tuple[Comparison, AnchorClassifier]:
        """Tunes the weak model with 16 shots per class drawn by `seed`, then scores every way to upgrade.

        Args:
            method (`str`): `"lora"` or `"coop"`.
            ceiling (`bool`, *optional*, defaults to `True`): also tune the strong model on the same labels.
            novel (`bool`, *optional*, defaults to `False`):
                Tune on the first half of the classes and use unlabelled images of those only.
            rows (`Sequence`, *optional*): what `compare` takes as `variants`.

        Returns:
            The comparison and the tuned weak model.
        """
        config = TuningConfig(method=method, seed=seed, **SANDBOX_TUNING)
        options = {"progress": progress, "cache_dir": cache_dir}
        train, unlabelled = self.images("train"), self.images("unlabelled")
        names, seen = train.features["label"].names, None
        shots = few_shot(train["label"], config.shots, seed)
        if novel:
            base, _ = base_novel(names)
            seen = [names[i] for i in base]
            train, unlabelled = (_first_classes(images, seen) for images in (train, unlabelled))
            shots = few_shot(train["label"], config.shots, seed)
        tuned = [tune(model, train, config=config, **options) for model in self.models[: 1 + ceiling]]
        tuned = [AnchorClassifier(t.encoder, Anchors(tuple(names), (), t.anchors.templates)) for t in tuned]
        left_out = () if ceiling else ("tuned strong",)
        found = compare(
            self.weak,
            self.strong,
            tuned[0],
            self.images("test"),
            unlabelled=unlabelled,
            labelled=train.select(shots),
            general=sandbox.load_dataset("street", "unlabelled"),
            tuned_strong=tuned[1] if ceiling else None,
            variants=[row for row in rows if row not in left_out],
            seen_classes=seen,
            anchors=self.anchors,
            text_anchors=self.text_anchors,
            gradient=ExtractionConfig(solver="gradient", basis="fixed", seed=seed),
            **options,
        )
        return found, tuned[0]

    @property
    def models(self) -> tuple[DualEncoder, DualEncoder]:
        return self.weak, self.strong


def _first_classes(images, names: Sequence[str]):
    """Only the images of the first classes, whose labels keep their numbers."""
    kept = images.select([row for row, label in enumerate(images["label"]) if label < len(names)])
    return kept.cast_column("label", ClassLabel(names=list(names)))


def run_demo(
    output_dir: str | os.PathLike,
    *,
    domains: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    ceiling: bool = True,
    progress: bool = True,
    overwrite: bool = False,
) -> dict:
    """Tunes, extracts, bridges, transfers and scores on the sandbox, and leaves a report behind.

    Args:
        output_dir (`str` or `os.PathLike`): gets `report.md`, `scores.json`, `figures/`, and per task `adapter/`,
            `bridge.safetensors` and `strong_adapter/`. Written beside it first and moved there when complete.
        domains (`Sequence[str]`, *optional*): sandbox tasks; `DOMAINS` when omitted.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`): draws of the few shots and of the tuning.
        ceiling (`bool`, *optional*, defaults to `True`): also tune the strong model on the same labels.
        progress (`bool`, *optional*, defaults to `True`): show progress bars.
        overwrite (`bool`, *optional*, defaults to `False`): replace an existing output.

    Returns:
        `dict`: `scores` (`list[Score]` over all tasks, `split` names the task), `recommended`, `output_dir`, `table`.

    Raises:
        FileExistsError: `output_dir` is not empty, and `overwrite` is `False` or it holds something else than a demo.
        ValueError: an unknown task.
    """
    domains, target = tuple(domains or DOMAINS), Path(output_dir)
    unknown = [domain for domain in domains if domain not in METHODS]
    if unknown:
        raise ValueError(f"there is no sandbox task {unknown[0]!r}; there are {', '.join(METHODS)}.")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{target} is not empty: choose another folder or pass --overwrite.")
        own = {"report.md", "scores.json", "figures", *METHODS}
        if not (target / "scores.json").is_file() or any(entry.name not in own for entry in target.iterdir()):
            raise FileExistsError(f"{target} holds something else than a demo: choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder, old = (target.with_name(f".{target.name}-{os.getpid()}-{kind}") for kind in ("new", "old"))
    folder.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more threads bring little, and cost much on cores that are shared
    try:
        scores, sections, recommended = [], [], {}
        for domain in domains:
            found = _run_task(domain, tuple(seeds), folder, ceiling, progress)
            scores += found["scores"]
            sections.append(found["section"])
            recommended[domain] = found["recommended"]
        write_scores(folder / "scores.json", scores)
        report.write_report(folder, sections, title="Sandbox demo", intro=_INTRO)
        if target.exists():
            os.replace(target, old)
        os.replace(folder, target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        torch.set_num_threads(threads)
    return {
        "output_dir": str(target),
        "scores": scores,
        "recommended": recommended,
        "table": "\n\n".join(s.title + "\n\n" + markdown_table(s.scores, notes=s.notes) for s in sections),
    }


_INTRO = (
    "A weak CLIP was tuned on a few labelled pictures; every way to carry that over to a stronger CLIP, without "
    "labels, is scored on 1,500 test pictures. Written by `hf-transmiter demo`."
)


def _run_task(domain: str, seeds: tuple[int, ...], folder: Path, ceiling: bool, progress: bool) -> dict:
    task, runs, by_seed = Task.load(domain), [], {}
    for seed in tqdm(seeds, desc=f"{domain}: seeds", disable=not progress or len(seeds) == 1):
        found, teacher = task.compare(seed, METHODS[domain], ceiling=ceiling, progress=progress)
        runs.append([_of_task(score, domain) for score in found.scores])
        for method in found.logits:
            by_seed.setdefault(method, []).append(found.value(method))
        if seed == seeds[0]:
            first, first_teacher = found, teacher
    _save(task, first, first_teacher, folder / domain, progress)
    scores = aggregate(runs)
    drawn = _figures(task, first, first_teacher, by_seed, folder / "figures", progress)
    text = first.advice
    section = report.Section(
        f"Task: {domain} ({METHODS[domain]})", text, scores, drawn, first.notes, "zero-shot strong"
    )
    return {"scores": scores, "section": section, "recommended": first.recommended}


def _of_task(score: Score, domain: str) -> Score:
    return Score(**{**score.__dict__, "split": domain})


def _save(task: Task, found: Comparison, teacher: AnchorClassifier, folder: Path, progress: bool) -> None:
    """Tuned model, adapter, bridge and strong adapter; then PEFT reads the last one and must answer alike."""
    teacher.save_pretrained(folder / "tuned")
    adapter = extract(task.weak, teacher, task.images("unlabelled"), progress=progress)
    adapter.adapter_config.provenance["teacher"] = teacher_facts(str(folder / "tuned"))
    adapter.save_pretrained(folder / "adapter")
    found.bridges["general"].save(folder / "bridge.safetensors")
    upgraded = found.classifiers[found.recommended]
    named = {found.recommended: THIS}
    on = {"dataset": f"sandbox:{task.domain}", "num_images": len(found.labels)}
    rows = [replace(score, method=named.get(score.method, score.method), **on) for score in found.scores]
    write_scores(folder / "strong_adapter" / SCORES, rows)
    upgraded.save_pretrained(folder / "strong_adapter")
    clip = CLIPModel.from_pretrained(model_location(task.strong.name_or_path), dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(clip, folder / "strong_adapter").eval()
    pixels = task.strong.preprocess(task.images("test")[:8]["image"])
    with torch.no_grad():
        difference = reloaded(pixel_values=pixels).logits_per_image - upgraded(pixel_values=pixels).logits_per_image
    if difference.abs().max() > 1e-3:
        raise RuntimeError(f"the saved adapter answers differently after loading, by {difference.abs().max():.2g}.")


def _figures(task: Task, found: Comparison, teacher, by_seed: dict, folder: Path, progress: bool) -> list[Path]:
    def path(name: str) -> Path:
        return folder / f"{task.domain}_{name}.png"

    lines = {name: sum(by_seed[name]) / len(by_seed[name]) for name in ("zero-shot strong", "tuned weak")}
    best, domain = found.recommended, task.domain
    sweeps = (
        ("beta", "published adapter, basis change", beta_sweep, "pull β of the logit bridge", "β (absolute)"),
        ("lambda", "ridge, bridge", lambda_sweep, "penalty λ of the ridge extraction", "λ (mean eigenvalues)"),
        ("images", "refit", image_sweep, "unlabelled images for the refit", "unlabelled task images"),
    )
    made = [figures.bars(by_seed, path("methods"), title=f"{domain}: accuracy on the strong model", reference=lines)]
    for name, series, sweep, title, xlabel in sweeps:
        points = {series: sweep(task, teacher, progress)}
        made.append(figures.curves(points, path(name), title=f"{domain}: {title}", xlabel=xlabel, reference=lines))
    before, after, labels = found.logits["zero-shot strong"], found.logits[best], found.labels
    title = f"{domain}: zero-shot strong to {best}"
    made.append(figures.confusion_change(before, after, labels, found.class_names, path("confusion"), title=title))
    return [figure for figure in made if figure is not None]


def _accuracy(classifier: AnchorClassifier, test, progress: bool) -> float:
    return evaluate(classifier, test, progress=progress)[0].value


def beta_sweep(task: Task, teacher, progress: bool = False) -> list[tuple[float, float]]:
    """Accuracy of the published adapter on the strong model for several β."""
    config = ExtractionConfig(solver="gradient", basis="fixed")
    images, test, options = task.images("unlabelled"), task.images("test"), {"progress": progress}
    adapter = extract(task.weak, teacher, images, anchors=task.anchors, config=config, **options)
    tables = [embed_dataset(model, images, **options) for model in task.models]
    texts = [model.embed_names(task.anchors.names, task.anchors.templates) for model in task.models]
    moment = image_moment(*task.models, tables, texts)
    pair, points = [ModelId.of(model) for model in task.models], []
    for beta in (1e-3, 1.0, 10.0, 100.0, 500.0, 5000.0, 5e5):
        bridge = Bridge.from_moment(moment, *pair, space="logit", beta=beta, anchors=task.anchors)
        upgraded = transfer(adapter, task.strong, bridge=bridge, **options)
        points.append((beta, _accuracy(upgraded, test, progress)))
    return points


def lambda_sweep(task: Task, teacher, progress: bool = False) -> list[tuple[float, float]]:
    """Accuracy of the ridge's class vectors carried by a bridge, for several λ."""
    images, test, points = task.images("unlabelled"), task.images("test"), []
    bridge = Bridge.build(task.weak, task.strong, images, progress=progress)
    names = test.features["label"].names
    for lam in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0):
        config = ExtractionConfig(solver="ridge", lambdas=(lam,))
        adapter = extract(task.weak, teacher, images, class_names=names, config=config, progress=progress)
        points.append(
            (lam, _accuracy(transfer(adapter, task.strong, bridge=bridge, progress=progress), test, progress))
        )
    return points


def image_sweep(task: Task, teacher, progress: bool = False) -> list[tuple[float, float]]:
    """Accuracy of the refit for several numbers of unlabelled images."""
    images, test, points = task.images("unlabelled"), task.images("test"), []
    names = test.features["label"].names
    for count in (36, 144, 576, len(images)):
        some = images.select(range(count))
        adapter = extract(task.weak, teacher, some, class_names=names, progress=progress)
        points.append(
            (float(count), _accuracy(transfer(adapter, task.strong, some, progress=progress), test, progress))
        )
    return points
