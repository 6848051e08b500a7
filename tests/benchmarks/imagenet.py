"""What carrying an adapter over on ImageNet costs, reckoned from measured parts.

    python tests/benchmarks/run.py --output-dir OUT --only embedding imagenet
    python tests/benchmarks/imagenet.py OUT/benchmarks.json [--gpus 1 8 64] [--forward 500 2000 8000] [--cores 8]

1,281,167 pictures, 1,000 classes, one pass of each model; the forward pass is assumed, not measured. Solving is ten
times that of a tenth of the pictures, with which it grows linearly. Measured ratios become seconds by those of the
reference where the machine is idle. Rates of another machine take the place of the measured ones: `--preparation`,
pictures per second and core, and `--solving`, seconds.
"""

import argparse
import json
from dataclasses import dataclass

from measuring import number


IMAGES, CLASSES = 1_281_167, 1000
# Width of the shared space, and of the tower features that a refit reads beside it.
MODELS = {"ViT-B/16": (512, 0), "ViT-L/14": (768, 2048)}
PICTURE = 110_000  # bytes of a picture of ImageNet, on average


@dataclass
class Parts:
    """Measured, or put in.

    Args:
        preparation: pictures per second and core: read from memory, decoded, scaled, normalised.
        reading: seconds per picture that its file's digest takes, from memory.
        solving: seconds of bridge and refit in one process.
        memory: MB of the refit in one process.
    """

    preparation: float
    reading: float
    solving: float
    memory: float

    @classmethod
    def of(cls, rows: list[dict]) -> "Parts":
        """From the rows of `benchmarks.json`.

        Raises:
            ValueError: a benchmark is not among them.
        """

        def find(bench: str, case: str, key: str = "ratio") -> float:
            for row in rows:
                if (row["bench"], row["case"]) == (bench, case) and row[key]:
                    return row[key]
            raise ValueError(f"there is no {case!r} in it: run the benchmark {bench!r} (--only {bench}).")

        unit = find("machine", "one product", "seconds")
        picture = unit * find("embedding", "preparing a picture")
        solving = unit * sum(find("imagenet", f"{case}, a tenth") for case in ("bridge of embeddings", "refit"))
        reading = picture * find("embedding", "files read once, to know the pictures")
        return cls(1 / picture, reading, 10 * solving, 10 * find("imagenet", "refit, a tenth", "peak_mb"))


def embedding_minutes(parts: Parts, gpus: int, forward: float, cores: int) -> tuple[float, float]:
    """Minutes of one model's pass: of the forward pass, and of preparing. Workers prepare while the model runs, so
    that the larger of the two is what it takes."""
    return IMAGES / (forward * gpus) / 60, IMAGES / (parts.preparation * cores * gpus) / 60


def disk_gb(width: int, features: int) -> float:
    """Of a table, float32."""
    return 4 * IMAGES * (width + features) / 1e9


def report(parts: Parts, gpus: list[int], rates: list[float], cores: int) -> str:
    """The tables, in markdown."""
    serial, passes = parts.solving / 60, len(MODELS)
    lines = [
        f"| GPUs | pictures/s and GPU (assumed) | forward, min | preparing on {cores} cores per GPU, min | "
        "both models, min | with solving, min | what limits it |",
        "|---:|---:|---:|---:|---:|---:|:---|",
    ]
    for count in gpus:
        for rate in rates:
            forward, prepare = embedding_minutes(parts, count, rate, cores)
            passing = passes * max(forward, prepare)
            limit = "solving" if serial > passing else "preparing" if prepare > forward else "forward"
            cells = [number(each) for each in (forward, prepare, passing, passing + serial)]
            lines.append(f"| {count} | {rate:,.0f} | {' | '.join(cells)} | {limit} |")
    lines += ["", "| once, however many GPUs | |", "|:---|---:|"]
    lines.append(f"| bridge and refit, in one process | {parts.solving / 60:.0f} min |")
    lines.append(f"| their memory | {parts.memory / 1000:.1f} GB |")
    reading = IMAGES * parts.reading / 60
    lines.append(f"| digests of the pictures' files, from memory, which processes share | {reading:.0f} min |")
    gigabytes = IMAGES * PICTURE / 1e9
    lines.append(f"| the same from a disk of 200 MB/s | {gigabytes / 0.2 / 60:.0f} min |")
    lines.append(f"| label logits (N, C), float32, each copy | {4 * IMAGES * CLASSES / 1e9:.1f} GB |")
    for name, (width, features) in MODELS.items():
        said = f"{width} numbers" + (f" and {features} of the tower" if features else "")
        lines.append(f"| table of {name} on disk, {said} (twice that while it is joined) | "
                     f"{disk_gb(width, features):.1f} GB |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--forward", type=float, nargs="+", default=[500.0, 2000.0, 8000.0], metavar="PICTURES_PER_S")
    parser.add_argument("--cores", type=int, default=8, help="per GPU")
    parser.add_argument("--preparation", type=float, help="pictures per second and core")
    parser.add_argument("--solving", type=float, help="seconds")
    arguments = parser.parse_args()
    with open(arguments.benchmarks) as file:
        rows = json.load(file)["rows"]
    parts = Parts.of(rows)
    for name in ("preparation", "solving"):
        if getattr(arguments, name) is not None:
            setattr(parts, name, getattr(arguments, name))
    print(f"Measured: {parts.preparation:.0f} pictures prepared per second and core.\n")
    print(report(parts, arguments.gpus, arguments.forward, arguments.cores), end="")


if __name__ == "__main__":
    main()
