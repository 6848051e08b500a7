"""The command line end to end on the sandbox: one chain of commands, shared by the tests, and what goes wrong."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from commands import error, run
from datasets import Value
from safetensors import safe_open

from hf_transmiter.data.images import load_images
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.classifier import AnchorClassifier


COMMANDS = ("demo", "tune", "extract", "bridge", "transfer", "evaluate", "compare", "bench", "push", "app")
PRINT = ("--dataset", "sandbox:print", "--split", "validation")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def chain(out):
    """tune -> extract -> bridge -> transfer, and the JSON each of them printed."""
    cache, said = ("--cache-dir", out / "features", "--json"), {}

    def step(name, *args):
        result = run(name, *args, *cache)
        said[name] = json.loads(result.stdout)
        assert "stands in for" not in result.stderr  # the refit finds the teacher's logits: its images are the same

    config = {"model": "sandbox:weak", "dataset": "sandbox:print", "split": "validation"}
    config.update({"epochs": 50, "batch-size": 72, "lr": 0.01, "shots": 6, "augment": "none"})
    (out / "tune.yaml").write_text(yaml.safe_dump(config))
    step("tune", "--config", out / "tune.yaml", "--epochs", "8", "--output-dir", out / "tuned")
    models = ("--weak", "sandbox:weak")
    step("extract", *models, "--teacher", out / "tuned", *PRINT, "--output-dir", out / "adapter")
    step("bridge", *models, "--strong", "sandbox:strong", *PRINT, "--output", out / "bridge.safetensors")
    target = ("--strong", "sandbox:strong", "--output-dir", out / "strong")
    step("transfer", out / "adapter", *target, *PRINT, "--bridge", out / "bridge.safetensors")
    return said


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    text = " ".join(run(name, "--help").stdout.replace("│", " ").split())
    assert f"Example: hf-transmiter {name} " in text and "--json" in text and "--config" in text


def test_the_overview_lists_every_command():
    text = run("--help").stdout
    assert re.findall(r"^│ (\w+) ", text, re.M) == list(COMMANDS)
    assert re.findall("─ (To .*?) ─", text) == ["To try", "To upgrade", "To see what it is worth", "To show others"]


def test_settings_are_options():
    text = run("extract", "--help").stdout
    for option in ("--solver", "--teacher-temperature", "--shrinkage", "--lr", "--basis", "--seed"):
        assert option in text
    assert "Divides the teacher's logits." in text and "[default: 30.0]" in text
    assert re.search(r"--refit +--no-refit", run("transfer", "--help").stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_shows_few_options_and_names_those_of_experts(name):
    text = run(name, "--help").stdout
    assert len(re.findall(r"^│ [* ] +--", text, re.M)) <= 25
    if name in ("tune", "extract", "transfer", "compare"):
        words = re.findall(r"\w+", text[text.index("For experts: key=value of") :])
        assert {"embed_batch_size", {"tune": "pull", "extract": "warmup"}.get(name, "subset")} <= set(words)
        assert "--embed-batch-size" not in text


def test_settings_of_experts(out):
    file, folder = out / "experts.yaml", out / "experts"
    file.write_text("weight_decay: 0.5\npull: l1\nadapter: [n_ctx=2]\n")
    tune = ("tune", "--model", "sandbox:weak", *PRINT, "--method", "coop", "--shots", "1", "--epochs", "1")
    given = ("--set", "pull=l2", "--set", "lr=1e-2", "--adapter", "init_phrase=a drawing", "--adapter", "n_ctx=8")
    run(*tune, "--config", file, *given, "--output-dir", folder, "--quiet")
    made = json.loads((folder / "teacher.json").read_text())["settings"]
    assert [made[key] for key in ("n_ctx", "lr", "weight_decay", "pull")] == [8, 0.01, 0.5, "l2"]
    assert made["init_phrase"] == "a drawing"
    assert yaml.safe_load((folder / "settings.yaml").read_text())["adapter"] == ["init_phrase=a drawing", "n_ctx=8"]
    assert "--set has unknown options n_context; there are: model," in error(*tune, "--set", "n_context=8")
    for option in ("--set", "--adapter"):
        said = error(*tune, option, "n_ctx", "--output-dir", out / "none")
        assert f"{option} takes key=value, got 'n_ctx'" in said
    said = error(*tune, "--adapter", "n_contexts=8", "--output-dir", out / "none")
    assert "CoOpConfig nor TuningConfig has an option 'n_contexts'; did you mean" in said
    extract = ("extract", "--weak", "sandbox:weak", "--teacher", folder, "--output-dir", out / "none")
    assert "solver 'ridge' does not read lr: leave that out" in error(*extract, "--solver", "ridge", "--lr", "0.1")


def test_help_is_cheap():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from hf_transmiter.cli.main import app\n"
        f"for name in [[]] + [[n] for n in {COMMANDS}]:\n"
        "    assert CliRunner().invoke(app, [*name, '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_file_and_overrides(chain, out):
    settings = yaml.safe_load((out / "tuned" / "settings.yaml").read_text())
    assert settings["epochs"] == 8  # the command line wins over the file's 50
    assert (settings["shots"], settings["batch_size"], settings["augment"]) == (6, 72, "none")
    assert "output_dir" not in settings and settings["dataset"] == "sandbox:print"
    assert json.loads((out / "tuned" / "teacher.json").read_text())["settings"]["epochs"] == 8


def test_saved_settings_repeat_a_run(chain, out):
    run("extract", "--config", out / "adapter" / "settings.yaml", "--output-dir", out / "again", "--quiet")
    tensors = []
    for name in ("adapter", "again"):
        with safe_open(out / name / "adapter_model.safetensors", framework="pt") as file:
            tensors.append({key: file.get_tensor(key) for key in file.keys()})
    assert tensors[0].keys() == tensors[1].keys()
    assert all((tensors[0][key] == tensors[1][key]).all() for key in tensors[0])


def test_what_the_chain_says_and_leaves(chain, out):
    assert chain["tune"]["num_classes"] == 36
    learnt = chain["tune"]["learnt"]
    assert learnt["held_out"]["accuracy"] > learnt["held_out"]["zero_shot"] + 10 and learnt["warning"] is None
    facts = chain["extract"]["provenance"]
    assert (facts["solver"], facts["num_images"]) == ("image_map", 500)
    assert chain["bridge"]["source"] == "images" and chain["bridge"]["num_pairs"] == 500
    made = Bridge.load(out / "bridge.safetensors")
    assert made.alignment == pytest.approx(chain["bridge"]["alignment"])
    facts = chain["transfer"]["provenance"]
    assert facts["refit_on"] == 500 and facts["parts"] == "both" and facts["even"] is True and facts["coverage"] > 0.75
    assert facts["held_out_kl"] < 0.8 * facts["held_out_kl_zero_shot"] and len(facts["steps"]) == 3
    assert facts["bridge"]["num_pairs"] == 500 and facts["extracted"]["step"] == "extract"
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    strong = AnchorClassifier.from_pretrained(out / "strong")
    assert strong.class_names == tuple(load_images("sandbox:print", "test").features["label"].names)


def test_transfer_says_what_it_made_and_why(chain, out):
    args = ("transfer", out / "adapter", "--strong", "sandbox:strong", "--bridge", out / "bridge.safetensors")
    given, facts = (*args, *PRINT, "--cache-dir", out / "features"), chain["transfer"]["provenance"]
    measured = (
        f"Held-out images: KL {facts['held_out_kl']:.3f} to the labels, {facts['held_out_kl_zero_shot']:.3f} "
        f"zero-shot; {facts['held_out_agreement']:.0f} % agreement."
    )
    tuned = "the tuning changed what pictures look like"
    assert facts["because"] == f"{tuned}; a text side for the class names joins it. {measured}"
    said = run(*given, "--parts", "image", "--output-dir", out / "image").stdout.splitlines()
    assert said[-2].startswith("Transferred to sandbox:strong (refit on 500 images): ")
    assert said[-1].startswith(f"Why so: {tuned}; the image side was asked for alone. Held-out images: KL ")
    made = AnchorClassifier.from_pretrained(out / "image")
    assert set(made.transmiter.tensors("default")) == {"anchors", "image_map", "image_shift"}
    assert made.adapter_config.open_names and made.adapter_config.provenance["parts"] == "image"
    # Of some of the classes the image side alone, without being asked for.
    (out / "some.txt").write_text("\n".join(made.class_names[:18]))
    seen = ("--seen-classes", out / "some.txt", "--output-dir", out / "some")
    assert f"Why so: {tuned}; not all classes were seen for a text side." in run(*given, *seen).stdout
    # A bridge without a picture, or with few of them, carries what there is.
    few = (*given, "--max-images", "99", "--output-dir", out / "few")
    for carried in (
        (*args, "--output-dir", out / "as_it_is"),
        (*given, "--no-refit", "--output-dir", out / "no"),
        few,
    ):
        lines = run(*carried).stdout.splitlines()
        assert lines[-2].startswith("Transferred to sandbox:strong (bridge from images): ")
        assert lines[-1] == f"Why so: {tuned}, and is carried over as it is."
    none = ("--output-dir", out / "none")
    assert "needs at least 100 images, got 99: pass more, or leave it out" in error(*few[:-2], *none, "--refit")
    assert "a transfer without a refit does not read parts" in error(*given, *none, "--no-refit", "--parts", "text")
    assert "parts must be one of both, image, text" in error(*given, *none, "--parts", "tower")
    assert "ask for parts='image'" in error(*given, *none, *seen[:2], "--parts", "both")
    assert not (out / "none").exists()


def test_evaluate(chain, out):
    test, scores = ("--dataset", "sandbox:print", "--split", "validation", "--cache-dir", out / "features"), {}
    for name in ("sandbox:weak", "sandbox:strong", out / "tuned", out / "adapter", out / "strong"):
        found = json.loads(run("evaluate", name, *test, "--json").stdout)
        (score,) = found["scores"]
        assert (score["metric"], found["num_images"], score["split"]) == ("accuracy", 500, "validation")
        scores[name] = score["value"]
    assert scores["sandbox:weak"] + 20 < scores[out / "tuned"]
    # The default extraction keeps what carries over, not what is best on the weak model.
    assert scores["sandbox:weak"] < scores[out / "adapter"]
    assert scores["sandbox:strong"] + 5 < scores[out / "strong"]
    names = load_images("sandbox:print", "test").features["label"].names
    (out / "seen.txt").write_text("\n".join(names[:18]))
    result = run("evaluate", out / "strong", *test, "--seen-classes", out / "seen.txt")
    assert all(f"validation {metric}" in result.stdout for metric in ("accuracy", "base", "novel", "hm", "joint"))
    assert f"{scores[out / 'strong']:.1f}" in result.stdout


def test_an_adapter_from_stored_logits_needs_no_tuned_model(chain, out):
    teacher = out / "adapter" / "calibration.safetensors"
    args = ("--weak", "sandbox:weak", "--teacher", teacher, *PRINT, "--cache-dir", out / "features")
    run("extract", *args, "--output-dir", out / "from_logits", "--quiet")
    scores = []
    for name in ("adapter", "from_logits"):
        found = run("evaluate", out / name, *PRINT, "--cache-dir", out / "features", "--json").stdout
        scores.append(json.loads(found)["scores"][0]["value"])
    assert scores[0] == pytest.approx(scores[1], abs=1.0)  # logits are stored in half precision


def test_a_prompt_is_carried_by_text_alone(out):
    """CoOp has class vectors of its own: neither `extract` nor `transfer` sees a picture."""
    tuning = ("--method", "coop", "--shots", "2", "--epochs", "1")
    run("tune", "--model", "sandbox:weak", *PRINT, *tuning, "--output-dir", out / "coop", "--quiet")
    args = ("--weak", "sandbox:weak", "--teacher", out / "coop", "--output-dir", out / "coop_adapter", "--json")
    assert json.loads(run("extract", *args).stdout)["provenance"]["own_class_vectors"] is True
    args = ("--strong", "sandbox:strong", "--output-dir", out / "coop_strong", "--json")
    found = json.loads(run("transfer", out / "coop_adapter", *args).stdout)["provenance"]
    assert found["bridge"]["source"] == "text" and "refit_on" not in found
    # Saved by PEFT alone it is asked in the same words.
    (shutil.copytree(out / "coop", out / "coop_peft") / "teacher.json").unlink()
    test = ("--dataset", "sandbox:print", "--split", "validation", "--cache-dir", out / "features", "--json")
    scores = [json.loads(run("evaluate", out / name, *test).stdout)["scores"] for name in ("coop", "coop_peft")]
    assert [score["value"] for score in scores[0]] == [score["value"] for score in scores[1]]


def test_the_strong_model_learns_from_the_tuned_one(chain, out):
    """Without labels; what was tuned from is noted beside the teacher."""
    taught = ("tune", "--model", "sandbox:strong", "--teacher", out / "tuned", *PRINT, "--cache-dir", out / "features")
    tuning = ("--epochs", "2", "--lr", "0.01", "--augment", "none", "--output-dir", out / "retuned")
    found = json.loads(run(*taught, *tuning, "--json").stdout)
    assert found["method"] == "lora" and found["learnt"]["held_out"]["num_images"] == 50
    noted = json.loads((out / "retuned" / "teacher.json").read_text())
    assert noted["weak"] == "sandbox:strong" and noted["taught_by"]["weak"]["name"] == "sandbox:weak"
    assert noted["taught_by"]["settings"]["shots"] == 6
    test, scores = (*PRINT, "--cache-dir", out / "features", "--json"), []
    for name in ("sandbox:strong", out / "retuned"):
        scores.append(json.loads(run("evaluate", name, *test).stdout)["scores"][0]["value"])
    assert scores[1] > scores[0] + 5
    # Stored logits need no weak model, a bare one must be named.
    pack = out / "adapter" / "calibration.safetensors"
    few = ("--method", "coop", "--epochs", "1", "--output-dir")
    said = run(*taught[:3], "--teacher", pack, *taught[5:], *few, out / "from_pack").stdout
    assert "(coop) on 36 classes" in said and "Agreement with the teacher" in said
    bare = (*taught[:3], "--teacher", "sandbox:weak-upgraded", *taught[5:], *few, out / "none")
    assert "does not say which model it was tuned from: name it with --weak" in error(*bare)
    assert "leave shots out" in error(*taught, "--shots", "4", *few, out / "none")
    alone = ("tune", "--model", "sandbox:strong", "--weak", "sandbox:weak", *PRINT, *few, out / "none")
    assert "pass --teacher, or name the model --model" in error(*alone)


def test_options_of_the_adapter(out):
    settings = ("--method", "contcoop", "--epochs", "1", "--shots", "1", "--seed", "3", "--max-images", "400")
    options = ("--adapter", "class_embed=mean_token", "--adapter", "heads=2")
    folder = out / "options"
    run("tune", "--model", "sandbox:weak", *PRINT, *settings, *options, "--output-dir", folder, "--quiet")
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert (adapter["seed"], adapter["class_embed"], adapter["heads"]) == (3, "mean_token", 2)


def test_existing_output_stays(chain, out):
    args = ("--weak", "sandbox:weak", "--teacher", out / "tuned", *PRINT, "--cache-dir", out / "features")
    before = (out / "adapter" / "adapter_config.json").read_bytes()
    assert "--overwrite" in error("extract", *args, "--output-dir", out / "adapter")
    pair = ("--weak", "sandbox:weak", "--strong", "sandbox:strong")
    assert "--overwrite" in error("bridge", *pair, "--output", out / "bridge.safetensors")
    assert (out / "adapter" / "adapter_config.json").read_bytes() == before
    # What somebody else put there is never replaced.
    foreign = out / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("text")
    assert "not written by" in error("extract", *args, "--output-dir", foreign, "--overwrite")
    assert (foreign / "thesis.txt").read_text() == "text"
    run("extract", *args, "--output-dir", out / "twice", "--quiet")
    (out / "twice" / "stale.txt").write_text("old")
    run("extract", *args, "--output-dir", out / "twice", "--overwrite", "--solver", "ridge", "--quiet")
    assert not (out / "twice" / "stale.txt").exists()
    assert json.loads((out / "twice" / "adapter_config.json").read_text())["provenance"]["solver"] == "ridge"


def test_config_errors(out):
    file = out / "bad.yaml"
    file.write_text("model: sandbox:weak\nepoch: 3\n")
    said = error("tune", "--config", file, "--dataset", "sandbox:print", "--output-dir", out / "none")
    assert "unknown options epoch;" in said and "epochs" in said and "model" in said
    for text, words in (("[1, 2]", "not a list"), ("a: [", "not valid YAML")):
        file.write_text(text)
        assert words in error("tune", "--config", file, "--output-dir", out / "none")
    assert "cannot read the config" in error("tune", "--config", out / "missing.yaml", "--output-dir", out / "none")
    file.write_text("model: sandbox:weak\ndataset: sandbox:print\nepochs: many\n")
    assert "valid integer" in run("tune", "--config", file, "--output-dir", out / "none", code=2).stderr


def test_errors_are_one_line(out, chain, tmp_path):
    tune = ("tune", "--output-dir", out / "none")
    weak = ("--model", "sandbox:weak")
    assert "no model './nowhere'" in error(*tune, "--model", "./nowhere", "--dataset", "sandbox:print")
    assert "there are weak, strong" in error(*tune, "--model", "sandbox:big", "--dataset", "sandbox:print")
    assert "cannot load the model 'me/none'" in error(*tune, "--model", "me/none", "--dataset", "sandbox:print")
    assert "there are print, night" in error(*tune, *weak, "--dataset", "sandbox:mars")
    assert "no dataset './none'" in error(*tune, *weak, "--dataset", "./none")
    assert "me/none" in error(*tune, *weak, "--dataset", "me/none")
    assert "train, unlabelled" in error(*tune, *weak, "--dataset", "sandbox:print", "--split", "dev")
    assert "no column 'kind'" in error(*tune, *weak, *PRINT, "--label-column", "kind")
    assert "method must be one of" in error(*tune, *weak, *PRINT, "--method", "magic")
    assert "dtype must be" in error(*tune, *weak, *PRINT, "--dtype", "int8")
    assert "cannot be used" in error(*tune, *weak, *PRINT, "--device", "abacus")
    assert "No templates named 'nice'" in error(*tune, *weak, *PRINT, "--template", "nice")
    other = ("extract", "--weak", "sandbox:strong", "--teacher", out / "tuned", "--output-dir", out / "none")
    assert "was tuned from" in error(*other)
    assert "no adapter to transfer" in error(
        "transfer", out / "tuned", "--strong", "sandbox:strong", "--output-dir", out / "none"
    )
    assert not (out / "none").exists()
    with pytest.raises(FileNotFoundError):
        run(*tune, *weak, "--dataset", "./none", "--debug")
    assert run(*tune, *weak, code=2).stderr.count("--dataset")


def test_images_from_anywhere(tmp_path, make_dataset):
    dataset = make_dataset(12)
    names = dataset.features["label"].names
    for i, row in enumerate(dataset):
        folder = tmp_path / "folder" / ("train" if i < 9 else "test") / names[row["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{i}.png")
    folder = load_images(str(tmp_path / "folder"), prefer=("test",))
    assert len(folder) == 3 and folder.features["label"].names == sorted(names)
    assert len(load_images(str(tmp_path / "folder"), "train[:3]")) == 3
    with pytest.raises(ValueError, match="name one with --split: train, test"):
        load_images(str(tmp_path / "folder"), prefer=("unlabelled",))
    words = dataset.remove_columns("label").add_column("label", [names[i] for i in dataset["label"]])
    words.select(range(6)).to_parquet(tmp_path / "a.parquet")
    words.select(range(6, 12)).to_parquet(tmp_path / "b.parquet")
    parquet = load_images(str(tmp_path / "*.parquet"), prefer=("test",))  # the only split, under any name
    assert len(parquet) == 12 and parquet.features["label"].names == sorted(names)
    assert [parquet.features["label"].int2str(i) for i in parquet["label"]] == words["label"]
    dataset.save_to_disk(tmp_path / "disk")
    few = [load_images(str(tmp_path / "disk"), max_images=5) for _ in range(2)]
    assert len(few[0]) == 5 and few[0]._fingerprint == few[1]._fingerprint != dataset._fingerprint
    with pytest.raises(ValueError, match="all of one kind"):
        load_images(str(tmp_path / "disk" / "*"))


def test_options_that_nothing_reads_are_errors(chain, out):
    bridge, new = str(out / "bridge.safetensors"), ("--output", out / "unread")
    for option in (("--weak", "sandbox:weak"), ("--space", "logit"), ("--anchors", "x"), ("--set", "beta=3")):
        said = error("bridge", "--invert", bridge, *option, *new)
        assert "has their models, space and names" in said or "unknown options beta" in said
    test = ("--dataset", "sandbox:print", "--split", "validation", "--cache-dir", out / "features")
    said = error("evaluate", out / "strong", *test, "--template", "a drawing of a {}.")
    assert "was saved with its own templates: leave --template out" in said
    said = error("push", out / "strong", "me/x", "--subfolder", "s", "--license", "mit")
    assert "license and tags are for the card, which no subfolder has" in said
    names = load_images("sandbox:print", "test").features["label"].names
    said = error("evaluate", out / "strong", *test, "--class-names", f"{names[0]},x")  # they were ignored
    assert "not among the classifier's names" in said or "cannot be asked" in said


def test_an_accuracy_of_guesses_is_said_to_be_one(chain, out):
    names = load_images("sandbox:print", "test").features["label"].names
    images = load_images("sandbox:print", "validation").cast_column("label", Value("int64"))
    images.to_parquet(out / "numbers.parquet")
    given = ("--dataset", out / "numbers.parquet", "--cache-dir", out / "features")
    (out / "shifted.txt").write_text("\n".join([*names[7:], *names[:7]]))
    (out / "names.txt").write_text("\n".join(names))
    said = run("evaluate", out / "tuned", *given, "--class-names", out / "shifted.txt").stdout
    assert "is no better than guessing, 2.8 %: look at the labels, the class names and their order" in said
    assert "guessing" not in run("evaluate", out / "tuned", *given, "--class-names", out / "names.txt").stdout


def test_bars_and_remarks_of_libraries_stay_out_of_files(chain, out):
    """549 lines of one comparison, and a warning with every LoRA."""
    command = [sys.executable, "-m", "hf_transmiter", "extract", "--weak", "sandbox:weak", "--teacher", out / "tuned"]
    command += ["--dataset", "sandbox:print", "--max-images", "20", "--output-dir", out / "noise"]
    shown = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=shown)
    assert done.returncode == 0 and done.stderr == ""
