"""The training loop: its schedule, that it goes on where it stopped, and that processes share the work."""

import math

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hf_transmiter.training import FitConfig, fit, learning_rate


def rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


X, Y = rows(23, 5, 1), rows(23, 2, 2)
CONFIG = FitConfig(epochs=4, batch_size=6, lr=0.05, weight_decay=0.01, seed=3)


def weight():
    return nn.Parameter(rows(5, 2, 0))


def regression(parameter, seen=None, noise=0.0):
    """A `step`: mean squared error of a linear map; notes the rows it is given."""

    def step(indices, generator):
        if seen is not None:
            seen.append(indices.tolist())
        x = X[indices] + noise * torch.randn(len(indices), 5, generator=generator)
        return (x @ parameter - Y[indices]).square().mean()

    return step


def run(config=CONFIG, noise=0.0, **kwargs):
    parameter = weight()
    losses = fit([parameter], regression(parameter, noise=noise), len(X), config, progress=False, **kwargs)
    return parameter.detach(), losses


def test_the_schedule():
    # 40 steps, 10 % of them warm-up: 1/4, 2/4, 3/4, 4/4 of the peak, then half a cosine over the other 36.
    rates = [learning_rate(step, 40, 0.2, 0.1) for step in range(40)]
    assert rates[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert rates[4] == pytest.approx(0.2) and rates[22] == pytest.approx(0.1)  # the peak, and half-way down
    assert rates[13] == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)))
    assert all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False)) and 0 < rates[-1] < 0.001
    assert learning_rate(0, 10, 1.0, 0.0) == 1.0  # no warm-up: starts at the peak
    assert learning_rate(0, 1, 1.0, 0.05) == 1.0


def test_the_published_settings_are_the_defaults():
    config = FitConfig()
    assert (config.epochs, config.batch_size, config.lr, config.weight_decay, config.warmup, config.optimizer) == (
        *(10, 128, 1e-3, 1e-3, 0.05, "adamw"),
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_equal_to_a_loop_by_hand(optimizer):
    config = FitConfig(epochs=2, batch_size=23, lr=0.1, weight_decay=0.01, optimizer=optimizer)
    by_hand = weight()
    settings = {"lr": 0.1, "weight_decay": 0.01}
    known = torch.optim.AdamW([by_hand], **settings) if optimizer == "adamw" else None
    known = known or torch.optim.SGD([by_hand], momentum=0.9, **settings)
    expected = []
    for step in range(2):  # one batch an epoch: two steps, the first of them warm-up
        known.param_groups[0]["lr"] = (0.1, 0.1)[step]
        loss = (X @ by_hand - Y).square().mean()
        known.zero_grad()
        loss.backward()
        known.step()
        expected.append(loss.item())
    found, losses = run(config)
    assert losses == pytest.approx(expected, rel=1e-5) and losses[1] < losses[0]
    torch.testing.assert_close(found, by_hand.detach(), atol=1e-5, rtol=1e-5)


def test_every_example_once_an_epoch_in_an_order_of_its_own():
    parameter, seen = weight(), []
    fit([parameter], regression(parameter, seen), 23, CONFIG, progress=False)
    assert [len(batch) for batch in seen] == [6, 6, 6, 5] * 4
    epochs = [sum(seen[4 * e : 4 * e + 4], []) for e in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_everything():
    for noise in (0.0, 0.3):
        first, again = run(noise=noise), run(noise=noise)
        torch.randn(7)  # the global generator plays no part
        assert torch.equal(first[0], again[0]) and first[1] == again[1]
        other = run(FitConfig(epochs=4, batch_size=6, lr=0.05, weight_decay=0.01, seed=4), noise=noise)
        assert not torch.equal(first[0], other[0])


def test_frozen_parameters_stay():
    parameter, frozen = weight(), nn.Parameter(torch.ones(2), requires_grad=False)
    fit([parameter, frozen], regression(parameter), 23, CONFIG, progress=False)
    assert frozen.tolist() == [1, 1] and not torch.equal(parameter, weight())


# Checkpoints


def interrupted(path, after, config=CONFIG, noise=0.3):
    """Runs `after` steps and is stopped."""
    parameter = weight()
    step, count = regression(parameter, noise=noise), 0

    def stopping(indices, generator):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return step(indices, generator)

    with pytest.raises(KeyboardInterrupt):
        fit([parameter], stopping, len(X), config, checkpoint=path, progress=False)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, optimizer):
    config = FitConfig(epochs=4, batch_size=6, lr=0.05, seed=3, optimizer=optimizer)
    path = tmp_path / "new" / "run.safetensors"
    expected, losses = run(config, noise=0.3)
    interrupted(path, after=10, config=config)  # in the third of four epochs
    assert [file.name for file in path.parent.iterdir()] == ["run.safetensors"]
    found, rest = run(config, noise=0.3, checkpoint=path)
    assert torch.equal(found, expected) and rest == losses[2:]
    assert list(path.parent.iterdir()) == []  # removed at the end


def test_interrupted_before_the_first_checkpoint(tmp_path):
    interrupted(tmp_path / "run", after=2)
    assert list(tmp_path.iterdir()) == []
    assert run(noise=0.3, checkpoint=tmp_path / "run")[1] == run(noise=0.3)[1]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    interrupted(path, after=10)
    other = FitConfig(epochs=4, batch_size=6, lr=0.1, weight_decay=0.01, seed=3)
    with pytest.raises(ValueError, match="run.safetensors is the checkpoint of another run; remove it or use its"):
        run(other, checkpoint=path)
    small = nn.Parameter(torch.zeros(5, 1))
    with pytest.raises(ValueError, match="another run"):
        fit([small], regression(small), len(X), CONFIG, checkpoint=path, progress=False)
    assert path.is_file()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    interrupted(path, after=10)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "parameter.0": torch.full((5, 2), float("nan"))}, path, metadata=metadata)
    with pytest.raises(ValueError, match="the checkpoint hold NaN"):
        run(checkpoint=path)


# Errors


def test_a_loss_that_is_not_finite():
    parameter = weight()

    def step(indices, generator):
        return (X[indices] @ parameter).sum() * (float("nan") if 7 in indices else 1.0)

    with pytest.raises(ValueError, match=r"the loss became nan in epoch 1, step \d: lower the learning rate \(0.05\)"):
        fit([parameter], step, len(X), CONFIG, progress=False)


def test_nothing_to_train():
    parameter = weight()
    with pytest.raises(ValueError, match="1 parameters and 0 examples"):
        fit([parameter], regression(parameter), 0, CONFIG)
    with pytest.raises(ValueError, match="0 parameters and 23 examples"):
        fit([parameter.requires_grad_(False)], regression(parameter), 23, CONFIG)
    with pytest.raises(ValueError, match="'adamw' or 'sgd', got 'lion'"):
        run(FitConfig(optimizer="lion"))


# Several processes


def _in_two_processes(path):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    parameter, seen = weight(), []
    losses = fit(
        [parameter], regression(parameter, seen), 23, CONFIG, accelerator=accelerator, checkpoint=path / "checkpoint"
    )
    rank = accelerator.process_index
    save_file(
        {"weight": parameter.detach(), "losses": torch.tensor(losses), "seen": torch.tensor(sum(seen, []))},
        path / f"{rank}.safetensors",
    )


def test_two_processes_learn_what_one_does(tmp_path):
    expected, losses = run()
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_in_two_processes, args=(tmp_path,), num_processes=2)
    results = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for result in results:
        torch.testing.assert_close(result["weight"], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result["losses"], torch.tensor(losses), atol=1e-5, rtol=1e-5)
    assert torch.equal(results[0]["weight"], results[1]["weight"])
    # Each saw its half of every batch: 3 + 3 + 3 + (3 or 2) rows an epoch.
    assert [len(result["seen"]) for result in results] == [48, 44]
    assert sorted(torch.cat([result["seen"] for result in results]).tolist()) == sorted(4 * list(range(23)))
    assert not (tmp_path / "checkpoint").exists()
