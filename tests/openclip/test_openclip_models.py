"""Models of open_clip as two-tower models: where they are found, what they answer, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_open_clip
import torch
from safetensors.torch import load_file, save_file

from hf_transmiter.encoders import open_clip as ours
from hf_transmiter.encoders.dual_encoder import DualEncoder, load_encoder
from hf_transmiter.encoders.families import dummy_text_inputs, image_inputs
from hf_transmiter.encoders.identity import vocabulary_hash
from hf_transmiter.encoders.open_clip import CONFIG, WEIGHTS, OpenClipModel, load_processor, load_tokenizer


TEXTS = ["a photo of a cat.", "2012 Chevrolet Silverado 2500HD Regular Cab", "Été (red) bird's nest.", "dog " * 90]
KINDS = pytest.mark.parametrize("kind", ["resnet", "eva", "vit"])


def same(left, right, atol=1e-5):
    torch.testing.assert_close(left, right, atol=atol, rtol=0)


def check(encoder, reference, pictures, transform):
    """Rows and logits of `encoder` are those of open_clip's own model."""
    import open_clip

    pixels = torch.stack([transform(picture) for picture in pictures])
    same(encoder.preprocess(pictures), pixels, atol=1e-6)
    tokens = open_clip.tokenize(TEXTS)
    with torch.no_grad():
        images, texts = (reference.encode_image(pixels, normalize=True), reference.encode_text(tokens, normalize=True))
        logits = reference.get_logits(pixels, tokens)[0]
    same(encoder.embed_images(pictures), images)
    same(encoder.embed_texts(TEXTS), texts)
    same(encoder.logits(encoder.embed_images(pictures), encoder.embed_texts(TEXTS)), logits, atol=1e-4)
    with torch.no_grad():
        output = encoder.model(**encoder.tokenize(TEXTS), pixel_values=pixels)
    same(output.logits_per_image, logits, atol=1e-4)
    same(output.logits_per_text, logits.T, atol=1e-4)
    assert (images[0] - images[1]).abs().max() > 1e-3 and (texts[0] - texts[1]).abs().max() > 1e-3


# What they answer


@KINDS
def test_rows_and_logits_are_those_of_open_clip(kind, folder_of, load, pictures):
    import open_clip

    reference = open_clip.create_model(f"local-dir:{folder_of(kind)}").eval()
    encoder = load(kind)
    check(encoder, reference, pictures(3), open_clip.image_transform(32, is_train=False))
    assert encoder.embed_dim == tiny_open_clip.MODELS[kind]["embed_dim"] and encoder.image_size == 32
    assert encoder.context_length == 77 and encoder.family == "open_clip" and encoder.logit_bias == 0
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    inputs = {**image_inputs(encoder.model, torch.zeros(1, 3, 32, 32)), **dummy_text_inputs(encoder.model)}
    same(encoder.model(**inputs).image_embeds, encoder.embed_pixels(torch.zeros(1, 3, 32, 32)))


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "tag"), [("RN50", "openai"), ("EVA02-B-16", "merged2b_s8b_b131k")])
def test_the_papers_architectures(architecture, tag, tmp_path, pictures, monkeypatch):
    """Random weights under the names of the published ones, which cannot be had here."""
    import open_clip

    gelu = {"force_quick_gelu": architecture == "RN50"}  # what open_clip leaves to its caller
    reference = tiny_open_clip.loud(open_clip.create_model(architecture, pretrained=None, **gelu), seed=0)
    save_file({key: value.contiguous() for key, value in reference.state_dict().items()}, tmp_path / WEIGHTS[0])
    repository = open_clip.get_pretrained_cfg(architecture, tag)["hf_hub"].rstrip("/")
    asked = []

    def fetch(source, file, **hub):
        asked.append((source, file))
        return tmp_path / file

    monkeypatch.setattr(ours, "fetch", fetch)
    encoder = DualEncoder.from_pretrained(f"open_clip:{architecture}/{tag}")
    assert asked == [(repository, WEIGHTS[0])]
    images = [picture.resize((300, 260)) for picture in pictures(2)]
    check(encoder, reference, images, open_clip.image_transform(224, is_train=False))
    assert (encoder.embed_dim, encoder.image_size) == ({"RN50": 1024, "EVA02-B-16": 512}[architecture], 224)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_become_pixels_as_in_open_clip(mode, interpolation, folder_of, pictures, tmp_path):
    import open_clip

    how = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": interpolation, "resize_mode": mode}
    content = json.loads(Path(folder_of("vit"), CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**content, "preprocess_cfg": how}))
    (tmp_path / WEIGHTS[0]).symlink_to(Path(folder_of("vit"), WEIGHTS[0]))
    encoder = DualEncoder.from_pretrained(f"open_clip:{tmp_path}")
    transform = open_clip.image_transform(32, is_train=False, **how)
    expected = torch.stack([transform(picture) for picture in pictures(8)])
    same(encoder.preprocess(pictures(8)), expected, atol=1e-6)
    assert encoder.image_size == 32


def test_the_tokens_are_those_of_openais_checkpoints():
    import open_clip

    tokenizer = load_tokenizer()
    vocabulary = tokenizer.get_vocab()
    # The size of vocab.json beside openai/clip-vit-base-patch16 on the Hub.
    assert len(json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")).encode()) == 862_328
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"], vocabulary["!"]) == (49406, 49407, 0)
    assert tokenizer("a photo of a")["input_ids"] == [49406, 320, 1125, 539, 320, 49407]
    known = open_clip.IMAGENET_CLASSNAMES
    found = tokenizer([f"a photo of a {name}." for name in known])["input_ids"]
    wanted = open_clip.tokenize([f"a photo of a {name}." for name in known])
    assert [row + [0] * (77 - len(row)) for row in found] == wanted.tolist()
    assert vocabulary_hash(tokenizer) == vocabulary_hash(load_tokenizer(32))


def test_half_precision(folder_of, load, pictures):
    encoder = load("eva")
    half = DualEncoder.from_pretrained(encoder.name_or_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    same(half.embed_images(pictures(3)), encoder.embed_images(pictures(3)), atol=0.05)
    same(half.embed_texts(TEXTS), encoder.embed_texts(TEXTS), atol=0.05)


def test_gradients_reach_pixels_and_texts(load):
    model = load("eva").model.requires_grad_(True)
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)
    ids = load_tokenizer()(["cat.", "dog."], return_tensors="pt")["input_ids"]
    model(input_ids=ids, pixel_values=pixels).logits_per_image[0, 0].backward()
    assert pixels.grad[0].any() and not pixels.grad[1].any()
    grad = model.text_model.embeddings.token_embedding.weight.grad
    assert grad[ids[0, 1]].any() and not grad[ids[1, 1]].any()
    assert all(p.grad is not None for p in model.parameters())


# Where they are found


def test_a_folder_a_file_and_what_open_clip_writes_are_the_same_model(folder_of, load, tmp_path):
    import open_clip

    encoder = load("resnet")
    reference = open_clip.create_model(f"local-dir:{folder_of('resnet')}")
    flat = {key.removeprefix("text."): value for key, value in reference.state_dict().items()}
    (tmp_path / "theirs").mkdir()
    save_file(flat, tmp_path / "theirs" / WEIGHTS[1])  # a CLIP of open_clip's, whose text tower has no name
    content = {"model_cfg": {**tiny_open_clip.MODELS["resnet"], "custom_text": False}, "preprocess_cfg": {}}
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(content))
    theirs = DualEncoder.from_pretrained(f"open_clip:{tmp_path / 'theirs'}")
    assert theirs.fingerprint == encoder.fingerprint and encoder.revision is None
    assert load("resnet", seed=1).fingerprint != encoder.fingerprint
    (tmp_path / "archs").mkdir()
    (tmp_path / "archs" / "tiny-rn-quickgelu.json").write_text(json.dumps(content["model_cfg"]))
    open_clip.add_model_config(tmp_path / "archs")
    name = f"open_clip:tiny-rn-quickgelu/{tmp_path / 'theirs' / WEIGHTS[1]}"
    assert load_encoder(name).fingerprint == encoder.fingerprint
    assert load_encoder(name).name_or_path == name


def test_stored_precision(folder_of, load, tmp_path):
    path = Path(folder_of("vit"))
    (tmp_path / CONFIG).write_bytes((path / CONFIG).read_bytes())
    save_file({key: value.half() for key, value in load_file(path / WEIGHTS[0]).items()}, tmp_path / WEIGHTS[0])
    name = f"open_clip:{tmp_path}"
    assert DualEncoder.from_pretrained(name, dtype="auto").dtype == torch.float16
    assert DualEncoder.from_pretrained(name).dtype == torch.float32
    assert DualEncoder.from_pretrained(name, dtype="bfloat16").dtype == torch.bfloat16
    assert DualEncoder.from_pretrained(load("vit").name_or_path, dtype="auto").dtype == torch.float32


@pytest.fixture
def tiny_tag(hub, folder_of, tmp_path, monkeypatch):
    """An architecture and a tag of open_clip's table whose weights are on the tests' Hub; `None` or the commit."""
    import open_clip
    from open_clip import pretrained

    config = {key: value for key, value in tiny_open_clip.MODELS["resnet"].items() if key != "quick_gelu"}
    (tmp_path / "tiny-rn.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-rn.json")
    entry = {"hf_hub": "alice/tiny/", "quick_gelu": True, "mean": None, "interpolation": "bilinear"}
    table = {"seen": entry, "binary": {"hf_hub": "alice/binary/model.bin"}, "url": {"url": "https://nowhere/x.pt"}}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-rn", table)
    hub.write("alice/binary", {"model.bin": b"pickle"})
    return hub.write("alice/tiny", {WEIGHTS[0]: Path(folder_of("resnet"), WEIGHTS[0]).read_bytes()})


def test_a_tag_from_the_hub(tiny_tag, hub, load, folder_of, pictures):
    encoder = load_encoder("open_clip:tiny-rn/seen")
    assert encoder.revision == tiny_tag and encoder.name_or_path == "open_clip:tiny-rn/seen"
    assert encoder.model.config.model_cfg["quick_gelu"] is True  # the tag's, not the architecture's
    same(encoder.embed_texts(TEXTS), load("resnet").embed_texts(TEXTS), atol=0)
    assert encoder.processor.image_processor.resample == 2  # of the tag
    other = Path(folder_of("resnet", 1), WEIGHTS[0]).read_bytes()
    moved = hub.write("alice/tiny", {WEIGHTS[0]: other})
    for name, revision in (("open_clip:tiny-rn/seen", tiny_tag), (f"open_clip:tiny-rn/seen@{tiny_tag}", None)):
        pinned = load_encoder(name, revision=revision)
        assert pinned.fingerprint == encoder.fingerprint and pinned.revision == tiny_tag
    newest = load_encoder("open_clip:tiny-rn/seen")
    assert newest.revision == moved and newest.fingerprint != encoder.fingerprint
    asked = len(hub.log)
    offline = DualEncoder.from_pretrained("open_clip:tiny-rn/seen", local_files_only=True)
    assert offline.fingerprint == newest.fingerprint and offline.revision == moved and len(hub.log) == asked


def test_a_repository_of_the_hub(hub, load, folder_of, pictures):
    files = {file: Path(folder_of("eva"), file).read_bytes() for file in (CONFIG, WEIGHTS[0])}
    commit = hub.write("bob/eva", files)
    encoder = load_encoder("open_clip:hf-hub:bob/eva")
    assert encoder.revision == commit and encoder.fingerprint == load("eva").fingerprint
    hub.write("bob/eva", {CONFIG: b"{}"})
    assert load_encoder(f"open_clip:hf-hub:bob/eva@{commit}").fingerprint == encoder.fingerprint
    with pytest.raises(OSError, match="has no open_clip_config.json that describes a model"):
        load_encoder("open_clip:hf-hub:bob/eva")
    with pytest.raises(OSError, match="There is no repository 'bob/none'"):
        load_encoder("open_clip:hf-hub:bob/none")


def test_pickled_weights_are_not_read(tiny_tag, hub, folder_of, tmp_path):
    for tag in ("binary", "url"):
        with pytest.raises(OSError, match="pickled .*are not read: they can run code.*safetensors.torch.save_file"):
            load_encoder(f"open_clip:tiny-rn/{tag}")
    assert not hub.requests("GET", r"model\.bin")
    hub.write("bob/old", {CONFIG: Path(folder_of("vit"), CONFIG).read_bytes(), "open_clip_pytorch_model.bin": b"x"})
    with pytest.raises(OSError, match="hf-hub:bob/old' has no open_clip_model.safetensors in bob/old"):
        load_encoder("open_clip:hf-hub:bob/old")
    assert not hub.requests("GET", r"\.bin")
    (tmp_path / "w.pt").write_bytes(b"pickle")
    with pytest.raises(OSError, match="pickled"):
        load_encoder(f"open_clip:RN50/{tmp_path / 'w.pt'}")


def test_every_entry_of_the_table_is_readable_or_refused():
    """Configurations only: those that read texts as CLIP does are known, all others say why not."""
    import open_clip

    readable, refused = set(), set()
    for architecture, tag in open_clip.list_pretrained():
        try:
            config = ours._config(ours._find(f"open_clip:{architecture}/{tag}"))
        except ValueError as error:
            assert "does not read texts as CLIP does" in str(error)
            refused.add(architecture)
            continue
        readable.add(architecture)
        side = open_clip.get_model_config(architecture)["vision_cfg"]["image_size"]
        assert config.image_size == side and config.projection_dim > 0
    assert readable >= {"RN50", "RN101", "RN50x16", "ViT-B-16", "ViT-L-14", "ViT-H-14-378-quickgelu", "convnext_base"}
    assert readable >= {"EVA01-g-14", "EVA02-B-16", "EVA02-L-14", "EVA02-L-14-336", "EVA02-E-14-plus", "PE-Core-B-16"}
    assert {name.split("-")[0] for name in refused if "SigLIP" not in name and "CLIPA" not in name} == {
        *("roberta", "xlm", "nllb", "coca_ViT", "MobileCLIP", "MobileCLIP2", "ViT")
    }
    assert "ViT-B-16-SigLIP" in refused and "ViT-H-14-worldwide" in refused


# What is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:EVA02-B-61/x", r"no architecture 'EVA02-B-61'; the nearest are EVA02-B-16"),
        ("open_clip:RN50/laion", r"no weights 'laion' for RN50; it has openai, yfcc15m, cc12m"),
        ("open_clip:RN50/none.safetensors", "there is no file 'none.safetensors'"),
        ("open_clip:RN50", r"neither a folder, nor open_clip:ARCHITECTURE/TAG, nor open_clip:hf-hub:user/repo"),
        ("open_clip:./nowhere/at-all", "neither a folder"),
        ("open_clip:", "neither a folder"),
        ("open_clip:ViT-B-16-SigLIP/webli", "SigLIP and MetaCLIP 2 are in transformers"),
        ("open_clip:coca_ViT-B-32/laion2b_s13b_b90k", "multimodal_cfg"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises((ValueError, OSError), match=message):
        load_encoder(name)
    with pytest.raises((ValueError, OSError), match=message):
        load_processor(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision_cfg": {**tiny_open_clip.VIT, "width": 16}},
            "holds other weights than this model has: .* mismatch",
        ),
        ({"vision_cfg": {**tiny_open_clip.VIT, "wings": 2}}, "open_clip .* cannot build this model.*wings"),
        ({"vision_cfg": {**tiny_open_clip.EVA, "timm_model_name": "hf-hub:bob/x"}}, "is not one of timm's own"),
        ({"vision_cfg": {**tiny_open_clip.EVA, "timm_model_name": "vitt"}}, "cannot build this model.*vitt"),
        ({"vision_cfg": {**tiny_open_clip.VIT, "image_size": [32, 64]}}, "are not square"),
        ({"text_cfg": {**tiny_open_clip.TEXT, "hf_model_name": "roberta-base"}}, "hf_model_name='roberta-base'"),
        ({"text_cfg": {**tiny_open_clip.TEXT, "pool_type": "last"}}, "pool_type='last'"),
        ({"text_cfg": {**tiny_open_clip.TEXT, "vocab_size": 32000}}, "vocab_size=32000"),
        ({"embed_dim": None}, "has no 'embed_dim'"),
    ],
)
def test_configurations_that_cannot_be(change, message, folder_of, tmp_path):
    model_cfg = {**tiny_open_clip.MODELS["vit"], **change}
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": model_cfg}))
    (tmp_path / WEIGHTS[0]).symlink_to(Path(folder_of("vit"), WEIGHTS[0]))
    with pytest.raises(ValueError, match=message):
        DualEncoder.from_pretrained(f"open_clip:{tmp_path}")


def test_pictures_of_another_kind_are_refused(folder_of, tmp_path):
    content = json.loads(Path(folder_of("vit"), CONFIG).read_text())
    for change in ({"resize_mode": "longest"}, {"interpolation": "random"}):
        content["preprocess_cfg"] |= change
        (tmp_path / CONFIG).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="cannot be read"):
            load_processor(f"open_clip:{tmp_path}")


def test_other_models_names():
    with pytest.raises(ValueError, match="no model of open_clip: such names begin with 'open_clip:'"):
        OpenClipModel.from_pretrained("openai/clip-vit-base-patch16")


def test_the_core_never_imports_it():
    code = """
import importlib, pkgutil, sys, hf_transmiter
for module in pkgutil.walk_packages(hf_transmiter.__path__, "hf_transmiter."):
    if ".assets." not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print([name for name in ("open_clip", "timm") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
