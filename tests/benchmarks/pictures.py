"""Benchmarks of everything that reads pictures, texts or weights: embedding, inference, loading.

Weights are random; the sizes are those of CLIP ViT-B/16 and ViT-B/32. Pictures are drawn, JPEG, 500 x 375.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import count as numbers
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from measuring import Missing, Row, interleaved
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from hf_transmiter import (
    AnchorClassifier,
    Anchors,
    Bridge,
    DualEncoder,
    TransMiterConfig,
    embed_dataset,
    sandbox,
    transfer,
)
from hf_transmiter.data import embeddings


def draw(count: int, folder: Path | None = None) -> Dataset:
    """So many photograph-like pictures, some 70 kB each: smooth patches with grain. Stored inside, or as files."""
    random, rows = np.random.default_rng(0), []
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.BICUBIC)
        grain = random.normal(0, 12, (375, 500, 1))
        picture, content = Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)), BytesIO()
        picture.save(content, "JPEG", quality=85)
        if folder is None:
            rows.append({"bytes": content.getvalue(), "path": None})
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:06d}.jpg").write_bytes(content.getvalue())
            rows.append({"bytes": None, "path": str(folder / f"{index:06d}.jpg")})
    return Dataset.from_dict({"image": rows}, features=Features({"image": ImageFeature()}))


def clip(vision: dict, text: dict | None = None) -> DualEncoder:
    """A model of random weights that prepares pictures as OpenAI's do, 224 x 224."""
    import tiny_models  # of tests

    tokenizer = tiny_models.clip_tokenizer(77)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config={**ends, **(text or {})}, vision_config=vision)).eval()
    return DualEncoder(model.requires_grad_(False), CLIPProcessor(CLIPImageProcessorPil(), tokenizer))


SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "patch_size": 32}  # ViT-S/32
FAST = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 32}


def embedding(quick: bool, scratch: Path) -> Iterator[Row]:
    """`embed_dataset` beside the forward pass over prepared pixels, and beside preparing alone.

    The one is what decides where the model is slow (ViT-B/16 here, on a CPU), the other where it is fast: a tower of
    one narrow layer stands for a GPU.
    """
    fresh = numbers()
    workers = [None]
    if "num_workers" in inspect.signature(embed_dataset).parameters:
        workers = [0, 1] if quick else [0, 1, 2]
    models = {"one narrow layer": (FAST, 16 if quick else 128, 32)}
    if not quick:
        models["ViT-B/16"] = ({"patch_size": 16}, 8, 8)
    for name, (vision, count, batch_size) in models.items():
        encoder, dataset = clip(vision, SMALL_TEXT), draw(count)
        stored = [{"bytes": row, "path": None} for row in (each["bytes"] for each in _stored(dataset))]
        pixels = encoder.preprocess(stored)

        def embed(more: dict, encoder=encoder, dataset=dataset, batch_size=batch_size) -> None:
            place = scratch / f"features{next(fresh)}"
            embed_dataset(encoder, dataset, batch_size=batch_size, cache_dir=place, progress=False, **more)

        cases = {
            "forward": lambda e=encoder, p=pixels, b=batch_size: [e.embed_pixels(block) for block in p.split(b)],
            "prepare": lambda e=encoder, s=stored: e.preprocess(s),
        }
        for each in workers:
            about = {} if each is None else {"num_workers": each}
            cases[each] = lambda more=about, embed=embed: embed(more)
        fast = name != "ViT-B/16"
        against = "prepare" if fast else "forward"
        found = interleaved(cases, against, repeats=1 if quick else 3)
        if fast:
            yield Row(
                "embedding",
                "preparing a picture",
                found["prepare"][1] / count / _unit(),
                seconds=found["prepare"][1] / count,
            )
        for each in workers:
            ratio, spent = found[each]
            said = "" if each is None else f", num_workers={each}"
            unit = (
                "pictures per second, of those of preparing alone"
                if fast
                else "pictures per second, of those of the forward pass alone"
            )
            yield Row("embedding", f"embed_dataset, {name}{said}", 1 / ratio, unit, spent)
    yield from reading(quick, scratch)


def _stored(dataset: Dataset):
    return dataset.cast_column("image", ImageFeature(decode=False))["image"]


def _unit() -> float:
    from measuring import reference, seconds

    return sorted(seconds(reference) for _ in range(9))[4]


def reading(quick: bool, scratch: Path) -> Iterator[Row]:
    """What `embed_dataset` does besides: it reads files to know the pictures (from memory here, not from a disk)."""
    if not hasattr(embeddings, "content_fingerprint"):
        raise Missing("content_fingerprint")
    count = 20 if quick else 500
    files = draw(count, scratch / "files")
    fresh = numbers()

    def anew() -> None:  # copies have another state, and are read again
        place = scratch / f"copies{next(fresh)}"
        place.mkdir()
        rows = []
        for row in _stored(files):
            copy = place / Path(row["path"]).name
            copy.hardlink_to(row["path"])
            rows.append({"bytes": None, "path": str(copy)})
        copies.append(Dataset.from_dict({"image": rows}, features=Features({"image": ImageFeature()})))

    copies: list[Dataset] = []
    for _ in range(5):
        anew()
    left = iter(copies)
    encoder, stored = clip(FAST, SMALL_TEXT), _stored(files)
    cases = {
        "prepare": lambda: encoder.preprocess([row["path"] for row in stored]),
        "read": lambda: embeddings.content_fingerprint(next(left), "image"),
        "again": lambda: embeddings.content_fingerprint(files, "image"),
    }
    found = interleaved(cases, "prepare", repeats=1 if quick else 3)
    for key, said in (("read", "files read once, to know the pictures"), ("again", "the same files, known already")):
        ratio, spent = found[key]
        yield Row("embedding", said, ratio, "preparing the pictures", spent / count)


FORMS = {
    "class vectors": {"form": "linear"},
    "image side": {"form": "linear", "image_side": 0, "text_side": None},
    "both sides": {"form": "linear", "image_side": 0, "text_side": 0},
    "both sides, with tower features": {"form": "linear", "image_side": 1, "text_side": 1},
    "published (1,024 anchors)": {"form": "mlp"},
}


def inference(quick: bool, scratch: Path) -> Iterator[Row]:
    """A call of each form of adapter beside the zero-shot model's, and the adapter alone as a share of that call. The
    tower is a small one, ViT-S/32: of a larger one all shares are smaller."""
    encoder = clip(FAST if quick else SMALL, SMALL_TEXT)
    d, tower = encoder.embed_dim, encoder.tower_dim
    names, more = [f"class {number}" for number in range(100)], [f"word {number}" for number in range(924)]
    models = {"zero-shot": _classifier(encoder, names, [])}
    for said, options in FORMS.items():
        given = dict(options)
        for side, wide in (("image_side", given.get("image_side")), ("text_side", given.get("text_side"))):
            if wide is not None:
                given[side] = d + wide * tower + (d if side == "text_side" else 0)
        classifier = _classifier(encoder, names, more if given["form"] == "mlp" else [])
        models[said] = classifier.add_adapter(TransMiterConfig.for_anchors(classifier.anchors, **given))
    for batch in (1, 4) if quick else (1, 64):
        pixels = torch.rand(batch, 3, 224, 224)
        calls = {said: (lambda m=model, p=pixels: m(pixel_values=p)) for said, model in models.items()}
        found = interleaved(calls, "zero-shot", repeats=2 if quick else 3 if batch > 1 else 9)
        alone = {"zero-shot": calls["zero-shot"]}
        for said, model in models.items():
            rows = encoder.embed_pixels(pixels, model.reads_tower)
            alone[f"{said} "] = lambda m=model, r=rows: [m.classify(r) for _ in range(10)]
        shares = interleaved(alone, "zero-shot", repeats=3)
        for said in models:
            share = f"the part after the tower is {10 * shares[f'{said} '][0]:.3f} % of it"
            yield Row(
                "inference", f"{said}, batch {batch}", found[said][0], "the zero-shot call", found[said][1], note=share
            )


def _classifier(encoder: DualEncoder, names: list[str], more: list[str]) -> AnchorClassifier:
    anchors = Anchors(names, more)
    rows = torch.nn.functional.normalize(torch.randn(len(anchors), encoder.embed_dim), dim=-1)
    return AnchorClassifier(encoder, anchors, rows)


def loading(quick: bool, scratch: Path) -> Iterator[Row]:
    """An adapter with its model beside the model alone, both from folders (whose weights are read to see whether they
    are the adapter's)."""
    encoder = clip(FAST, SMALL_TEXT) if quick else clip({"patch_size": 32})
    encoder.model.save_pretrained(scratch / "model")
    encoder.processor.save_pretrained(scratch / "model")
    encoder = DualEncoder.from_pretrained(scratch / "model")
    classifier = _classifier(encoder, [f"class {number}" for number in range(100)], [])
    classifier.add_adapter(TransMiterConfig.for_anchors(classifier.anchors, form="linear"))
    classifier.save_pretrained(scratch / "adapter")
    cases = {
        "model": lambda: DualEncoder.from_pretrained(scratch / "model"),
        "adapter": lambda: AnchorClassifier.from_pretrained(scratch / "adapter"),
        "onto it": lambda: AnchorClassifier.from_pretrained(scratch / "adapter", encoder),
    }
    found = interleaved(cases, "model", repeats=2 if quick else 5)
    unit = "DualEncoder.from_pretrained (ViT-B/32)"
    for key, said in (("adapter", "with its model"), ("onto it", "onto a model that is there")):
        yield Row("loading", f"AnchorClassifier.from_pretrained, {said}", found[key][0], unit, found[key][1])


@contextmanager
def _quiet():
    log = logging.getLogger("hf_transmiter")
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)


def texts(quick: bool, scratch: Path) -> Iterator[Row]:
    """`transfer` with pictures whose embeddings are there, beside one pass of its texts through both text towers: what
    many names and templates cost it."""
    count = 50 if quick else 500
    weak, strong = (DualEncoder.from_pretrained(f"sandbox:{name}") for name in ("weak", "strong"))
    names, templates = sandbox.vocabulary()[:count], ("a photo of a {}.", "a drawing of a {}.", "{}.", "one {}.")
    anchors, pictures = Anchors(names, (), templates), sandbox.load_dataset("street", "test").select(range(500))
    adapter = AnchorClassifier(weak, anchors)
    adapter.add_adapter(TransMiterConfig.for_anchors(anchors, form="linear"))
    options = {"cache_dir": scratch / "texts", "progress": False}
    if quick:
        pictures = pictures.select(range(120))

    def fresh() -> list[DualEncoder]:
        return [DualEncoder(each.model, each.processor, each.name_or_path) for each in (weak, strong)]

    def carry() -> None:
        models = fresh()
        source = AnchorClassifier(models[0], anchors)
        source.transmiter = adapter.transmiter
        transfer(source, models[1], pictures, **options)

    with _quiet():
        cases = {
            "texts": lambda: [model.embed_names(names, templates) for model in fresh()],
            "bridge": lambda: Bridge.build(*fresh(), pictures, names=anchors, **options),
            "transfer": carry,
        }
        found = interleaved(cases, "texts", repeats=2 if quick else 3)
    unit = "its texts through both text towers once"
    yield Row("texts", f"transfer, {count} names, {len(templates)} templates", found["transfer"][0], unit)
