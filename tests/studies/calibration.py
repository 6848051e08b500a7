"""Can the confidence of an upgraded model be believed, and does a temperature fitted without labels mend it?

    python tests/studies/calibration.py [--tasks print:lora jargon:coop ...] [--caltech FOLDER] [--seeds 3]

The sandbox's weak model is tuned with 16 shots per class and carried to the strong one. For every model and way of
upgrading: accuracy, mean confidence and expected calibration error (ECE, 15 bins) against the test labels, as it is
and divided by a temperature T (in brackets). T is fitted on unlabelled pictures to the tuned weak model's
probabilities, or to its predictions as if they were labels; or on the validation split to the labels, which is the
most that one temperature can do. Mean ± std over seeds, in percent.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from hf_transmiter.cli.demo import METHODS, SANDBOX_TUNING, Task
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.evaluation.reliability import expected_calibration_error, fit_temperature
from hf_transmiter.hub.files import replace_file
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.extract import extract
from hf_transmiter.method.teacher import teacher_logits
from hf_transmiter.method.transfer import interpolate, transfer
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import ExtractionConfig, TransferConfig, TuningConfig


SPLITS = ("unlabelled", "validation", "test")


def upgrades(task: Task, teacher: AnchorClassifier, names: list[str], seed: int) -> dict[str, AnchorClassifier]:
    """Ways to upgrade, by the rows' names in `compare`."""
    unlabelled, quiet = task.images("unlabelled"), {"progress": False}
    adapter = extract(task.weak, teacher, unlabelled, class_names=names, **quiet)
    config = ExtractionConfig(solver="gradient", basis="fixed", seed=seed)
    published = extract(task.weak, teacher, unlabelled, anchors=task.anchors, config=config, **quiet)
    plain = TransferConfig(refit=False)
    return {
        "TransMiter": transfer(published, task.strong, unlabelled, **quiet),
        "bridge from text": transfer(adapter, task.strong, config=plain, **quiet),
        "bridge from task images": transfer(adapter, task.strong, unlabelled, config=plain, **quiet),
        "refit": transfer(adapter, task.strong, unlabelled, **quiet),
    }


def answers(task: Task, method: str, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Logits of every model, on every split."""
    config = TuningConfig(method=method, seed=seed, **SANDBOX_TUNING)
    names = task.images("test").features["label"].names
    teacher = tune(task.weak, task.images("train"), config=config, progress=False)
    found = {"tuned weak": {}, "zero-shot strong": {}}
    classifiers = upgrades(task, teacher, names, seed)
    for split in SPLITS:
        images = task.images(split)
        found["tuned weak"][split] = teacher_logits(teacher, images, names, progress=False)
        x = embed_dataset(task.strong, images, progress=False).embeds
        with torch.no_grad():
            text = task.strong.embed_names(names, teacher_templates(classifiers["refit"]))
            found["zero-shot strong"][split] = task.strong.logits(x, text)
            for row, classifier in classifiers.items():
                found.setdefault(row, {})[split] = classifier.classify(x)
    return found


def teacher_templates(classifier: AnchorClassifier) -> tuple[str, ...]:
    return tuple(classifier.adapter_config.templates)


def measure(found: dict[str, dict[str, torch.Tensor]], labels: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Accuracy, confidence, errors of calibration in percent, and temperatures, by row."""
    teacher, rows = found["tuned weak"]["unlabelled"], {}
    for row, logits in found.items():
        classes = logits["test"].shape[1]
        rows[row] = {
            "accuracy": 100 * float((logits["test"].argmax(1) == labels["test"]).float().mean()),
            "confidence": 100 * float(logits["test"].softmax(1).max(1).values.mean()),
            "ECE": expected_calibration_error(logits["test"], labels["test"]),
        }
        for name, split, target in (
            ("probabilities", "unlabelled", teacher.softmax(1)),
            ("predictions", "unlabelled", one_hot(teacher.argmax(1), classes)),
            ("labels", "validation", one_hot(labels["validation"], classes)),
        ):
            if row == "tuned weak" and name != "labels":
                continue  # it agrees with itself
            try:
                t = rows[row][f"T, {name}"] = fit_temperature(logits[split], target)
            except ValueError:  # right on every image: Caltech's tuned weak model on those it was tuned on
                continue
            rows[row][f"ECE, {name}"] = expected_calibration_error(logits["test"] / t, labels["test"])
    return rows


def sandbox(pair: str, seeds: int) -> list[dict[str, dict]]:
    domain, method = pair.split(":")
    task = Task.load(domain)
    labels = {split: torch.tensor(task.images(split)["label"]) for split in ("validation", "test")}
    return [measure(answers(task, method, seed), labels) for seed in range(seeds)]


def caltech(folder: Path, seeds: int) -> list[dict[str, dict]]:
    """Real embeddings, see `caltech.py`; the labelled images of the weak model's tuning are the validation split."""
    from caltech import Run, tune_class_vectors

    data, found = load_file(folder / "train_16shot.safetensors"), []
    for seed in range(seeds):
        run = Run(data, seed)
        rows = {"unlabelled": run.of("unlabelled"), "validation": run.of("labelled"), "test": run.of("test")}
        labelled, weak, strong = rows["validation"], run.weak, run.strong
        tuned = tune_class_vectors(weak.x[labelled], run.labels[labelled], run.text[weak])
        vectors = interpolate(run.carry(run.bridge(rows["unlabelled"]), tuned), run.text[strong], 0.0)
        fitted, bias = run.refit(rows["unlabelled"], vectors, run.pack(rows["unlabelled"], tuned))
        said = {split: (weak.x[at], strong.x[at]) for split, at in rows.items()}
        models = {
            "tuned weak": {split: weak.logits(x, tuned) for split, (x, _) in said.items()},
            "zero-shot strong": {split: strong.logits(x, run.text[strong]) for split, (_, x) in said.items()},
            "bridge from task images": {split: strong.logits(x, vectors) for split, (_, x) in said.items()},
            "refit": {split: strong.logits(x, fitted) + bias for split, (_, x) in said.items()},
        }
        found.append(measure(models, {split: run.labels[at] for split, at in rows.items()}))
    return found


def table(title: str, runs: list[dict[str, dict]]) -> str:
    columns = ["accuracy", "confidence", "ECE", "ECE, probabilities", "ECE, predictions", "ECE, labels"]
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]

    def spread(values: list[float], digits: int) -> str:
        std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{std}"

    for row in runs[0]:
        cells = []
        for column in columns:
            values = [run[row][column] for run in runs if column in run[row]]
            fitted = [run[row][key] for run in runs if (key := column.replace("ECE, ", "T, ")) in run[row]]
            with_t = f" (T {spread(fitted, 2)})" if column.startswith("ECE, ") and fitted else ""
            cells.append((spread(values, 1) if values else "–") + with_t)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pairs = [f"{domain}:{method}" for domain, method in METHODS.items()]
    parser.add_argument("--tasks", nargs="*", default=pairs, help="TASK:METHOD of the sandbox")
    parser.add_argument("--caltech", type=Path, help="folder with real embeddings, see caltech.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write every seed's numbers there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    everything = {}
    for pair in [*arguments.tasks, *(["caltech"] if arguments.caltech else [])]:
        real = pair == "caltech"
        everything[pair] = caltech(arguments.caltech, arguments.seeds) if real else sandbox(pair, arguments.seeds)
        print(f"\n{table(f'{pair}, {arguments.seeds} seeds', everything[pair])}", flush=True)
    if arguments.json:
        replace_file(arguments.json, lambda path: path.write_text(json.dumps(everything, indent=1)))


if __name__ == "__main__":
    main()
