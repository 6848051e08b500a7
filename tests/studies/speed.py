"""Ratios within one run: solvers, transfer memory, and what the adapter adds to inference.

    python tests/studies/speed.py [--parts solvers memory forward] [--images 2000]

- solvers: gradient extraction at D = K = 1024 with a learned basis and with a fixed basis, and both closed
  forms. Random embeddings of a planted teacher; accuracies are printed beside.
- memory: peak resident memory of the moment and the refit at N = 10,000 and 40,000 (d = 512 / 768 with 2 x 768 tower
  features, C = 100), on top of the labels.
- forward: a ViT-B/16-sized image tower (random weights, batch 32), and what the adapter adds to it (K = D = 1024;
  image side and text side of 100 classes, both with tower features).
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from resident import measured
from torch.nn.functional import normalize

from hf_transmiter.data.table import FeatureTable
from hf_transmiter.method.extract import closed_form, gradient
from hf_transmiter.method.moments import image_pairs, sum_pairs
from hf_transmiter.method.refit import refit
from hf_transmiter.settings import ExtractionConfig


class Recorded:
    """The part of a `DualEncoder` that the solvers read."""

    logit_scale, logit_bias, device = torch.tensor(100.0), 0.0, torch.device("cpu")

    def __init__(self, width: int):
        self.embed_dim = width

    def logits(self, x, a):
        return self.logit_scale * x @ a.T


def solvers(images: int, epochs: int) -> None:
    torch.manual_seed(0)
    d, k, c = 512, 1024, 50
    weak, text = Recorded(d), normalize(torch.randn(k, d), dim=-1)
    tuned = normalize(text[:c] + 1.5 * normalize(torch.randn(c, d), dim=-1), dim=-1)
    labels = torch.randint(c, (images + 2000,))
    x = normalize(tuned[labels] + 0.2 * torch.randn(len(labels), d), dim=-1)
    table, test = FeatureTable(x[:images]), x[images:]
    said = weak.logits(x[:images], tuned)
    truth = weak.logits(test, tuned).argmax(1)

    def agreement(found: dict) -> float:
        if "image_map" in found:
            moved = normalize(test + test @ found["image_map"].T + found["image_shift"], dim=-1)
            logits = weak.logits(moved, text[:c])
        elif "class_vectors" in found:
            logits = weak.logits(test, found["class_vectors"]) + found["bias"]
        else:
            norm, up, down = (torch.nn.LayerNorm(k), torch.nn.Linear(k, 4 * k), torch.nn.Linear(4 * k, k))
            for name, module in (("norm", norm), ("up", up), ("down", down)):
                module.load_state_dict({key: found[f"{name}.{key}"] for key in ("weight", "bias")})
            from hf_transmiter.tuners.transmiter.layer import refine

            with torch.no_grad():
                logits = refine(weak.logits(test, text), found["basis"], norm, up, down)[:, :c]
        return 100 * float((logits.argmax(1) == truth).float().mean())

    zero = 100 * float((weak.logits(test, text[:c]).argmax(1) == truth).float().mean())
    print(f"solvers: D = K = {k}, N = {images}, {epochs} epochs; agreement with the teacher (zero-shot {zero:.1f})")
    seconds = {}
    for name, config in {
        "learned basis": ExtractionConfig(solver="gradient", epochs=epochs),
        "fixed basis": ExtractionConfig(solver="gradient", basis="fixed", epochs=epochs),
        "ridge": ExtractionConfig(solver="ridge"),
        "discriminant": ExtractionConfig(solver="discriminant"),
        "image map": ExtractionConfig(solver="image_map"),
    }.items():
        since = time.perf_counter()
        if config.solver == "gradient":
            found, _ = gradient(table, said, text, weak, config, progress=False)
        else:
            found, _ = closed_form(table, said, text[:c], weak, None, config)
        seconds[name] = time.perf_counter() - since
        ratio = seconds["learned basis"] / seconds[name]
        print(
            f"  {name:14s} {seconds[name]:8.2f} s  {ratio:7.1f} x faster  agreement {agreement(found):5.1f}",
            flush=True,
        )


def memory() -> None:
    print("memory: peak on top of the start, tables on disk")
    for images in (10000, 40000):
        weak, strong = Recorded(512), Recorded(3 * 768)
        with tempfile.TemporaryDirectory() as folder:
            tables = []
            for number, model in enumerate((weak, strong)):
                path = Path(folder, f"{number}.npy")
                np.save(path, normalize(torch.randn(images, model.embed_dim), dim=-1))
                tables.append(FeatureTable(torch.from_numpy(np.load(path, mmap_mode="c"))))
            vectors = normalize(torch.randn(100, 768), dim=-1)
            labels = torch.cat([100 * x[:, :768] @ vectors.T for x in tables[1].batches(4096)])
            with measured() as cost:
                sum_pairs(image_pairs(weak, strong, tables, None), strong.embed_dim, weak.embed_dim)
                refit(tables[1], labels, vectors, 100.0)
        print(f"  N = {images:6d}: {cost['peak_mb']:7.1f} MB, {cost['seconds']:.2f} s", flush=True)


def forward(repeats: int) -> None:
    from peft import get_peft_model
    from transformers import CLIPConfig, CLIPModel

    from hf_transmiter.encoders.families import dummy_text_inputs
    from hf_transmiter.tuners import TransMiterConfig

    torch.manual_seed(0)
    vision = {"patch_size": 16}
    bare = CLIPModel(CLIPConfig(vision_config=vision)).eval()
    names = [str(i) for i in range(1024)]
    pixels = torch.randn(32, 3, 224, 224)
    models = {}
    d = bare.config.projection_dim
    wide = d + 2 * bare.config.vision_config.hidden_size
    sides = {"image_side": wide, "text_side": d + wide}
    for form, more in {"mlp": {}, "linear": {}, "linear, both sides": sides}.items():
        auxiliary = names[100:] if form == "mlp" else []
        form_name = form.split(",")[0]
        config = TransMiterConfig(class_names=names[:100], auxiliary_names=auxiliary, form=form_name, **more)
        model = get_peft_model(copy.deepcopy(bare), config).eval()
        layer = model.get_base_model().transmiter
        k = len(config.anchors)
        layer.set_anchors("default", normalize(torch.randn(k, bare.config.projection_dim), dim=-1))
        models[form] = model
    scale = bare.logit_scale.exp()
    x = torch.cat([normalize(torch.randn(32, d), dim=-1), torch.randn(32, wide - d)], dim=1)
    dummy = dummy_text_inputs(bare)
    parts = {
        "image tower": (lambda: bare.get_image_features(pixel_values=pixels), 1),
        "smallest text, for a bare CLIPModel": (lambda: bare.get_text_features(**dummy), 20),
    }
    for form, model in models.items():
        parts[f"adapter, {form}"] = (lambda m=model: m.get_base_model().transmiter(_read(m, x, d), scale), 20)
    print(f"forward: ViT-B/16, batch 32, best of {repeats} (adapters: {20 * repeats})")
    best = {}
    with torch.no_grad():
        for name, (run, times) in parts.items():
            run()
            best[name] = min(_seconds(run) for _ in range(repeats * times))
            share = 100 * best[name] / best["image tower"]
            print(f"  {name:36s} {1000 * best[name]:10.2f} ms  {share:7.3f} % of the tower", flush=True)


def _read(model, x: torch.Tensor, d: int) -> torch.Tensor:
    return x if model.get_base_model().transmiter.reads_tower else x[:, :d]


def _seconds(run) -> float:
    since = time.perf_counter()
    run()
    return time.perf_counter() - since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["solvers", "memory", "forward"])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if "solvers" in arguments.parts:
        solvers(arguments.images, arguments.epochs)
    if "memory" in arguments.parts:
        memory()
    if "forward" in arguments.parts:
        forward(arguments.repeats)


if __name__ == "__main__":
    main()
