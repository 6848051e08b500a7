"""Ten adapters to a new model: one `upgrade` over one bridge, against ten separate transfers.

    python tests/studies/upgrade_many.py [--processes] [--epochs 20]

CoOp prompts, tuned on the sandbox's weak model with 16 pictures per class (four tasks, three seeds, the first ten),
are extracted as adapters and carried to the strong model without an image: by one call of `upgrade`, which loads the
strong model and builds the bridge from text once, and by ten calls of `transfer` that each load both models and build
their own, as ten runs of `hf-transmiter transfer` do. `--processes` also times the commands, a process each. The
logits on test pictures must be the same to the bit. Prints seconds (the fastest of three runs, of the commands of two)
and the ratio within this run.

Last comes the report of an upgrade, scored on the test pictures, over a bridge from the sandbox's own words: the
common nouns of the default are mostly unknown to these tiny models, so that bridge says little about what to expect.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from hf_transmiter import AnchorClassifier, Bridge, extract, sandbox, transfer, tune
from hf_transmiter.catalog import load_encoder
from hf_transmiter.demo import SANDBOX_TUNING, Task
from hf_transmiter.evaluation import evaluate
from hf_transmiter.prompt_tuning import TuningConfig
from hf_transmiter.sharing import record_scores
from hf_transmiter.upgrading import upgrade, upgrade_table


TASKS = [(task, seed) for seed in range(3) for task in ("print", "night", "neon", "jargon")][:10]
WEAK, STRONG = "sandbox:weak", "sandbox:strong"


def make_adapters(folder: Path, epochs: int) -> list[str]:
    """One adapter per task and seed; returns the folders."""
    weak, found = load_encoder(WEAK), []
    for task, seed in TASKS:
        config = TuningConfig(method="coop", seed=seed, **{**SANDBOX_TUNING, "epochs": epochs})
        tuned = tune(weak, sandbox.load_dataset(task, "train"), config=config, progress=False)
        found.append(str(folder / f"{task}-{seed}"))
        extract(weak, tuned, progress=False).save_pretrained(found[-1])
    return found


def one_upgrade(sources: list[str], output: Path) -> None:
    upgrade(sources, load_encoder(STRONG), output, progress=False)


def separate_transfers(sources: list[str], output: Path) -> None:
    for source in sources:
        adapter = AnchorClassifier.from_pretrained(source, load_encoder(WEAK))
        transfer(adapter, load_encoder(STRONG)).save_pretrained(output / Path(source).name)


def one_command(sources: list[str], output: Path) -> None:
    repos = [word for source in sources for word in ("--repos", source)]
    _command("upgrade", *repos, "--to", STRONG, "--output-dir", str(output))


def separate_commands(sources: list[str], output: Path) -> None:
    for source in sources:
        _command("transfer", source, "--strong", STRONG, "--output-dir", str(output / Path(source).name))


def _command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "hf_transmiter", *words, "--quiet"], check=True, stdout=subprocess.DEVNULL)


def logits(folders: list[Path]) -> list[torch.Tensor]:
    """Of each upgraded adapter, on the first test pictures of its task."""
    strong, found = load_encoder(STRONG), []
    for folder in folders:
        pixels = strong.preprocess(sandbox.load_dataset(folder.name.split("-")[0], "test")[:100]["image"])
        with torch.no_grad():
            found.append(AnchorClassifier.from_pretrained(folder, strong)(pixel_values=pixels).logits_per_image)
    return found


def compare(name: str, ways: tuple, sources: list[str], folder: Path, repeats: int) -> None:
    """Times both ways, checks that they end in the same, and prints a row."""
    seconds, results = [[], []], []
    for repeat in range(repeats):
        for way, taken in zip(ways, seconds, strict=True):
            output = folder / f"{way.__name__}-{repeat}"
            start = time.perf_counter()
            way(sources, output)
            taken.append(time.perf_counter() - start)
            results.append(logits([output / Path(source).name for source in sources]))
    for found in results[1:]:
        if not all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True)):
            raise SystemExit("the two ways do not give the same logits")
    one, many = map(min, seconds)
    print(f"| {name} | {one:.1f} | {many:.1f} | {many / one:.1f} |", flush=True)


def report(sources: list[str], folder: Path) -> str:
    """The table of one upgrade of scored adapters, and what its bridge is worth."""
    task = Task.load("print")
    for source in sources:
        domain, options = Path(source).name.split("-")[0], {"split": "test", "progress": False}
        options["dataset_name"] = f"sandbox:{domain}"
        adapter = AnchorClassifier.from_pretrained(source, task.weak)
        images = sandbox.load_dataset(domain, "test")
        record_scores(source, adapter, images, evaluate(adapter, images, **options), **options)
    bridge, nouns = (Bridge.build(task.weak, task.strong, anchors=names) for names in (task.text_anchors, None))
    rows = upgrade(sources, task.strong, folder / "scored", bridge=bridge, progress=False)
    said = f"Alignment on held-out names: {bridge.held_out:.2f}; of a bridge from common nouns {nouns.held_out:.2f}."
    return f"{upgrade_table(rows)}\n{said}".replace(f"{folder}/", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", action="store_true", help="also time the commands, a process each")
    parser.add_argument("--epochs", type=int, default=20, help="of tuning")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = make_adapters(folder / "old", arguments.epochs)
        print(
            f"{len(sources)} adapters\n\n| | one upgrade, s | separate transfers, s | ratio |\n|:---|---:|---:|---:|"
        )
        compare("functions", (one_upgrade, separate_transfers), sources, folder, repeats=3)
        if arguments.processes:
            compare("commands, a process each", (one_command, separate_commands), sources, folder, repeats=2)
        print("\n" + report(sources, folder))


if __name__ == "__main__":
    main()
