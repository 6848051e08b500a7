import json
import os
import random
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import bench_folder
import pytest
import tiny_models
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState

from hf_transmiter.bench.cells import Alone, Workshop, cells, make_plan, read_cell
from hf_transmiter.bench.config import BenchConfig
from hf_transmiter.bench.run import deal, run_bench
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.vocabulary import universal_vocabulary
from hf_transmiter.encoders.dual_encoder import load_encoder
from hf_transmiter.evaluation.drift import feature_drift
from hf_transmiter.evaluation.methods import METHODS
from hf_transmiter.hub.adapter_files import TEACHER_FILE
from hf_transmiter.hub.files import claim


@pytest.fixture(autouse=True, scope="module")
def _no_figures():
    """Without matplotlib they are left out: here it is cells that count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield


@pytest.fixture(scope="module")
def content(tmp_path_factory, make_dataset):
    return bench_folder.write(tmp_path_factory.mktemp("bench"), make_dataset)


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory):
    """An uninterrupted run, and how many files it moved to their place."""
    output, moved = tmp_path_factory.mktemp("finished") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", _counting(os.replace, moved))
        found = run(content, output)
    assert found.done == found.made == found.total == 2 and not found.failed
    return output, len(moved)


def _counting(replace, moved: list):
    def counted(*args):
        moved.append(args[1])
        return replace(*args)

    return counted


def run(content, output: Path, **options):
    embedding = {"cache_dir": output.parent / f"{output.name}-cache", "batch_size": 8}
    return run_bench(BenchConfig.from_dict(content), output, embedding=embedding, progress=False, **options)


def measured(content, output: Path) -> list[dict]:
    """Everything in the cells."""
    return [read_cell(output, cell) for cell in cells(BenchConfig.from_dict(content))]


def test_what_a_run_leaves(content, finished):
    output, _ = finished
    assert sorted(path.name for path in output.iterdir()) == ["cells", "report.md", "tuned"]
    every = list(cells(BenchConfig.from_dict(content)))
    assert {path.stem for path in (output / "cells").iterdir()} == {cell.key for cell in every}
    tuned = list((output / "tuned").iterdir())
    assert len(tuned) == 2 and all((folder / TEACHER_FILE).is_file() for folder in tuned)  # and no checkpoint
    made = read_cell(output, every[0])
    assert made["num_images"] == 20 and len(made["rows"]) == 3
    row = made["rows"]["EFT"]
    assert set(row["metrics"]) == {"accuracy", "base", "novel", "hm", "joint", "ece"}
    assert row["needs"] == ["weak model at run time"]


def test_a_finished_run_does_nothing(content, finished):
    output, _ = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    found = run(content, output)
    assert (found.done, found.made) == (2, 0)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.json")} == before


def test_interrupted_anywhere_it_ends_the_same(content, finished, tmp_path, monkeypatch):
    """Stopped before or after a file gets to its place, again and again, at random."""
    output, (reference, moves), draws = tmp_path / "out", finished, random.Random(0)
    replace, interruptions = os.replace, 0
    for late in (False, True, False):
        left = draws.randrange(moves // 3)

        def stopped(*args, late=late):
            nonlocal left
            left -= 1
            if left < 0 and not late:
                raise KeyboardInterrupt
            replace(*args)
            if left < 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", stopped)
        try:
            run(content, output)
        except KeyboardInterrupt:
            interruptions += 1
    monkeypatch.setattr(os, "replace", replace)
    assert interruptions == 3
    run(content, output)
    assert measured(content, output) == measured(content, reference)
    assert (output / "report.md").read_text() == (reference / "report.md").read_text()
    assert not list(output.rglob("*.checkpoint*")) and not list(output.rglob("*.tmp"))


def _in_two_processes(content, output):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    found = run(content, output, accelerator=accelerator)
    assert found.done == found.total == 2


def test_two_processes_measure_what_one_does(content, finished, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_in_two_processes, args=(content, tmp_path / "out"), num_processes=2)
    reference, _ = finished
    assert measured(content, tmp_path / "out") == measured(content, reference)
    assert (tmp_path / "out" / "report.md").read_text() == (reference / "report.md").read_text()


def test_cells_that_share_a_tuned_model_go_to_one_process(content):
    content = {**content, "models": content["models"] + [{**content["models"][0], "strong": "sandbox:strong"}]}
    every = list(cells(BenchConfig.from_dict(content)))
    hands = deal(range(len(every)), every, 3)
    assert sorted(sum(hands, [])) == list(range(len(every)))
    for hand in hands:
        for place in hand:
            twins = [p for p, cell in enumerate(every) if cell.shared == every[place].shared]
            assert len(twins) == 2 and all(p in hand for p in twins)


def test_a_larger_grid_adds_cells(content, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    shutil.copytree(finished[0].parent / "out-cache", tmp_path / "out-cache")
    before = {path.name: path.read_text() for path in (output / "cells").iterdir()}
    tuned = {path: path.stat().st_mtime_ns for path in (output / "tuned").rglob("adapter_model.safetensors")}
    larger = {**content, "seeds": [1, 2, 3]}
    assert run(larger, output).made == 1
    assert {name: (output / "cells" / name).read_text() for name in before} == before
    # Another row, and another name for one: nothing is tuned again, and what was measured stays.
    rows = ["zero-shot strong", {"EFT": {}, "name": "emulated"}, "bridge from task images", "logit ensemble"]
    wider = {**content, "variants": rows}
    assert run(wider, output).made == 2
    narrow = list(cells(BenchConfig.from_dict(content)))
    for cell, other in zip(cells(BenchConfig.from_dict(wider)), narrow, strict=True):
        old, new = json.loads(before[f"{other.key}.json"])["rows"], read_cell(output, cell)["rows"]
        assert list(new) == ["zero-shot strong", "emulated", "bridge from task images", "logit ensemble"]
        new.pop("logit ensemble")
        assert {**new, "EFT": new["emulated"]} == {**old, "emulated": old["EFT"]}
    assert tuned.items() <= {p: p.stat().st_mtime_ns for p in (output / "tuned").rglob("*.safetensors")}.items()
    assert "emulated" in (output / "report.md").read_text()


def test_one_bad_cell_does_not_stop_the_others(content, tmp_path):
    folder = Path(content["datasets"][0]["source"])
    bench_folder.spoil(folder)
    spoilt = {"name": "spoilt", "source": f"{folder}-spoilt"}
    bad = {
        **content,
        "datasets": [spoilt, content["datasets"][0]],
        "variants": ["EFT"],
        "models": content["models"] + [{**content["models"][0], "strong": str(tmp_path / "nowhere")}],
        "seeds": [1],
    }
    found = run(bad, tmp_path / "out")
    assert (found.total, found.done, len(found.failed)) == (4, 1, 3)
    messages = list(found.failed.values())
    assert sum("the image in row 2 cannot be read" in message for message in messages) == 1
    assert sum("there is no model" in message for message in messages) == 2
    assert len(list((tmp_path / "out" / "failed").iterdir())) == 3
    report = (tmp_path / "out" / "report.md").read_text()
    assert "1 of 4 cells" in report and "- spoilt, CoOp, 3 shots, seed 1" in report
    assert make_plan(BenchConfig.from_dict(bad), tmp_path / "out")["failed"] == 3
    # Mended, the others are tried again.
    mended = {**bad, "models": content["models"], "skip_unreadable": True}
    assert run(mended, tmp_path / "out").failed == {}


def test_fewer_images_than_shots(content, tmp_path):
    many = {**content, "shots": [7], "seeds": [1], "variants": ["zero-shot strong"]}
    found = run(many, tmp_path / "out")
    assert found.report is None
    assert "7 images per class are wanted, but class 0 has 6" in next(iter(found.failed.values()))
    assert run({**many, "allow_fewer": True}, tmp_path / "out").done == 1


def test_another_model_under_the_same_name(content, tmp_path):
    folder = tmp_path / "strong"
    tiny_models.save("clip", folder, 1)
    own = {
        **content,
        "models": [{**content["models"][0], "strong": str(folder)}],
        "seeds": [1],
        "variants": ["zero-shot strong"],
    }
    run(own, tmp_path / "out")
    before = measured(own, tmp_path / "out")[0]
    tiny_models.save("clip", folder, 2)
    assert run(own, tmp_path / "out").made == 1
    after = measured(own, tmp_path / "out")[0]
    assert after["made_from"] != before["made_from"] and after["rows"] != before["rows"]
    # It cannot be loaded any more, but its cell is there.
    shutil.rmtree(folder)
    assert run(own, tmp_path / "out").done == 1


def test_what_cannot_be_read_is_made_again(content, finished, tmp_path, caplog):
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    first, second = sorted((output / "cells").iterdir())
    first.write_text("{")
    second.write_text(json.dumps({**json.loads(second.read_text()), "facts": {}}))
    assert make_plan(BenchConfig.from_dict(content), output)["done"] == 0
    assert "cannot be read" in caplog.text and "holds something else" in caplog.text
    assert run(content, output).made == 2
    assert measured(content, output) == measured(content, finished[0])


def test_a_number_that_changed_is_made_again(content, finished, tmp_path, caplog):
    """A cell that is still JSON, with another score."""
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    cell = sorted((output / "cells").iterdir())[0]
    found = json.loads(cell.read_text())
    found["rows"]["EFT"]["metrics"]["accuracy"] += 1
    cell.write_text(json.dumps(found))
    assert run(content, output).made == 1 and "holds something else" in caplog.text
    assert measured(content, output) == measured(content, finished[0])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "teacher.json", "digest.txt"])
def test_a_tuned_model_that_is_damaged_is_made_again(content, finished, tmp_path, caplog, name):
    output, one = tmp_path / "out", {**content, "seeds": [1]}
    shutil.copytree(finished[0], output)
    (folder,) = (output / "tuned").glob("*seed-1*")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damaged = bytearray(whole[name])
    damaged[-9] ^= 1
    (folder / name).write_bytes(damaged)
    for path in (output / "cells").iterdir():
        path.unlink()
    assert run(one, output).made == 1 and f"{folder} is damaged and will be made again" in caplog.text
    assert measured(one, output) == measured(one, finished[0])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_picture_that_was_replaced_under_its_name(content, tmp_path, make_dataset):
    pictures = tmp_path / "pictures"
    for split, count in (("train", 24), ("test", 20)):
        for number, row in enumerate(make_dataset(count, bench_folder.NAMES)):
            folder = pictures / split / bench_folder.NAMES[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{number}.bmp")
    own = {**content, "datasets": [{"name": "own", "source": str(pictures)}], "seeds": [1]}
    run(own, tmp_path / "out")
    assert run(own, tmp_path / "out").made == 0
    picture, times = pictures / "test" / "cat" / "0.bmp", (pictures / "test" / "cat" / "0.bmp").stat()
    shutil.copyfile(pictures / "test" / "dog" / "1.bmp", picture)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(own, tmp_path / "out").made == 1


def test_two_runs_into_one_folder(content, finished, tmp_path):
    with claim(tmp_path / "out"), pytest.raises(BlockingIOError, match="another run is writing to"):
        run(content, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_lies_among_the_figures_stays(content, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    (output / "figures").mkdir()
    (output / "figures" / "notes.txt").write_text("mine")
    run(content, output)
    assert (output / "figures" / "notes.txt").read_text() == "mine"


def test_a_folder_of_somebody_else(content, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="was not written by a bench"):
        run(content, tmp_path)


def test_an_error_nobody_foresaw_is_noted(content, finished, tmp_path, monkeypatch):
    one = {**content, "seeds": [1]}

    def broken(self, cell):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Workshop, "make", broken)
    found = run(one, tmp_path / "out")
    assert list(found.failed.values()) == ["ZeroDivisionError('oh')"]
    note = json.loads(next((tmp_path / "out" / "failed").iterdir()).read_text())
    assert any("ZeroDivisionError: oh" in line for line in note["traceback"])


def test_a_row_that_ran_out_of_memory_is_tried_again(content, tmp_path, monkeypatch):
    one = {**content, "seeds": [1]}
    with monkeypatch.context() as patch:
        method = replace(METHODS["EFT"], run=lambda task, variant: (_ for _ in ()).throw(OSError("no room")))
        patch.setitem(METHODS, "EFT", method)
        found = run(one, tmp_path / "out")
    assert list(found.failed.values()) == ["EFT: it failed: no room"] and found.done == 0
    cell = next(cells(BenchConfig.from_dict(one)))
    rows = read_cell(tmp_path / "out", cell)["rows"]
    assert rows["EFT"] == {"failed": "it failed: no room"} and "metrics" in rows["bridge from task images"]
    assert run(one, tmp_path / "out").failed == {}
    assert "metrics" in read_cell(tmp_path / "out", cell)["rows"]["EFT"]


def test_tuned_elsewhere(content, tmp_path, make_dataset):
    """Tuned on colours, asked about other names; labelled images of the source are none of the target."""
    from datasets import DatasetDict

    target = make_dataset(100, ("ship", "drawing"), 5)
    DatasetDict({"train": target, "test": target}).save_to_disk(tmp_path / "target")
    elsewhere = {
        **content,
        "protocol": "cross-dataset",
        "train_on": content["datasets"][0],
        "datasets": [{"name": "target", "source": str(tmp_path / "target")}],
        "seeds": [1],
        "tunings": [{"name": "LoRA", "method": "lora", "epochs": 1, "lr": 0.01}],
        "variants": ["refit", "linear probe", "tuned strong"],
    }
    assert run(elsewhere, tmp_path / "out").failed == {}
    cell = next(cells(BenchConfig.from_dict(elsewhere)))
    rows = read_cell(tmp_path / "out", cell)["rows"]
    assert "labelled" in rows["linear probe"]["skipped"]
    assert rows["tuned strong"]["metrics"]["accuracy"] >= 0 and "task images" in rows["refit"]["needs"]
    assert len(list((tmp_path / "out" / "tuned").iterdir())) == 2  # weak and strong
    report = (tmp_path / "out" / "report.md").read_text()
    assert "linear probe: it needs labelled images" in report
    # Tuned weights are those of the source's classes, the scores those of the target's.
    shop = Workshop(BenchConfig.from_dict(elsewhere), tmp_path / "out", embedding={"cache_dir": tmp_path / "c"})
    asked = shop.asked(cell, cell.pair.weak, ["ship", "drawing"])
    assert asked.class_names == ("ship", "drawing")


def test_an_upgrade(content, tmp_path):
    upgrade = {
        "title": "Tiny upgrade",
        "experiment": "upgrade",
        "models": [{"old": content["models"][0]["weak"], "new": content["models"][0]["strong"]}],
        "datasets": content["datasets"],
        "protocol": "few-shot",
        "shots": [3],
        "seeds": [1],
        "retrain": True,
        "tunings": [
            {**bench_folder.TUNING, "name": f"CoOp {n}", "method": "coop", "init_phrase": None, "n_ctx": n}
            for n in (1, 3)
        ],
    }
    found = run(upgrade, tmp_path / "out")
    assert found.done == 2 and not found.failed
    for cell in cells(BenchConfig.from_dict(upgrade)):
        made = read_cell(tmp_path / "out", cell)
        assert set(made["rows"][cell.tuning.name]["metrics"]) == {"old", "upgraded", "retrained", "h"}
        assert set(made["rows"]["zero-shot"]["metrics"]) == {"old", "upgraded", "h"}
        pair = [load_encoder(name) for name in (cell.pair.weak, cell.pair.strong)]
        assert made["drift"] == [asdict(row) for row in feature_drift(*pair, universal_vocabulary(200))]
    assert len(list((tmp_path / "out" / "tuned").iterdir())) == 4  # two ways to tune on two models
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| CoOp 3 |" in report and "| layer 2 |" in report


def test_what_cannot_be_tuned_anew_is_said(content, tmp_path):
    """A prompt that the new model does not take: old scores stay, the row says why there are no others."""
    tiny_models.save("vision-text-dual-encoder", tmp_path / "new", 1)
    upgrade = {
        "title": "Tiny upgrade",
        "experiment": "upgrade",
        "models": [{"old": content["models"][0]["weak"], "new": str(tmp_path / "new")}],
        "datasets": content["datasets"],
        "shots": [3],
        "seeds": [1],
        "retrain": True,
        "tunings": content["tunings"],
    }
    assert not run(upgrade, tmp_path / "out").failed
    cell = next(cells(BenchConfig.from_dict(upgrade)))
    row = read_cell(tmp_path / "out", cell)["rows"]["CoOp"]
    assert set(row["metrics"]) == {"old"}
    assert row["remark"].startswith("not re-trained: prompt learning") and "prompt learning" in row["skipped"]


def test_the_upgrade_that_comes_with_the_package(tmp_path):
    config = BenchConfig.read("sandbox-upgrade").with_overrides(seeds=[1], shots=[1])
    embedding = {"cache_dir": tmp_path / "cache"}
    found = run_bench(config, tmp_path / "out", embedding=embedding, progress=False)
    assert found.done == found.total == 4 and not found.failed
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| H (old, upgraded) | retrained | old base | old novel | old hm | upgraded base |" in report
    assert "### The text tower" in report
    for name in ("zero-shot", "CoOp", "CoOp, layer 1", "KgCoOp", "ContCoOp"):
        assert f"| {name} |" in report


def test_two_processes_hear_of_a_picture_that_one_cannot_read(content, tmp_path):
    folder = Path(content["datasets"][0]["source"])
    bench_folder.spoil(folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_unreadable, args=(f"{folder}-spoilt", content["models"][0]["weak"], tmp_path), num_processes=2)
    assert {path.read_text() for path in tmp_path.glob("*.txt")} == {"row 2"}


def _unreadable(folder, model, path):
    from datasets import DatasetDict

    from hf_transmiter.encoders.dual_encoder import load_encoder

    accelerator = Accelerator(cpu=True)
    images = DatasetDict.load_from_disk(folder)["test"]
    with pytest.raises(ValueError, match="the image in row 2 cannot be read"):
        embed_dataset(load_encoder(model), images, accelerator=accelerator, cache_dir=path, progress=False)
    (path / f"{accelerator.process_index}.txt").write_text("row 2")


def test_alone():
    alone = Alone("cpu")
    assert (alone.num_processes, alone.process_index, alone.is_main_process) == (1, 0, True)
    assert alone.wait_for_everyone() is None


def test_a_strong_model_that_cannot_be_tuned_alike(content, tmp_path):
    """Its row says why and costs no other; with settings of its own it has a number."""
    tiny_models.save("vision-text-dual-encoder", tmp_path / "strong", 1)
    weak = content["models"][0]["weak"]
    own = {"tuned strong": {"method": "lora", "epochs": 1, "target_modules": "visual_projection"}, "name": "head"}
    other = {
        **content,
        "models": [{"weak": weak, "strong": str(tmp_path / "strong")}],
        "seeds": [1],
        "variants": ["zero-shot strong", "tuned strong", own],
    }
    assert run(other, tmp_path / "out").failed == {}
    cell = next(cells(BenchConfig.from_dict(other)))
    rows = read_cell(tmp_path / "out", cell)["rows"]
    assert "prompt learning" in rows["tuned strong"]["skipped"]
    assert rows["head"]["metrics"]["base"] >= 0 and rows["zero-shot strong"]["metrics"]["base"] >= 0
