"""[`fit`]: the one training loop. A method brings its parameters and a `step(indices, generator) -> loss`.

Every process takes its part of each batch and gradients are summed, so that the result does not depend on the number
of processes (up to the order of floating-point sums); what `step` draws for an example goes through
`draws.per_example`. The order of the examples and the generator given to `step` follow from the seed and the step
alone, so that a run resumed from its checkpoint ends where an uninterrupted one does.

Beside it, what published prompt learners do to training itself: a schedule by epochs ([`scheduled_rate`]), parameters
averaged over epochs ([`gaussian_epoch_weights`]) and a gradient that does not go against that of another loss
([`project_gradient`]).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..algebra import total
from ..hub.files import digest, replace_file
from ..settings import SCHEDULES, FitConfig, check_choice
from .draws import BatchGenerator


logger = logging.getLogger(__name__)

FIRST_EPOCH_LR = 1e-5  # of the "epochs" schedule, whatever the peak

Step = Callable[[Tensor, torch.Generator], Tensor | tuple[Tensor, Tensor]]


def scheduled_rate(config: FitConfig, epoch: int, step: int, total: int) -> float:
    """The learning rate of a step.

    With the schedule `"cosine"`, linear warm-up over the first `warmup` share of the steps, then cosine to 0, per
    step. With `"epochs"`, the one of CoOp (arXiv 2109.01134), for epochs e = 1 ... E: 1e-5 for e = 1, and
    ``lr / 2 * (1 + cos(pi * (e - 2) / E))`` after that.

    Args:
        epoch (`int`): counted from 0, i.e. e - 1.
        step (`int`): counted from 0 over the whole run of `total` steps.

    Raises:
        ValueError: an unknown schedule.
    """
    check_choice("schedule", config.schedule, SCHEDULES)
    if config.schedule == "epochs":
        if epoch == 0:
            return FIRST_EPOCH_LR
        angle = math.pi * (epoch - 1) / config.epochs
    else:
        ramp = max(1, round(config.warmup * total))
        if step < ramp:
            return config.lr * (step + 1) / ramp
        angle = math.pi * (step - ramp) / max(1, total - ramp)
    return config.lr / 2 * (1 + math.cos(angle))


def gaussian_epoch_weights(epochs: int, mean: float, std: float) -> list[float]:
    """Weights of PromptSRC's Gaussian aggregation of prompts (arXiv 2307.06948), for [`fit`].

    ``g_e = exp(-(e - mean)^2 / (2 std^2)) / sum_k exp(-(k - mean)^2 / (2 std^2))`` for epochs e = 1 ... E, in which
    mean and std are counted. They add up to 1.

    Raises:
        ValueError: no epoch, or a standard deviation that is not positive.
    """
    if epochs < 1 or not std > 0:
        raise ValueError(f"there must be an epoch and a positive std, got epochs={epochs} and std={std}.")
    distance = (torch.arange(1, epochs + 1, dtype=torch.float64) - mean) / std
    return torch.softmax(-distance.square() / 2, dim=0).tolist()


def project_gradient(main: Tensor, pull: Tensor, strength: float = 1.0) -> Tensor:
    """ProGrad's rule (arXiv 2205.14865): follow the main loss, but not against the pull.

    ``g - strength * <g, u> u`` with ``u = k / |k|`` where ``<g, k> < 0``, else ``g``: at strength 1 the part of g that
    points against k is taken out. `main` and `pull` are g and k, gradients of the two losses for one parameter; where
    k is zero, g stays. For `fit(..., combine=project_gradient)`.
    """
    g, k = main.float(), pull.float()
    u = k / k.abs().amax().clamp_min(torch.finfo(k.dtype).tiny)  # first of all, so that no square underflows
    u = u / u.norm().clamp_min(1)  # at least 1, but for k = 0 (or next to it)
    inner = (g * u).sum()
    return torch.where(inner < 0, g - strength * inner * u, g).to(main.dtype)


def fit(
    parameters: Sequence[nn.Parameter],
    step: Step,
    num_examples: int,
    config: FitConfig,
    *,
    combine: Callable[[Tensor, Tensor], Tensor] | None = None,
    epoch_weights: Sequence[float] | None = None,
    held_out: Callable[[], float] | None = None,
    about: Mapping | None = None,
    accelerator=None,
    checkpoint: str | os.PathLike | None = None,
    keep_checkpoint: bool = False,
    description: str = "Training",
    progress: bool = True,
) -> list[float]:
    """Minimises `step` over the examples; the mean (main) loss of each epoch run here.

    Args:
        parameters (`Sequence[nn.Parameter]`): what is learnt.
        step: `step(indices, generator)` returns the mean loss over the examples at `indices` (B,); with `combine`, a
            pair of mean losses, the main one and a pull.
        num_examples (`int`): N.
        combine (*optional*): `combine(main, pull)` makes one gradient of those of the two losses, parameter by
            parameter, over the whole batch; see [`project_gradient`].
        epoch_weights (`Sequence[float]`, *optional*): g_e (E,) that add up to 1. At the end the parameters become
            ``sum_e g_e theta_e`` with theta_e those after epoch e; see [`gaussian_epoch_weights`].
        held_out (*optional*): a loss on other examples, the same number on every process, measured after each epoch.
            Those parameters are kept that had the lowest. Training goes on to its end: at a high rate that loss may
            rise for epochs, and fall with the rate.
        about (`Mapping`, *optional*): what else the run depends on, tensors among it: the images, say.
        accelerator (`Accelerator`, *optional*): for several processes.
        checkpoint (`str` or `os.PathLike`, *optional*): written (atomically) after every epoch and removed at the
            end; a run that finds one goes on from there. One that is damaged, or of a run with another start, other
            settings or `about`, is not used, and the log says why.
        keep_checkpoint (`bool`, *optional*, defaults to `False`): leave it at the end, for whoever saves the result.

    Raises:
        ValueError: no example, no parameter, an unknown optimizer or schedule, unfit `epoch_weights` or these beside
            `held_out`, a number of losses that does not go with `combine`, a loss that is not finite, or a checkpoint
            that not all processes see.
    """
    if held_out is not None and epoch_weights is not None:
        raise ValueError("parameters are averaged over epochs, or those of the best epoch are kept: choose one.")
    run = _Run(parameters, step, num_examples, config, combine, epoch_weights, accelerator)
    best = run.best = None if held_out is None else _Best(run.parameters)
    state = _Checkpoint(checkpoint, run, {"step": description, **(about or {})})
    first, losses = state.load(), []
    if total(torch.tensor(float(first)), accelerator) != first * run.world:  # two machines: they would be mixed
        raise ValueError(
            f"the checkpoint {checkpoint} is not the same for all processes: let it be in a folder that all machines "
            "see, or remove it."
        )
    hidden = not progress or run.rank > 0 or None  # None: only a terminal or a notebook shows it
    with tqdm(total=run.total, initial=first * run.per_epoch, desc=description, disable=hidden, leave=False) as bar:
        for epoch in range(first, config.epochs):
            losses.append(run.epoch(epoch, bar))
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
            if best is not None:
                best.compare(held_out())
            if run.rank == 0 and epoch + 1 < config.epochs:
                state.save(epoch + 1)
    for p, kept in zip(run.parameters, run.averages if best is None else best.parameters, strict=False):
        p.data.copy_(kept)
    run.check()
    if run.rank == 0 and not keep_checkpoint:
        state.remove()
    return losses


class _Best:
    """The parameters with the lowest held-out loss so far, and that loss, (1,)."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.learnt, self.parameters = parameters, [p.detach().clone() for p in parameters]
        self.loss = torch.tensor([math.inf], dtype=torch.float64)

    def compare(self, loss: float) -> None:
        """Keeps the parameters as they are now, if they are better."""
        if loss < self.loss:
            self.loss.fill_(loss)
            for kept, p in zip(self.parameters, self.learnt, strict=True):
                kept.copy_(p.detach())


class _Run:
    """What an epoch needs, on this process. `averages` sums ``g_e theta_e`` in fp32; it is empty without weights."""

    def __init__(self, parameters, step: Step, num_examples: int, config: FitConfig, combine, weights, accelerator):
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters or num_examples < 1:
            raise ValueError(f"nothing to train: {len(self.parameters)} parameters and {num_examples} examples.")
        self.optimizer = _optimizer(self.parameters, config)
        self.step, self.num_examples, self.config, self.combine = step, num_examples, config, combine
        self.accelerator, self.rank, self.world = accelerator, 0, 1
        if accelerator is not None:
            self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.per_epoch = math.ceil(num_examples / config.batch_size)
        self.total = self.per_epoch * config.epochs
        self.weights, self.averages = None, []
        if weights is not None:
            self.weights = [float(weight) for weight in weights]
            if len(weights) != config.epochs:
                raise ValueError(f"there must be one weight per epoch: got {len(weights)} for {config.epochs}.")
            if not math.isclose(sum(self.weights), 1, abs_tol=1e-4):
                raise ValueError(f"epoch_weights must add up to 1, got {sum(self.weights)}: divide them by that.")
            self.averages = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in self.parameters]

    def check(self) -> None:
        """Raises a `ValueError` where a weight is not finite: the loss only shows what came before the last step."""
        rate = f"lower the learning rate ({self.config.lr:g}), or load the model in float32"
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            raise ValueError(f"the weights became NaN or infinite in training: {rate}.")

    def epoch(self, epoch: int, bar: tqdm) -> float:
        """Goes through the examples once; their mean loss."""
        generator = torch.Generator().manual_seed(_seed(self.config.seed, epoch, 0))
        order = torch.randperm(self.num_examples, generator=generator)
        epoch_loss = 0.0
        for number, indices in enumerate(order.split(self.config.batch_size)):
            for group in self.optimizer.param_groups:
                group["lr"] = scheduled_rate(self.config, epoch, epoch * self.per_epoch + number, self.total)
            losses = self._backward(indices, _seed(self.config.seed, epoch, number + 1))
            if not torch.isfinite(losses).all():
                raise ValueError(
                    f"the loss became {' and '.join(map(str, losses.tolist()))} in epoch {epoch + 1}, step "
                    f"{number + 1}: lower the learning rate ({self.config.lr:g}), or look for broken inputs."
                )
            self.optimizer.step()
            epoch_loss += float(losses[0]) * len(indices)
            bar.update()
        self.check()
        for p, average in zip(self.parameters, self.averages, strict=False):
            average.add_(p.detach().float(), alpha=self.weights[epoch])
        return epoch_loss / self.num_examples

    def _backward(self, indices: Tensor, seed: int) -> Tensor:
        """Sets the gradients of a batch, over all processes; its losses: (1,), or (2,) with `combine`."""
        share = slice(self.rank, None, self.world)
        mine = indices[share]
        count = 1 if self.combine is None else 2
        losses, gradients = torch.zeros(count), [[None] * len(self.parameters)] * count
        if len(mine):
            generator = BatchGenerator(seed, len(indices), share)
            found = self.step(mine, generator)
            if isinstance(found, tuple) != (self.combine is not None):
                raise ValueError("step must return two losses with combine=, and one without.")
            found = found if isinstance(found, tuple) else (found,)
            scaled = [loss * (len(mine) / len(indices)) for loss in found]
            losses = torch.stack([loss.detach() for loss in scaled])
            # The graph is kept for the second loss.
            gradients = [
                torch.autograd.grad(loss, self.parameters, retain_graph=loss is not scaled[-1], allow_unused=True)
                for loss in scaled
            ]
        if self.world > 1:
            losses = self.accelerator.reduce(losses.to(self.accelerator.device), "sum")
        for p, *own in zip(self.parameters, *gradients, strict=True):
            if self.world > 1 or self.combine is not None:
                own = [torch.zeros_like(p) if gradient is None else gradient for gradient in own]
            if self.world > 1:  # sums go by place in memory, where a transposed gradient lies the other way round
                own = [self.accelerator.reduce(gradient.contiguous(), "sum") for gradient in own]
            p.grad = own[0] if self.combine is None else self.combine(*own)
        return losses


def _optimizer(parameters: list[nn.Parameter], config: FitConfig) -> torch.optim.Optimizer:
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **settings)
    raise ValueError(f"optimizer must be 'adamw' or 'sgd', got {config.optimizer!r}.")


def _seed(seed: int, epoch: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed}/{epoch}/{number}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class _Checkpoint:
    """Parameters, optimizer state and averages over epochs, or the best epoch's parameters: one safetensors file."""

    def __init__(self, path, run: _Run, about: Mapping):
        self.path, self.run = Path(path) if path else None, run
        if path is None:
            return
        start = {f"{i}": p for i, p in enumerate(run.parameters)}
        about = {key: digest({"": value}) if torch.is_tensor(value) else value for key, value in about.items()}
        facts = {"num_examples": run.num_examples, "epoch_weights": run.weights, "start": digest(start)}
        self.settings = json.dumps({**about, **asdict(run.config), **facts}, sort_keys=True)

    def save(self, epoch: int) -> None:
        if self.path is None:
            return
        tensors = {key: value.detach().contiguous() for key, value in self._tensors().items()}
        for i, p in enumerate(self.run.parameters):
            for key, value in self.run.optimizer.state[p].items():
                if torch.is_tensor(value):
                    tensors[f"state.{i}.{key}"] = value.contiguous()
        metadata = {"epoch": str(epoch), "settings": self.settings}
        metadata["digest"] = digest(tensors, metadata["epoch"], self.settings)
        replace_file(self.path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    def load(self) -> int:
        if self.path is None or not self.path.is_file():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
            known = digest(tensors, metadata.get("epoch"), metadata.get("settings")) == metadata.get("digest")
        except (OSError, SafetensorError):
            known = False
        if not known or metadata["settings"] != self.settings:
            why = "is damaged"
            if known:
                mine, theirs = json.loads(self.settings), json.loads(metadata["settings"])
                other = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
                why = f"is of another run (other {', '.join(other)})"
            if self.run.rank == 0:
                logger.warning("the checkpoint %s %s: training begins anew.", self.path, why)
            return 0
        for key, value in self._tensors().items():
            value.data.copy_(tensors[key])
        for i, p in enumerate(self.run.parameters):
            prefix = f"state.{i}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self.run.optimizer.state[p].update(state)
        return int(metadata["epoch"])

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"parameter.{i}": p for i, p in enumerate(self.run.parameters)}
        tensors |= {f"sum.{i}": average for i, average in enumerate(self.run.averages)}
        if self.run.best is not None:
            tensors |= {f"best.{i}": kept for i, kept in enumerate(self.run.best.parameters)}
            tensors["best"] = self.run.best.loss
        return tensors

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
