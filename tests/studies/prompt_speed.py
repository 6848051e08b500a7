"""Speed and memory of prompt tuning, as ratios within one run.

    python tests/studies/prompt_speed.py [--steps 30]

1. One training step of CoOp (C = 100, M = 4) with texts cut at the last end-of-text token, against full length: on the
   sandbox's weak model (24 positions) and on one of its shape with CLIP's 77.
2. Tuning from cached image embeddings, against embedding the same pictures in every step: same result, ratio of times.
3. Peak memory of one step with C = 1,000 classes, text tower (4 layers, 256 wide) in parts of 64 prompts, against all
   at once. Each in a process of its own.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time

import torch
from resident import measured
from transformers import CLIPModel

from hf_transmiter import sandbox
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.method import tune as tuning
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import TuningConfig
from hf_transmiter.tuners import CoOpConfig, inject
from hf_transmiter.tuners.prompts import class_vectors, phrase_token_ids, prompt_layer


def prompted(**text) -> DualEncoder:
    """The weak model with CoOp on it; with another text tower, one of random weights."""
    weak = DualEncoder.from_pretrained(sandbox.model_path("weak"))
    model = weak.model
    if text:
        config = copy.deepcopy(model.config)
        config.text_config.update(text)
        model = CLIPModel(config).eval().requires_grad_(False)
        weak.processor.tokenizer.model_max_length = config.text_config.max_position_embeddings
    ids = phrase_token_ids(weak.processor.tokenizer, "a photo of a")
    inject(model, CoOpConfig(init_token_ids=ids))
    return DualEncoder(model, weak.processor, weak.name_or_path)


def step(encoder: DualEncoder, inputs: dict, images: torch.Tensor, chunk_size: int) -> None:
    logits = images @ class_vectors(encoder.model, inputs, chunk_size).T
    torch.nn.functional.cross_entropy(100 * logits, torch.arange(len(images))).backward()


def names(count: int) -> list[str]:
    return [f"{name}." for name in sandbox.vocabulary()[-count:]]


def cut_sequences(steps: int) -> None:
    for text in ({}, {"max_position_embeddings": 77}):
        encoder = prompted(**text)
        images = torch.nn.functional.normalize(torch.randn(32, encoder.embed_dim), dim=-1)
        length = {"padding": "max_length", "truncation": True, "max_length": encoder.context_length}
        inputs = encoder.processor.tokenizer(names(100), return_tensors="pt", **length)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for index in range(2 * steps + 4):
            full = bool(index % 2)  # in turns, so that other work on the machine slows both
            prompt_layer(encoder.model).reads_every_position = full
            start = time.perf_counter()
            step(encoder, inputs, images, 256)
            if index >= 4:
                seconds[full].append(time.perf_counter() - start)
        cut, whole = (statistics.median(seconds[kind]) for kind in (False, True))
        shape = f"{encoder.model.config.text_config.max_position_embeddings} positions"
        print(f"step, {shape}: cut {1e3 * cut:.1f} ms, full {1e3 * whole:.1f} ms, ratio {whole / cut:.1f}")


def cached_features() -> None:
    weak = DualEncoder.from_pretrained(sandbox.model_path("weak"))
    train = sandbox.load_dataset("print", "train")
    config = TuningConfig(epochs=10, lr=2e-2)
    seconds, vectors = {}, {}
    for cached in (True, False):
        moves = tuning._moves_images
        if not cached:
            tuning._moves_images = lambda tuned: True
        start = time.perf_counter()
        tuned = tune(weak, train, "coop", config=config, progress=False)
        seconds[cached] = time.perf_counter() - start
        tuning._moves_images = moves
        vectors[cached] = tuned.text_embeds
    apart = (vectors[True] - vectors[False]).abs().max()
    print(
        f"tuning 10 epochs: cached {seconds[True]:.1f} s, embedded in every step {seconds[False]:.1f} s, "
        f"ratio {seconds[False] / seconds[True]:.1f}; class vectors differ by at most {apart:.0e}"
    )


def peak_memory(chunk_size: int) -> float:
    """MB that one step with 1,000 classes needs on top of what is there before it; for a fresh process."""
    encoder = prompted(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    inputs = encoder.tokenize(names(1000))
    images = torch.nn.functional.normalize(torch.randn(32, encoder.embed_dim), dim=-1)
    few = {key: value[:8] for key, value in inputs.items()}
    step(encoder, few, images[:8], chunk_size)  # what any first step allocates for good
    with measured() as found:
        step(encoder, inputs, images, chunk_size)
    return found["peak_mb"]


def memory() -> None:
    peaks = {}
    for chunk_size in (64, 1000):
        command = [sys.executable, __file__, "--peak", str(chunk_size)]
        peaks[chunk_size] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    print(
        f"peak of one step, 1,000 classes: in parts of 64 {peaks[64]:.0f} MB, at once {peaks[1000]:.0f} MB, "
        f"share {peaks[64] / peaks[1000]:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(json.dumps(peak_memory(arguments.peak)))
        return
    cut_sequences(arguments.steps)
    cached_features()
    memory()


if __name__ == "__main__":
    main()
