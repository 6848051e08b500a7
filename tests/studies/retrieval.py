"""An index of RN50 embeddings that ViT-B/32 asks, over bridges from a few or many other pictures, or from names.

    python tests/studies/retrieval.py --data FOLDER [--seeds 3]

FOLDER is as that of `refits.py`: `caltech101_clip_features`, `fgvc_clip_features` and `clip_text_embeddings`, real
OpenAI CLIP. Of 1,600 pictures 800 are in the index, and each asks for its neighbours; the bridge knows others only.
Neighbours are right where ViT-B/32, had it embedded all, would find them. "words": 1,203 object names ask.
"""

import argparse
from pathlib import Path

import torch
from refits import Table
from safetensors.torch import load_file
from torch.nn.functional import normalize

from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.evaluation.retrieval import INDEX, KS, OLD, QUERIES, nearest, recall, recalls
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.moments import sum_pairs


def bridge_from(weak: torch.Tensor, strong: torch.Tensor) -> Bridge:
    nobody = ModelId(None, None, "")
    moment, _ = sum_pairs([(strong, weak)], strong.shape[1], weak.shape[1])
    return Bridge.from_moment(moment, nobody, nobody, space="embedding")


def words(bridge: Bridge, texts: list[torch.Tensor], weak: torch.Tensor, strong: torch.Tensor) -> dict:
    """As [`recalls`], asked by texts."""
    ways = {
        OLD: (texts[0], weak),
        INDEX: (texts[1], bridge.translate(weak)),
        QUERIES: (bridge.translate_queries(texts[1]), weak),
    }
    best = nearest(texts[1], strong, max(KS))
    found = {name: nearest(*way, max(KS)) for name, way in ways.items()}
    return {name: {k: recall(rows[:, :k], best[:, :k]) for k in KS} for name, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    names = load_file(args.data / "clip_text_embeddings" / "lvis_1203_names.safetensors")
    texts = [normalize(names[key].float(), dim=-1) for key in ("openai_rn50", "openai_vit_b32")]
    tables = {kind: Table(kind) for kind in ("pictures ask", "words ask")}
    for task in ("caltech101", "fgvc"):
        found = load_file(args.data / f"{task}_clip_features" / "train_16shot.safetensors")
        rows = [normalize(found[key].float(), dim=-1) for key in ("rn50_image_embeds", "vitb_image_embeds")]
        for seed in range(args.seeds):
            order = torch.randperm(1600, generator=torch.Generator().manual_seed(seed))
            index = [each[order[800:]] for each in rows]
            bridges = {"1,203 names": bridge_from(*texts)}
            for count in (100, 200, 400, 800):
                bridges[f"{count} pictures"] = bridge_from(*(each[order[:count]] for each in rows))
            for source, bridge in bridges.items():
                for kind, way in (
                    ("pictures ask", recalls(bridge, *index, range(800))),
                    ("words ask", words(bridge, texts, *index)),
                ):
                    for name, of in way.items():
                        row = name if name == OLD else f"{name}, bridge from {source}"
                        if name == OLD and source != "1,203 names":
                            continue
                        for k, value in of.items():
                            tables[kind].add(row, f"{task}, recall@{k}", value)
    print(*tables.values(), sep="\n\n")


if __name__ == "__main__":
    main()
