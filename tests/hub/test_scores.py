"""Scores: as a table, as a file, over seeds."""

import json
import logging
import math
from dataclasses import replace

import pytest

from hf_transmiter.hub.scores import Score, aggregate, markdown_table, read_scores, write_scores


SCORES = [
    Score("zero-shot strong", "print", "base", 60.0, 0.0, None, 3),
    Score("zero-shot strong", "print", "novel", 71.25, 0.0, None, 3),
    Score("refit", "print", "base", 72.04, 0.81, 4.26, 3),
    Score("refit", "print", "novel", math.nan, math.nan, 4.26, 3),
    Score("bridge", "print", "base", 65.5, 1.25, 250.4, 3),
    Score("bridge", "print", "novel", 70.0, 0.5, 250.4, 3),
    Score("bridge", "night", "base", 33.3),
    Score("tuned strong", "print", "base", 90.1, 0.2, 12.0, 3),
]
CEILING = {"tuned strong": "needs labels"}


def cells(table):
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in row] for row in rows]
    return header, {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in body}


def test_table_has_methods_as_rows_and_split_metric_and_cost_as_columns():
    header, rows = cells(markdown_table(SCORES, notes=CEILING))
    assert header == ["method", "print base", "print novel", "night base", "seconds"]
    assert list(rows) == ["zero-shot strong", "refit", "bridge", "tuned strong †"]
    assert rows["bridge"] == {
        "print base": "65.5 ± 1.2",
        "print novel": "70.0 ± 0.5",
        "night base": "33.3",
        "seconds": "250",
    }
    assert rows["refit"]["print novel"] == rows["refit"]["night base"] == "–"
    assert rows["refit"]["seconds"] == "4.3"
    assert rows["zero-shot strong"]["seconds"] == "–"


def test_best_of_a_column_is_bold_and_a_noted_method_never_is():
    table = markdown_table(SCORES, notes=CEILING)
    _, rows = cells(table)
    assert rows["refit"]["print base"] == "**72.0 ± 0.8**"
    assert rows["zero-shot strong"]["print novel"] == "**71.2 ± 0.0**"
    assert rows["tuned strong †"]["print base"] == "90.1 ± 0.2"
    # A column with one value has no best, and cost is never bold.
    assert table.count("**") == 4
    assert "† needs labels" in table and "best of the methods without a mark" in table
    _, unmarked = cells(markdown_table(SCORES))
    assert unmarked["tuned strong"]["print base"] == "**90.1 ± 0.2**"
    assert unmarked["refit"]["print base"] == "72.0 ± 0.8"


def test_values_that_print_the_same_are_all_bold():
    scores = [Score(m, "test", "accuracy", v) for m, v in (("a", 50.01), ("b", 49.98), ("c", 49.9))]
    _, rows = cells(markdown_table(scores))
    assert [row["test accuracy"] for row in rows.values()] == ["**50.0**", "**50.0**", "49.9"]


def test_baseline_adds_the_distance_in_points():
    table = markdown_table(SCORES, baseline="zero-shot strong")
    _, rows = cells(table)
    assert rows["bridge"]["print base"] == "65.5 ± 1.2 (+5.5)"
    assert rows["bridge"]["print novel"] == "70.0 ± 0.5 (-1.2)"
    assert rows["zero-shot strong"]["print base"] == "60.0 ± 0.0"
    assert rows["bridge"]["night base"] == "33.3"  # the baseline has no value there
    assert "points above or below zero-shot strong" in table


def test_std_and_costs_only_where_they_are_known():
    table = markdown_table([Score("a", "test", "accuracy", 50.0, 3.0, seeds=1)])
    assert cells(table) == (["method", "test accuracy"], {"a": {"test accuracy": "50.0"}})
    assert "±" not in table


def test_equal_notes_share_a_symbol_and_symbols_do_not_run_out():
    scores = [Score(f"m{i}", "test", "accuracy", i) for i in range(7)]
    notes = {"m0": "weak model", "m2": "labels", "m3": "weak model", "absent": "not shown"}
    table = markdown_table(scores, notes=notes)
    _, rows = cells(table)
    assert list(rows)[:4] == ["m0 †", "m1", "m2 ‡", "m3 †"]
    assert table.count("weak model") == 1 and "not shown" not in table
    many = markdown_table(scores, notes={f"m{i}": f"note {i}" for i in range(6)})
    assert list(cells(many)[1]) == ["m0 †", "m1 ‡", "m2 §", "m3 ¶", "m4 ††", "m5 ‡‡", "m6"]


def test_aggregated_runs_make_a_table_and_raw_runs_are_refused():
    runs = [[Score("a", "test", "accuracy", value)] for value in (60.0, 62.0, 64.0)]
    table = markdown_table(aggregate(runs))
    assert cells(table)[1]["a"]["test accuracy"] == "62.0 ± 2.0" and "over 3 seeds" in table
    with pytest.raises(ValueError, match="aggregate first"):
        markdown_table([score for run in runs for score in run])
    mixed = aggregate(runs) + [Score("b", "test", "accuracy", 1.0, 0.1, seeds=5)]
    assert "over 3 to 5 seeds" in markdown_table(mixed)


def test_a_bar_in_a_name_does_not_break_the_table():
    assert "| a\\|b c |" in markdown_table([Score("a|b\nc", "test", "accuracy", 1.0)])


def test_table_errors():
    with pytest.raises(ValueError, match="no score to show"):
        markdown_table([])
    with pytest.raises(ValueError, match="baseline 'none' has no score"):
        markdown_table(SCORES, baseline="none")


def test_scores_survive_a_round_trip(tmp_path):
    path = tmp_path / "made" / "scores.json"
    write_scores(path, SCORES)
    back = read_scores(path)
    assert math.isnan(back[3].value) and math.isnan(back[3].std)
    assert [s for s in back if s.value == s.value] == [s for s in SCORES if s.value == s.value]
    rows = json.loads(path.read_text())
    assert rows[2] == {
        "method": "refit", "split": "print", "metric": "base", "value": 72.04, "std": 0.81, "seconds": 4.26,
        "seeds": 3,
    }  # fmt: skip
    assert rows[3]["value"] is None
    assert [p.name for p in path.parent.iterdir()] == ["scores.json"]


def test_earlier_files_with_peak_memory_are_read(tmp_path):
    """It said 0 of nearly everything: what a process has freed before is allocated again without a trace."""
    path = tmp_path / "scores.json"
    write_scores(path, SCORES[:1])
    rows = [{**row, "peak_mb": 0.0} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(rows))
    assert read_scores(path) == SCORES[:1]
    assert "MB" not in markdown_table(read_scores(path))


def test_what_a_score_was_measured_on_is_optional(tmp_path):
    path = tmp_path / "scores.json"
    scores = [SCORES[0], replace(SCORES[1], dataset="mteb/dtd@abc", num_images=1880)]
    write_scores(path, scores)
    assert read_scores(path) == scores
    plain, told = json.loads(path.read_text())
    assert {"dataset", "num_images"}.isdisjoint(plain)  # as earlier versions wrote it
    assert (told["dataset"], told["num_images"]) == ("mteb/dtd@abc", 1880)
    path.write_text(json.dumps([{**told, "dataset": None, "num_images": None}]))
    assert read_scores(path) == [SCORES[1]]


def test_a_refused_write_leaves_the_old_file(tmp_path, caplog):
    path = tmp_path / "scores.json"
    write_scores(path, SCORES[:1])
    with pytest.raises(ValueError, match=r"the scores: \[1\]\.value must be a finite number, or null, found inf"):
        write_scores(path, [SCORES[0], replace(SCORES[0], value=math.inf)])
    assert read_scores(path) == SCORES[:1]
    with caplog.at_level(logging.INFO, "hf_transmiter.hub.scores"):
        write_scores(path, SCORES[1:2])
    assert f"{path} is replaced" in caplog.text and read_scores(path) == SCORES[1:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": ""}, "method must be a text that is not empty"),
        ({"split": 3}, "split must be a text"),
        ({"value": "62"}, "value must be a finite number, or null, found '62'"),
        ({"value": True}, "value must be a finite number"),
        ({"std": -1.0}, "std must be a finite number of at least 0, or null, found -1.0"),
        ({"seconds": [1]}, "seconds must be a finite number of at least 0"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1"),
        ({"seeds": 1.5}, "seeds must be a whole number"),
        ({"extra": 1}, "unknown key.*extra"),
        ({"dataset": " "}, "dataset must be a text that is not empty"),
        ({"dataset": ["a"]}, "dataset must be a text"),
        ({"num_images": 0}, "num_images must be a whole number of at least 1"),
        ({"num_images": True}, "num_images must be a whole number"),
    ],
)
def test_reading_names_the_row_and_the_key_that_is_wrong(tmp_path, change, message):
    path = tmp_path / "scores.json"
    write_scores(path, SCORES[:2])
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([rows[0], {**rows[1], **change}]))
    with pytest.raises(ValueError, match=rf"scores.json: \[1\].*{message}"):
        read_scores(path)


def test_reading_refuses_what_is_no_list_of_scores(tmp_path):
    path = tmp_path / "scores.json"
    with pytest.raises(FileNotFoundError):
        read_scores(path)
    for text, message in (
        ("[{", "is not valid JSON"),
        ('{"method": "a"}', "must be a list of scores, as write_scores makes it"),
        ("[1]", "must be an object"),
        ('[{"method": "a"}]', "lacks metric, seconds, seeds, split, std, value"),
        ("[NaN]", "is not valid JSON: NaN is not a number"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_scores(path)


def test_the_best_of_a_metric_is_not_always_the_highest():
    values = {"ece": (5.0, 3.0), "calibration gap": (2.0, 8.0), "agreement": (90.0, 80.0), "accuracy": (50.0, 60.0)}
    scores = [Score(m, "t", metric, pair[i]) for i, m in enumerate("ab") for metric, pair in values.items()]
    _, rows = cells(markdown_table(scores))
    assert rows["a"] == {"t ECE": "5.0", "t calibration gap": "**2.0**", "t agreement": "90.0", "t accuracy": "50.0"}
    assert rows["b"] == {
        "t ECE": "**3.0**",
        "t calibration gap": "8.0",
        "t agreement": "80.0",
        "t accuracy": "**60.0**",
    }


def test_aggregate_takes_mean_and_sample_deviation_over_seeds():
    runs = [[Score("a", "test", "accuracy", v, seconds=s), Score("b", "test", "accuracy", 1.0)] for v, s in
            ((10.0, 1.0), (20.0, 3.0), (30.0, None))]  # fmt: skip
    first, second = aggregate(runs)
    assert (first.value, first.std, first.seconds, first.seeds) == (20.0, 10.0, 2.0, 3)
    assert (second.value, second.std, second.seconds, second.seeds) == (1.0, 0.0, None, 3)
    assert aggregate(runs[:1])[0].std == 0.0
