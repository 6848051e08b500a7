"""[`BridgeFiles`]: a bridge as a file, a folder and a repository on the Hub."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import CommitInfo
from safetensors.torch import save_file

from ..algebra import ORTHOGONALITY, check_finite, check_semi_orthogonal
from ..data.anchors import Anchors
from ..encoders.identity import ModelId
from ..hub.adapter_files import BRIDGE
from ..hub.card import write_card
from ..hub.checks import check_json
from ..hub.files import read_metadata_json, read_tensors, replace_file
from ..hub.push import push
from ..hub.repo import fetch, public_name


if TYPE_CHECKING:
    from .bridge import Bridge

_FORMAT = "hf_transmiter.bridge"
_SHAPES = {"matrix": ("m", "k"), "mean_strong": ("m",), "mean_weak": ("k",)}
_FACTS = (
    *("space", "scale", "scale_back", "source", "dataset", "num_pairs", "alignment", "held_out", "beta", "through"),
    *("strong", "weak", "anchors", "versions"),
)


class BridgeFiles:
    """The part of [`Bridge`] that reads and writes."""

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Writes one safetensors file, atomically.

        Raises:
            FileExistsError: `path` exists and `overwrite` is `False`.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another path or overwrite=True.")
        facts = {key: getattr(self, key) for key in _FACTS}
        facts.update(strong=asdict(self.strong), weak=asdict(self.weak))
        facts["anchors"] = None if self.anchors is None else self.anchors.to_dict()
        metadata = {"format": _FORMAT, "bridge": json.dumps(facts)}
        tensors = {key: getattr(self, key).contiguous() for key in _SHAPES}
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Bridge:
        """Reads what [`save`] wrote, and checks it: first the header, then values, then that the map is one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a bridge, a damaged one, shapes that do not fit, values that are not finite, or a matrix
                that is not (semi-)orthogonal; of a composed bridge, one that makes rows longer.
        """
        tensors, metadata = read_tensors(path, _FORMAT, "bridge", "Bridge.save", _SHAPES)
        facts = read_metadata_json(path, metadata, "bridge", dict)
        check_json(facts, "bridge", f"bridge in {path}")
        if facts["anchors"] is not None:
            check_json(facts["anchors"], "anchors", f"anchors in {path}")
            facts["anchors"] = Anchors.from_dict(facts["anchors"])
        facts.update(strong=ModelId(**facts["strong"]), weak=ModelId(**facts["weak"]))
        facts["through"] = tuple(facts.get("through", ()))
        for key, tensor in tensors.items():
            check_finite(tensor.reshape(1, -1), f"{key} of {path}")
        bridge = cls(**{key: tensor.float() for key, tensor in tensors.items()}, **facts)
        bridge._check_matrix(str(path))
        return bridge

    def _check_matrix(self, where: str) -> None:
        """
        Raises:
            ValueError: `matrix` is not what it is in every bridge of this space; the message begins with `where`.
        """
        logit = self.space == "logit"
        if logit and len(set(self.matrix.shape) | {len(self.anchors or self.matrix)}) > 1:
            raise ValueError(f"{where}: the matrix {tuple(self.matrix.shape)} does not fit the anchors.")
        if self.derived is None or logit:
            check_semi_orthogonal(self.matrix, f"{where}: the matrix", full_rank=logit)
        elif torch.linalg.matrix_norm(self.matrix.double(), 2) > 1 + ORTHOGONALITY:
            raise ValueError(f"{where}: the matrix is no product of bridges; the file was changed or damaged.")

    def save_pretrained(self, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
        """A folder ready for the Hub: `bridge.safetensors` and its card, `README.md`.

        Raises:
            FileExistsError: there is a bridge already and `overwrite` is `False`.
        """
        self.save(Path(folder) / BRIDGE, overwrite=overwrite)
        write_card(folder)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
    ) -> Bridge:
        """A bridge from the Hub, a folder or a file.

        Args:
            repo_or_path (`str` or `os.PathLike`): Hub id (``id@revision`` too), folder, or a ``.safetensors`` file.
            revision, token, cache_dir, subfolder, local_files_only: as in transformers; not used for a file.

        Raises:
            FileNotFoundError: nothing there, or no bridge in it.
            OSError: the Hub has no such repository, or cannot be reached.
            ValueError: what [`load`] raises.
        """
        name = os.fspath(repo_or_path)
        if name.endswith(".safetensors"):
            return cls.load(name)
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        path = fetch(name, BRIDGE, subfolder=subfolder, **hub)
        if path is None:
            raise FileNotFoundError(f"there is no {BRIDGE} in {name!r}; write one with Bridge.save_pretrained.")
        return cls.load(path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Uploads what [`save_pretrained`] writes, in one commit; the repository is made if it is not there.

        Args:
            repo_id (`str`): ``user/name``.
            private (`bool`, *optional*): whether a new repository is private; the account's default when omitted.
            commit_message (`str`, *optional*): "Upload bridge with hf_transmiter" when omitted.
            create_pr (`bool`, *optional*, defaults to `False`): propose the commit instead of making it.
            token (`str` or `bool`, *optional*): Hub token; the stored one when omitted.
        """
        options = {"private": private, "commit_message": commit_message, "create_pr": create_pr, "token": token}
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / BRIDGE)
            return push(folder, repo_id, **options)

    def without_paths(self) -> Bridge:
        """The same bridge, without the folders of this machine that its models were loaded from: only their names."""
        weak, strong = (
            replace(model, name=model.name and public_name(model.name)) for model in (self.weak, self.strong)
        )
        return replace(
            self,
            weak=weak,
            strong=strong,
            through=tuple(public_name(name) for name in self.through),
            dataset=self.dataset and public_name(self.dataset),
        )
