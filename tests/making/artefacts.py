"""Make one of everything that can be shared, on the sandbox, with its card.

    python tests/making/artefacts.py --output-dir out/artefacts --cards model_cards

* `jargon-coop`: *weak*, tuned with a CoOp prompt on 16 labelled pictures per class of *jargon*;
* `weak-to-strong-bridge`: between *weak* and *strong*, from the world's phrases alone;
* `jargon-adapter`: what that tuning taught, as an adapter of *weak*;
* `jargon-strong`: the same on *strong*, over the bridge and refitted to unlabelled pictures.

The recipe is the demo's. ``model_cards/`` of the source repository holds the cards that came out of it.
"""

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hf_transmiter.cli.demo import SANDBOX_TUNING
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.evaluate import evaluate
from hf_transmiter.hub.card import write_card
from hf_transmiter.hub.files import replace_folder
from hf_transmiter.hub.provenance import library_versions
from hf_transmiter.hub.repo import SANDBOX
from hf_transmiter.hub.scores import THIS, Score, write_scores
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.extract import extract
from hf_transmiter.method.transfer import transfer
from hf_transmiter.method.tune import tune
from hf_transmiter.sandbox.data import load_dataset
from hf_transmiter.sandbox.words import vocabulary
from hf_transmiter.settings import TuningConfig


DOMAIN, METHOD = "jargon", "coop"
ARTEFACTS = ("jargon-coop", "weak-to-strong-bridge", "jargon-adapter", "jargon-strong")


def make_artefacts(output_dir: Path, *, progress: bool = True) -> list[Path]:
    """Tunes, extracts, bridges, transfers and scores, and saves each result in a folder of its own.

    Args:
        output_dir (`Path`): gets a folder for each of `ARTEFACTS`.
        progress (`bool`, *optional*, defaults to `True`): show progress bars.

    Returns:
        `list[Path]`: the folders, in the order of `ARTEFACTS`.

    Raises:
        FileExistsError: one of them is there already.
    """
    folders = [Path(output_dir) / name for name in ARTEFACTS]
    there = [folder for folder in folders if folder.exists()]
    if there:
        raise FileExistsError(f"{there[0]} exists already: choose another --output-dir.")
    weak, strong = (DualEncoder.from_pretrained(SANDBOX + name) for name in ("weak", "strong"))
    train, unlabelled, test = (load_dataset(DOMAIN, split) for split in ("train", "unlabelled", "test"))
    names = tuple(test.features["label"].names)
    config = TuningConfig(seed=0, **SANDBOX_TUNING)

    tuned = tune(weak, train, METHOD, config=config, progress=progress)
    bridge = Bridge.build(weak, strong, anchors=Anchors((), tuple(vocabulary())), progress=progress)
    adapter = extract(weak, tuned, unlabelled, progress=progress)
    source = f"{SANDBOX}{DOMAIN}"
    tuned.model.peft_config["default"].provenance.update(dataset=source, versions=library_versions())
    teacher = {"method": METHOD, "shots": tuned.facts.settings["shots"], "seed": config.seed, "dataset": source}
    # What only the one who runs a step knows.
    adapter.adapter_config.provenance.update(teacher=teacher, dataset=source)
    adapter.calibration.dataset = f"{source} (unlabelled)"
    upgraded = transfer(adapter, strong, unlabelled, bridge=bridge, progress=progress)
    upgraded.adapter_config.provenance["dataset"] = source
    crossed = transfer(adapter, strong, bridge=bridge, progress=progress)

    def score(classifier: AnchorClassifier, method: str = THIS) -> Score:
        return evaluate(classifier, test, method=method, dataset_name=source, progress=progress)[0]

    zero_weak, zero_strong = (
        score(AnchorClassifier(model, Anchors(names)), f"zero-shot {name}")
        for name, model in (("weak", weak), ("strong", strong))
    )
    taught, bare = score(tuned, "tuned weak"), score(crossed, "over the bridge, no image")
    rows = (
        [zero_weak, replace(taught, method=THIS)],
        [zero_strong, bare],
        [zero_weak, taught, score(adapter)],
        [zero_strong, taught, bare, score(upgraded)],
    )
    savers = (
        tuned.save_pretrained,
        bridge.save_pretrained,
        adapter.save_pretrained,
        upgraded.save_pretrained,
    )
    for folder, save, scores in zip(folders, savers, rows, strict=True):
        replace_folder(folder, partial(_save, save=save, scores=scores, name=folder.name))
    return folders


def _save(folder: Path, *, save: Callable[[Path], object], scores: Sequence[Score], name: str) -> None:
    save(folder)
    write_scores(folder / "scores.json", scores)
    write_card(folder, name=name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python tests/making/artefacts.py",
        description="Make the sandbox's tuned model, adapters and bridge, with their cards.",
        epilog="example: python tests/making/artefacts.py --output-dir out/artefacts",
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="each artefact goes to a folder of its name here"
    )
    parser.add_argument("--cards", type=Path, help="also copy the cards here, NAME.md each")
    arguments = parser.parse_args()
    folders = make_artefacts(arguments.output_dir)
    if arguments.cards is not None:
        arguments.cards.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            shutil.copyfile(folder / "README.md", arguments.cards / f"{folder.name}.md")
    print(*folders, sep="\n")


if __name__ == "__main__":
    main()
