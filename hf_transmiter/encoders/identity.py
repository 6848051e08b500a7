"""What identifies a model: [`ModelId`], and one hex digest for everything its answers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .families import EMBEDDING_PARTS


# Config entries that say where or with what a model was saved, not what it computes.
_PROVENANCE = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("image_processor_type", "processor_class"),
)

# Keyed by identity and dying with the tensor, so a new adapter never inherits the digest of a deleted one.
_DIGESTS = WeakIdKeyDictionary()


@dataclass
class ModelId:
    """Which model: name, revision and the fingerprint of its weights. `encoder` is a [`DualEncoder`]."""

    name: str | None
    revision: str | None
    fingerprint: str

    @classmethod
    def of(cls, encoder) -> ModelId:
        return cls(encoder.name_or_path, encoder.revision, encoder.fingerprint)

    def is_of(self, encoder) -> bool:
        """Whether `encoder` is this model: the very revision of it with no adapter in its towers, or equal weights
        and processor. A model in float32 is also compared as it would be in half precision; of one in half precision,
        whose float32 weights are not known, the name decides, and the revision where both are known."""
        adapted = any(active for _, active, *_ in _adapter_state(encoder.model))
        if self.name is not None and self.name == encoder.name_or_path and not adapted:
            if self.revision is not None and self.revision == encoder.revision:
                return True
            if encoder.dtype != torch.float32 and None in (self.revision, encoder.revision):
                return True
        if encoder.fingerprint == self.fingerprint:
            return True
        halves = (torch.bfloat16, torch.float16) if encoder.dtype == torch.float32 else ()
        return any(encoder.fingerprint_in(dtype) == self.fingerprint for dtype in halves)

    def check(self, encoder, role: str) -> None:
        """
        Raises:
            ValueError: `encoder` is another model.
        """
        if not self.is_of(encoder):
            raise ValueError(
                f"the bridge was built for the {role} model {self.name!r} (revision {self.revision}), this is "
                f"{encoder.name_or_path!r} (revision {encoder.revision}) with other weights or another processor: "
                "load that model, or build a bridge for this pair."
            )


def vocabulary_hash(tokenizer) -> str:
    """SHA-256 of a tokenizer's tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def model_fingerprint(model: nn.Module, settings, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over `settings`, the adapters active in the towers (or on their embeddings), and the values of every
    tensor in them.

    Equal across processes and machines. Values are read once; later calls read again only tensors that were
    replaced or written in place (as optimizers and `load_state_dict` do; a write through ``.data`` goes unseen).

    Args:
        settings: anything made of dicts, lists and plain values; where it was saved and by which version is ignored.
        dtype (`torch.dtype`, *optional*): floating-point values as they would be in this type.
    """
    facts = [_without_provenance(settings), list(_adapter_state(model))]
    state = model.state_dict(keep_vars=True).items()
    values = [value for name, value in state if name.split(".", 1)[0] in EMBEDDING_PARTS and torch.is_tensor(value)]
    tensors = []
    for tensor in (*values, *(part for module in model.modules() for part in _embedding_parts(module))):
        read = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        tensors.append(f"{read.dtype} {tuple(read.shape)} {_tensor_digest(read)}")
    # Sorted by value, not by name: transformers renames modules between versions, saved fingerprints must outlive it.
    return hashlib.sha256(json.dumps([facts, sorted(tensors)], sort_keys=True).encode()).hexdigest()


def _without_provenance(value):
    """`value` as JSON can write it, without the entries that do not change what a model computes."""
    if isinstance(value, dict):
        return {str(key): _without_provenance(item) for key, item in value.items() if key not in _PROVENANCE}
    if isinstance(value, (list, tuple)):
        return [_without_provenance(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _embedding_parts(module: nn.Module) -> list[Tensor]:
    """Weights of a layer beside the towers that change their embeddings (an image side that is switched on)."""
    return module.embedding_parts() if hasattr(module, "embedding_parts") else []


def _adapter_state(model: nn.Module) -> Iterator[list]:
    """Adapters switched on per layer, with their scale: the same weights answer differently."""
    for name, module in model.named_modules():
        inside = name.split(".", 1)[0] in EMBEDDING_PARTS or _embedding_parts(module)
        if isinstance(module, BaseTunerLayer) and inside:
            scaling = {key: float(value) for key, value in getattr(module, "scaling", {}).items()}
            active = [] if module.disable_adapters else list(module.active_adapters)
            yield [name, active, list(module.merged_adapters), scaling]


def _tensor_digest(tensor: Tensor) -> str:
    version = (tensor.data_ptr(), tensor._version)
    known = _DIGESTS.get(tensor)
    if known is None or known[0] != version:
        values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        known = _DIGESTS[tensor] = (version, hashlib.sha256(values.data).hexdigest())
    return known[1]
