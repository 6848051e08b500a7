"""Runs the notebooks as a reader would, each in a fresh kernel.

    python tests/run_notebooks.py [notebooks/2_bridges.ipynb ...]

runs them (all of `notebooks/` without arguments) and keeps what they print and draw in the files. Nothing is
downloaded: the sandbox stands in for models and pictures, and a Hub on this machine for the Hub.
"""

import base64
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import nbformat
from local_hub import LocalHub
from nbclient import NotebookClient
from PIL import Image


FOLDER = Path(__file__).parents[1] / "notebooks"
SHARING = "4_share_and_load.ipynb"
TIMEOUT = 300  # seconds for one cell, on a machine that is busy with other things
# What other libraries say about each other, and that this Jupyter cannot draw progress bars.
NOISE = "ignore::FutureWarning,ignore:IProgress not found"


def notebooks() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def run(path: Path, folder: Path, environment: Mapping[str, str]) -> nbformat.NotebookNode:
    """What the notebook at `path` becomes when its cells run from top to bottom; the file stays as it is.

    Args:
        path (`Path`): the notebook.
        folder (`Path`): an empty folder to run in.
        environment (`Mapping[str, str]`): of the kernel.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    # Over sockets in a folder of its own: ports could be taken by the kernel of another test in between.
    with tempfile.TemporaryDirectory() as sockets:
        client.create_kernel_manager()
        client.km.transport, client.km.connection_file = "ipc", str(Path(sockets) / "kernel.json")
        own = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": NOISE, "IPYTHONDIR": str(Path(sockets) / "ipython")}
        client.execute(env={**environment, **own})
    return _clean(notebook)


def _clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from machine to machine, and with pictures of 256 colours, which are half as large."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
    return notebook


def picture(png: str) -> Image.Image:
    """A picture out of a notebook's output."""
    return Image.open(io.BytesIO(base64.b64decode(png)))


def _smaller(png: str) -> str:
    buffer = io.BytesIO()
    picture(png).convert("RGB").quantize(256).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def shape(notebook: nbformat.NotebookNode) -> list[list[tuple]]:
    """For each cell what kinds of outputs it has, and their words; numbers and blanks do not count. Of a card that is
    quoted only the headings count: its words have tests of their own."""
    return [[_shape(output) for output in cell.get("outputs", ())] for cell in notebook.cells]


def _shape(output: nbformat.NotebookNode) -> tuple:
    if output.output_type == "stream":
        return (output.name, _words(output.text))
    data = output.get("data", {})
    text = data.get("text/markdown", data.get("text/plain", ""))
    if text.startswith("> "):
        text = "\n".join(re.findall(r"^> #.*$", text, re.MULTILINE))
    return (output.output_type, *sorted(data), _words(text))


def _words(text: str) -> str:
    # A best value is printed bold, whichever it is; a version such as 2.13.0+cpu is a number.
    return " ".join(re.sub(r"[-+−±]?\d[\w.+]*|\*\*", "", text).split())


def main() -> None:
    hub = LocalHub()
    hub.start()
    for path in [Path(argument) for argument in sys.argv[1:]] or notebooks():
        hub.reset()
        with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            who = {**reader(home), **(alice(hub) if path.name == SHARING else {})}
            ran = run(path, Path(folder), {**os.environ, **who})
            nbformat.write(ran, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e3:.0f} kB")
    hub.close()


def reader(home: str) -> dict[str, str]:
    """Environment of somebody with an empty cache and no network."""
    return {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def alice(hub: LocalHub) -> dict[str, str]:
    """Environment of somebody who is logged in to the Hub of this machine."""
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_alice", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


if __name__ == "__main__":
    main()
