import sys

import pytest
from PIL import Image

from hf_transmiter.bench.cells import cells, read_cell, write_cell, write_failure
from hf_transmiter.bench.config import BenchConfig, published_table
from hf_transmiter.bench.report import gather, write_bench_report


PAIR = {"weak": "openai/clip-vit-base-patch16", "strong": "openai/clip-vit-large-patch14"}
CONFIG = {
    "title": "A bench",
    "notes": "On paper only.\n",
    "models": [PAIR],
    "datasets": ["dtd", "eurosat"],
    "tunings": [{"name": "PromptSRC", "method": "promptsrc"}],
    "seeds": [1, 2],
    "variants": ["zero-shot strong", "EFT", {"refit": {}, "name": "mine | yours"}],
}


def config(**changes) -> BenchConfig:
    return BenchConfig.from_dict({**CONFIG, **changes})


def row_names(cell) -> list[str]:
    return [variant.name for variant in cell.config.variants] or ["zero-shot", cell.tuning.name]


def fill(found: BenchConfig, output, value, skip=()) -> None:
    """Finished cells with made-up scores: `value(cell, row)` gives the metrics of a row."""
    for cell in cells(found):
        if (cell.spec.name, cell.seed) in skip:
            continue
        rows = {}
        for name in row_names(cell):
            needs = {"EFT": ["weak model at run time"], "mine | yours": ["task images"]}.get(name, [])
            rows[name] = {"metrics": value(cell, name), "needs": needs}
        write_cell(output, cell, {"made_from": {}, "num_images": 10, "rows": rows})


def line(report: str, name: str) -> list[str]:
    """Cells of the first row of a table with this name."""
    rows = report.replace("\\|", "¦").splitlines()
    return [cell.strip() for cell in next(row for row in rows if row.startswith(f"| {name} |")).strip("|").split("|")]


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def accuracies(cell, name) -> dict:
    high = {"zero-shot strong": 60.0, "EFT": 75.0}.get(name, 70.0)
    return {"accuracy": high + (10.0 if cell.spec.name == "dtd" else 0.0) + 2 * cell.seed, "ece": 5.0}


def test_averages(tmp_path, no_figures):
    found = config()
    fill(found, tmp_path, accuracies)
    report = write_bench_report(found, tmp_path).read_text()
    assert report.startswith("# A bench\n\nOn paper only.\n\n4 of 4 cells (base-to-base; transfer).")
    assert f"## {PAIR['weak']} → {PAIR['strong']}\n" in report
    assert line(report, "method") == ["method", "accuracy", "ECE", "needs"]
    # Two seeds, two datasets: 60 + (12 + 14 + 2 + 4) / 4, and the spread of 67 and 69.
    assert line(report, "zero-shot strong")[1] == "68.00 ± 1.41"
    # EFT is higher, but has an advantage; the best of the others is bold.
    assert line(report, "EFT")[1:] == ["83.00 ± 1.41", "5.00 ± 0.00", "weak model at run time"]
    mine = ["**78.00 ± 1.41**", "**5.00 ± 0.00**", "task images"]
    assert line(report, "mine ¦ yours") == ["mine ¦ yours", *mine]
    assert "### accuracy, by dataset" in report
    by_dataset = report.split("### accuracy, by dataset")[1]
    assert line(by_dataset, "zero-shot strong") == ["zero-shot strong", "73.00 ± 1.41", "63.00 ± 1.41"]


def test_published_scores_stand_beside(tmp_path, no_figures):
    found = config(protocol="base-to-novel", published="base-to-novel-promptsrc")

    def halves(cell, name):
        novel = 40.0 if cell.spec.name == "dtd" else 80.0
        return {"accuracy": 50.0, "joint": 50.0, "base": 80.0, "novel": novel, "hm": 0.0}

    fill(found, tmp_path, halves)
    report = write_bench_report(found, tmp_path).read_text()
    header = ["method", "base", "novel", "HM", "joint", "published base", "published novel", "published HM", "needs"]
    assert line(report, "method") == header
    # Of the averages 80 and 60; the average of harmonic means would be 66.67.
    assert line(report, "zero-shot strong")[3] == "**68.57 ± 0.00**"
    assert line(report, "zero-shot strong")[5:8] == ["76.71", "80.85", "78.73"]
    # What was not measured here is there all the same.
    assert line(report, "TransMiter") == ["TransMiter", *"––––", "85.27", "81.07", "83.12", ""]
    assert "average of 11 datasets. What was measured here goes over 2, 2 of them among those." in report
    assert "HM 83.45" in report  # remarks
    by_dataset = report.split("### HM, by dataset")[1]
    assert line(by_dataset, "method") == ["method", "dtd", "eurosat"]
    assert line(by_dataset, "zero-shot strong")[1] == "**53.33 ± 0.00**"
    assert line(by_dataset, "TransMiter (reference notebook), published")[1:] == ["75.33", "88.98"]


def test_published_scores_are_of_their_own_number_of_shots(tmp_path, no_figures):
    found = config(published="base-to-base-b16-l14-promptsrc", shots=[4, 16])
    fill(found, tmp_path, accuracies)
    few, usual = write_bench_report(found, tmp_path).read_text().split("\n## ")[1:]
    assert "16 shots" in usual and line(usual, "zero-shot strong")[3] == "72.54"
    assert "Published scores are of 16 shots, and left out here." in few
    assert "72.54" not in few and "TransMiter" not in few


def test_reports_hold_no_path_of_the_machine(tmp_path, no_figures):
    pictures, model = tmp_path / "pictures", tmp_path / "model"
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (pictures / part / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(pictures / part / name / "1.png")
    pair = {"weak": str(model), "strong": "sandbox:strong"}
    found = config(models=[pair], datasets=[str(pictures), "dtd"], seeds=[1, 2])
    fill(found, tmp_path / "out", accuracies, skip=[("dtd", 2)])
    missing = next(cell for cell in cells(found) if (cell.spec.name, cell.seed) == ("dtd", 2))
    write_failure(tmp_path / "out", missing, ValueError("nothing"))
    report = write_bench_report(found, tmp_path / "out").read_text()
    assert "## model → sandbox:strong" in report and "| method | pictures | dtd |" in report
    assert str(tmp_path) not in report


def test_every_published_number_has_its_source():
    for key in ("base-to-base-rn50-b16-coop", "base-to-novel-promptsrc", "transmiter-plus-maple", "ablation-weak"):
        published = published_table(key)
        assert "2508.08604" in published["source"] and published["shots"] == 16 and len(published["datasets"]) == 11


def test_what_is_missing_or_failed_is_said(tmp_path, no_figures):
    found = config()
    fill(found, tmp_path, accuracies, skip=[("dtd", 2), ("eurosat", 1), ("eurosat", 2)])
    every = list(cells(found))
    write_failure(tmp_path, every[1], ValueError("too\nfew images"))
    report = write_bench_report(found, tmp_path).read_text()
    assert "1 of 4 cells" in report
    assert "Failed:\n\n- dtd, PromptSRC, 16 shots, seed 2: too few images" in report
    assert line(report, "zero-shot strong")[1] == "72.00"  # one seed has no spread
    with pytest.raises(FileNotFoundError, match="no finished cell of this configuration"):
        write_bench_report(found, tmp_path / "elsewhere")


def test_rows_that_could_not_be_had(tmp_path, no_figures):
    found = config()
    fill(found, tmp_path, accuracies)
    for cell in cells(found):
        if cell.spec.name == "dtd":
            rows = {name: {"metrics": accuracies(cell, name)} for name in row_names(cell)}
            rows["EFT"] = {"skipped": "it is Sunday"}
            write_cell(tmp_path, cell, {"made_from": {}, "num_images": 1, "rows": rows})
    report = write_bench_report(found, tmp_path).read_text()
    assert "- EFT: it is Sunday (dtd)" in report
    assert "† Averaged over fewer datasets, not to be compared with the others (EFT: 1 of 2)." in report
    assert line(report, "EFT †")[1] == "78.00 ± 1.41"
    by_dataset = report.split("### accuracy, by dataset")[1]
    assert line(by_dataset, "EFT") == ["EFT", "–", "78.00 ± 1.41"]


def test_groups(tmp_path):
    found = config(shots=[1, 4], tunings=[{"name": "A", "method": "coop"}, {"name": "B", "method": "kgcoop"}])
    fill(found, tmp_path, accuracies)
    titles = [group.title(found) for group in gather(found, tmp_path)]
    pair = f"{PAIR['weak']} → {PAIR['strong']}"
    assert titles == [f"{pair}, {name}, {shots} shots" for name in "AB" for shots in (1, 4)]


def drawn(found: BenchConfig, output, value) -> set[str]:
    fill(found, output, value)
    report = write_bench_report(found, output).read_text()
    names = {path.name for path in (output / "figures").iterdir()}
    assert all(f"(figures/{name})" in report for name in names)
    for name in names:
        with Image.open(output / "figures" / name) as image:
            assert image.width > 600
    return names


def halves_by_name(cell, name) -> dict:
    base = 50.0 + (int(name.split()[0]) if name[0].isdigit() else 0)
    return {"accuracy": 40.0, "joint": 40.0, "base": base, "novel": 60.0 + cell.seed, "hm": 0.0}


def test_figures(tmp_path):
    variants = [
        *("zero-shot strong", "tuned weak"),
        *({"refit": {"zero_shot_weight": n / 16}, "name": f"{n} sixteenths"} for n in (1, 4, 16)),
    ]
    found = config(protocol="base-to-novel", variants=variants, sweep="variants.zero_shot_weight")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "of-an-earlier-report.png").write_bytes(b"")
    names = drawn(found, tmp_path, halves_by_name)
    stem = "1-openai-clip-vit-base-patch16-openai-clip-vit-large-patch14"
    assert names == {f"{stem}-{name}.png" for name in ("methods", "variants.zero-shot-weight")}


@pytest.mark.slow
def test_figures_over_shots_and_tunings(tmp_path):
    found = config(shots=[1, 4, 16])
    names = drawn(found, tmp_path / "shots", accuracies)
    assert {name[:2] for name in names} == {"1-", "2-", "3-", "sh"} and "shots-1.png" in names
    found = config(
        experiment="upgrade",
        models=[{"old": PAIR["weak"], "new": PAIR["strong"]}],
        tunings=[{"name": f"{m}, M = {n}", "method": m, "n_ctx": n} for m in ("coop", "contcoop") for n in (2, 4)],
        sweep="tuning.n_ctx",
        variants=[],
    )
    names = drawn(
        found, tmp_path / "upgrade", lambda cell, name: {"old": 50.0, "upgraded": 40.0 + cell.seed, "h": 0.0}
    )
    assert {name[-11:] for name in names} == {"upgrade.png", "g.n-ctx.png"}


def test_sweeps_over_settings_of_the_tuning(tmp_path):
    tunings = [{"name": f"CoOp, layer {n}", "method": "coop", "layer": n} for n in (0, 1, 2)]
    models = [{"old": PAIR["weak"], "new": PAIR["strong"]}]
    changes = {"models": models, "tunings": tunings, "variants": [], "experiment": "upgrade"}
    found = config(**changes, sweep="tuning.layer", protocol="few-shot")
    names = drawn(found, tmp_path, lambda cell, name: {"old": 50.0, "upgraded": 40.0 + cell.seed, "h": 0.0})
    assert {name[-11:] for name in names} == {"upgrade.png", "g.layer.png"}


def test_an_upgrade(tmp_path, no_figures):
    found = config(
        experiment="upgrade",
        models=[{"old": "sandbox:weak", "new": "sandbox:weak-upgraded"}],
        tunings=[{"name": f"CoOp, M = {n}", "method": "coop", "n_ctx": n} for n in (2, 4)],
        sweep="tuning.n_ctx",
        variants=[],
    )

    def both(cell, name):
        old = 50.0 if name == "zero-shot" else 80.0 if cell.spec.name == "dtd" else 60.0
        return {"old": old, "upgraded": 60.0, "h": 1.0}

    fill(found, tmp_path, both)
    report = write_bench_report(found, tmp_path).read_text()
    assert line(report, "method") == ["method", "old", "upgraded", "H (old, upgraded)"]
    # Of the averages 70 and 60.
    assert line(report, "CoOp, M = 2") == ["CoOp, M = 2", "**70.00 ± 0.00**", "**60.00 ± 0.00**", "**64.62 ± 0.00**"]


def test_an_upgrade_among_base_and_novel_classes(tmp_path, no_figures):
    found = config(
        experiment="upgrade",
        models=[{"old": "sandbox:weak", "new": "sandbox:weak-upgraded"}],
        tunings=[{"name": "CoOp", "method": "coop"}],
        variants=[],
    )

    def halves(cell, name):
        novel = 40.0 if cell.spec.name == "dtd" else 80.0
        old = {"old": 50.0, "old base": 80.0, "old novel": novel, "old hm": 0.0}
        return old if name == "CoOp" else {**old, "upgraded": 50.0, "h": 50.0}

    fill(found, tmp_path, halves)
    for cell in cells(found):
        content = read_cell(tmp_path, cell)
        content["rows"]["CoOp"]["skipped"] = "too wide"
        row = {"name": "layer 1", "absolute": 2.0, "relative": 0.1, "similarity": 0.9}
        write_cell(tmp_path, cell, {**content, "drift": [row]})
    report = write_bench_report(found, tmp_path).read_text()
    header = ["method", "old", "upgraded", "H (old, upgraded)", "old base", "old novel", "old hm"]
    assert line(report, "method") == header
    assert line(report, "CoOp")[2:4] == ["–", "–"] and line(report, "CoOp")[6] == "**68.57 ± 0.00**"
    assert "- CoOp: too wide (dtd, eurosat)" in report
    assert "| layer 1 | 2 | 10.0% | 0.900 |" in report.split("### The text tower")[1]
