"""A Hub on this machine, for tests: repositories in memory, spoken to by `huggingface_hub` over real HTTP.

It answers as https://huggingface.co does to huggingface_hub 2.4 and datasets 5.2: repositories of models and datasets
(private ones too), commits, pull requests, branches and tags, LFS uploads, downloads with ranges, and the error
codes. What it cannot do: Xet storage (clients run with ``HF_HUB_DISABLE_XET=1``), the dataset viewer, Spaces,
discussions, search. A test gets it from the fixture `hub` of conftest.py.

Where a method takes the id of a repository, a dataset's is ``datasets/user/name``.
"""

from __future__ import annotations

import io
import re
import socketserver
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml
from local_hub_routes import Handler
from local_hub_storage import LFS_FILES, File, Repository


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match, see `LocalHub.fault`."""

    method: str
    path: str
    what: int | str
    times: int


class LocalHub(socketserver.ThreadingTCPServer):
    """The server. Its address is known (`url`) and kept from others before it is started."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.server_bind()  # the port is ours now, but connections are refused until start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.RLock()
        self.running = False
        self.reset()

    def start(self) -> None:
        if not self.running:
            self.running = True
            self.server_activate()
            threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        if self.running:
            self.shutdown()
        self.server_close()

    def reset(self) -> None:
        """Two accounts, nothing else."""
        self.users = {"hf_alice": "alice", "hf_bob": "bob"}  # token -> name
        self.repos: dict[str, Repository] = {}
        self.gated: set[str] = set()  # ids of those that only the owner may read, though all may see them
        self.blobs: dict[str, bytes] = {}  # LFS files that were uploaded, by sha256
        self.log: list[tuple[str, str]] = []
        self.faults: list[Fault] = []

    def fault(self, method: str, path: str, what: int | str, times: int = 1) -> None:
        """Lets something go wrong with the next `times` requests with this method and a path that holds `path`
        (regular expression). What goes wrong:

        - a number: the answer has this status, and nothing is done;
        - ``"drop"``: the connection is cut when half of what is sent (of an upload) or of the answer has passed;
        - ``"no answer"``: all is done, but the connection is cut before the answer;
        - ``"corrupt"``: one bit of the answer is wrong;
        - ``"truncate"``: half of the answer is missing, and its header agrees.
        """
        self.faults.append(Fault(method, path, what, times))

    def take_fault(self, method: str, path: str) -> int | str | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault.what
        return None

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of every file, as pushed."""
        return {path: file.data for path, file in self.repos[repo_id].files(revision).items()}

    def titles(self, repo_id: str, revision: str = "main") -> list[str]:
        """Titles of the commits, the newest first, without the one that made the repository."""
        return self.repos[repo_id].titles(revision)[:-1]

    def write(self, repo_id: str, files: dict[str, bytes], title: str = "by hand") -> str:
        """Commits files without a client (hostile ones, say), in a new public repository if need be."""
        if repo_id not in self.repos:
            self.make(repo_id, private=False)
        repo = self.repos[repo_id]
        new = {path: File(data, path.endswith(LFS_FILES)) for path, data in files.items()}
        return repo.commit("main", title, {**repo.files("main"), **new}, repo.find("main"))

    def add_dataset(self, repo_id: str, files: dict[str, bytes], title: str = "by hand") -> str:
        """Commits files of a public dataset without a client; `datasets.load_dataset(repo_id)` reads them.

        Returns: the commit, for ``revision=``.
        """
        return self.write(f"datasets/{repo_id}", files, title)

    def requests(self, method: str, path: str = "") -> list[str]:
        """Paths of the requests so far with this method whose path holds `path` (regular expression)."""
        return [asked for how, asked in self.log if how == method and re.search(path, asked)]

    def make(self, repo_id: str, private: bool) -> None:
        repo = self.repos[repo_id] = Repository(private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_FILES)
        repo.commit("main", "initial commit", {".gitattributes": File(attributes.encode(), False)}, None)


def dataset_files(splits: dict[str, Dataset], subset: str = "default") -> dict[str, bytes]:
    """For `LocalHub.add_dataset`: a parquet file per split in the folder `subset`, and a card that names splits,
    columns and classes, as `Dataset.push_to_hub` writes it."""
    files, features = {}, next(iter(splits.values())).features
    for name, split in splits.items():
        content = io.BytesIO()
        split.to_parquet(content)
        files[f"{subset}/{name}-00000-of-00001.parquet"] = content.getvalue()
    where = [{"split": name, "path": f"{subset}/{name}-*"} for name in splits]
    card = {
        "configs": [{"config_name": subset, "data_files": where}],
        "dataset_info": {"config_name": subset, "features": features._to_yaml_list()},
    }
    return {"README.md": f"---\n{yaml.safe_dump(card)}---\n# Pictures\n".encode(), **files}
