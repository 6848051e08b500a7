"""Cards: what they say is what the files say, whoever wrote those; what people wrote stays."""

import html
import json
import math
import re
import shutil
from dataclasses import replace
from functools import reduce
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from markdown_it import MarkdownIt
from peft import LoraConfig
from safetensors.torch import save_file

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.hub.card import MARKER, METRIC_NAMES, read_card, write_card
from hf_transmiter.hub.card_text import NamedDataset, NamedModel, argument, escape, literal, one_line
from hf_transmiter.hub.provenance import library_versions
from hf_transmiter.hub.repo import SANDBOX, is_hub_id
from hf_transmiter.hub.scores import Score, write_scores
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.extract import extract
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import TuningConfig


NAMES = ["cat", "dog", "car"]
STRONG = {"name": "openai/clip-vit-large-patch14", "revision": "32bd64288804d66eefd0ccbe215aa642df71cc41"}
FINGERPRINT = "c0ffee" + "0" * 58
EXTRACTED = {
    "step": "extract",
    "solver": "discriminant",
    "weak": {"name": "openai/clip-vit-base-patch32", "revision": "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
             "fingerprint": "ab" * 32},
    "num_images": 1880,
    "dataset": "mteb/dtd@0b1c2d (train)",
    "dataset_fingerprint": "93b0a1e12db929f2",
    "teacher": {"method": "lora", "shots": 16, "seed": 3, "dataset": "mteb/dtd"},
    "shrinkage": 30.0,
}  # fmt: skip
TRANSFERRED = {
    "step": "transfer",
    "strong": {**STRONG, "fingerprint": FINGERPRINT},
    "bridge": {"space": "embedding", "source": "images", "num_pairs": 5000, "alignment": 0.8123, "beta": 0.0},
    "extracted": EXTRACTED,
    "zero_shot_weight": 0.0,
    "refit_on": 1880,
    "teacher_logits": True,
    "versions": {"torch": "2.13.0", "hf_transmiter": "0.1.0"},
}
SCORES = [
    Score("zero-shot strong", "test", "accuracy", 55.0, dataset="mteb/dtd@0b1c2d", num_images=1880),
    Score("this model", "test", "accuracy", 71.256, 0.444, seeds=3, dataset="mteb/dtd@0b1c2d", num_images=1880),
    Score("this model", "test", "novel", 60.0, dataset="mteb/dtd@0b1c2d", num_images=1880),
    Score("this model", "test", "accuracy", 40.0, dataset="/home/me/my photos", num_images=12),
    Score("this model", "elsewhere", "accuracy", 50.0),
    Score("this model", "empty", "accuracy", math.nan, dataset="mteb/dtd", num_images=3),
]


def write_adapter(folder: Path, names=NAMES, provenance=TRANSFERRED, dtype=torch.float32, **changes) -> Path:
    """A small adapter as `save_pretrained` writes it, on a model that nobody needs to load."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "TRANSMITER", "form": "linear", "class_names": list(names), "auxiliary_names": [],
        "templates": ["a photo of a {}."], "anchors_fingerprint": "12" * 32, "peft_version": "0.21.2",
        "base_model_name_or_path": STRONG["name"], "revision": STRONG["revision"], "base_fingerprint": FINGERPRINT,
        "provenance": provenance, **changes,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"class_vectors": torch.zeros(len(names), 4, dtype=dtype)}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter's repository with every optional file."""
    folder = write_adapter(tmp_path / "dtd-l14")
    write_scores(folder / "scores.json", SCORES)
    return folder


def written(folder: Path, **facts) -> ModelCard:
    return ModelCard.load(write_card(folder, **facts))


class Seen(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, card: ModelCard):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(MarkdownIt("commonmark").enable("table").render(card.text))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


# ---- what a card says ----------------------------------------------------------------------------------------------


def test_metadata_of_an_adapter(folder):
    data = written(folder).data
    assert data.base_model == STRONG["name"] and data.base_model_relation == "adapter"
    assert (data.library_name, data.pipeline_tag) == ("hf-transmiter", "zero-shot-image-classification")
    assert data.tags == ["peft", "clip", "transmiter", "weak-to-strong"]
    assert data.datasets == ["mteb/dtd"] and data.metrics == ["accuracy"]
    assert data.license is None and "license" not in data.to_yaml()


def test_the_model_index_has_its_own_scores_on_known_data_only(folder):
    data = written(folder, name="me/dtd-l14").data
    assert data.model_name == "me/dtd-l14"
    found = {(r.dataset_type, r.metric_name, r.dataset_split): r for r in data.eval_results}
    assert set(found) == {
        ("mteb/dtd", "accuracy, %", "test"),
        ("mteb/dtd", "accuracy on novel classes, %", "test"),
        ("my photos", "accuracy, %", "test"),
    }
    first = found["mteb/dtd", "accuracy, %", "test"]
    assert (first.metric_value, first.dataset_revision, first.metric_type) == (71.26, "0b1c2d", "accuracy")
    assert first.metric_args == {"seeds": 3, "num_images": 1880, "std": 0.44}
    assert found["my photos", "accuracy, %", "test"].metric_args == {"seeds": 1, "num_images": 12}


def test_a_table_of_one_method_is_about_the_artefact(folder):
    write_scores(folder / "scores.json", [Score("model", "test", "accuracy", 71.0, dataset="mteb/dtd", num_images=9)])
    assert written(folder).data.eval_results[0].metric_value == 71.0
    assert "| this model | 71.0 |" in (folder / "README.md").read_text()
    write_scores(folder / "scores.json", [Score(m, "test", "accuracy", 71.0, dataset="a/b") for m in ("refit", "EFT")])
    assert written(folder).data.eval_results is None  # nothing says which of them it is


def test_the_text_of_an_adapter(folder):
    text = written(folder).text
    for words in (
        "[openai/clip-vit-large-patch14](https://huggingface.co/openai/clip-vit-large-patch14) at `32bd64288804`",
        "with what LoRA in the image tower (16 labelled images per class of mteb/dtd, seed 3) taught",
        "a bridge in embedding space, built from images (5,000 pairs), and refitted to 1,880 unlabelled images",
        "3: cat, dog, car (all in `adapter_config.json`)",
        "| zero-shot strong | 55.0 |",
        "71.3 ± 0.4** (+16.3)",
        "(test), 1,880 images",
        "images of a data set that is not stated",
        "its fingerprint `93b0a1e12db929f2`",
        "| its fingerprint | `c0ffee0000000000` |",
        "alignment 0.812",
        "hf_transmiter 0.1.0, torch 2.13.0",
        "| license | not stated |",
        'revision="32bd64288804d66eefd0ccbe215aa642df71cc41"',
        "--weak openai/clip-vit-base-patch32",
        "--dataset mteb/dtd@0b1c2d",
        "arXiv:2508.08604",
        "calibration: whether 0.8 means right in 8 of 10 cases: not measured",
    ):
        assert words in text, words
    assert "accuracy: not measured" not in text and "did not see: not measured" not in text  # both were
    assert "/home/me" not in text


def test_which_names_can_be_asked(folder):
    """An image side takes any, class vectors their own."""
    for sides, opened, said in (
        ({}, False, "| form | one vector per class: nothing is added"),
        ({"image_side": None, "text_side": 4}, False, "| form | one vector per class: nothing is added"),
        ({"image_side": 4}, True, "| form | a linear map of image embeddings: next to nothing is added"),
        ({"image_side": 8, "text_side": 4}, True, "map of image embeddings and one vector per class: next to"),
        ({"form": "mlp"}, False, "| form | as published: an MLP"),
    ):
        text = written(write_adapter(folder, **sides)).text
        assert said in text and ("The class names are fixed." in text) is not opened
        assert ('model.predict("photo.jpg", class_names=["a name", "another name"])' in text) is opened
        assert ("Any class names can be asked." in text) is opened
        assert ("Those that it was made for have vectors" in text) is (opened and "text_side" in sides)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/home/me/models/clip-l14", "the local model `clip-l14`"),
        ("C:\\Users\\me\\clip-l14", "the local model `clip-l14`"),
        ("clip-l14", "the local model `clip-l14`"),
        ("sandbox:strong", "An adapter for `sandbox:strong`"),
        (None, "a model that is not stated"),
        ("here/model", "the local model `model`"),
    ],
)
def test_a_model_that_is_not_on_the_hub_is_no_base_model(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    card = written(write_adapter(tmp_path / "a", base_model_name_or_path=name, revision=None))
    assert card.data.base_model is None and "base_model_relation" not in card.data
    assert said in card.text and "/home" not in str(card) and "Users" not in str(card)
    assert "No base model stands in this page's metadata" in card.text


@pytest.mark.parametrize("damaged", [False, True])
def test_a_missing_or_damaged_file_is_a_fact_that_is_not_known(folder, damaged, caplog):
    file = folder / "scores.json"
    file.write_bytes(b"\xff\xfe{[") if damaged else file.unlink()
    text = written(folder).text
    assert "could not be written" not in text and MARKER in text
    assert "Nothing: there are no scores beside the weights" in text
    assert (f"{file.name} is left out of the card" in caplog.text) == damaged
    assert "- accuracy: not measured" in text and "model-index" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"step": "extract"},
        {"step": "transfer"},
        {"step": "transfer", "bridge": [], "extracted": "no", "strong": 3, "refit_on": "many", "versions": ["x"]},
        {"step": "extract", "teacher": ["lora"], "weak": [], "num_images": -3, "settings": 7, "dataset": {}},
        {"step": ["a"], "before": {"step": {}}},
        {"step": "label_tune", "num_images": 32, "before": EXTRACTED},
    ],
)
def test_facts_that_were_not_noted_are_not_stated(tmp_path, provenance):
    config = {"base_model_name_or_path": None, "revision": None, "base_fingerprint": None, "anchors_fingerprint": None}
    card = written(write_adapter(tmp_path / "a", provenance=provenance, **config, peft_version=None))
    assert "not stated" in card.text and "could not be written" not in card.text and "None" not in card.text
    assert ("It was then tuned on 32 labelled images." in card.text) == (provenance.get("step") == "label_tune")


def test_where_a_plain_model_is_better_that_is_said_first(folder):
    rows = {"zero-shot strong": (75.04, 60.0), "this model": (71.26, 60.04), "zero-shot | `x`": (71.4, 10.0)}
    scores = [
        Score(method, "te|st", metric, value, dataset="mteb/dtd")
        for method, values in rows.items()
        for metric, value in zip(("accuracy", "novel"), values, strict=True)
    ]
    unlike = Score("zero-shot strong", "test", "ece", 90.0, dataset="mteb/dtd")
    write_scores(folder / "scores.json", [*scores, unlike, replace(unlike, metric="accuracy", dataset="me/other")])
    first = written(folder).text.split("\n\n")[1]
    assert html.unescape(first).splitlines() == [
        "> [!WARNING]",
        "> This model is worse than zero-shot strong on te|st: accuracy 71.3 % against 75.0 %.",
        "> This model is worse than zero-shot | `x` on te|st: accuracy 71.3 % against 71.4 %.",
    ]
    assert "|" not in first and "`" not in first
    as_good = [replace(score, value=75.0) for score in scores if score.metric == "accuracy"]
    write_scores(folder / "scores.json", as_good)
    first = written(folder).text.split("\n\n")[1]
    assert "> This model is no better than zero-shot strong on te" in first
    write_scores(folder / "scores.json", SCORES)
    assert "WARNING" not in written(folder).text


def test_a_gain_is_told_only_where_it_was_measured(folder):
    """Of an upgraded adapter: what it is, and no word of "better" without scores of the model as it is."""
    (folder / "scores.json").unlink(missing_ok=True)
    assert "Whether it is better than its base model as it is was not measured." in written(folder).text
    own = Score("this model", "test", "accuracy", 71.26, dataset="mteb/dtd")
    write_scores(folder / "scores.json", [own, replace(own, method="tuned weak", value=60.0)])
    assert "was not measured." in written(folder).text
    for value, gain in ((65.0, "+6.3"), (75.0, "-3.7")):
        write_scores(folder / "scores.json", [own, replace(own, method="zero-shot strong", value=value)])
        told = f"It scores 71.3 % on test, against {value:.1f} % of its base model as it is ({gain} points)."
        assert told in written(folder).text


def test_versions_are_those_of_the_libraries():
    found = library_versions()
    assert found["torch"] == version("torch") and found["peft"] == version("peft")
    assert {"python", "hf_transmiter", "transformers", "datasets"} < set(found)


# ---- bridges and tuned models --------------------------------------------------------------------------------------


def make_bridge(**changes) -> Bridge:
    weak, strong = ModelId("me/weak", "a1", "aa" * 32), ModelId(STRONG["name"], "b2", FINGERPRINT)
    facts = {"source": "text", "num_pairs": 1024, "alignment": 0.81234, "anchors": Anchors((), ("cat", "dog"))}
    return Bridge(
        "embedding", torch.eye(4, 3), 0.9, torch.zeros(4), torch.zeros(3), strong, weak, **{**facts, **changes}
    )


def test_card_of_a_bridge(tmp_path):
    make_bridge(held_out=0.7777, held_out_on="names").save(tmp_path / "b" / "bridge.safetensors")
    card = written(tmp_path / "b", name="me/b32-l14")
    assert card.data.base_model == STRONG["name"] and card.data.pipeline_tag is None
    assert "bridge" in card.data.tags and "peft" not in card.data.tags
    for words in (
        "from [me/weak](https://huggingface.co/me/weak) at `a1` to [openai/clip-vit-large-patch14]",
        "**Alignment 0.812 on names**",
        "On names that were held out, a bridge from the others is aligned by 0.778.",
        "text, 1,024 pairs",
        "| names | 2: cat, dog |",
        "what an adapter that crosses it is worth: not measured",
        'Bridge.from_pretrained("me/b32-l14")',
        "| composed | no |",
    ):
        assert words in card.text, words


def test_a_card_says_what_an_alignment_is_of(tmp_path):
    make_bridge(held_out=0.25, held_out_on="images").save(tmp_path / "bridge.safetensors")
    assert "On images, none of which it was built from, it is aligned by 0.250." in written(tmp_path).text
    made = make_bridge(held_out=0.25, held_out_on="images", alignment=None, through=("me/between",))
    made.save(tmp_path / "composed" / "bridge.safetensors")
    assert "**Alignment 0.250 on images**" in written(tmp_path / "composed").text


def test_card_of_a_bridge_with_scores_keeps_them_off_the_leaderboards(tmp_path):
    make_bridge().save(tmp_path / "bridge.safetensors")
    write_scores(tmp_path / "scores.json", [Score("adapter over it", "test", "accuracy", 66.0, dataset="mteb/dtd")])
    card = written(tmp_path)
    assert card.data.eval_results is None and "| adapter over it | 66.0 |" in card.text
    assert "is worth: not measured" not in card.text and "not built from: not measured" in card.text
    assert "this model" not in card.text


def test_card_of_a_composed_bridge_in_logit_space(tmp_path):
    names = Anchors(("cat", "dog"))
    options = {"space": "logit", "matrix": torch.eye(2), "mean_strong": torch.zeros(2), "mean_weak": torch.zeros(2)}
    made = make_bridge()
    for key, value in {**options, "anchors": names, "beta": 500.0, "through": ("me/between",)}.items():
        setattr(made, key, value)
    made.alignment, made.source = None, "images"
    made.save(tmp_path / "bridge.safetensors")
    text = written(tmp_path).text
    assert "**Alignment not measured**" in text and "their logits over the same names" in text
    assert "yes, through [me/between](https://huggingface.co/me/between)" in text
    assert "| pull towards the identity (β) | 500.000 |" in text and "--compose path/to/bridge-2 --output" in text
    assert "| data set | not stated |" in text


@pytest.fixture
def tuned_folder(encoder, make_dataset, tmp_path):
    def make(method: str, name: str = "tuned") -> Path:
        config = TuningConfig(shots=2, epochs=1, batch_size=4, seed=5)
        encoder.name_or_path = "me/tiny"
        tuned = tune(encoder, make_dataset(), method, config=config, progress=False)
        tuned.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def test_card_of_a_prompt(tuned_folder):
    card = written(tuned_folder("contcoop"))
    assert card.data.tags == ["peft", "clip", "prompt-learning", "contcoop"] and card.data.base_model == "me/tiny"
    for words in ("A ContCoOp prompt for [me/tiny]", "2 labelled images per class (6 in all)", "3: cat, dog, car",
                  "arxiv.org/abs/2412.20895", "seed `5`", "attach(",
                  " --seed 5 ", " --method contcoop ", " --shots 2 ",
                  " --adapter 'init_phrase=a photo of a' "):  # fmt: skip
        assert words in card.text, words


def test_card_of_a_lora_without_what_tune_notes(tuned_folder):
    folder = tuned_folder("lora")
    text = written(folder).text
    assert (
        "LoRA in the image tower for [me/tiny]" in text
        and "r `8`" in text
        and " --adapter r=8 " in text
        and "attach(" not in text
    )
    (folder / "teacher.json").unlink()
    (folder / "README.md").unlink()
    card = written(folder)
    assert (
        "A PEFT adapter (LORA) for the local model `clip-" in card.text
        and "How it was tuned is not stated." in card.text
    )
    assert "## Class names\n\nNot stated." in card.text and card.data.tags == ["peft", "clip", "lora"]
    assert "load_classifier" not in card.text and "hf-transmiter tune" not in card.text


def test_a_plain_peft_config_is_enough(tmp_path):
    LoraConfig(base_model_name_or_path="openai/clip-vit-base-patch32").save_pretrained(tmp_path)
    assert read_card(tmp_path).kind == "tuned"
    assert written(tmp_path).data.base_model == "openai/clip-vit-base-patch32"


def test_saving_writes_the_card(encoder, make_dataset, tmp_path, make_images):
    weak = encoder
    adapter = extract(weak, torch.randn(12, 3), make_dataset(), class_names=NAMES, progress=False)
    adapter.save_pretrained(tmp_path / "a")
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert "3: cat, dog, car" in card.text and "12 unlabelled images" in card.text
    assert str(Path(weak.name_or_path).parent) not in str(card)
    assert read_card(tmp_path / "a").kind == "adapter"
    adapter.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text().replace("# b\n", "# a\n").replace('"b"', '"a"') == str(card)


# ---- what people wrote ---------------------------------------------------------------------------------------------


def test_metadata_that_people_give_survives(folder):
    write_card(folder, name="me/dtd", license="mit", datasets=["me/own"], tags=["texture"], language="en")
    again = written(folder, new_version="me/dtd-l14", tags=["more", "clip"])
    assert (again.data.license, again.data.language, again.data.new_version) == ("mit", ["en"], "me/dtd-l14")
    assert again.data.datasets == ["me/own", "mteb/dtd"]
    assert again.data.tags == ["peft", "clip", "transmiter", "weak-to-strong", "texture", "more"]
    assert "There is a newer version: [me/dtd-l14](https://huggingface.co/me/dtd-l14)" in again.text
    assert "| license | mit |" in again.text and again.text.count(MARKER) == 1
    assert "# me/dtd\n" in again.text  # the name stands in the model index
    before = (folder / "README.md").read_bytes()
    write_card(folder)
    assert (folder / "README.md").read_bytes() == before
    assert written(folder, license="apache-2.0").data.license == "apache-2.0"


PEOPLE = """---
license: cc-by-4.0
library_name: peft
base_model: /home/me/clip
tags:
- base_model:adapter:/home/me/clip
- mine
widget:
- src: cat.jpg
model-index:
- name: mine
  results:
  - task:
      type: zero-shot-image-classification
    dataset:
      name: other
      type: me/other
    metrics:
    - type: accuracy
      value: 12.3
---
# My adapter

Written with *care*.\r
"""


def test_a_card_of_people_keeps_its_text(folder):
    (folder / "README.md").write_bytes(PEOPLE.encode())
    card = written(folder, new_version="me/newer")
    assert card.text == PEOPLE.split("---\n")[-1]
    data = card.data
    assert (data.license, data.library_name, data.base_model) == ("cc-by-4.0", "hf-transmiter", STRONG["name"])
    assert "mine" in data.tags and not any(tag.startswith("base_model:") for tag in data.tags)
    assert data.new_version == "me/newer" and data.widget == [{"src": "cat.jpg"}]
    assert {(r.dataset_type, r.metric_value) for r in data.eval_results} >= {("me/other", 12.3), ("mteb/dtd", 71.26)}
    before = (folder / "README.md").read_bytes()
    write_card(folder)
    assert (folder / "README.md").read_bytes() == before


def test_what_people_state_is_not_overruled(folder):
    text = "---\npipeline_tag: image-classification\nbase_model: me/finer\nlibrary_name: own\n---\nMine.\n"
    (folder / "README.md").write_text(text)
    data = written(folder).data
    assert (data.pipeline_tag, data.base_model, data.library_name) == ("image-classification", "me/finer", "own")


def test_a_form_that_peft_left_is_no_card(folder):
    ModelCard.from_template(ModelCard("---\nlicense: mit\nlibrary_name: peft\n---\n").data).save(folder / "README.md")
    assert "[More Information Needed]" in (folder / "README.md").read_text()
    card = written(folder)
    assert MARKER in card.text and "More Information" not in card.text
    assert (card.data.license, card.data.library_name) == ("mit", "hf-transmiter")


@pytest.mark.parametrize("metadata", ["tags: [1, null, [x]]", "license: [mit]", "new_version: 7",
                                      "model-index: 3", "model-index: [{name: 4}]", "datasets: ''"])  # fmt: skip
def test_odd_metadata_is_left_out(folder, metadata):
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n{MARKER}\n")
    card = written(folder)
    assert "could not be written" not in card.text and len(card.text) > 1000
    assert card.data.tags == ["peft", "clip", "transmiter", "weak-to-strong"]


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_card_that_cannot_be_made_costs_nothing(folder, caplog):
    (folder / "adapter_config.json").write_text("{damaged")
    text = written(folder).text
    assert "Its card could not be written" in text and "the card of" in caplog.text
    assert yaml.safe_load((folder / "README.md").read_text().split("---")[1])["library_name"] == "hf-transmiter"
    before = (folder / "README.md").read_bytes()
    write_adapter(folder)
    assert "could not be written" not in written(folder).text  # mended with the next save
    for broken in (b"---\nlicense: [\n---\nmine\n", b"\xff\xfe\x00 not text"):
        (folder / "README.md").write_bytes(broken)
        write_card(folder)
        assert (folder / "README.md").read_bytes() == broken
    assert before and not list(folder.glob(".*"))


def test_errors_of_the_caller_are_raised(folder, tmp_path):
    with pytest.raises(TypeError, match="knows no fact 'licence'; it knows license"):
        write_card(folder, licence="mit")
    with pytest.raises(FileNotFoundError, match="neither adapter_config.json nor bridge.safetensors"):
        write_card(tmp_path)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither adapter_config.json nor bridge.safetensors"):
        read_card(folder)


# ---- anybody's names -----------------------------------------------------------------------------------------------

HOSTILE = [
    "a|b", "a\nb", "---", "\n---\nlicense: evil\n---\n", "<script>alert(1)</script>", "{{ 7 * 7 }}", "{% raw %}",
    "# h", "`x`", "```\n", "[a](javascript:b)", "![i](http://x/y.png)", "https://evil.example", "*b* _c_ __d__ ~~e~~",
    "f_g", "$$x$$", "\\(x\\)", "&lt;b&gt;", "<!-- -->", MARKER, "a\u2028b", "\u202egnp.exe", "- item", "1. item",
    "> quote", "    code", "\ttab", "'\"", "null", "yes", "猫", "🐈", "&#60;b&#62;", "a\x00b",
    "| a | b |", "\\| x", "\\",
]  # fmt: skip
names_of_anybody = st.lists(
    st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30)).filter(lambda text: bool(one_line(text))),
    min_size=1, max_size=8, unique_by=one_line,
)  # fmt: skip


def examples(**values):
    """Each of the values of an argument is tried first."""
    [(name, each)] = values.items()
    return lambda test: reduce(lambda made, value: example(**{name: value})(made), each, test)


@examples(names=[HOSTILE[start : start + 8] for start in range(0, len(HOSTILE), 8)])
@given(names=names_of_anybody)
def test_any_class_names_make_a_card_that_shows_them(tmp_path_factory, names):
    folder = write_adapter(tmp_path_factory.mktemp("card"), names)
    plain = write_adapter(tmp_path_factory.mktemp("card"), [f"name{i}" for i in range(len(names))])
    try:
        card, other = written(folder, name="me/a"), written(plain, name="me/a")
        assert card.data.to_dict() == read_card(folder, name="me/a").metadata().to_dict() == other.data.to_dict()
        seen, expected = Seen(card), Seen(other)
        assert seen.tags == expected.tags
        listed = re.search(r"^\d+: (.*) \(all in ", seen.text, re.M)[1]
        assert " ".join(listed.split()) == " ".join(", ".join(map(one_line, names)).split())
        assert card.text.count("\n") == other.text.count("\n")
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(plain)


def card_full_of(text: str, folder: Path) -> ModelCard:
    """One whose every text that comes from files or people is `text`."""
    extracted = {**EXTRACTED, "solver": text, "dataset": text, "dataset_fingerprint": text, "teacher": text}
    provenance = {
        **TRANSFERRED, "extracted": extracted, "versions": {text: text},
        "strong": {"name": text, "revision": text}, "bridge": {"space": text, "source": text, "num_pairs": 3},
    }  # fmt: skip
    write_adapter(folder, [text], provenance, base_model_name_or_path=text)
    rows = [Score(text, text, text, 50.0, dataset=text), Score("this model", text, text, 50.0, dataset=text)]
    write_scores(folder / "scores.json", rows)
    try:
        return written(folder, name=text, license=text, tags=[text], datasets=[text], new_version=text)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory) -> Seen:
    return Seen(card_full_of("plain", tmp_path_factory.mktemp("card")))


@examples(text=HOSTILE)
@given(text=st.text(max_size=40).filter(lambda text: bool(one_line(text)) and not text.startswith(SANDBOX)))
def test_any_text_from_a_repository_is_only_text(tmp_path_factory, ordinary, text):
    card = card_full_of(text, tmp_path_factory.mktemp("card"))
    assert "could not be written" not in card.text
    assert card.data.license == one_line(text) and one_line(text) in card.data.tags
    assert card.data.eval_results[0].metric_name == METRIC_NAMES.get(text, one_line(text))
    seen = Seen(card)
    assert set(seen.tags) <= {*ordinary.tags, "code"}
    for tag in ("a", "h1", "h2", "h3", "tr", "td", "li", "p", "pre", "blockquote"):
        assert seen.tags.count(tag) == ordinary.tags.count(tag), tag


@given(text=st.text(st.characters(exclude_categories=())))
def test_escaped_text_reads_as_it_was(text):
    shown = MarkdownIt("commonmark").enable("table").renderInline("x" + escape(text) + "x")
    assert html.unescape(shown)[1:-1].split() == one_line(text).split() or "\N{REPLACEMENT CHARACTER}" in shown
    assert "\n" not in escape(text) and "|" not in escape(text)
    assert eval(literal(text)) == text.encode("utf-8", "replace").decode()
    assert "\n" not in literal(text) and "\n" not in argument(text)


def test_what_is_a_hub_id():
    assert is_hub_id("openai/clip-vit-base-patch32")
    for name in (None, 3, "clip", "/a/b", "./a", "~/a", "a/b/c", "sandbox:weak", "a//b", "a/b c"):
        assert not is_hub_id(name), name
    assert NamedModel("out/weak").source == "out/weak" and NamedModel("/x/weak").source == "path/to/weak"
    assert NamedDataset.of("mteb/dtd@abc (train)") == NamedDataset("mteb/dtd", "abc")
    assert NamedDataset.of("sandbox:print") == NamedDataset("sandbox:print")
    assert NamedDataset.of("/data/photos (train)") == NamedDataset("photos")
    assert NamedDataset.of("  ") is None and NamedDataset.of(3) is None


def test_the_hub_accepts_the_metadata(hub, folder, tmp_path):
    make_bridge().save(tmp_path / "b" / "bridge.safetensors")
    for path in (write_card(folder), write_card(tmp_path / "b")):
        ModelCard.load(path).validate()
    assert len(hub.requests("POST", "/api/validate-yaml")) == 2
