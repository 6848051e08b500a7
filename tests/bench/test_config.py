import re

import pytest
import yaml

from hf_transmiter.bench.cells import cells, make_plan
from hf_transmiter.bench.config import BenchConfig, Pair, published_table, ready_configs
from hf_transmiter.evaluation.methods import METHODS


BASE = {
    "title": "A bench",
    "models": [{"weak": "sandbox:weak", "strong": "sandbox:strong"}],
    "datasets": ["dtd", "eurosat"],
    "tunings": [{"name": "CoOp", "method": "coop"}],
}
CATALOGUE = 11


def config(**changes) -> BenchConfig:
    return BenchConfig.from_dict({**BASE, **changes})


@pytest.mark.parametrize("name", ready_configs())
def test_ready_configurations_can_be_planned(name, tmp_path):
    """Read, checked and planned without loading a model or an image."""
    found = BenchConfig.read(name)
    assert found.title == ready_configs()[name] and found.notes
    some = found.with_overrides([spec.name for spec in found.datasets[-2:]], [1])
    plan = make_plan(some, tmp_path)
    runs = len(some.models) * len(some.tunings) * len(some.shots) * len(some.seeds)
    assert plan["total"] == runs * len(some.datasets) and plan["done"] == plan["failed"] == 0
    assert {model for model, *_ in plan["tunings"]} >= {pair.weak for pair in found.models}
    assert {tuning for _, tuning, *_ in plan["tunings"]} == {tuning.name for tuning in found.tunings}
    assert len({cell.key for cell in cells(some)}) == plan["total"]


def test_what_the_papers_compare():
    """Every table has its configuration, with the models and datasets of the papers."""
    ready = {name: BenchConfig.read(name) for name in ready_configs()}
    b16, l14 = "openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14"
    assert ready["base-to-base-rn50-b16-coop"].models == (Pair("open_clip:RN50/openai", b16),)
    assert ready["base-to-novel-promptsrc"].models == (Pair(b16, l14),)
    for name in ("base-to-base-b16-l14-coop", "base-to-novel-promptsrc", "few-shot-coop", "ablation"):
        assert len(ready[name].datasets) == CATALOGUE and ready[name].seeds == (1, 2, 3)
    assert ready["few-shot-coop"].shots == (1, 2, 4, 8, 16)
    upgrade = ready["contcoop-upgrade"]
    assert len(upgrade.datasets) == 15 and upgrade.retrain and upgrade.train_on.name == "imagenet"
    layers = [tuning.on("dtd", 16, 1)["adapter"]["layer"] for tuning in ready["prompt-layer"].tunings]
    assert layers == list(range(12)) and ready["prompt-layer"].sweep == "tuning.layer"
    assert {tuning.settings["n_ctx"] for tuning in ready["context-length"].tunings} == {2, 4, 8, 16}
    assert ready["cross-dataset"].train_on.name == "imagenet"
    # Few-shot settings of PromptSRC differ by dataset.
    promptsrc = ready["base-to-base-b16-l14-promptsrc"].tunings[0]
    assert promptsrc.on("dtd", 16, 1)["config"].gaussian_mean == 45
    assert promptsrc.on("food101", 16, 1)["config"].gaussian_mean == 30


def test_published_rows_are_rows_of_the_bench():
    """So that the two stand beside each other."""
    tables = []
    for found in map(BenchConfig.read, ready_configs()):
        if found.published is None:
            continue
        tables.append(published := published_table(found.published))
        assert set(published["average"]) <= {variant.name for variant in found.variants}
        assert set(published["datasets"]) == {spec.name for spec in found.datasets}
        for rows in published.get("per_dataset", {}).values():
            assert set(rows) <= set(published["datasets"])
    assert len(tables) == 9


def test_published_harmonic_means_are_those_of_the_averages():
    published = published_table("base-to-novel-promptsrc")
    for row in [*published["average"].values(), *published["per_dataset"]["TransMiter (reference notebook)"].values()]:
        base, novel = row["base"], row["novel"]
        assert 2 * base * novel / (base + novel) == pytest.approx(row["hm"], abs=0.02)


def test_defaults_are_those_of_the_papers():
    found = config()
    assert found.protocol == "base-to-base" and found.shots == (16,) and found.seeds == (1, 2, 3)
    rows = [variant.method for variant in found.variants]
    assert set(METHODS) - set(rows) == {"given bridge"}
    assert [(pair.weak, pair.strong) for pair in found.models] == [("sandbox:weak", "sandbox:strong")]
    assert [spec.name for spec in found.datasets] == ["dtd", "eurosat"]
    assert config(train_on="imagenet").train_on.name == "imagenet"


def test_overrides():
    found = config().with_overrides(["eurosat", "ucf101"], [7], [1, 2])
    assert [spec.name for spec in found.datasets] == ["eurosat", "ucf101"]
    assert found.seeds == (7,) and found.shots == (1, 2) and found.title == "A bench"
    assert config().with_overrides() == config()


def test_reading_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WEAK_MODEL", "sandbox:weak")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**BASE, "models": [{"weak": "$WEAK_MODEL", "strong": "sandbox:strong"}]}))
    assert BenchConfig.read(path).models == (Pair("sandbox:weak", "sandbox:strong"),)
    path.write_text("title: [")
    with pytest.raises(ValueError, match="mine.yaml is not valid YAML"):
        BenchConfig.read(path)
    path.write_text("- a list")
    with pytest.raises(ValueError, match="mine.yaml: a configuration holds 'key: value' lines, not a list"):
        BenchConfig.read(path)
    with pytest.raises(FileNotFoundError, match="did you mean 'base-to-novel-promptsrc'"):
        BenchConfig.read("base-to-novel-promptscr")
    with pytest.raises(FileNotFoundError, match="no ready configuration"):
        BenchConfig.read("../published")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tunnings": []}, "there is no key 'tunnings'; did you mean 'tunings'"),
        ({"models": None}, "'models' is missing: list pairs such as {weak: openai/clip-vit-base-patch16"),
        ({"datasets": []}, "'datasets' is missing: list names such as dtd"),
        ({"tunings": []}, "'tunings' is missing"),
        ({"datasets": ["dtt"]}, "there is no dataset 'dtt'.*dtd"),
        ({"datasets": "dtd"}, "datasets must be a list, got 'dtd'"),
        ({"datasets": ["dtd", "DTD"]}, "datasets has dtd twice"),
        ({"protocol": "base-to-new"}, "protocol must be one of base-to-base, base-to-novel"),
        ({"protocol": "cross-dataset"}, "cross-dataset tunes on another dataset: name it with train_on"),
        ({"datasets": ["imagenetv2"]}, "'imagenetv2' has no train split"),
        ({"experiment": "carry"}, "experiment must be one of transfer, upgrade"),
        ({"models": [{"old": "a", "new": "b"}]}, "a pair of models is {weak: ..., strong: ...}"),
        ({"models": [{"weak": "a"}]}, "a pair of models is"),
        ({"experiment": "upgrade"}, "a pair of models is {old: ..., new: ...}"),
        ({"seeds": [1, 1]}, "seeds has 1 twice"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"seeds": [-1]}, "seeds must be whole numbers of at least 0, got -1"),
        ({"shots": [0]}, "shots must be whole numbers of at least 1, got 0"),
        ({"shots": ["16"]}, "got '16'"),
        ({"max_images": 1.5}, "max_images must be a whole number of at least 1, got 1.5"),
        ({"tunings": [{"method": "cop"}]}, "method must be one of lora, coop"),
        (
            {"tunings": [{"method": "coop", "epoch": 3}]},
            "the tuning 'coop': .* an option 'epoch'; did you mean 'epochs'",
        ),
        ({"tunings": [{"method": "coop", "seed": 3}]}, "list values under seeds"),
        ({"tunings": [{"method": "coop", "per_dataset": {"dtd": {"shots": 3}}}]}, "list values under shots"),
        ({"tunings": [{"method": "coop", "per_dataset": {"dtd": {"lr": 1, "rat": 1}}}]}, "'rat'"),
        ({"tunings": ["coop"]}, "a tuning is a mapping such as"),
        ({"variants": ["ETF"]}, "there is no method 'ETF'; did you mean 'EFT'"),
        ({"variants": ["EFT", {"refit": {}, "name": "EFT"}]}, "variants has EFT twice"),
        ({"variants": [{"refit": {"betta": 1}}]}, "'betta'"),
        ({"allow_fewer": "no"}, "allow_fewer must be true or false, got 'no'"),
        ({"title": 5}, "title must be a text, got 5"),
        ({"general": ["a"]}, "general must be a text"),
        ({"sweep": "beta"}, "sweep must be PART.SETTING with one of tuning, variants"),
        ({"published": "base-to-novel-promptscr"}, "no published scores .*did you mean 'base-to-novel-promptsrc'"),
    ],
)
def test_what_is_wrong_is_said(changes, message):
    with pytest.raises(ValueError, match=message if "{" not in message else re.escape(message)):
        config(**changes)


def test_a_key_with_nothing_behind_it_is_not_given():
    found = config(notes=None, seeds=None, sweep=None, variants=None)
    assert (found.notes, found.seeds, found.sweep) == ("", (1, 2, 3), None)


def test_an_upgrade_has_no_variants():
    models = [{"old": "sandbox:weak", "new": "sandbox:weak-upgraded"}]
    assert config(experiment="upgrade", models=models).variants == ()
    with pytest.raises(ValueError, match="an upgrade has one row per tuning"):
        config(experiment="upgrade", models=models, variants=["EFT"])
