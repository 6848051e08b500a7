"""compare on tiny random models: every row is there, is what its own function gives, and needs what it says."""

import pytest
import tiny_models
import torch
from datasets import Dataset

from hf_transmiter.anchors import Anchors
from hf_transmiter.backbone import DualEncoder
from hf_transmiter.baselines import prompt_transfer, reattach_prompt
from hf_transmiter.classifier import AnchorClassifier
from hf_transmiter.comparison import AT_RUN_TIME, LABELS, Comparison, compare, recommend, verdict
from hf_transmiter.evaluation import Score
from hf_transmiter.extraction import ExtractionConfig, extract
from hf_transmiter.transferring import TransferConfig, transfer
from hf_transmiter.tuners import CoCoOpConfig, ContCoOpConfig, CoOpConfig, MaPLeConfig, TransMiterConfig


NAMES = ("cat", "dog", "car")


@pytest.fixture(scope="module")
def found(model_dir, make_dataset):
    weak = DualEncoder.from_pretrained(model_dir("clip"))
    strong = DualEncoder.from_pretrained(model_dir("siglip", seed=1))
    text = weak.embed_names(NAMES)
    moved = torch.nn.functional.normalize(text + 0.1 * torch.randn(text.shape), dim=-1)
    config = TransMiterConfig(class_names=list(NAMES), form="class_vectors")
    tensors = {"anchors": text, "class_vectors": moved, "bias": torch.zeros(3)}
    teacher = AnchorClassifier(weak, Anchors(NAMES)).add_adapter(config, tensors)
    sets = {name: make_dataset(30, seed=seed) for seed, name in enumerate(("test", "unlabelled"))}
    sets["labelled"] = make_dataset(30, names=NAMES[:2], seed=2)
    result = compare(
        weak,
        strong,
        teacher,
        sets["test"],
        unlabelled=sets["unlabelled"],
        labelled=sets["labelled"],
        general=make_dataset(30, names=("tree", "ship"), seed=9),
        tuned_strong=strong,
        anchors=Anchors(NAMES, ("tree", "ship", "red", "blue")),
        text_anchors=Anchors((), ("tree", "ship", "red", "blue", "old", "big")),
        gradient=ExtractionConfig(solver="gradient", basis="fixed", epochs=1),
        seen_classes=NAMES[:2],
        progress=False,
    )
    return result, weak, strong, teacher, sets


def test_every_method_has_every_metric(found):
    result = found[0]
    assert {score.metric for score in result.scores} == {"accuracy", "base", "novel", "hm", "joint"}
    assert len(result.scores) == 5 * len(result.logits) and len(result.logits) == 20
    assert all(torch.isfinite(z).all() and z.shape == (30, 3) for z in result.logits.values())
    assert all(score.seconds >= 0 for score in result.scores)


def test_rows_are_what_the_public_functions_give(found):
    result, weak, strong, teacher, sets = found
    adapter = extract(weak, teacher, sets["unlabelled"], progress=False)
    seen = {"seen_classes": NAMES[:2], "progress": False}
    upgraded = transfer(adapter, strong, sets["unlabelled"], config=TransferConfig(refit=True), **seen)
    x = strong.embed_images(sets["test"]["image"])
    with torch.no_grad():
        assert torch.allclose(result.logits["refit"], upgraded.classify(x), atol=1e-4)
    bridged = transfer(adapter, strong, sets["unlabelled"], **seen)  # no refit: one class was not seen
    with torch.no_grad():
        assert torch.allclose(result.logits["bridge from task images"], bridged.classify(x), atol=1e-4)
    eft = result.logits["zero-shot strong"] + result.logits["tuned weak"] - result.logits["zero-shot weak"]
    assert torch.allclose(result.logits["EFT"], eft, atol=1e-5)
    assert torch.allclose(result.logits["tuned strong"], result.logits["zero-shot strong"], atol=1e-4)


def test_notes_name_what_a_method_needs(found):
    result = found[0]
    assert {m for m, note in result.notes.items() if note == AT_RUN_TIME} == {
        "EFT",
        "EFT averaged with tuned weak",
        "logit ensemble",
    }
    assert {m for m, note in result.notes.items() if note == LABELS} == {
        "linear probe",
        "TransMiter+ from identity",
        "TransMiter+ from refit",
        "tuned strong",
    }


def test_the_recommended_method_was_run_and_can_be_saved(found, tmp_path):
    result = found[0]
    assert result.recommended == "bridge from task images" and result.reason
    result.classifiers[result.recommended].save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_what_is_not_at_hand_is_left_out(found):
    _, weak, strong, teacher, sets = found
    result = compare(weak, strong, teacher, sets["test"], text_anchors=Anchors((), ("tree", "ship")), progress=False)
    assert list(result.logits) == [
        "zero-shot weak",
        "zero-shot strong",
        "tuned weak",
        "EFT",
        "EFT averaged with tuned weak",
        "logit ensemble",
        "bridge from text",
    ]
    assert result.recommended == "bridge from text"
    with pytest.raises(KeyError, match="no score 'accuracy' of 'refit'"):
        result.value("refit")


@pytest.fixture(scope="module")
def compared(model_dir, make_dataset):
    """``compared(config, strong)``: a comparison for a teacher with random prompts on it, and the teacher."""
    sets = {"test": make_dataset(20), "unlabelled": make_dataset(20, seed=1)}

    def run(config, strong_dir: str, wrap=lambda teacher: teacher, **options):
        weak, strong = DualEncoder.from_pretrained(model_dir("clip")), DualEncoder.from_pretrained(strong_dir)
        tuned = DualEncoder.from_pretrained(model_dir("clip"))
        tuned.model.add_adapter(config)
        torch.manual_seed(3)
        for name, parameter in tuned.model.named_parameters():
            if ".default" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape)
        tuned.model.requires_grad_(False)
        teacher = AnchorClassifier(tuned, Anchors(NAMES, templates=("{}.",)))
        settings = {"text_anchors": Anchors((), ("tree", "ship", "red", "blue")), "progress": False, **options}
        result = compare(weak, strong, wrap(teacher), sets["test"], **settings)
        return result, strong, tuned, sets["test"]

    run.unlabelled = sets["unlabelled"]
    return run


@pytest.mark.parametrize("config", [CoOpConfig(init_phrase="a photo of a"), CoCoOpConfig(), MaPLeConfig(depth=2)])
def test_a_prompt_that_fits_is_reattached(compared, model_dir, config):
    result, strong, tuned, test = compared(config, model_dir("clip", seed=1))
    moved = AnchorClassifier(reattach_prompt(tuned, strong), Anchors(NAMES, templates=("{}.",)))
    pixels = strong.preprocess(test["image"])
    with torch.no_grad():  # through the whole model: MaPLe's images are not those of the strong model
        expected = moved(pixel_values=pixels).logits_per_image
    assert torch.allclose(result.logits["re-attached prompt"], expected, atol=1e-3)
    assert "prompt transfer" not in result.logits  # without images
    assert "re-attached prompt" not in result.notes and result.recommended != "re-attached prompt"


def test_prompt_transfer_is_a_row_where_it_is_possible(compared, model_dir, tmp_path):
    wide = tiny_models.save("clip", tmp_path, 1, width=24)
    options = {
        "unlabelled": compared.unlabelled,
        "anchors": Anchors(NAMES, ("tree", "ship", "red", "blue")),
        "gradient": ExtractionConfig(solver="gradient", basis="fixed", epochs=1),
    }
    result, strong, tuned, test = compared(CoOpConfig(init_phrase="a photo of a"), wide, **options)
    x = strong.embed_images(options["unlabelled"]["image"])
    said = AnchorClassifier(tuned, Anchors(NAMES, templates=("{}.",)))
    with torch.no_grad():
        target = said.classify(tuned.embed_images(options["unlabelled"]["image"])).softmax(1)
    moved = prompt_transfer(tuned, strong, x, target, NAMES, progress=False)
    expected = strong.logits(strong.embed_images(test["image"]), moved.embed_names(NAMES, ("{}.",)))
    assert torch.allclose(result.logits["prompt transfer"], expected, atol=1e-2)
    assert "re-attached prompt" not in result.logits  # the widths differ
    assert result.recommended == "refit"
    # Other prompts, and the same prompt on an equal width, have the other row.
    result = compared(ContCoOpConfig(zero_init=False), model_dir("clip", seed=1), **options)[0]
    assert "prompt transfer" not in result.logits and "re-attached prompt" in result.logits
    # A mean of several tuned models is no prompt, and has no class vectors to carry.
    several = compared(CoOpConfig(init_phrase="a photo of a"), model_dir("clip", seed=1), wrap=lambda t: [t, t])[0]
    assert not {"prompt transfer", "re-attached prompt"} & set(several.logits)
    assert several.recommended == "zero-shot strong"


def test_recommendation_follows_the_data():
    assert recommend(own_class_vectors=True, unlabelled=True, general=True)[0] == "refit"
    unseen = recommend(own_class_vectors=True, unlabelled=True, general=True, unseen=True)
    assert unseen[0] == "bridge from task images"
    assert recommend(own_class_vectors=True, unlabelled=False, general=True)[0] == "bridge from general images"
    assert recommend(own_class_vectors=True, unlabelled=False, general=False)[0] == "bridge from text"
    assert recommend(own_class_vectors=False, unlabelled=False, general=True)[0] == "zero-shot strong"


def test_says_so_when_something_else_scored_higher():
    scores = [Score(m, "test", "accuracy", v) for m, v in (("refit", 60.0), ("linear probe", 70.0), ("EFT", 65.0))]
    logits = {score.method: torch.zeros(1, 2) for score in scores}
    found = Comparison(scores, logits, torch.zeros(1), ("a", "b"), notes={"linear probe": LABELS}, recommended="refit")
    said = " On these test images linear probe scored higher (70.0 against 60.0); it needs labelled images."
    assert _what_beats(found) == said
    found.recommended = "linear probe"
    assert _what_beats(found) == ""


def test_a_test_set_without_names_is_refused(found):
    _, weak, strong, teacher, sets = found
    bare = Dataset.from_dict({"image": sets["test"]["image"], "label": sets["test"]["label"]})
    with pytest.raises(ValueError, match="pass class_names"):
        compare(weak, strong, teacher, bare, progress=False)
