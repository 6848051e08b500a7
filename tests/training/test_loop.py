"""The training loop: its schedule, that it goes on where it stopped, and that processes share the work."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from hf_transmiter.settings import FitConfig
from hf_transmiter.training.loop import fit, gaussian_epoch_weights, project_gradient, scheduled_rate


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


def epoch_by_epoch(config):
    """The parameter after each epoch of a run of four steps an epoch."""
    parameter, seen = weight(), []
    inner = regression(parameter)

    def step(indices, generator):
        seen.append(parameter.detach().clone())
        return inner(indices, generator)

    fit([parameter], step, len(X), config, progress=False)
    return [*seen[4::4], parameter.detach()]


def test_the_schedule():
    # 40 steps, 10 % of them warm-up: 1/4, 2/4, 3/4, 4/4 of the peak, then half a cosine over the other 36.
    config = FitConfig(lr=0.2, warmup=0.1)
    rates = [scheduled_rate(config, step // 4, step, 40) for step in range(40)]
    assert rates[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert rates[4] == pytest.approx(0.2) and rates[22] == pytest.approx(0.1)  # the peak, and half-way down
    assert rates[13] == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)))
    assert all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False)) and 0 < rates[-1] < 0.001
    assert scheduled_rate(FitConfig(lr=1.0, warmup=0.0), 0, 0, 10) == 1.0  # no warm-up: starts at the peak
    assert scheduled_rate(FitConfig(lr=1.0, warmup=0.05), 0, 0, 1) == 1.0


def test_the_schedule_of_prompt_learners():
    config = FitConfig(epochs=5, lr=0.0035, schedule="epochs")
    rates = [scheduled_rate(config, epoch, 3 * epoch + step, 15) for epoch in range(5) for step in range(3)]
    assert rates[::3] == pytest.approx([1e-5, 0.0035, 0.00317, 0.00229, 0.00121], abs=5e-6)
    assert rates == [rate for rate in rates[::3] for _ in range(3)]  # the same throughout an epoch
    two = FitConfig(epochs=2, lr=0.2, schedule="epochs")
    assert [scheduled_rate(two, epoch, epoch, 2) for epoch in range(2)] == [1e-5, 0.2]
    with pytest.raises(ValueError, match="schedule must be one of cosine, epochs, got 'linear'"):
        run(FitConfig(schedule="linear"))


def test_the_first_epoch_barely_moves():
    config = FitConfig(epochs=2, batch_size=6, lr=0.05, weight_decay=0.0, schedule="epochs")
    after = epoch_by_epoch(config)
    # AdamW moves each value by at most about the learning rate a step, of which there are four an epoch.
    assert 0 < (after[0] - weight()).abs().max() < 4.1e-5 and (after[1] - after[0]).abs().max() > 0.05


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


# The average over epochs


def test_gaussian_weights():
    weights = gaussian_epoch_weights(20, 15, 1)
    assert weights[12:17] == pytest.approx([0.054, 0.242, 0.399, 0.242, 0.054], abs=5e-4)
    assert sum(weights) == pytest.approx(1, abs=1e-12) and max(weights[:9]) < 1e-8
    assert gaussian_epoch_weights(1, 15, 1) == [1.0]
    assert gaussian_epoch_weights(3, 1e4, 0.1) == [0.0, 0.0, 1.0]  # far away: the nearest epoch, not 0 / 0
    assert gaussian_epoch_weights(4, 2.5, 1e6) == pytest.approx([0.25] * 4)
    for wrong in ((0, 1, 1), (3, 1, 0), (3, 1, -1), (3, 1, float("nan"))):
        with pytest.raises(ValueError, match="an epoch and a positive std, got epochs="):
            gaussian_epoch_weights(*wrong)


def test_the_average_is_that_of_the_epochs():
    after = epoch_by_epoch(CONFIG)
    weights = [0.1, 0.2, 0.3, 0.4]
    by_hand = sum(weight * snapshot.double() for weight, snapshot in zip(weights, after, strict=True))
    found, losses = run(epoch_weights=weights)
    torch.testing.assert_close(found.double(), by_hand, atol=1e-6, rtol=1e-6)
    assert (found - after[-1]).abs().max() > 1e-3
    assert losses == run()[1]  # training itself goes on from what was not averaged
    assert torch.equal(run(epoch_weights=[0, 0, 0, 1])[0], after[-1])
    assert torch.equal(run(replace(CONFIG, epochs=1), epoch_weights=[1.0])[0], run(replace(CONFIG, epochs=1))[0])


def test_the_best_epoch_is_kept(tmp_path):
    """By a held-out loss, in a resumed run, too."""
    config, losses = replace(CONFIG, epochs=6), (3.0, 1.0, 2.0, 2.0, 1.5, 1.0)
    after, seen = epoch_by_epoch(config), []

    def held_out():
        seen.append(1)
        return losses[len(seen) - 1]

    found, training = run(config, held_out=held_out)
    assert torch.equal(found, after[1]) and len(training) == len(seen) == 6

    def interrupted():
        if len(seen) == 3:
            raise KeyboardInterrupt
        return held_out()

    path = tmp_path / "run.safetensors"
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        run(config, held_out=interrupted, checkpoint=path)
    assert torch.equal(run(config, held_out=held_out, checkpoint=path)[0], after[1])
    assert len(seen) == 6 and not path.exists()
    seen.clear()
    losses = (6, 5, 4, 3, 2, 1)
    assert torch.equal(run(config, held_out=held_out)[0], after[5])
    with pytest.raises(ValueError, match="those of the best epoch are kept: choose one"):
        run(held_out=held_out, epoch_weights=[0.25] * 4)


def test_half_precision_is_averaged_in_single():
    """A hundred epochs of a parameter that stays: sums in bfloat16 would lose it."""
    parameter = nn.Parameter(torch.tensor([1.0, -3.0], dtype=torch.bfloat16))
    config = FitConfig(epochs=100, batch_size=1, lr=1e-30, optimizer="sgd")
    fit([parameter], lambda i, g: parameter.sum(), 1, config, epoch_weights=[0.01] * 100, progress=False)
    assert parameter.dtype == torch.bfloat16 and parameter.tolist() == [1.0, -3.0]


def test_epoch_weights_that_do_not_fit():
    with pytest.raises(ValueError, match="one weight per epoch: got 3 for 4"):
        run(epoch_weights=[0.2, 0.3, 0.5])
    for weights in ([1, 1, 1, 1], [float("nan")] * 4):
        with pytest.raises(ValueError, match="epoch_weights must add up to 1"):
            run(epoch_weights=weights)


# Two losses


TARGET = rows(5, 2, 4)


def two_losses(parameter, seen=None):
    """The regression, and a pull towards other weights."""
    regress = regression(parameter, seen)

    def step(indices, generator):
        # Of the transposed weights, so that this gradient lies in memory the other way round.
        pull = ((parameter - TARGET).T * (1 + X[indices].square().mean(0))).square().mean()
        return regress(indices, generator), pull

    return step


def run_two(combine, config=CONFIG, **kwargs):
    parameter = weight()
    losses = fit([parameter], two_losses(parameter), len(X), config, combine=combine, progress=False, **kwargs)
    return parameter.detach(), losses


def test_the_combined_gradient_is_followed():
    alone, losses = run()
    found, main = run_two(lambda main, pull: main)
    assert torch.equal(found, alone) and main == losses  # the loss reported is the main one
    # A sum of gradients is the gradient of the sum.
    found, main = run_two(lambda main, pull: main + 0.5 * pull)
    parameter = weight()
    step = two_losses(parameter)
    fit([parameter], lambda i, g: step(i, g)[0] + 0.5 * step(i, g)[1], len(X), CONFIG, progress=False)
    torch.testing.assert_close(found, parameter.detach(), atol=1e-6, rtol=1e-5)
    assert main != losses


def test_gradients_are_combined_parameter_by_parameter():
    a, b, c = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(3))
    given = []

    def combine(main, pull):
        given.append((main.tolist(), pull.tolist()))
        return main - pull

    def step(indices, generator):
        return (3 * a + b).sum(), (b * b).sum()  # of these, a knows one, b both and c none

    config = FitConfig(epochs=1, batch_size=1, lr=0.1, weight_decay=0.0, optimizer="sgd")
    assert fit([a, b, c], step, 1, config, combine=combine, progress=False) == [12.0]
    assert given == [([3, 3], [0, 0]), ([1, 1], [2, 4]), ([0, 0], [0, 0])]
    assert torch.allclose(a, torch.tensor([0.7, 1.7])) and torch.allclose(b, torch.tensor([1.1, 2.3]))
    assert c.tolist() == [1, 2]


def test_the_number_of_losses_must_fit():
    for combine, step in ((None, two_losses), (project_gradient, regression)):
        parameter = weight()
        with pytest.raises(ValueError, match="two losses with combine=, and one without"):
            fit([parameter], step(parameter), len(X), CONFIG, combine=combine, progress=False)


def test_a_pull_that_is_not_finite():
    parameter = weight()

    def step(indices, generator):
        return parameter.square().mean(), parameter.sum() / 0

    with pytest.raises(ValueError, match=r"the loss became [\d.]+ and -?inf in epoch 1, step 1: lower"):
        fit([parameter], step, len(X), CONFIG, combine=project_gradient, progress=False)


numbers = st.floats(-100, 100, width=32)
gradients = st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.lists(numbers, min_size=n, max_size=n)] * 2))


@given(gradients)
def test_a_projected_gradient_does_not_go_against_the_pull(pair):
    main, pull = map(torch.tensor, pair)
    found = project_gradient(main, pull)
    size = float(main.norm() * pull.norm())
    inner = float((main.double() * pull.double()).sum())
    assert float(found.double() @ pull.double()) >= -1e-5 * size
    if inner > 1e-6 * size or size == 0:
        assert torch.equal(found, main)
    elif inner < -1e-6 * size:
        assert abs(float(found.double() @ pull.double())) <= 1e-5 * size
        assert float(found.norm()) <= float(main.norm()) * (1 + 1e-5)


@given(gradients, st.floats(0, 2), st.floats(1e-6, 1e6))
def test_projection_by_the_formula(pair, strength, scale):
    main, pull = (torch.tensor(values, dtype=torch.float64) for values in pair)
    found = project_gradient(main.float(), scale * pull.float(), strength)
    inner = main @ pull
    expected = main - strength * inner * pull / pull.square().sum() if inner < 0 else main
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-4)


def test_projection_keeps_shape_and_type():
    main, pull = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert project_gradient(main, pull).tolist() == [[1, 0], [0.5, 0]]
    assert project_gradient(main, pull, 0.5).tolist() == [[1, -1], [0.5, 0]]
    assert project_gradient(main, torch.zeros(2, 2)).tolist() == main.tolist()
    for size in (1e-37, 1e-30, 1e-20, 1e20, 1e38):  # the length of the pull does not matter, only where it points
        assert project_gradient(main, size * pull).tolist() == [[1, 0], [0.5, 0]]
    assert project_gradient(main.bfloat16(), pull.bfloat16()).dtype == torch.bfloat16


# Checkpoints


def interrupted(path, after, config=CONFIG, noise=0.3, **kwargs):
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
        fit([parameter], stopping, len(X), config, checkpoint=path, progress=False, **kwargs)


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


@pytest.mark.parametrize("after", [6, 10, 14])
def test_a_resumed_average_is_the_uninterrupted_one(tmp_path, after, caplog):
    path, weights = tmp_path / "run.safetensors", [0.1, 0.2, 0.3, 0.4]
    expected, _ = run(noise=0.3, epoch_weights=weights)
    for other in (None, weights[::-1]):
        interrupted(path, after=after, epoch_weights=weights)
        found = run(noise=0.3, checkpoint=path, epoch_weights=other)
        assert torch.equal(found[0], run(noise=0.3, epoch_weights=other)[0]) and len(found[1]) == 4
        assert "is of another run (other epoch_weights): training begins anew" in caplog.text
        caplog.clear()
    interrupted(path, after=after, epoch_weights=weights)
    assert torch.equal(run(noise=0.3, checkpoint=path, epoch_weights=weights)[0], expected)
    assert not path.exists()


def test_interrupted_before_the_first_checkpoint(tmp_path):
    interrupted(tmp_path / "run", after=2)
    assert list(tmp_path.iterdir()) == []
    assert run(noise=0.3, checkpoint=tmp_path / "run")[1] == run(noise=0.3)[1]


OTHER = FitConfig(epochs=4, batch_size=6, lr=0.1, weight_decay=0.01, seed=3)


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        ({}, {"config": OTHER}, "lr"),
        ({"about": {"images": torch.zeros(3)}}, {"about": {"images": torch.ones(3)}}, "images"),
        ({"about": {"images": torch.zeros(3)}}, {"about": {"images": torch.zeros(3, 1)}}, "images"),
        ({"about": {"model": "a", "names": ["b"]}}, {"about": {"model": "a", "names": ["c"]}}, "names"),
        ({}, {"about": {"teacher": "a"}}, "teacher"),
    ],
    ids=["settings", "content", "shape", "names", "more"],
)
def test_a_checkpoint_of_another_run_is_not_used(tmp_path, caplog, before, now, why):
    """It begins anew, says why, and ends where a run without a checkpoint does."""
    path = tmp_path / "run.safetensors"
    interrupted(path, after=10, **before)
    found = run(noise=0.3, checkpoint=path, **now)
    assert f"{path} is of another run (other {why}): training begins anew." in caplog.text
    assert torch.equal(found[0], run(noise=0.3, **now)[0]) and found[1] == run(noise=0.3, **now)[1]
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_parameters_is_not_used(tmp_path, caplog):
    path, other = tmp_path / "run.safetensors", nn.Parameter(torch.ones(5, 2))
    interrupted(path, after=10)
    losses = fit([other], regression(other), len(X), CONFIG, checkpoint=path, progress=False)
    assert len(losses) == 4 and "(other start)" in caplog.text


def _cut(content: bytes) -> bytes:
    return content[:-7]


def _flip(content: bytes) -> bytes:
    return content[:-40] + bytes([content[-40] ^ 0x40]) + content[-39:]


def _epoch(content: bytes) -> bytes:
    return content.replace(b'"epoch":"2"', b'"epoch":"3"')


@pytest.mark.parametrize("damage", [_cut, _flip, _epoch, lambda content: b"", lambda content: content[:9]])
def test_a_damaged_checkpoint_is_made_again(tmp_path, caplog, damage):
    path = tmp_path / "run.safetensors"
    interrupted(path, after=10)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    found = run(noise=0.3, checkpoint=path)
    assert f"{path} is damaged: training begins anew." in caplog.text
    assert torch.equal(found[0], run(noise=0.3)[0]) and not path.exists()


def test_a_checkpoint_is_kept_for_whoever_saves_the_result(tmp_path):
    path = tmp_path / "run.safetensors"
    expected, losses = run(noise=0.3, checkpoint=path, keep_checkpoint=True)
    found, rest = run(noise=0.3, checkpoint=path, keep_checkpoint=True)
    assert torch.equal(found, expected) and rest == losses[3:] and path.is_file()


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


ODD = replace(CONFIG, batch_size=11)  # the last of three batches has one example, which leaves none for a process


def _two_losses_in_two_processes(path):
    accelerator = Accelerator(cpu=True)
    weights = gaussian_epoch_weights(4, 3, 1)
    found, losses = run_two(project_gradient, ODD, accelerator=accelerator, epoch_weights=weights)
    tensors = {"weight": found, "losses": torch.tensor(losses)}
    save_file(tensors, path / f"{accelerator.process_index}.safetensors")


def test_two_processes_combine_what_one_does(tmp_path):
    """The gradients of the whole batch are combined, not those of each half; so is the average over epochs."""
    expected, losses = run_two(project_gradient, ODD, epoch_weights=gaussian_epoch_weights(4, 3, 1))
    assert not torch.allclose(expected, run_two(lambda main, pull: main, ODD)[0], atol=1e-3)  # the rule was at work
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_two_losses_in_two_processes, args=(tmp_path,), num_processes=2)
    results = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for result in results:
        torch.testing.assert_close(result["weight"], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result["losses"], torch.tensor(losses), atol=1e-5, rtol=1e-5)
    assert torch.equal(results[0]["weight"], results[1]["weight"])


def _with_a_checkpoint_each(path):
    """Each has a folder of its own, and in that of the first is the checkpoint of a run that was killed."""
    accelerator = Accelerator(cpu=True)
    parameter, own = weight(), path / str(accelerator.process_index)
    about = {"accelerator": accelerator, "checkpoint": own / "checkpoint"}
    try:
        fit([parameter], regression(parameter), 23, CONFIG, **about)
    except ValueError as error:
        (own / "said").write_text(str(error))


def test_a_checkpoint_that_one_of_two_machines_sees(tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    interrupted(tmp_path / "0" / "checkpoint", 7, noise=0.0)
    assert (tmp_path / "0" / "checkpoint").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_with_a_checkpoint_each, args=(tmp_path,), num_processes=2)
    for rank in "01":
        said = (tmp_path / rank / "said").read_text()
        assert f"the checkpoint {tmp_path / rank / 'checkpoint'} is not the same for all processes" in said


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
