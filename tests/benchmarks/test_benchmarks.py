"""The pieces of the benchmarks, and that each case still runs; what they measure is in RESULTS.md."""

import json
import subprocess
import sys
import time

import imagenet
import measuring
import numpy as np
import pytest
import solving
import torch
from measuring import Row


def test_repeats_take_turns_and_ratios_are_medians():
    order = []

    def waiting(name: str, milliseconds: float):
        return lambda: (order.append(name), time.sleep(milliseconds / 1000))

    found = measuring.interleaved({"a": waiting("a", 10), "b": waiting("b", 60)}, "a", repeats=3)
    assert order == [*"ab", *"ba", *"ab", *"ba"]  # once to warm up, then in turns
    assert found["a"][0] == 1 and found["b"][0] > 1.5 and found["b"][1] >= 0.06  # on a busy machine, too


def test_memory_is_what_is_allocated_not_what_is_mapped(tmp_path):
    np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float32, (50, 2**18)).flush()  # 50 MB
    rows = np.load(tmp_path / "rows.npy", mmap_mode="c")
    assert measuring.alone(lambda: rows.sum(), repeats=1)["peak_mb"] < 25
    found = measuring.alone(lambda: (torch.ones(50, 2**18), time.sleep(0.02)), repeats=1)
    assert 40 < found["peak_mb"] < 75 and found["ratio"] > 0


def test_cases_are_measured_in_reference_work():
    def five_times() -> None:
        for _ in range(5):
            measuring.reference()

    assert 3 < measuring.alone(five_times)["ratio"] < 8


@pytest.mark.parametrize("power", [0, 1, 2.5])
def test_exponents(power):
    points = [(x, 3 * x**power) for x in (10, 100, 1000)]
    assert measuring.exponent([(1, 500), *points]) == pytest.approx(power)  # small sizes have other costs
    assert measuring.exponent(points[:1]) is None


def test_the_report_has_every_number_and_every_failure(tmp_path):
    rows = [Row("one", "a case", 1.25, "another", note="a remark"), Row("two", "left out", note="not in this version")]
    rows += [Row("grown", "linear", size / 8, axis="N", size=size, peak_mb=7.0) for size in (10, 100)]
    rows += [Row("grown", "linear", axis="N", size=1000, note="it ended with exit code 137")]
    measuring.write(tmp_path, rows, {"torch": "2"})
    measuring.draw(tmp_path, rows)
    said = (tmp_path / "benchmarks.md").read_text()
    assert "| a case | 1.25 | another |  | a remark |" in said and "not in this version" in said
    assert "| linear | 1.25 | 12.5 |  | 1.00 |" in said and "| linear | 7 | 7 |  | 0.00 |" in said
    assert "linear, N = 1,000: it ended with exit code 137" in said
    kept = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [Row(**row) for row in kept["rows"]] == rows
    assert (tmp_path / "grown_N.png").stat().st_size > 1000


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(solving, "WEAK", 16)
    monkeypatch.setattr(solving, "STRONG", 24)


@pytest.mark.parametrize("case", solving.CASES)
def test_every_case_runs(case, tmp_path, narrow):
    settings = {"rows": solving.write_rows(tmp_path, 300, 4, strong=24), "N": 250, "K": 8}
    found = solving.run_case(case, {**settings, "repeats": {"repeats": 1}})
    assert found["ratio"] > 0 and found["seconds"] > 0


def test_rows_are_those_of_the_planted_teacher(tmp_path, narrow):
    settings = {"rows": solving.write_rows(tmp_path, 300, 4, strong=24), "N": 300}
    x, logits, tuned = solving.mapped(settings, "weak"), solving.mapped(settings, "logits"), solving.vectors(settings)
    torch.testing.assert_close(logits, 100 * x @ tuned["tuned"].T, atol=1e-3, rtol=0)
    agreed = (x @ tuned["weak"].T).argmax(1) == logits.argmax(1)
    assert 0.3 < agreed.float().mean() < 1  # there is something to learn


def test_imagenet_is_reckoned_from_its_parts():
    parts = imagenet.Parts(preparation=100.0, reading=0.001, solving=7200.0, memory=10_000.0)
    assert imagenet.embedding_minutes(parts, 8, 500, 4) == pytest.approx((1281167 / 4000 / 60, 1281167 / 3200 / 60))
    said = imagenet.report(parts, [1, 64], [500.0], 4).splitlines()
    assert said[2] == "| 1 | 500 | 42.7 | 53.4 | 107 | 227 | solving |"
    assert said[3].endswith("| solving |") and "| bridge and refit, in one process | 120 min |" in said
    with pytest.raises(ValueError, match="run the benchmark 'machine'"):
        imagenet.Parts.of([])
    rows = [Row("machine", "one product", 1.0, seconds=0.02), Row("imagenet", "refit, a tenth", 500, peak_mb=1000)]
    rows += [Row("imagenet", "bridge of embeddings, a tenth", 100), Row("embedding", "preparing a picture", 0.5)]
    rows += [Row("embedding", "files read once, to know the pictures", 0.1)]
    found = imagenet.Parts.of([vars(row) for row in rows])
    assert vars(found) == pytest.approx({"preparation": 100, "reading": 0.001, "solving": 120, "memory": 10_000})


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    command = [sys.executable, str(measuring.HERE / "run.py"), "--quick", "--output-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "benchmarks.json").read_text())["rows"]
    assert {row["bench"] for row in rows} >= {"embedding", "inference", "loading", "texts", "starting", "processes"}
    assert all(row["ratio"] for row in rows), [row for row in rows if not row["ratio"]]
