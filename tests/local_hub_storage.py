"""What the Hub keeps: the repositories of `local_hub.LocalHub`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


LFS_FILES = (".safetensors", ".bin", ".pt", ".pkl", ".png", ".jpg", ".parquet", ".arrow")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Refusal(Exception):
    """An answer that is an error: status, the Hub's error code and its message."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(status, message, code)


@dataclass
class File:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Git's name of the content; of an LFS file, of the pointer that stands for it."""
        data = f"oid sha256:{sha256(self.data)}\nsize {len(self.data)}".encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return sha256(self.data) if self.lfs else self.oid

    def entry(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.etag, "size": len(self.data), "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.data), "oid": self.oid, **lfs}


def folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}


@dataclass
class Repository:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # branch, tag or refs/pr/N -> commit
    commits: dict[str, tuple[str, str | None, dict[str, File]]] = field(default_factory=dict)  # title, parent, files
    tags: set[str] = field(default_factory=set)

    def commit(self, ref: str, title: str, files: dict[str, File], parent: str | None) -> str:
        content = [(path, file.oid) for path, file in sorted(files.items())]
        name = hashlib.sha1(f"{parent} {title} {content} {len(self.commits)}".encode()).hexdigest()
        self.commits[name] = (title, parent, files)
        self.refs[ref] = name
        return name

    def find(self, revision: str) -> str:
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str) -> dict[str, File]:
        return self.commits[self.find(revision)][2]

    def titles(self, revision: str) -> list[str]:
        """Of the commits, from the newest to the oldest."""
        commit, found = self.find(revision), []
        while commit:
            title, commit, _ = self.commits[commit]
            found.append(title)
        return found
