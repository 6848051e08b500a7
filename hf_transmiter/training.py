"""[`fit`]: the one training loop. A method brings its parameters and a `step(indices, generator) -> loss`."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import replace_file
from .settings import FitConfig
from .solvers import check_finite


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then cosine to 0, per step."""
    ramp = max(1, round(warmup * total))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak / 2 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


def fit(
    parameters: Sequence[nn.Parameter],
    step: Callable[[Tensor, torch.Generator], Tensor],
    num_examples: int,
    config: FitConfig,
    *,
    accelerator=None,
    checkpoint: str | os.PathLike | None = None,
    description: str = "Training",
    progress: bool = True,
) -> list[float]:
    """Minimises `step` over the examples.

    Every process takes its part of each batch and gradients are summed, so that the result does not depend on the
    number of processes (up to the order of floating-point sums, and to what `step` draws at random). The order of the
    examples and the generator given to `step` follow from the seed and the step alone, so that a run resumed from
    `checkpoint` ends where an uninterrupted one does.

    Args:
        parameters (`Sequence[nn.Parameter]`): what is learnt.
        step: `step(indices, generator)` returns the mean loss over the examples at `indices` (B,).
        num_examples (`int`): N.
        config (`FitConfig`): settings.
        accelerator (`Accelerator`, *optional*): for several processes.
        checkpoint (`str` or `os.PathLike`, *optional*): written (atomically) after every epoch and removed at the
            end; a run that finds one goes on from there.

    Returns:
        `list[float]`: the mean loss of each epoch run here.

    Raises:
        ValueError: no example, no parameter, an unknown optimizer, a loss that is not finite, or a checkpoint of
            another run.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters or num_examples < 1:
        raise ValueError(f"nothing to train: {len(parameters)} parameters and {num_examples} examples.")
    groups = {"params": parameters, "lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW([groups])
    elif config.optimizer == "sgd":
        optimizer = torch.optim.SGD([groups], momentum=0.9)
    else:
        raise ValueError(f"optimizer must be 'adamw' or 'sgd', got {config.optimizer!r}.")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    per_epoch = math.ceil(num_examples / config.batch_size)
    total, losses = per_epoch * config.epochs, []
    state = _Checkpoint(checkpoint, parameters, optimizer, {**asdict(config), "num_examples": num_examples})
    first = state.load()
    bar = tqdm(total=total, initial=first * per_epoch, desc=description, disable=not progress or rank > 0, leave=False)
    for epoch in range(first, config.epochs):
        order = torch.randperm(num_examples, generator=_generator(config.seed, epoch, 0))
        epoch_loss = 0.0
        for number, indices in enumerate(order.split(config.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * per_epoch + number, total, config.lr, config.warmup)
            mine = indices[rank::world]
            optimizer.zero_grad()
            loss = torch.zeros(())
            if len(mine):
                share = len(mine) / len(indices)
                weighted = step(mine, _generator(config.seed, epoch, number + 1 + rank * per_epoch)) * share
                weighted.backward()
                loss = weighted.detach()
            if world > 1:
                loss = accelerator.reduce(loss.to(accelerator.device), "sum")
                for p in parameters:
                    p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss became {float(loss)} in epoch {epoch + 1}, step {number + 1}: lower the learning rate "
                    f"({config.lr:g}), or look for broken inputs."
                )
            optimizer.step()
            epoch_loss += float(loss) * len(indices)
            bar.update()
        losses.append(epoch_loss / num_examples)
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
        if rank == 0 and epoch + 1 < config.epochs:
            state.save(epoch + 1)
    bar.close()
    if rank == 0:
        state.remove()
    return losses


def _generator(seed: int, epoch: int, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{epoch}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class _Checkpoint:
    """Parameters and optimizer state in one safetensors file."""

    def __init__(self, path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, settings: dict):
        self.path = Path(path) if path else None
        self.parameters, self.optimizer = parameters, optimizer
        self.settings = json.dumps(settings, sort_keys=True)

    def save(self, epoch: int) -> None:
        if self.path is None:
            return
        tensors = {f"parameter.{i}": p.detach().contiguous() for i, p in enumerate(self.parameters)}
        for i, p in enumerate(self.parameters):
            for key, value in self.optimizer.state[p].items():
                if torch.is_tensor(value):
                    tensors[f"state.{i}.{key}"] = value.contiguous()
        metadata = {"epoch": str(epoch), "settings": self.settings}
        replace_file(self.path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    def load(self) -> int:
        if self.path is None or not self.path.is_file():
            return 0
        with safe_open(self.path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
        shapes = [tensors.get(f"parameter.{i}", torch.empty(0)).shape for i in range(len(self.parameters))]
        if metadata.get("settings") != self.settings or shapes != [p.shape for p in self.parameters]:
            raise ValueError(f"{self.path} is the checkpoint of another run; remove it or use its settings.")
        for i, p in enumerate(self.parameters):
            p.data.copy_(check_finite(tensors[f"parameter.{i}"].reshape(1, -1), "the checkpoint").reshape(p.shape))
            prefix = f"state.{i}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self.optimizer.state[p].update(state)
        return int(metadata["epoch"])

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
