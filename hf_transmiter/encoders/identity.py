"""What identifies a model: [`ModelId`], and one hex digest for everything its answers depend on."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .families import EMBEDDING_PARTS, IMAGE_PARTS, TEXT_PARTS


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
        """With adapters in its towers a model is no revision of anything."""
        revision = None if active_adapters(encoder.model) else encoder.revision
        return cls(encoder.name_or_path, revision, encoder.fingerprint)

    def is_of(self, encoder) -> bool:
        """Whether `encoder` is this model, in whatever floating-point type either was loaded: the very revision of it
        with no adapter in its towers, or equal weights and processor. Where weights do not tell, the name does."""
        named = None not in (self.name, self.revision) and not active_adapters(encoder.model)
        if named and (self.name, self.revision) == (encoder.name_or_path, encoder.revision):
            return True
        same = same_model(self.fingerprint, encoder.fingerprint)
        return self.name is not None and self.name == encoder.name_or_path if same is None else same

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


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters in the towers (or on their embeddings) that are switched on, or merged into weights."""
    return sorted({name for _, active, merged, _ in _adapter_state(model) for name in (*active, *merged)})


def moves_images(model: nn.Module) -> bool:
    """Whether an adapter that is switched on, or merged, changes image embeddings: one anywhere else than in the text
    tower, or one there that says so (prompts in both towers)."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            on, merged, _ = _layer_state(module)
            elsewhere = name.split(".", 1)[0] in IMAGE_PARTS or bool(_embedding_parts(module))
            if (on or merged) and getattr(module, "moves_images", elsewhere):
                return True
    return False


def check_untuned(encoder) -> None:
    """
    Raises:
        ValueError: adapters are active in `encoder`, so that it is not what it was before a tuning.
    """
    found = active_adapters(encoder.model)
    if found:
        raise ValueError(
            f"the weak model {encoder.name_or_path!r} has an adapter switched on ({', '.join(map(repr, found))}): "
            "PEFT changes a model in place, and this one should be as it was before the tuning. Load it anew, "
            "DualEncoder.from_pretrained(...), or merge an adapter that belongs to it (merge_and_unload)."
        )


def vocabulary_hash(tokenizer) -> str:
    """SHA-256 of a tokenizer's tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def model_fingerprint(model: nn.Module, settings) -> str:
    """64 hex digits of `settings`, the adapters active in the towers (or on their embeddings), and the values of every
    tensor in them: 24 of the values as they are, 20 as bfloat16 has them, 20 as float16 has them. See [`same_model`].

    Equal across processes and machines. Values are read once; later calls read again only tensors that were
    replaced or written in place, as far as [`_state`] tells.

    Args:
        settings: anything made of dicts, lists and plain values; where it was saved and by which version is ignored.
    """
    facts = [_without_provenance(settings), list(_adapter_state(model))]
    state = model.state_dict(keep_vars=True).items()
    values = [value for name, value in state if name.split(".", 1)[0] in EMBEDDING_PARTS and torch.is_tensor(value)]
    values += [part for module in model.modules() for part in _embedding_parts(module)]
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        found = list(pool.map(_tensor_digests, values))
    digests = [[f"{tuple(value.shape)} {one}" for one in each] for value, each in zip(values, found, strict=True)]
    # Sorted by value, not by name: transformers renames modules between versions, saved fingerprints must outlive it.
    texts = (json.dumps([facts, sorted(each)], sort_keys=True) for each in zip(*digests, strict=True))
    exact, *rounded = (hashlib.sha256(text.encode()).hexdigest() for text in texts)
    return exact[:24] + "".join(digest[:20] for digest in rounded)


def text_version(model: nn.Module) -> tuple:
    """What changes whenever the text tower does: where its tensors lie, how often they were written to, a value of
    each matrix (see [`_state`]), which adapters are active. Asked in every forward pass, so in one walk, with one
    transfer from each device; of this process only."""
    found, values = [], defaultdict(list)
    for module in (module for part in TEXT_PARTS if hasattr(model, part) for module in getattr(model, part).modules()):
        if isinstance(module, BaseTunerLayer):
            found.append(_layer_state(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.append((tensor.data_ptr(), _writes(tensor)))
                if tensor.ndim > 1 and tensor.is_floating_point() and tensor.numel():
                    values[tensor.device].append(tensor.detach()[tuple(size // 2 for size in tensor.shape)])
    return tuple(found), tuple(tuple(torch.stack(each).tolist()) for each in values.values())


def same_model(a: str, b: str) -> bool | None:
    """Whether two fingerprints are of one model: equal as they are, or the one as half precision has the other. `None`
    where one is of a model in bfloat16 and the other of one in float16: what both were rounded from is not known."""
    if a == b or len(a) != 64 or len(b) != 64:
        return a == b
    a, b = ((each[:20], each[24:44], each[44:]) for each in (a, b))
    if a[0] in b or b[0] in a:
        return True
    loaded_in = [rounded.index(exact) if exact in rounded else None for exact, *rounded in (a, b)]
    return None if loaded_in in ([0, 1], [1, 0]) else False


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
            yield [name, *_layer_state(module)]


def _layer_state(layer: BaseTunerLayer) -> list:
    scaling = {key: float(value) for key, value in getattr(layer, "scaling", {}).items()}
    return [[] if layer.disable_adapters else list(layer.active_adapters), list(layer.merged_adapters), scaling]


def _state(tensor: Tensor) -> tuple:
    """What tells that a tensor was replaced or written to: where it lies, the writes that were counted, and a few of
    its values, since PEFT merges adapters through ``.data``, where no write is."""
    values = tensor.detach().flatten()
    return tensor.data_ptr(), _writes(tensor), tensor.dtype, values[:: len(values) // 16 | 1].tolist()


def _writes(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _tensor_digests(tensor: Tensor) -> list[str]:
    """Of the values as they are, as bfloat16 has them, and as float16 has them; each written in float32."""
    known, state = _DIGESTS.get(tensor), _state(tensor)
    if known is None or known[0] != state:
        values = tensor.detach().cpu().contiguous()
        forms = [values] * 3
        if tensor.is_floating_point():
            forms = [values.to(dtype).float() for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        read = [form.view(-1).view(torch.uint8).numpy() for form in forms]
        known = _DIGESTS[tensor] = state, [hashlib.sha256(form.data).hexdigest() for form in read]
    return known[1]
