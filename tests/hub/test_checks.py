"""Files that strangers wrote: JSON, headers, maps and pickles, each refused before it is used."""

import json
import math
import os
import pickle
import struct
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from hf_transmiter.algebra import check_semi_orthogonal
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.class_names import read_names
from hf_transmiter.data.vocabulary import load_vocabulary
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.hub import checks, rules
from hf_transmiter.hub.adapter_files import TeacherFacts
from hf_transmiter.hub.card_text import literal
from hf_transmiter.hub.checks import (
    KEY_PREFIX,
    adapter_shapes,
    check_adapter_tensors,
    check_json,
    check_tensors,
    load_json,
    parse_json,
    parse_yaml,
    printable,
    read_header,
    read_text,
    refuse_pickles,
)
from hf_transmiter.hub.scores import Score, cell_text
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.saved import load_teacher
from hf_transmiter.tuners import TransMiterConfig, inject, save_adapter
from hf_transmiter.tuners.prompts import PromptConfig
from hf_transmiter.tuners.transmiter.config import FORMS


CONFIGS = {
    kind.value.lower(): config
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if issubclass(config, PromptConfig)
}


ANCHORS = Anchors(("cat", "dog"), ("sky", "sea"))


def parts(rule: rules.Rule):
    """A rule and those of what is inside."""
    yield rule
    for inner in (rule.item, rule.name, *rule.keys.values()):
        if inner is not None:
            yield from parts(inner)


@pytest.mark.parametrize("kind", rules.KINDS)
def test_rules_say_what_they_want_and_what_to_do(kind):
    rule, remedy = rules.KINDS[kind]
    assert remedy.endswith(".")
    for part in parts(rule):
        assert part.words and set(part.required) <= set(part.keys)


def test_rules_agree_with_the_package():
    own = rules.METHODS["TRANSMITER"].keys
    assert set(own) <= set(TransMiterConfig(class_names=["cat"]).to_dict())
    assert all(own["form"].fits(form) for form in FORMS)
    kinds = {kind(class_names=["cat"]).peft_type.value for kind in CONFIGS.values()}
    assert set(rules.METHODS) == {"TRANSMITER", *kinds}
    assert set(rules.KINDS["scores"][0].item.keys) == {field.name for field in fields(Score)}
    assert set(rules.KINDS["teacher"][0].keys) == {field.name for field in fields(TeacherFacts)}
    assert set(rules.KINDS["anchors"][0].keys) == set(ANCHORS.to_dict())
    assert KEY_PREFIX == checks.KEY_PREFIX


@pytest.mark.parametrize("value", [True, "1", 1.0, math.nan, math.inf, -math.inf, 10**400, None, [1], {"a": 1}])
def test_kinds_of_values_are_not_mixed_up(value):
    """JSON knows one kind of number and no limits, Python takes True for 1."""
    row = dict.fromkeys(("method", "split", "metric"), "a") | {"std": 0, "seconds": 0, "seeds": 1}
    for key in ("seeds", "num_images", "value"):
        fine = value is None and key != "seeds" or key == "value" and value == 1.0 and value is not True
        if fine:
            check_json([row | {"value": 1} | {key: value}], "scores", "it")
            continue
        with pytest.raises(ValueError, match=rf"it: \[0\].{key} must be a (whole|finite) number"):
            check_json([row | {"value": 1} | {key: value}], "scores", "it")


def test_plain_json_is_read():
    content = {"names": ["dög", "🐈", 1, -2.5, 1e-400, None, True], "deep": [[[{}]]]}
    assert parse_json(json.dumps(content), "it") == content
    assert parse_json(json.dumps(content, ensure_ascii=False).encode(), "it") == content
    assert parse_json("[" * 30 + "]" * 30, "it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is not valid JSON"),
        ("{", "it is not valid JSON"),
        ("NaN", "NaN is not a number of JSON"),
        ("[-Infinity]", "-Infinity is not a number of JSON"),
        ("1e999", "1e999 is not a number of JSON"),
        ("9" * 5_000, "it is not valid JSON: .*4300"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ('"\\ud800"', "it is not valid JSON: .*surrogates not allowed"),
        ('{"\\udfff": 1}', "surrogates not allowed"),
        (b'"\xff"', "it is not valid JSON: .*utf-8"),
        ("\ufeff{}", "it is not valid JSON: .*BOM"),
        ("[" * 40 + "]" * 40, "nested more than 32 deep"),
        ("[" * 10**6, "nested more than 32 deep"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "nested more than 32 deep"),
        (" " * (checks.MAX_JSON_BYTES + 1), "it holds more than 8,388,608 bytes"),
    ],
    ids=range(15),
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text, "it")
    assert len(str(caught.value)) < 300


def test_json_files(tmp_path):
    path = tmp_path / "anchors.json"
    with pytest.raises(FileNotFoundError, match="anchors.json does not exist"):
        load_json(path)
    with pytest.raises(FileNotFoundError):
        load_json(tmp_path)
    path.write_text('{"task": ["cat"]}')
    assert load_json(path) == load_json(path, "anchors") == {"task": ["cat"]}
    with pytest.raises(ValueError, match=r"anchors.json must be a list of scores.*Write scores with write_scores"):
        load_json(path, "scores")
    with open(path, "wb") as file:
        file.truncate(2**40)  # a sparse file: nothing of it may be kept in memory
    with pytest.raises(ValueError, match="anchors.json holds more than 8,388,608 bytes"):
        load_json(path)


CONFIG = {
    "peft_type": "TRANSMITER",
    "class_names": ["cat", "dog"],
    "auxiliary_names": ["sky", "sea"],
    "templates": ["a photo of a {}."],
    "form": "mlp",
    "width": 5,
    "mlp_ratio": 2,
    "embed_dim": 3,
    "later_versions": {"may": "add"},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": []}, "class_names must be a list of 1 to 100,000 names"),
        ({"class_names": "cat"}, "class_names must be a list of 1 to 100,000 names, found 'cat'"),
        ({"class_names": ["cat", 3]}, r"class_names\[1\] must be a name of 1 to 1,000 characters, found 3"),
        ({"class_names": ["cat", "x" * 1001]}, r"class_names\[1\] must be a name of 1 to 1,000 characters"),
        ({"templates": ["a {} and a {}"]}, r"templates\[0\] must be a template .* with one {}"),
        ({"form": "lora"}, 'form must be "mlp" or "linear", found \'lora\''),
        ({"image_side": -1}, "image_side must be a whole number of 0 to 1,000,000, or null, found -1"),
        ({"text_side": "d"}, "text_side must be a whole number of 0 to 1,000,000, or null, found 'd'"),
        ({"width": 10**9}, "width must be a whole number of 1 to 1,000,000, or null, found 1000000000"),
        ({"width": 8.0}, "width must be a whole number"),
        ({"width": True}, "width must be a whole number"),
        ({"mlp_ratio": 65}, "mlp_ratio must be a whole number of 1 to 64"),
        ({"mlp_ratio": None}, "mlp_ratio must be a whole number of 1 to 64"),
        ({"embed_dim": 0}, "embed_dim must be a whole number of 1 to 65,536"),
        ({"seed": 2**64}, "seed must be a whole number of 64 bits"),
        ({"base_fingerprint": "A" * 64}, "base_fingerprint must be a SHA-256"),
        ({"provenance": []}, "provenance must be an object"),
        ({"revision": "../../refs"}, "revision must be the name of a branch, tag or commit"),
        ({"revision": "main\n"}, "revision must be the name of a branch"),
        ({"revision": "/etc"}, "revision must be the name of a branch"),
        ({"self": 1}, "must be the name of a setting, found 'self'"),
        ({"peft_type": "lora; rm"}, "peft_type must be the name of a PEFT method"),
        ({"peft_type": "COOP", "n_ctx": 10**9}, "n_ctx must be a whole number of 1 to 10,000, or null"),
        ({"peft_type": "LORA", "rank_pattern": [1]}, "rank_pattern must be an object, or null"),
    ],
)
def test_hostile_configurations(change, message):
    assert check_json(CONFIG, "adapter_config", "it") is CONFIG
    with pytest.raises(ValueError, match=f"{message}.*Restore the adapter_config.json"):
        check_json({**CONFIG, **change}, "adapter_config", "it")


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/3", "feature/a-b_c+d", "0" * 40])
def test_revisions(revision):
    check_json({**CONFIG, "revision": revision}, "adapter_config", "it")


def test_headers(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_header(path)
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64), "c": torch.tensor(1.0).bfloat16()}
    save_file(tensors, path, metadata={"format": "pt"})
    shapes = {"a": ("F32", (2, 3)), "b": ("I64", (4,)), "c": ("BF16", ())}
    assert read_header(path) == ({"format": "pt"}, shapes)
    whole = path.read_bytes()
    for data, message in (
        (b"", "damaged or not a map"),
        (b"PK\3\4 a zip file", "its header would have"),
        (whole[:-1], "damaged or not a map"),
        (whole + b"\0", "damaged or not a map"),
        (struct.pack("<Q", checks.MAX_HEADER_BYTES + 1) + whole[8:], "header would have 8,388,609 bytes, at most"),
        (whole.replace(b"[2,3]", b"[9,3]"), "damaged or not a map"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"x.safetensors is .*{message}.*; draw another\.") as caught:
            read_header(path, "map", "draw another")
        assert len(str(caught.value)) < 600


def test_expected_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    expected = {"matrix": ("m", "k"), "mean": ("m",), "note": (2,)}
    good = {"matrix": torch.zeros(3, 4), "mean": torch.zeros(3).half(), "note": torch.zeros(2)}

    def check(tensors):
        save_file(tensors, path)
        check_tensors(path, expected, optional=("note",), what="map")

    check(good)
    check({key: good[key] for key in ("matrix", "mean")})
    for change, message in (
        ({"mean": torch.zeros(4)}, r"mean must have the shape \(3\), it has \(4,\)"),
        ({"matrix": torch.zeros(3)}, r"matrix must have the shape \(m, k\), it has \(3,\)"),
        ({"matrix": torch.zeros(3, 0)}, "matrix must have the shape"),
        ({"note": torch.zeros(3)}, r"note must have the shape \(2\)"),
        ({"mean": torch.zeros(3, dtype=torch.int32)}, "mean has the dtype I32, it must be one of F64, F32"),
        ({"more": torch.zeros(1)}, r"it holds the unknown \['more'\]"),
    ):
        with pytest.raises(ValueError, match=f"damaged or not a map: {message}.*; fetch it again"):
            check(good | change)
    with pytest.raises(ValueError, match=r"it lacks \['mean'\]"):
        check({"matrix": torch.zeros(3, 4)})


def test_nothing_is_allocated_for_empty_tensors(tmp_path):
    """A shape with a zero in it has no bytes, so that a file of a few bytes can claim any other size."""
    text = b'{"logits":{"dtype":"F32","shape":[1000000000000000,0],"data_offsets":[0,0]}}'
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match="logits must have the shape"):
        check_tensors(tmp_path / "x.safetensors", {"logits": ("N", "C")})


@pytest.fixture(scope="module")
def saved(model_dir, tmp_path_factory):
    """``saved(form)``: folder with a TransMiter adapter on a tiny CLIP."""
    encoder, folders = DualEncoder.from_pretrained(model_dir("clip")), {}

    def get(form: str) -> Path:
        if form not in folders:
            options = {"mlp": {"width": 6, "mlp_ratio": 2}, "both sides": {"image_side": 48, "text_side": 64}}
            options = {"form": form if form in FORMS else "linear", **options.get(form, {})}
            classifier = AnchorClassifier(encoder, ANCHORS)
            classifier.add_adapter(TransMiterConfig.for_anchors(ANCHORS, **options))
            folders[form] = tmp_path_factory.mktemp(form)
            classifier.save_pretrained(folders[form])
        return folders[form]

    return get


@pytest.mark.parametrize("form", [*FORMS, "both sides"])
def test_shapes_of_an_adapter_are_those_that_are_saved(saved, form):
    config = load_json(saved(form) / "adapter_config.json", "adapter_config")
    weights = saved(form) / "adapter_model.safetensors"
    assert adapter_shapes(config) == {name: shape for name, (_, shape) in read_header(weights)[1].items()}
    check_adapter_tensors(weights, config)
    check_adapter_tensors(weights, config | {"embed_dim": None})
    for change in (
        {"class_names": ["cat"]},
        {"auxiliary_names": []},
        {"embed_dim": 4},
        {"form": "linear" if form == "mlp" else "mlp"},
        {"image_side": 17, "form": "linear"},
        {"text_side": 2, "form": "linear"},
    ):
        with pytest.raises(ValueError, match="load the weights that were saved with this configuration"):
            check_adapter_tensors(weights, config | change)
    if form == "mlp":
        for change in ({"width": 10**6}, {"mlp_ratio": 64}, {"width": None}):
            with pytest.raises(ValueError, match="must have the shape"):
                check_adapter_tensors(weights, config | change)


def copied(folder: Path, target: Path, **changes) -> Path:
    """A copy of an adapter with an edited configuration."""
    for file in folder.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize(
    "changes", [{"width": 10**6}, {"width": 10**9}, {"mlp_ratio": 64}, {"embed_dim": 65_536}], ids=str
)
def test_an_adapter_that_claims_to_be_huge(saved, encoder, tmp_path, changes):
    folder = copied(saved("mlp"), tmp_path, **changes)
    for load in (
        lambda: AnchorClassifier.from_pretrained(folder, encoder),
        lambda: PeftModel.from_pretrained(encoder.model, folder),
    ):
        with pytest.raises(ValueError, match="must have the shape|must be a whole number"):
            load()


def tuned(encoder: DualEncoder, config, folder: Path) -> Path:
    inject(encoder.model, config)
    save_adapter(encoder.model, folder)
    return folder


@pytest.mark.parametrize("method", [*CONFIGS, "ivlp without image prompts"])
def test_prompts_are_as_large_as_their_weights(model_dir, tmp_path, method):
    encoder = DualEncoder.from_pretrained(model_dir("clip"))
    kind, options = CONFIGS[method.split()[0]], {"class_names": ["cat", "dog"], "init_phrase": None, "n_ctx": 2}
    options |= {name: 1 for name in ("text_depth", "vision_depth", "depth") if hasattr(kind, name)}
    options |= {"vision_depth": 0} if "without" in method else {}
    folder = tuned(encoder, kind(**options), tmp_path)
    weights, config = folder / "adapter_model.safetensors", load_json(folder / "adapter_config.json", "adapter_config")
    check_adapter_tensors(weights, config)
    changes = {"n_ctx": 3, "n_vision": 5, "class_specific": True}
    if "without" in method:  # as many vectors as one likes in no layer
        changes.pop("n_vision")
    for key in changes.keys() & config.keys():
        with pytest.raises(ValueError, match="is not the adapter of its adapter_config.json"):
            check_adapter_tensors(weights, config | {key: changes[key]})


def test_lora_is_as_large_as_its_weights(encoder, model_dir, tmp_path):
    folder = tuned(encoder, LoraConfig(r=3, target_modules=["q_proj"]), tmp_path)
    weak = DualEncoder.from_pretrained(model_dir("clip"))
    assert load_teacher(str(folder), weak)
    for changes in ({"r": 10**9}, {"rank_pattern": {"layers.0": 10**9}}):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match="r is 1,000,000,000 there, here it is 3"):
            load_teacher(str(folder), weak)
        (folder / "adapter_config.json").write_text(json.dumps(config))
    # A narrow tensor is cheap to send and must not vouch for a rank.
    save_file(
        load_file(folder / "adapter_model.safetensors") | {"x.lora_A.weight": torch.zeros(1000, 1)}, folder / "a"
    )
    with pytest.raises(ValueError, match="r is 1,000 there, here it is 3"):
        check_adapter_tensors(folder / "a", config | {"r": 1000})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "FOO"}, "has the peft_type 'FOO', which PEFT does not know"),
        ({"target_modules": 5}, "describes no adapter for this model"),
        ({"target_modules": ["nowhere"]}, "describes no adapter for this model"),
        ({"lora_alpha": "much"}, "describes no adapter for this model"),
        ({"r": "much"}, "describes no adapter for this model"),
        ({"peft_type": "VERA"}, "describes no adapter for this model"),
    ],
    ids=str,
)
def test_a_strangers_settings_of_peft(encoder, model_dir, tmp_path, changes, message):
    folder = tuned(encoder, LoraConfig(r=3, target_modules=["q_proj"]), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=f"adapter_config.json of '.*{folder.name}' {message}"):
        load_teacher(str(folder), DualEncoder.from_pretrained(model_dir("clip")))


class Exploit:
    """Unpickled, it makes a folder."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("beside", [True, False])
def test_pickles_are_never_read(saved, encoder, tmp_path, beside):
    folder, made = tmp_path / "adapter", tmp_path / "made"
    folder.mkdir()
    copied(saved("mlp"), folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Exploit(made)))
    if not beside:
        (folder / "adapter_model.safetensors").unlink()
    for load in (
        lambda: AnchorClassifier.from_pretrained(folder, encoder),
        lambda: PeftModel.from_pretrained(encoder.model, folder),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=r"'adapter_model.bin'.* run the code in them"):
            load()
    tuned(encoder, LoraConfig(r=3, target_modules=["q_proj"]), folder)
    if not beside:
        (folder / "adapter_model.safetensors").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="adapter_model"):
        load_teacher(str(folder), encoder)
    assert not made.exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())
    assert made.exists()  # it would have worked


def test_which_files_are_pickles(tmp_path):
    refuse_pickles("user/adapter")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "pt"):
        (tmp_path / name).write_text("x")
    refuse_pickles(tmp_path)
    for name in ("a.bin", "b.PKL", "optimizer.pt", "c.pth", "d.ckpt", "e.pickle", "f.joblib"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match=f"holds '{name}': such files run the code .* Delete them"):
            refuse_pickles(tmp_path)
        (tmp_path / name).unlink()


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_orthogonal_maps(rows, columns, rank, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    full = min(rows, columns)
    rank = min(rank, full)
    matrix = (u[:, :rank] @ vh[:rank]).to(dtype)
    assert check_semi_orthogonal(matrix, "it") is matrix
    if rank == full:
        check_semi_orthogonal(matrix, "it", full_rank=True)
    else:
        with pytest.raises(ValueError, match="it is not orthogonal"):
            check_semi_orthogonal(matrix, "it", full_rank=True)
    for wrong in (1.1 * matrix, torch.full_like(matrix, torch.nan)):
        with pytest.raises(ValueError, match="it is not orthogonal; the file was changed or damaged"):
            check_semi_orthogonal(wrong, "it")


@pytest.mark.parametrize("shape", [(200_000, 1), (1, 200_000)])
def test_the_check_of_a_map_takes_no_more_memory_than_the_map(shape):
    """The larger Gram matrix would have 40,000,000,000 entries."""
    check_semi_orthogonal(torch.nn.functional.normalize(torch.ones(shape).flatten(), dim=0).reshape(shape), "it")


@pytest.mark.parametrize(
    ("model_cfg", "said"),
    [
        ({"embed_dim": 512, "vision_cfg": 3, "text_cfg": {}}, "model_cfg.vision_cfg must be an object, found 3"),
        ({"embed_dim": 10**9, "vision_cfg": {}, "text_cfg": {}}, "embed_dim must be a whole number of 1 to 16,384"),
        ({"vision_cfg": {"layers": [9] * 99}}, "layers must be a whole number of 1 to 1,000, or a list of at most 16"),
    ],
)
def test_models_of_open_clip_are_not_built_from_anything(model_cfg, said):
    with pytest.raises(ValueError, match=said):
        check_json({"model_cfg": model_cfg}, "open_clip_config", "here")
    resnet = {"width": 64, "layers": [3, 4, 6, 3], "patch_size": None, "image_size": 224}
    good = {"embed_dim": 1024, "vision_cfg": resnet, "text_cfg": {"width": 512, "heads": 8, "layers": 12}}
    check_json({"model_cfg": good}, "open_clip_config", "here")


def test_yaml_is_measured_before_it_is_expanded():
    """417 bytes stood for 4 GB."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    assert len(bomb) < 500
    with pytest.raises(ValueError, match="it is not valid YAML: its aliases stand for more than 100,000 values"):
        parse_yaml(bomb, "it")
    merged = bomb.replace("[x, x, x, x, x, x, x, x, x]", "{x: 1}").replace("[", "{<<: [").replace("]", "]}")
    with pytest.raises(ValueError, match="its aliases stand for more"):
        parse_yaml(merged, "it")
    # What people write.
    assert parse_yaml("a: &few {x: 1}\nb: *few\nc: {<<: *few, y: 2}", "it")["c"] == {"x": 1, "y": 2}
    assert parse_yaml("", "it") is None and parse_yaml("1e-3", "it") == "1e-3"
    assert parse_yaml("- café".encode(), "it") == ["café"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "an alias stands inside what it stands for"),
        ("a: 1\nb: 2\na: 3", "the key 'a' is there twice"),
        ("[" * 40 + "]" * 40, "nested more than 32 deep"),
        ("[" * 500, "nested more than 32 deep"),
        ("{[1]: 2}", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ("a: 2024-99-99", "not valid YAML: month must be"),
        (b"\xff\xfe\xfa", "not valid YAML"),
        ("x" * (8 * 2**20 + 1), "holds more than 8,388,608 bytes"),
    ],
    ids=range(10),
)
def test_yaml_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text, "it")
    assert str(caught.value).startswith("it ") and "\n" not in str(caught.value)


def test_texts_of_other_encodings_are_named(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("café\n".encode("utf-8-sig"))
    assert read_text(path) == "café\n"
    path.write_bytes("café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"names.txt is no text in UTF-8 \(.*byte 3\): save it as UTF-8"):
        read_text(path)
    with pytest.raises(ValueError, match="names.txt is no text in UTF-8"):
        read_names([str(path)])
    with pytest.raises(ValueError, match="names.txt is no text in UTF-8"):
        load_vocabulary(path)
    with pytest.raises(ValueError, match="there is no class name in ','"):
        read_names([","])


def test_what_a_terminal_would_obey_is_shown():
    assert printable("a\x1b[2J\u202e\u2066\x9b\r\x00\ud800") == "a\\x1b[2J\\u202e\\u2066\\x9b\\r\\x00\\ud800"
    for text in ("café ☕ 日本語", "a\tb\nc", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "👩\u200d🔬"):
        assert printable(text) == text
    assert cell_text("a|b\n<i>c\x1b\u202e") == "a\\|b &lt;i>c\\x1b\\u202e"
    assert literal("a\u202eb") == '"a\\u202eb"'
