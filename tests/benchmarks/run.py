"""Benchmarks: what each step costs, as ratios within one run, and how that grows.

    python tests/benchmarks/run.py --output-dir OUT [--only NAME ...] [--quick]

writes `benchmarks.json`, `benchmarks.md` and figures of the growth curves. Needs no network and no GPU; one thread per
process. With PYTHONPATH set to an older checkout it measures that one; what is not there is named and left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


HERE = Path(__file__).resolve().parent
# After what is installed: a PYTHONPATH says which version is measured.
sys.path += [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "studies")]
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("HF_HOME", str(Path(tempfile.gettempdir()) / "hf_transmiter_benchmarks"))

import torch  # noqa: E402
from measuring import Missing, Row, draw, reference, seconds, write  # noqa: E402


def benches() -> dict:
    """Functions of (quick, scratch) that yield rows, by name, in the order in which they run."""
    import pictures
    import solving
    import starting

    return {
        "embedding": pictures.embedding,
        "inference": pictures.inference,
        "loading": pictures.loading,
        "texts": pictures.texts,
        "starting": starting.starting,
        "solving": solving.solving,
        "classes": solving.classes,
        "anchors": solving.anchors,
        "processes": solving.processes,
        "images": solving.images,
        "imagenet": solving.imagenet,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it runs, not what it costs")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if arguments.case:
        import solving

        found = solving.run_case(arguments.case, arguments.settings)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(found), flush=True)
        return
    if arguments.output_dir is None:
        parser.error("the following arguments are required: --output-dir")
    known = benches()
    unknown = sorted(set(arguments.only or ()) - set(known))
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}: {', '.join(known)}")
    unit = min(seconds(reference) for _ in range(50))
    rows, failed, since = [Row("machine", "one product", 1.0, seconds=unit)], False, time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only or known:
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                for row in known[name](arguments.quick, Path(scratch)):
                    rows.append(row)
                    write(arguments.output_dir, rows, facts(arguments, time.perf_counter() - since))
            except Missing as error:
                rows.append(Row(name, "left out", note=f"not in this version: {error}"))
            except Exception as error:  # the others go on
                traceback.print_exc()
                failed = True
                rows.append(Row(name, "failed", note=f"{type(error).__name__}: {error}"[:200]))
    write(arguments.output_dir, rows, facts(arguments, time.perf_counter() - since))
    draw(arguments.output_dir, rows)
    print((arguments.output_dir / "benchmarks.md").read_text())
    sys.exit(failed)


def facts(arguments: argparse.Namespace, spent: float) -> dict:
    import transformers

    import hf_transmiter

    sizes = {"sizes": "quick"} if arguments.quick else {}
    place = Path(hf_transmiter.__file__).parent
    said = subprocess.run(["git", "-C", place, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    commit = {} if said.returncode else {"commit": said.stdout.strip()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"hf_transmiter": hf_transmiter.__version__, **commit, **versions, **sizes, "minutes": round(spent / 60, 1)}


if __name__ == "__main__":
    main()
