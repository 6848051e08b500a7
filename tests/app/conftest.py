"""The app as its users meet it: started by its command, driven in headless Chromium. Skipped without gradio,
playwright or a browser; `.ci/app-tests` makes an environment that has them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import demo_folder
import pytest


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without these Chromium asks the network for updates and much else at every start.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Runs a script or module and notes every address it looks up or connects to.
WATCHED = """
import os, runpy, sys
notes = open(os.environ["WATCHED"], "a", buffering=1)
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        notes.write(f"{event} {args[1] if event == 'socket.connect' else args[0]}\\n")
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def pytest_collection_modifyitems(config, items):
    missing = [name for name in ("gradio", "playwright") if not _installed(name)] + ([] if CHROMIUM else ["chromium"])
    for item in items:
        if missing and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}: run .ci/app-tests"))


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


class Served:
    """A process that serves the app: ``url``, what it said so far, and the addresses it asked for."""

    def __init__(self, *command: str, notes: Path, **environment: str):
        self.notes = notes
        variables = {**os.environ, "WATCHED": str(notes), "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, *command],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts what runs in its background deaf to Ctrl+C, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.said, self._ready = [], threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(180) and self.process.poll() is None, "".join(self.said)
        self.url = next(re.search(r"Open (http\S+)", line).group(1) for line in self.said if "Open http" in line)

    def _read(self):
        for line in self.process.stderr:
            self.said.append(line)
            if "Open http" in line:
                self._ready.set()
        self._ready.set()

    @property
    def asked(self) -> set[str]:
        """Hosts that the process looked up or connected to."""
        lines = self.notes.read_text().splitlines()
        return {re.sub(r"^socket\.\w+ \(?['\"]?([^'\",]*).*", r"\1", line) for line in lines}

    def end(self) -> str:
        """As Ctrl+C does. Returns: what it said on stdout."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.communicate(timeout=30)[0]
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """``serve(*command, **environment)``: a [`Served`], ended after the tests."""
    running = []

    def start(*command: str, **environment: str) -> Served:
        running.append(Served(*command, notes=tmp_path_factory.mktemp("served") / "notes.txt", **environment))
        return running[-1]

    yield start
    for served in running:
        served.process.kill()


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> dict[str, str]:
    """The tuned weak model and the upgraded strong one, as arguments of `load_models`."""
    task = demo_folder.make(tmp_path_factory.mktemp("demo")) / demo_folder.TASK
    return {"tuned": str(task / "tuned"), "upgraded": str(task / "strong_adapter")}


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=FLAGS, color_scheme="light"
        )
        yield context
        context.close()


@pytest.fixture
def page(browser):
    """A new page; ``page.outside`` are the requests it made to other machines, ``page.problems`` what went wrong."""
    page = browser.new_page()
    page.set_viewport_size({"width": 1280, "height": 900})
    page.outside, page.problems = [], []
    page.on("request", lambda request: _own(request.url) or page.outside.append(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    yield page
    page.close()


def _own(url: str) -> bool:
    return re.match(r"(data|blob|about):|http://(127\.0\.0\.1|localhost):\d+/", url) is not None
