"""When does what crosses a bridge from text end below the zero-shot strong model? What [`Bridge.doubt`] is known from.

    python tests/studies/text_bridges.py [--grid-dir GRID --weak FOLDER --strong STRONG] [--embeddings FOLDER]

Per task: a bridge from 12 to all names of a list, its held-out alignment on names and its alignment on unlabelled
pictures, and the accuracy of the class vectors that cross it, against the zero-shot strong model (points). The tasks
are the sandbox's, with names that its models know and names that they do not; with `--grid-dir` (see `verdicts.py`)
photographs as they are and inverted; with `--embeddings` OpenAI's RN50 and ViT-B/32 on Caltech-101, from
`caltech101_clip_features` and `clip_text_embeddings` in that folder (class vectors were tuned: no extraction).
"""

import argparse
import json
import logging
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize
from verdicts import SETTINGS, TEACHERS, photographs

from hf_transmiter import (
    AnchorClassifier,
    Anchors,
    Bridge,
    DualEncoder,
    TuningConfig,
    evaluate,
    extract,
    sandbox,
    transfer,
    tune,
)
from hf_transmiter.cli.demo import METHODS, SANDBOX_TUNING
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.evaluation.baselines import linear_head
from hf_transmiter.method.moments import sum_pairs
from hf_transmiter.method.transfer import interpolate
from hf_transmiter.settings import FitConfig


COUNTS = (12, 25, 50, 100, 200, 400, 800)


def drawn(names: list, count: int) -> list:
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    return [names[row] for row in order[:count]]


def counts(names: list) -> list[int]:
    return [*(count for count in COUNTS if count < len(names)), len(names)]


def accuracy(classifier: AnchorClassifier, test) -> float:
    return evaluate(classifier, test, progress=False)[0].value


def say(kind: str, count: int, on_names: float | None, on_images: float, gain: float) -> None:
    names = "  -  " if on_names is None else f"{on_names:5.3f}"
    print(f"  {kind:8s} {count:5d} names: {names} on names, {on_images:6.3f} on images, {gain:+6.1f}", flush=True)


def task(title: str, weak, strong, tuned, unlabelled, test, lists: dict[str, list[str]]) -> None:
    names = tuple(test.features["label"].names)
    tuned = AnchorClassifier(tuned.encoder, Anchors(names, (), tuned.anchors.templates))
    plain = [accuracy(AnchorClassifier(model, Anchors(names)), test) for model in (weak, strong)]
    print(f"\n{title}: zero-shot {plain[0]:.1f} to {plain[1]:.1f}, tuned weak {accuracy(tuned, test):.1f}")
    adapter = extract(weak, tuned, unlabelled, class_names=names, progress=False)
    for kind, pool in lists.items():
        for count in counts(pool):
            bridge = Bridge.build(weak, strong, anchors=Anchors((), tuple(drawn(pool, count))))
            on_names, on_images = bridge.held_out, bridge.measure(weak, strong, unlabelled, progress=False)
            gain = accuracy(transfer(adapter, strong, bridge=bridge, progress=False), test) - plain[1]
            say(kind, count, on_names, on_images, gain)


def on_sandbox(nouns: list[str]) -> None:
    weak, strong = (DualEncoder.from_pretrained(f"sandbox:{name}") for name in ("weak", "strong"))
    for domain, method in (*METHODS.items(), ("print", "coop")):
        train, unlabelled, test = (sandbox.load_dataset(domain, name) for name in ("train", "unlabelled", "test"))
        tuned = tune(weak, train, method, config=TuningConfig(**SANDBOX_TUNING), progress=False)
        lists = {"own": list(sandbox.vocabulary()), "nouns": nouns}
        task(f"sandbox {domain}, {method}", weak, strong, tuned, unlabelled, test, lists)


def on_photographs(folder: Path, weak: Path, strong: Path, nouns: list[str]) -> None:
    weak, strong = (DualEncoder.from_pretrained(str(name)) for name in (weak, strong))
    for inverted in (False, True):
        train, test = (photographs(folder, split, list(range(0, 190, 10)), inverted) for split in ("train", "test"))
        tuning, unlabelled = (train.select(range(start, len(train), 2)) for start in (0, 1))
        for method in ("lora", "coop"):
            config = TuningConfig(**SETTINGS, **TEACHERS[method][1])
            tuned = tune(weak, tuning, method, config=config, progress=False)
            title = f"photographs, {'inverted' if inverted else 'as they are'}, {method}"
            task(title, weak, strong, tuned, unlabelled, test, {"nouns": nouns})


def on_caltech(folder: Path) -> None:
    def words(name: str) -> str:
        return re.sub(r" \(.*\)", "", re.sub("[_-]", " ", name.lower()))

    images, text = folder / "caltech101_clip_features", folder / "clip_text_embeddings"
    classes = [words(name) for name in json.loads((images / "class_names.json").read_text())]
    names = [words(name) for name in json.loads((text / "names.json").read_text())]
    read, vectors = load_file(images / "train_16shot.safetensors"), load_file(text / "lvis_1203_names.safetensors")
    both = [(row, names.index(name)) for row, name in enumerate(classes) if name in names]
    rows = torch.cat([(read["labels"] == row).nonzero()[:, 0] for row, _ in both])
    labels, known = torch.arange(len(both)).repeat_interleave(16), [column for _, column in both]
    x = [normalize(read[f"{name}_image_embeds"][rows].float(), dim=-1) for name in ("rn50", "vitb")]
    a = [normalize(vectors[name].float(), dim=-1) for name in ("openai_rn50", "openai_vit_b32")]
    learnt = torch.arange(len(labels)) % 16 < 8
    config = FitConfig(epochs=75, lr=1e-3, weight_decay=0.0)
    tuned = linear_head(x[0][learnt], labels[learnt], a[0][known], 100.0, config, progress=False)

    def right(model: int, heads: torch.Tensor) -> float:
        return 100 * float(((x[model] @ heads.T).argmax(1) == labels)[~learnt].float().mean())

    plain = right(1, a[1][known])
    print(f"\nCaltech-101, {len(both)} classes: zero-shot {right(0, a[0][known]):.1f} to {plain:.1f}, ", end="")
    print(f"tuned weak {right(0, tuned):.1f}")
    others = [row for row in range(len(names)) if row not in known]
    pictures = sum_pairs([(x[1], x[0])], 512, 1024)[0].in_space("embedding")
    models = ModelId("weak", None, "a" * 64), ModelId("strong", None, "b" * 64)
    for count in counts(others):
        chosen = drawn(others, count)
        moment, held_out = sum_pairs([(a[1][chosen], a[0][chosen])], 512, 1024)
        bridge = Bridge.from_moment(moment, *models, space="embedding", source="text", held_out=held_out)
        carried = interpolate(bridge.carry_class_vectors(tuned, a[0][known], a[1][known]), a[1][known], 0.0)
        say("LVIS", count, bridge.held_out, pictures.alignment(bridge.matrix), right(1, carried) - plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--grid-dir", "--weak", "--strong", "--embeddings"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the models are tiny
    logging.getLogger("hf_transmiter").setLevel(logging.ERROR)
    nouns = list(Anchors.universal().names)
    if given.embeddings:
        on_caltech(given.embeddings)
    on_sandbox(nouns)
    if given.grid_dir:
        on_photographs(given.grid_dir, given.weak, given.strong, nouns)


if __name__ == "__main__":
    main()
