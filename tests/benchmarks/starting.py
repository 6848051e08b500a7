"""Benchmarks of commands: how long each takes beside importing the libraries that all of them need."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from measuring import Row, interleaved

from hf_transmiter import AnchorClassifier, Anchors, Bridge, DualEncoder, TransMiterConfig
from hf_transmiter.sandbox import load_dataset


IMPORTS = "python -c 'import torch, transformers'"


def starting(quick: bool, scratch: Path) -> Iterator[Row]:
    folder = scratch / "starting"
    weak, strong = (DualEncoder.from_pretrained(f"sandbox:{name}") for name in ("weak", "strong"))
    names = Anchors(tuple(load_dataset("print", "test").features["label"].names))
    adapter = AnchorClassifier(weak, names).add_adapter(TransMiterConfig.for_anchors(names, form="linear"))
    adapter.save_pretrained(folder / "adapter")
    Bridge.build(weak, strong, progress=False).save(folder / "bridge.safetensors")
    ours = [sys.executable, "-m", "hf_transmiter"]
    made, few = ("--overwrite", "--output-dir", folder / "made"), ("--dataset", "sandbox:print", "--max-images", "100")
    over = ("--strong", "sandbox:strong", "--bridge", folder / "bridge.safetensors")
    cases = {
        IMPORTS: [sys.executable, "-c", "import torch, transformers"],
        "import of all libraries": [sys.executable, "-c", "import torch, transformers, peft, accelerate, datasets"],
        "--help": [*ours, "--help"],
        "transfer --help": [*ours, "transfer", "--help"],
        "transfer over a bridge (sandbox)": [*ours, "transfer", folder / "adapter", *over, *made],
        "evaluate, 100 pictures (sandbox)": [*ours, "evaluate", folder / "adapter", *few],
    }
    if quick:
        cases = dict(list(cases.items())[:4])

    def started(command: list) -> None:
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=scratch)
        if result.returncode:
            raise RuntimeError(result.stderr.strip().splitlines()[-1])

    runs = {name: (lambda command=command: started(command)) for name, command in cases.items()}
    for name, (ratio, spent) in interleaved(runs, IMPORTS, repeats=1 if quick else 3, warm=False).items():
        if name != IMPORTS:
            yield Row("starting", name, ratio, IMPORTS, spent)
