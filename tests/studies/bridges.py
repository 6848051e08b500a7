"""Composed and inverted bridges against those built for the pair, on the sandbox.

    python tests/studies/bridges.py [--seeds 3] [--task jargon]

A CoOp adapter of the first model is carried to the last one, without an image of the task: over a bridge built for
the pair, over one composed of two, and over the composition's polar factor, which turns where the composition shrinks.
Bridges are built from names, from pictures of another domain ("street") or from unlabelled pictures of the task.
Prints the accuracy on the task's test pictures (%, mean and standard deviation over seeds of the few shots and the
tuning) and the alignment on those pictures, which no bridge saw; then how far an inverted bridge is from one built the
other way round.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch

from hf_transmiter import AnchorClassifier, Anchors, Bridge, DualEncoder, evaluate, extract, sandbox, transfer, tune
from hf_transmiter.algebra import polar
from hf_transmiter.cli.demo import SANDBOX_TUNING
from hf_transmiter.method.moments import RANK_TOLERANCE
from hf_transmiter.settings import TuningConfig


ROUTES = (
    ("weak", "weak-upgraded", "strong"),
    ("weak", "strong", "weak-upgraded"),
    ("strong", "weak-upgraded", "weak"),
    ("strong", "weak", "weak-upgraded"),
)
KINDS = ("names", "street pictures", "task pictures")


class Bench:
    """The three models, the task, and adapters of it by model and seed."""

    def __init__(self, task: str, seeds: int):
        self.models = {
            name: DualEncoder.from_pretrained(f"sandbox:{name}") for name in ("weak", "weak-upgraded", "strong")
        }
        self.words, self.task = Anchors((), tuple(sandbox.vocabulary())), task
        self.test = sandbox.load_dataset(task, "test")
        self.names = Anchors(tuple(self.test.features["label"].names))
        starts = {route[0] for route in ROUTES}
        self.adapters = {name: [self.adapter(name, seed) for seed in range(seeds)] for name in sorted(starts)}

    def adapter(self, name: str, seed: int) -> AnchorClassifier:
        config = TuningConfig(seed=seed, **SANDBOX_TUNING)
        train = sandbox.load_dataset(self.task, "train")
        tuned = tune(self.models[name], train, "coop", config=config, progress=False)
        return extract(self.models[name], tuned, class_names=self.names.task, progress=False)

    def accuracy(self, classifier: AnchorClassifier) -> float:
        return evaluate(classifier, self.test, progress=False)[0].value

    def build(self, kind: str, weak: str, strong: str) -> Bridge:
        pair = self.models[weak], self.models[strong]
        if kind == "names":
            return Bridge.build(*pair, anchors=self.words)
        domain = "street" if kind.startswith("street") else self.task
        return Bridge.build(*pair, sandbox.load_dataset(domain, "unlabelled"), progress=False)

    def worth(self, bridge: Bridge, weak: str, strong: str) -> tuple[list[float], float]:
        """Accuracies of the carried adapters, and the alignment on the test pictures."""
        moved = (
            transfer(adapter, self.models[strong], bridge=bridge, progress=False) for adapter in self.adapters[weak]
        )
        aligned = bridge.measure(self.models[weak], self.models[strong], self.test, progress=False)
        return [self.accuracy(classifier) for classifier in moved], aligned


def variants(bench: Bench, kind: str, route: tuple[str, str, str]) -> Iterator[tuple[str, Bridge]]:
    first, between, last = route
    yield "built for the pair", bench.build(kind, first, last)
    composed = bench.build(kind, first, between).compose(bench.build(kind, between, last))
    yield f"composed through {between}", composed
    turned = polar(composed.matrix.double(), RANK_TOLERANCE)
    yield "its polar factor", replace(composed, matrix=turned.float())


def shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):3.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):5.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", default="jargon")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the models are tiny
    bench = Bench(arguments.task, arguments.seeds)
    zero = {name: bench.accuracy(AnchorClassifier(model, bench.names)) for name, model in bench.models.items()}
    for route in ROUTES:
        first, _, last = route
        start = [bench.accuracy(adapter) for adapter in bench.adapters[first]]
        print(f"\n{first} to {last}: tuned {first} {shown(start)}, zero-shot {last} {zero[last]:.1f}", flush=True)
        for kind in KINDS:
            for name, bridge in variants(bench, kind, route):
                accuracies, aligned = bench.worth(bridge, first, last)
                print(f"  {kind:16s} {name:30s} {shown(accuracies)} %   alignment {aligned:.3f}", flush=True)
    print("\nInverted and built the other way round, strong to weak")
    for kind in KINDS:
        inverted, built = bench.build(kind, "weak", "strong").invert(), bench.build(kind, "strong", "weak")
        distance = float((inverted.matrix - built.matrix).abs().max())
        scales = f"scale {inverted.scale:.6f} / {built.scale:.6f}"
        print(f"  {kind:16s} largest difference of the maps {distance:.1e}, {scales}", flush=True)


if __name__ == "__main__":
    main()
