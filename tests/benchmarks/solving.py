"""Benchmarks of everything that is solved from embeddings, on synthetic rows: no picture and no text is read.

A planted teacher: unit rows x (N, 512) of C classes under its class vectors, its logits, and rows (N, 768) that a
strong model has of the same images; all on disk, written block by block and mapped, as `embed_dataset` keeps them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from measuring import Row, alone, growth, in_process, launched
from speed import Recorded  # of tests/studies
from torch import Tensor
from torch.nn.functional import normalize

from hf_transmiter import Anchors, Bridge, DualEncoder, ExtractionConfig
from hf_transmiter.data.embeddings import FeatureTable
from hf_transmiter.method import extract as extraction
from hf_transmiter.method import moments, refit


WEAK, STRONG, TOWER, BLOCK = 512, 768, 3 * 768, 8192


def write_rows(folder: Path, count: int, classes: int, strong: int = STRONG) -> str:
    """`weak.npy`, `strong.npy`, `logits.npy` (N, C) and the class vectors, unless they are there; N may be large."""
    place = folder / f"{count}x{classes}x{strong}"
    if place.is_dir():
        return str(place)
    place.mkdir()
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    text = {name: normalize(torch.randn(classes, d, generator=generator)) for name, d in sizes(strong).items()}
    moved = normalize(torch.randn(classes, WEAK, generator=generator))
    tuned = normalize(text["weak"] + 1.5 * moved)
    torch.save({**text, "tuned": tuned}, place / "vectors.pt")
    widths = {"weak": WEAK, "strong": strong, "logits": classes}
    files = {
        name: np.lib.format.open_memmap(place / f"{name}.npy", "w+", np.float32, (count, width))
        for name, width in widths.items()
    }
    for start in range(0, count, BLOCK):
        rows = slice(start, min(start + BLOCK, count))
        labels = torch.from_numpy(random.integers(classes, size=rows.stop - rows.start))

        def seen(vectors: Tensor, labels=labels) -> Tensor:
            noise = torch.from_numpy(random.standard_normal((len(labels), vectors.shape[1]), np.float32))
            return normalize(vectors[labels] + 0.2 * noise)

        x = seen(tuned)
        files["weak"][rows], files["logits"][rows] = x.numpy(), (100 * x @ tuned.T).numpy()
        files["strong"][rows] = seen(text["strong"]).numpy()
    for file in files.values():
        file.flush()
    return str(place)


def sizes(strong: int) -> dict[str, int]:
    return {"weak": WEAK, "strong": strong}


def mapped(settings: dict, name: str) -> Tensor:
    return torch.from_numpy(np.load(Path(settings["rows"], f"{name}.npy"), mmap_mode="c"))[: settings["N"]]


def vectors(settings: dict) -> dict[str, Tensor]:
    return torch.load(Path(settings["rows"], "vectors.pt"))


@contextmanager
def tables_for(*found: tuple[DualEncoder, FeatureTable]):
    """Inside, `embed_dataset` answers with tables that are there, whatever the pictures."""
    known = {id(encoder.model): table for encoder, table in found}
    real = moments.embed_dataset

    def answer(encoder, dataset, **options):
        return known[id(encoder.model)]

    answer.__signature__ = signature(real)
    with patch.object(moments, "embed_dataset", answer):
        yield


def stand_in(width: int, names: Tensor) -> DualEncoder:
    """A model of this width that embeds its first names as these rows (K, d)."""
    import tiny_models  # of tests

    model, processor = tiny_models.build("clip", width=width)
    encoder = DualEncoder(model, processor)
    encoder.embed_names = lambda asked, *rest: names[: len(asked)]
    return encoder


def bridge(settings: dict, space: str, accelerator=None) -> Callable:
    count = settings.get("K", 256)
    generator = torch.Generator().manual_seed(1)
    models = [stand_in(d, normalize(torch.randn(count, d, generator=generator))) for d in (WEAK, STRONG)]
    tables = [FeatureTable(mapped(settings, name)) for name in ("weak", "strong")]
    options = {"anchors": Anchors((), tuple(map(str, range(count))))} if space == "logit" else {}

    def run() -> None:
        with tables_for(*zip(models, tables, strict=True)):
            Bridge.build(*models, object(), space=space, accelerator=accelerator, progress=False, **options)

    return run


def extract(settings: dict, solver: str | None, accelerator=None) -> Callable:
    logits, text = mapped(settings, "logits"), vectors(settings)["weak"]
    table, weak = FeatureTable(mapped(settings, "weak")), Recorded(WEAK)
    config = ExtractionConfig(solver=solver)

    def run() -> None:
        extraction.closed_form(table, logits, text, weak, None, config, accelerator)

    return run


def gradient(settings: dict, accelerator=None) -> Callable:
    """The published adapter over K anchors; one epoch of its ten."""
    logits, text = mapped(settings, "logits"), vectors(settings)["weak"]
    more = torch.randn(settings["K"] - len(text), WEAK, generator=torch.Generator().manual_seed(2))
    anchors = torch.cat([text, normalize(more)])
    table, weak = FeatureTable(mapped(settings, "weak")), Recorded(WEAK)
    weak.fingerprint, config = "", ExtractionConfig(solver="gradient", epochs=1)

    def run() -> None:
        extraction.gradient(table, logits, anchors, weak, config, accelerator, progress=False)

    return run


def refitted(settings: dict, accelerator=None) -> Callable:
    """The refit of `transfer`, to label logits that are on disk, too."""
    logits, text = mapped(settings, "logits"), vectors(settings)["strong"][:, :STRONG]
    table, text = FeatureTable(mapped(settings, "strong")), normalize(text)

    def run() -> None:
        refit.refit(table, logits, text, 100.0, accelerator=accelerator)

    return run


CASES: dict[str, Callable[..., Callable]] = {
    "bridge of embeddings": lambda settings, *more: bridge(settings, "embedding", *more),
    "bridge of logits": lambda settings, *more: bridge(settings, "logit", *more),
    "extract, solver unset": lambda settings, *more: extract(settings, None, *more),
    "extract, ridge": lambda settings, *more: extract(settings, "ridge", *more),
    "extract, discriminant": lambda settings, *more: extract(settings, "discriminant", *more),
    "extract, image map": lambda settings, *more: extract(settings, "image_map", *more),
    "extract, gradient, one epoch": gradient,
    "refit": refitted,
}


def run_case(case: str, settings: dict) -> dict:
    """In this process: the measurement of a case; under `torchrun` of this process's share, which ends with all."""
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return alone(CASES[case](settings), **settings.get("repeats", {}))
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    work = CASES[case](settings, accelerator)

    def run() -> None:
        accelerator.wait_for_everyone()
        work()
        accelerator.wait_for_everyone()

    return alone(run, budget=float("inf"))  # as many repeats in every process


def measured_by(quick: bool) -> Callable[[str, dict], dict]:
    """Each case in a process of its own, whose memory is not that of the case before; here, where it is no matter."""
    return run_case if quick else partial(in_process, run_case)


def solving(quick: bool, scratch: Path) -> Iterator[Row]:
    """Every solver once, at the size of a usual task."""
    count, classes, measure = *((1000, 10) if quick else (10_000, 100)), measured_by(quick)
    settings = {"rows": write_rows(scratch, count, classes), "N": count, "K": 256 if quick else 1024}
    for case in CASES:
        yield Row("solving", case, **measure(case, settings))
    if not quick:
        settings["rows"] = write_rows(scratch, count, classes, TOWER)
        yield Row("solving", f"refit with tower features, {TOWER} wide", **measure("refit", settings))


def images(quick: bool, scratch: Path) -> Iterator[Row]:
    """Over the number of images, up to a million; tables and logits are on disk."""
    counts, classes = ([500, 1000], 10) if quick else ([1000, 10_000, 100_000, 1_000_000], 100)
    settings = {"rows": write_rows(scratch, counts[-1], classes)}
    cases = ["bridge of embeddings", "extract, ridge", "refit", "bridge of logits", "extract, image map"]
    for case in cases[:1] if quick else cases:
        yield from growth("images", case, "N", counts, settings, measured_by(quick))


def classes(quick: bool, scratch: Path) -> Iterator[Row]:
    """Over the number of classes."""
    count, numbers = (1000, [10, 20]) if quick else (10_000, [10, 100, 1000])
    for case in ("extract, ridge", "extract, discriminant", "extract, image map", "refit"):
        for number in numbers:
            settings = {"rows": write_rows(scratch, count, number), "N": count}
            yield from growth("classes", case, "C", [number], settings, measured_by(quick))


def anchors(quick: bool, scratch: Path) -> Iterator[Row]:
    """Over the number of anchors: the published adapter's bridge."""
    count, numbers = (1000, [64, 128]) if quick else (10_000, [256, 1024, 4096])
    settings = {"rows": write_rows(scratch, count, 10 if quick else 100), "N": count}
    yield from growth("anchors", "bridge of logits", "K", numbers, settings, measured_by(quick))


def processes(quick: bool, scratch: Path) -> Iterator[Row]:
    """One process and two, which share the images."""
    count, number = (1000, 10) if quick else (50_000, 100)
    settings = {"rows": write_rows(scratch, count, number), "N": count}
    for case in ("bridge of embeddings",) if quick else ("bridge of embeddings", "extract, image map", "refit"):
        found = {1: measured_by(quick)(case, settings), 2: launched(case, settings, 2)}
        spent = found[2]["seconds"] / found[1]["seconds"]
        note = "half is the best that two can do"
        yield Row("processes", case, spent, "one process", found[2]["seconds"], found[2]["peak_mb"], note=note)


def imagenet(quick: bool, scratch: Path) -> Iterator[Row]:
    """The sums of `transfer` over the classes of ImageNet and a tenth of its images, for `imagenet.py`."""
    count, number = (1000, 20) if quick else (128_117, 1000)
    settings = {"rows": write_rows(scratch, count, number), "N": count}
    for case in ("bridge of embeddings", "refit"):
        yield Row("imagenet", f"{case}, a tenth", **measured_by(quick)(case, settings))
