"""compare on tiny random models: every row is there, is what its own function gives, and needs what it says."""

import json

import pytest
import tiny_models
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file, save_file

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.table import FeatureTable
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.baselines import prompt_transfer
from hf_transmiter.evaluation.compare import CONTROL, NOTES, Comparison, Row, _advise, compare
from hf_transmiter.evaluation.evidence import AT_CHANCE, NOTHING_LEARNT, Evidence, recommend
from hf_transmiter.evaluation.methods import BACKPROP, IMAGES, LABELS, METHODS, WEAK, Variant
from hf_transmiter.evaluation.reliability import expected_calibration_error
from hf_transmiter.evaluation.report import comparison_table
from hf_transmiter.hub.scores import Score
from hf_transmiter.method.attach import reattach_prompt
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.extract import extract
from hf_transmiter.method.transfer import transfer
from hf_transmiter.settings import ExtractionConfig, TransferConfig
from hf_transmiter.tuners import CoCoOpConfig, ContCoOpConfig, CoOpConfig, MaPLeConfig, TransMiterConfig, inject


NAMES = ("cat", "dog", "car")
SHORT = Variant(
    "label-free tuning", {"epochs": 1, "batch_size": 20, "augment": "none", "lr": 0.01}, "label-free tuning"
)
ROWS = [SHORT if row == SHORT.name else row for row in METHODS]


@pytest.fixture(scope="module")
def found(model_dir, make_dataset):
    weak = DualEncoder.from_pretrained(model_dir("clip"))
    strong = DualEncoder.from_pretrained(model_dir("siglip", seed=1))
    text = weak.embed_names(NAMES)
    moved = torch.nn.functional.normalize(text + 0.1 * torch.randn(text.shape), dim=-1)
    config = TransMiterConfig(class_names=list(NAMES), form="linear")
    tensors = {"anchors": text, "class_vectors": moved, "bias": torch.zeros(3)}
    teacher = AnchorClassifier(weak, Anchors(NAMES)).add_adapter(config, tensors)
    sets = {"test": make_dataset(30), "unlabelled": make_dataset(110, seed=1)}
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
        variants=ROWS,
        vocabulary=("tree", "ship", "red", "blue", "old", "big"),
        num_anchors=7,
        gradient=ExtractionConfig(solver="gradient", basis="fixed", epochs=1),
        seen_classes=NAMES[:2],
        progress=False,
    )
    return result, weak, strong, teacher, sets


def test_every_method_has_every_metric(found):
    result = found[0]
    assert {score.metric for score in result.scores} == {"accuracy", "base", "novel", "hm", "joint", "ece"}
    assert len(result.scores) == 6 * len(result.rows) and len(result.rows) == 17
    assert [score.method for score in result.scores[::6]] == list(result.rows)
    assert all(row.size is not None for row in result.rows.values()) and result.labels.tolist() == [0, 1, 2] * 10
    assert all(torch.isfinite(row.logits).all() and row.logits.shape == (30, 3) for row in result.rows.values())
    assert all(score.seconds >= 0 for score in result.scores if score.method != "tuned strong")
    # It was tuned before: what that took is not known, and scoring it is no measure of that.
    assert {score.seconds for score in result.scores if score.method == "tuned strong"} == {None}
    ece = expected_calibration_error(result.rows["refit"].logits, result.labels)
    assert result.value("refit", "ece") == pytest.approx(ece)


def test_what_is_not_possible_says_why(found):
    assert found[0].skipped == {
        "re-attached prompt": "no prompt was tuned",
        "copied LoRA": "the tuned model has no layers of LoRA or the like",
        "prompt transfer": "no prompt was tuned",
        "given bridge": "it needs a finished bridge: pass `bridge`",
    }
    assert [row for row in METHODS if row not in found[0].skipped] == list(found[0].rows) and not found[0].lost


def test_needs_and_sizes(found):
    needs = {name: set(row.needs) for name, row in found[0].rows.items()}
    sizes = {name: row.size for name, row in found[0].rows.items()}
    assert needs["refit"] == needs["image map"] == needs["untuned teacher"] == {IMAGES}
    assert needs["bridge from text"] == set() and needs["label-free tuning"] == {IMAGES, BACKPROP}
    assert needs["TransMiter"] == {IMAGES, BACKPROP}
    assert needs["linear probe"] == {LABELS, BACKPROP}
    assert needs["EFT"] == needs["zero-shot weak"] == {WEAK}
    assert sizes["zero-shot strong"] == 0 and sizes["linear probe"] == 4 * 3 * 16
    vectors, width = 4 * (2 * 3 * 16 + 3), found[0].rows["refit"].classifier.adapter_config.reads
    assert sizes["bridge from text"] == sizes["EFT"] == vectors  # of this teacher, EFT keeps the same
    assert sizes["refit"] == sizes["image map"] == vectors + 4 * (16 * width + 16) and width > 16
    assert sizes["label-free tuning"] > 0
    assert sizes["TransMiter"] > 4 * 7 * 7 * 9


def test_rows_are_what_the_public_functions_give(found):
    result, weak, strong, teacher, sets = found
    adapter = extract(weak, teacher, sets["unlabelled"], progress=False)
    seen = {"seen_classes": NAMES[:2], "progress": False}
    upgraded = transfer(adapter, strong, sets["unlabelled"], config=TransferConfig(refit=True), **seen)
    x = embed_dataset(strong, sets["test"], tower=True, progress=False).embeds
    with torch.no_grad():
        expected = upgraded.classify(x)
    for row in ("refit", "image map"):  # a class was not seen, so there is no text side
        assert torch.allclose(result.rows[row].logits, expected, atol=1e-4)
    assert upgraded.adapter_config.provenance["because"].startswith(
        "the tuning changed what words mean; not all classes were seen for a text side. Held-out images: KL "
    )
    bridge = Bridge.build(weak, strong, sets["unlabelled"], progress=False)
    bridged = transfer(adapter, strong, bridge=bridge, **seen)
    with torch.no_grad():
        x = x[:, : strong.embed_dim]
        assert torch.allclose(result.rows["bridge from task images"].logits, bridged.classify(x), atol=1e-4)
    z = {name: row.logits for name, row in result.rows.items()}
    assert torch.allclose(z["EFT"], z["zero-shot strong"] + z["tuned weak"] - z["zero-shot weak"], atol=1e-5)
    assert torch.allclose(z["tuned strong"], z["zero-shot strong"], atol=1e-4)


def test_notes_name_what_a_method_needs(found):
    result = found[0]
    assert {m for m, note in result.notes.items() if note == NOTES[WEAK]} == {
        "EFT",
        "logit ensemble",
    }
    assert {m for m, note in result.notes.items() if note == NOTES[LABELS]} == {
        "linear probe",
        "label tuning",
        "tuned strong",
    }
    assert {m for m, note in result.notes.items() if note == CONTROL} == {"untuned teacher"}


def test_what_is_written_begins_with_the_advice(found):
    said = found[0].to_dict()
    assert list(said) == ["recommended", "advice", "evidence", "split", "rows", "skipped"]
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    rows = {row["name"]: row for row in said["rows"]}
    assert list(rows) == list(found[0].rows) and said["skipped"] == found[0].skipped
    assert rows["refit"]["needs"] == ["task images"] and rows["TransMiter"]["needs"] == ["task images", "backprop"]
    assert rows["refit"]["scores"]["hm"] == found[0].value("refit", "hm") and rows["refit"]["note"] is None
    assert rows["EFT"]["note"] == NOTES[WEAK] and rows["tuned strong"]["seconds"] is None
    assert rows["refit"]["bytes"] == found[0].rows["refit"].size and rows["refit"]["seconds"] > 0
    evidence, way = found[0].evidence, "image map"  # the tuning saw some of the classes
    gain = found[0].value(way) - found[0].value("zero-shot strong")
    assert evidence["gain"] == pytest.approx(gain) and evidence["standard_error"] > 0
    before = found[0].value("zero-shot strong")
    kept = gain <= evidence["standard_error"]
    assert found[0].recommended == ("zero-shot strong" if kept else way)
    said = f"{way} scores {before + gain:.1f} against {before:.1f}, {gain:+.1f} ± "
    start = "Keep the strong model as it is: " if kept else f"Take {way}: "
    assert found[0].advice.startswith(start + said)
    reason = (
        "Why image map: the tuning saw only some of the classes: the image map changes what pictures look like for"
    )
    assert (reason in found[0].advice) != kept


def test_the_method_was_run_and_can_be_saved(found, tmp_path):
    for row in ("bridge from task images", "image map", "refit"):
        found[0].rows[row].classifier.save_pretrained(tmp_path / row)
        assert (tmp_path / row / "adapter_model.safetensors").is_file()
    again = AnchorClassifier.from_pretrained(
        tmp_path / "image map", DualEncoder.from_pretrained(found[2].name_or_path)
    )
    x = embed_dataset(found[2], found[4]["test"], tower=True, progress=False).embeds
    with torch.no_grad():
        assert torch.allclose(again.classify(x), found[0].rows["image map"].logits, atol=1e-4)


def test_what_is_not_at_hand_is_left_out(found):
    _, weak, strong, teacher, sets = found
    result = compare(weak, strong, teacher, sets["test"], vocabulary=("tree", "ship"), progress=False)
    assert list(result.rows) == [
        "zero-shot weak",
        "zero-shot strong",
        "tuned weak",
        "EFT",
        "logit ensemble",
        "bridge from text",
    ]
    assert "bridge from text scores" in result.advice
    assert "pass `unlabelled`" in result.skipped["refit"] and "pass `labelled`" in result.skipped["tuned strong"]
    with pytest.raises(KeyError, match="no score 'accuracy' of 'refit'"):
        result.value("refit")
    with pytest.raises(KeyError, match="no score 'novel' of 'EFT'"):
        result.value("EFT", "novel")


@pytest.fixture(scope="module")
def compared(model_dir, make_dataset):
    """``compared(config, strong)``: a comparison for a teacher with random prompts on it, and the teacher."""
    sets = {"test": make_dataset(20), "unlabelled": make_dataset(20, seed=1)}

    def run(config, strong_dir: str, wrap=lambda teacher: teacher, **options):
        weak, strong = DualEncoder.from_pretrained(model_dir("clip")), DualEncoder.from_pretrained(strong_dir)
        tuned = DualEncoder.from_pretrained(model_dir("clip"))
        inject(tuned.model, config)
        torch.manual_seed(3)
        for name, parameter in tuned.model.named_parameters():
            if ".default" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape)
        tuned.model.requires_grad_(False)
        teacher = AnchorClassifier(tuned, Anchors(NAMES, templates=("{}.",)))
        rows = ["zero-shot strong", "re-attached prompt", "prompt transfer"]
        settings = {"variants": rows, "progress": False, **options}
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
    assert torch.allclose(result.rows["re-attached prompt"].logits, expected, atol=1e-3)
    assert "prompt transfer" not in result.rows  # without images
    assert "re-attached prompt" not in result.notes and result.recommended != "re-attached prompt"


def test_prompt_transfer_is_a_row_where_it_is_possible(compared, model_dir, tmp_path):
    wide = tiny_models.save("clip", tmp_path, 1, width=24)
    options = {"unlabelled": compared.unlabelled}
    result, strong, tuned, test = compared(CoOpConfig(init_phrase="a photo of a"), wide, **options)
    x = strong.embed_images(options["unlabelled"]["image"])
    said = AnchorClassifier(tuned, Anchors(NAMES, templates=("{}.",)))
    with torch.no_grad():
        target = said.classify(tuned.embed_images(options["unlabelled"]["image"])).softmax(1)
    moved = prompt_transfer(tuned, strong, x, target, NAMES, progress=False)
    expected = strong.logits(strong.embed_images(test["image"]), moved.embed_names(NAMES, ("{}.",)))
    assert torch.allclose(result.rows["prompt transfer"].logits, expected, atol=1e-2)
    assert "re-attached prompt" not in result.rows  # the widths differ
    way = "bridge from task images"  # there are too few of them for a refit
    assert result.recommended == way and result.advice.startswith(
        f"Whether {way} beats the strong model as it is was not measured: it is not among the rows."
    )
    # Other prompts, and the same prompt on an equal width, have the other row.
    result = compared(ContCoOpConfig(), model_dir("clip", seed=1), **options)[0]
    assert "prompt transfer" not in result.rows and "re-attached prompt" in result.rows
    # A mean of several tuned models is no prompt, and has no class vectors to carry.
    several = compared(CoOpConfig(init_phrase="a photo of a"), model_dir("clip", seed=1), wrap=lambda t: [t, t])[0]
    assert not {"prompt transfer", "re-attached prompt"} & set(several.rows)
    assert several.recommended == "zero-shot strong"


def test_recommendation_follows_the_data():
    def way(own, unlabelled, general, **more):
        return recommend(None, own_class_vectors=own, unlabelled=100 * unlabelled, general=general, **more)[0]

    assert way(True, True, True) == way(False, True, False) == "refit"
    assert way(True, True, True, unseen=True) == "image map"
    assert way(False, True, False, unseen=True) == "image map"
    assert way(True, False, True, unseen=True) == "bridge from general images"  # without an image there is no map
    assert (
        way(True, False, True) == "bridge from general images"
        and way(True, False, True, bridge=True) == "given bridge"
    )
    assert way(True, False, False) == way(True, False, False, doubt="few") == "bridge from text"  # labels will tell
    assert way(False, False, True) == "zero-shot strong"


def answers(**right: int) -> Comparison:
    """A comparison on 100 images, each row right on the first so many of them; `refit` is recommended."""
    labels, logits = torch.arange(100) % 2, {}
    for row, count in right.items():
        said = torch.where(torch.arange(100) < count, labels, 1 - labels)
        logits[row.replace("zero_shot", "zero-shot").replace("_", " ")] = torch.nn.functional.one_hot(said, 2).float()
    found = Comparison({}, labels, ("a", "b"))
    notes = {"EFT": NOTES[WEAK], "linear probe": NOTES[LABELS], "tuned strong": NOTES[LABELS]}
    notes["untuned teacher"] = CONTROL
    for (row, z), count in zip(logits.items(), right.values(), strict=True):
        scores = {"accuracy": Score(row, "test", "accuracy", float(count))}
        found.rows[row] = Row(z, scores, METHODS[row].needs, notes.get(row))
    strong = logits.get("zero-shot strong", torch.nn.functional.one_hot(1 - labels, 2).float())
    _advise(found, Evidence(strong, strong, strong), "refit", "it is.")
    return found


def test_the_verdict_is_measured_against_doing_nothing():
    found = answers(zero_shot_strong=60, refit=80)
    assert found.recommended == "refit" and found.evidence["standard_error"] == pytest.approx(
        4.02, abs=0.01
    )  # √(0.2 - 0.2²) / √99
    assert found.advice == (
        "Take refit: refit scores 80.0 against 60.0, +20.0 ± 4.0 points on these 100 labelled test images. Why refit: "
        "it is."
    )
    assert ", which may be chance. Why refit" in answers(zero_shot_strong=60, refit=63).advice  # 3 ± 1.7
    for count, said in ((61, "+1.0 ± 1.0"), (60, "+0.0 ± 0.0"), (30, "-30.0 ± 4.6")):
        found = answers(zero_shot_strong=60, refit=count)
        assert found.recommended == "zero-shot strong"
        assert found.advice == (
            f"Keep the strong model as it is: refit scores {count}.0 against 60.0, {said} points on these 100 "
            "labelled test images."
        )


def test_says_so_when_something_else_scored_higher():
    base = {"zero_shot_strong": 50}
    assert "higher" not in answers(**base, refit=60, EFT=63, linear_probe=62).advice  # which may be chance
    said = answers(**base, refit=60, EFT=80).advice
    assert said.endswith(
        f" On these images EFT scored higher than refit (80.0, +20.0 ± 4.0 points); it {NOTES[WEAK]}."
    )
    # The labels' turn: against the best that needs none.
    said = answers(**base, refit=60, EFT=70, linear_probe=65, tuned_strong=90).advice
    assert said.endswith(
        " With labels, tuned strong scored higher than EFT (90.0, +20.0 ± 4.0 points): where there are labels, "
        "re-tune the strong model."
    )
    said = answers(**base, refit=40, EFT=80).advice  # against doing nothing, where that is recommended
    assert said.startswith("Keep the strong model") and "EFT scored higher than zero-shot strong (80.0, +30.0" in said
    # A control is no way to upgrade, however good; it says whose the gain is.
    said = answers(**base, refit=60, untuned_teacher=70).advice
    assert said.endswith(
        " An untuned teacher reaches 70.0, by self-training alone: the tuning's share is -10.0 ± 3.0 points, so what "
        "was gained comes from the pictures and not from the tuning."
    )
    said = answers(**base, refit=70, untuned_teacher=60).advice
    assert said.endswith("the tuning's share is +10.0 ± 3.0 points.")
    # Without the row of doing nothing its answers are there all the same; and what was not run is not praised.
    assert answers(refit=60).advice.startswith("Take refit: refit scores 60.0 against 0.0")
    found = answers(EFT=50)
    assert found.recommended == "refit" and "was not measured: it is not among the rows." in found.advice


def test_images_without_labels(found):
    """What the tuned weak model says takes the place of labels; names are those it knows."""
    with_labels, weak, strong, teacher, sets = found
    bare = sets["test"].remove_columns("label")
    rows = ["zero-shot strong", "tuned weak", "EFT"]
    result = compare(weak, strong, teacher, bare, variants=rows, progress=False)
    assert result.labels is None and result.class_names == NAMES and list(result.rows) == rows
    assert [score.metric for score in result.scores] == ["agreement", "confidence", "calibration gap"] * 3
    said = result.rows["tuned weak"].logits.argmax(1)
    for row in rows:
        z = result.rows[row].logits
        assert torch.allclose(z, with_labels.rows[row].logits, atol=1e-5)
        assert result.value(row, "agreement") == pytest.approx(100 * (z.argmax(1) == said).float().mean().item())
        assert result.value(row, "confidence") == pytest.approx(100 * z.softmax(1).max(1).values.mean().item())
        assert result.value(row, "calibration gap") == pytest.approx(expected_calibration_error(z, said))
    assert result.value("tuned weak", "agreement") == 100
    # Random models: what the tuned one knows may look like chance; and nothing that would be recommended was run.
    doubted = result.evidence["changed"] < 100 * NOTHING_LEARNT or result.evidence["kappa_strong"] < AT_CHANCE
    assert result.recommended == ("zero-shot strong" if doubted else "bridge from task images")
    start = "Keep the strong model as it is: the tun" if doubted else "Whether bridge from task images beats"
    assert result.advice.startswith(start)
    given = compare(weak, strong, teacher, bare, class_names=NAMES[::-1], variants=["EFT"], progress=False)
    assert torch.allclose(given.rows["EFT"].logits, result.rows["EFT"].logits.flip(1), atol=1e-5)
    with pytest.raises(ValueError, match="pass class_names"):  # a bare model knows no names
        compare(weak, strong, weak, bare, progress=False)


def test_labelled_images_that_are_test_images_are_counted(found):
    result, weak, strong, teacher, sets = found
    assert "Beware" not in result.advice
    three = sets["test"].select([4, 0, 8])  # in other batches than the test images
    rows = {"variants": ["zero-shot strong"], "progress": False}
    seen = compare(weak, strong, teacher, sets["test"], labelled=three, **rows)
    assert "Beware: 3 of the 3 labelled images are test images too" in seen.advice
    bare = compare(weak, strong, teacher, sets["test"].remove_columns("label"), labelled=three, **rows)
    assert "Beware: 3 of the 3" in bare.advice


def test_rows_of_the_callers_own(found):
    _, weak, strong, teacher, sets = found
    own = {"refit": {"parts": "text"}, "name": "words alone"}
    rows = ["zero-shot strong", own, Variant("refit")]
    options = {"unlabelled": sets["unlabelled"], "progress": False}
    result = compare(weak, strong, teacher, sets["test"], variants=rows, **options)
    assert list(result.rows) == ["zero-shot strong", "words alone", "refit"]
    assert not torch.allclose(result.rows["words alone"].logits, result.rows["refit"].logits, atol=1e-3)
    assert result.rows["words alone"].classifier.adapter_config.provenance["refit_on"] == 110
    assert [result.rows[row].classifier.adapter_config.provenance["parts"] for row in ("words alone", "refit")] == [
        "text",
        "both",
    ]
    with pytest.raises(ValueError, match="two rows are called 'refit'"):
        compare(weak, strong, teacher, sets["test"], variants=["refit", "refit"])


def test_one_row_that_fails_does_not_take_the_others_along(found, caplog):
    _, weak, strong, teacher, sets = found
    rows = ["EFT", {"TransMiter": {"num_auxiliary": 10**6}}, "refit"]
    options = {"unlabelled": sets["unlabelled"], "labelled": sets["unlabelled"].select([0]), "progress": False}
    broken = {"label tuning": {"optimizer": "magic"}}
    result = compare(weak, strong, teacher, sets["test"], variants=[*rows, broken], **options)
    assert list(result.rows) == ["EFT", "refit"]
    assert result.skipped["TransMiter (num_auxiliary: 1000000)"].startswith(
        "it failed: 1000000 auxiliary names are wanted"
    )
    assert "optimizer must be" in result.skipped["label tuning (optimizer: magic)"] and "is left out" in caplog.text
    table = comparison_table(result)
    assert "Not in the table:" in table and "- TransMiter (num_auxiliary: 1000000): it failed: " in table


# Several processes


def _rows_of(folders, sets, cache, accelerator=None):
    weak, strong, tuned = map(DualEncoder.from_pretrained, folders)
    rows = ["tuned weak", "EFT", "refit", "image map", "bridge from text", "linear probe", "distilled head"]
    quick = {"epochs": 1, "batch_size": 8}
    rows.append({"TransMiter": {"num_auxiliary": 4, **quick}})
    rows.append({"label tuning": quick})
    rows.append({"tuned strong": {**quick, "augment": "none", "lr": 0.01}})
    words = ("tree", "ship", "red", "blue", "old", "big")
    return compare(
        weak,
        strong,
        AnchorClassifier(tuned, Anchors(NAMES)),
        variants=rows,
        vocabulary=words,
        cache_dir=cache,
        progress=False,
        accelerator=accelerator,
        **sets,
    )


def _in_two_processes(path, folders, sets):
    batches = FeatureTable.batches
    FeatureTable.batches = lambda self, size: batches(self, 7)  # both processes get blocks
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    result = _rows_of(folders, sets, path / "cache", accelerator)
    logits = {name: row.logits.contiguous() for name, row in result.rows.items()}
    save_file(logits, path / f"{accelerator.process_index}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("labels", [True, False])
def test_two_processes_find_what_one_does(model_dir, make_dataset, tmp_path, labels):
    folders = (model_dir("clip"), model_dir("siglip", seed=1), model_dir("clip", seed=2))
    sets = {"test": make_dataset(15), "unlabelled": make_dataset(110, seed=1), "labelled": make_dataset(13, seed=2)}
    if not labels:
        sets["test"] = sets["test"].remove_columns("label")
    expected = _rows_of(folders, sets, tmp_path / "one")
    assert not expected.skipped
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_in_two_processes, args=(tmp_path, folders, sets), num_processes=2)
    both = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert set(both[0]) == set(both[1]) == set(expected.rows)
    for name, row in expected.rows.items():
        for found in both:
            torch.testing.assert_close(found[name], row.logits, atol=2e-3, rtol=1e-3, msg=name)


def test_a_test_set_without_names_is_refused(found):
    _, weak, strong, teacher, sets = found
    bare = Dataset.from_dict({"image": sets["test"]["image"], "label": sets["test"]["label"]})
    with pytest.raises(ValueError, match="pass class_names"):
        compare(weak, strong, teacher, bare, progress=False)
