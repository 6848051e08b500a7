"""The refit: its image side and its text side against their formulas, and what it refuses."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from hf_transmiter.algebra import divergence, fit_temperature, spread
from hf_transmiter.data import table as data_table
from hf_transmiter.data.table import FeatureTable
from hf_transmiter.method import experts
from hf_transmiter.method import refit as module
from hf_transmiter.method.refit import ImageSide, fewest_images, fit_image_side, refit


CLASSES, D, WIDTH, SCALE = 5, 8, 14, 20.0


class Problem:
    """Pictures whose tower features h know the class, while x hardly does; labels are linear in ``[x | h]``."""

    def __init__(self, count=400, seed=0, classes=None):
        draw = torch.Generator().manual_seed(0)
        self.texts = normalize(torch.randn(CLASSES, D, generator=draw), dim=1)
        told = torch.randn(CLASSES, WIDTH - D, generator=draw)
        draw = torch.Generator().manual_seed(seed + 1)
        self.classes = torch.randint(CLASSES, (count,), generator=draw) if classes is None else classes
        noise = torch.randn(len(self.classes), WIDTH, generator=draw)
        x = normalize(0.3 * self.texts[self.classes] + 0.4 * noise[:, :D], dim=1)
        self.rows = torch.cat([x, told[self.classes] + 0.3 * noise[:, D:]], 1)
        self.labels = 3 * self.rows[:, D:] @ told.T - 1.5 * told.square().sum(1)
        self.table = FeatureTable(self.rows)

    def zero_shot(self):
        return SCALE * self.rows[:, :D] @ self.texts.T

    def said(self, side, head):
        """Logits of the strong model with both parts."""
        x = self.rows[:, :D] if side is None else side(self.rows)
        if head is None:
            return SCALE * x @ self.texts.T
        rows = torch.cat([x, self.rows], 1) if head[0].shape[1] == D + WIDTH else self.rows
        return SCALE * rows @ head[0].T + head[1]


def accuracy(logits, classes):
    return 100 * float((logits.argmax(1) == classes).float().mean())


# The image side


def ridge_step(rows, said, texts, labels):
    """One step of the image side, written out on standardised rows: matrix and shift for rows as they are."""
    f = rows.double()
    mean, std = f.mean(0), f.std(0, correction=0)
    f = (f - mean) / std
    error = (labels.double() - said.double().softmax(1)) @ (texts - texts.mean(0)).double()
    penalty = max(1.0, f.shape[1] / len(f)) * torch.eye(f.shape[1], dtype=torch.float64)
    matrix = torch.linalg.solve(f.T @ f / len(f) + penalty, f.T @ error / len(f)).T / std
    return matrix, error.mean(0) - matrix @ mean


@pytest.mark.parametrize("count", [400, 10])  # of fewer images than features, more penalty
def test_one_step_of_the_image_side_is_a_ridge_regression(monkeypatch, count):
    monkeypatch.setattr(module, "STEPS", (1.5,))
    monkeypatch.setattr(module, "ROUNDS", 1)
    one = Problem(count)
    labels = one.labels.softmax(1)
    side = fit_image_side(one.table, labels, one.texts, SCALE, penalty=1.0)
    matrix, shift = ridge_step(one.rows, one.zero_shot(), one.texts, labels)
    torch.testing.assert_close(side.matrix, (1.5 * matrix).float(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(side.shift, (1.5 * shift).float(), atol=1e-4, rtol=1e-3)
    assert side.matrix.shape == (D, WIDTH) and side.matrix.dtype == torch.float32
    moved = normalize(one.rows[:, :D] + 1.5 * (one.rows.double() @ matrix.T + shift).float(), dim=1)
    torch.testing.assert_close(side(one.rows), moved, atol=1e-4, rtol=1e-3)


def test_steps_start_from_the_side_that_is_given(monkeypatch):
    """A second step from the first one's end is two steps; a start of x alone leaves tower features be."""
    one, labels = Problem(), Problem().labels.softmax(1)
    monkeypatch.setattr(module, "STEPS", (1.0,))
    asked = {"text": False, "even": True}
    monkeypatch.setattr(experts, "class_pull", lambda logits: torch.zeros(logits.shape[1]))
    monkeypatch.setattr(module, "ROUNDS", 2)
    both, _, facts = refit(one.table, one.labels, one.texts, SCALE, **asked)
    assert facts["steps"] == [1.0, 1.0]
    monkeypatch.setattr(module, "ROUNDS", 1)
    first, _, _ = refit(one.table, one.labels, one.texts, SCALE, **asked)
    second, _, _ = refit(one.table, one.labels, one.texts, SCALE, start=first, **asked)
    torch.testing.assert_close(second.matrix, both.matrix, atol=1e-4, rtol=1e-4)
    narrow = ImageSide(0.1 * torch.ones(D, D), torch.full((D,), 0.1))
    moved, _, _ = refit(one.table, one.labels, one.texts, SCALE, start=narrow, **asked)
    matrix, shift = ridge_step(one.rows, SCALE * narrow(one.rows) @ one.texts.T, one.texts, labels)
    expected = matrix.float() + torch.cat([narrow.matrix, torch.zeros(D, WIDTH - D)], 1)
    torch.testing.assert_close(moved.matrix, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(moved.shift, shift.float() + 0.1, atol=1e-4, rtol=1e-3)


def test_features_may_have_any_unit_and_any_mean():
    """Rows are standardised to be fitted, and what is returned is for rows as they are."""
    one = Problem()
    unit, mean = torch.cat([torch.ones(D), torch.logspace(-2, 2, WIDTH - D)]), torch.zeros(WIDTH)
    mean[D:] = 3.0
    other = FeatureTable(one.rows * unit + mean)
    side, head, facts = refit(one.table, one.labels, one.texts, SCALE, even=True)
    scaled, scaled_head, known = refit(other, one.labels, one.texts, SCALE, even=True)
    torch.testing.assert_close(scaled.matrix * unit, side.matrix, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(scaled(other.embeds), side(one.rows), atol=1e-3, rtol=1e-3)
    assert known["steps"] == facts["steps"] and known["held_out_kl"] == pytest.approx(facts["held_out_kl"], abs=1e-3)
    said = SCALE * torch.cat([scaled(other.embeds), other.embeds], 1) @ scaled_head[0].T + scaled_head[1]
    torch.testing.assert_close(said.softmax(1), one.said(side, head).softmax(1), atol=5e-3, rtol=0)


def test_a_start_that_is_right_stays():
    one = Problem()
    draw = torch.Generator().manual_seed(5)
    right = ImageSide(0.3 * torch.randn(D, WIDTH, generator=draw), 0.1 * torch.randn(D, generator=draw))
    labels = SCALE * right(one.rows) @ one.texts.T
    side, head, facts = refit(one.table, labels, one.texts, SCALE, start=right, text=False, even=False)
    assert facts["steps"] == [0.0] * 3 and head is None
    assert facts["held_out_kl"] < 1e-4 < 0.1 < facts["held_out_kl_zero_shot"] and facts["held_out_agreement"] == 100
    torch.testing.assert_close(side.matrix, right.matrix) and torch.testing.assert_close(side.shift, right.shift)


# What it learns


@pytest.mark.parametrize("parts", ["both", "image", "text"])
def test_what_is_linear_in_the_features_is_learnt(parts):
    one, new = Problem(), Problem(seed=1)
    asked = {"image": parts != "text", "text": parts != "image"}
    side, head, facts = refit(one.table, one.labels, one.texts, SCALE, even=True, **asked)
    assert (side is None, head is None) == (parts == "text", parts == "image")
    if head is not None:
        assert head[0].shape == (CLASSES, WIDTH if side is None else D + WIDTH) and head[1].shape == (CLASSES,)
    assert facts["held_out_kl"] < 0.5 * facts["held_out_kl_zero_shot"]
    assert accuracy(one.zero_shot(), one.classes) < 60 < 90 < facts["held_out_agreement"]
    # So it does on other images; and what is known of held-out images is true of them.
    said, q = new.said(side, head), new.labels.softmax(1)
    assert accuracy(said, new.classes) > 90
    assert divergence(q, said) == pytest.approx(facts["held_out_kl"], abs=0.15)
    zero_shot = fit_temperature(new.zero_shot(), q) * new.zero_shot()
    assert facts["held_out_kl_zero_shot"] == pytest.approx(divergence(q, zero_shot), abs=0.15)


def test_the_text_side_is_blended_by_the_number_of_images():
    """Beside an image side: each in units of its spread, the discriminant's share ``N / (N + 10 C)``."""
    one = Problem()
    side, head, _ = refit(one.table, one.labels, one.texts, SCALE, even=True)
    alone, text, _ = refit(one.table, one.labels, one.texts, SCALE, even=True, image=False)
    assert alone is None
    known = SCALE * side(one.rows) @ one.texts.T
    words = SCALE * one.rows @ text[0].T + text[1]
    share = 400 / (400 + 10 * CLASSES)
    blend = (1 - share) * known / spread(known) + share * words / spread(words)
    said = one.said(side, head)
    centred = [z - z.mean(1, keepdim=True) for z in (said / spread(said), blend / spread(blend))]
    torch.testing.assert_close(*centred, atol=1e-3, rtol=1e-3)


def test_answers_are_as_sure_as_the_labels():
    """Labels that are half as sure give smaller logits: the temperature is fitted to them."""
    one = Problem()
    spreads = []
    for factor in (1.0, 0.5, 0.25):
        side, head, _ = refit(one.table, factor * one.labels, one.texts, SCALE, even=True)
        said, q = one.said(side, head), (factor * one.labels).softmax(1)
        assert fit_temperature(said, q) == pytest.approx(1, abs=0.15)
        spreads.append(spread(said))
    assert spreads[0] > 1.4 * spreads[1] > 1.9 * spreads[2]


def test_classes_that_the_images_lack_are_not_pushed_away():
    """Not even: the images' class frequencies are explained by an offset that is not kept. The images show two of
    eight classes and a disturbance that is the same for all."""
    draw = torch.Generator().manual_seed(0)
    texts, spoils = normalize(torch.randn(8, 16, generator=draw), dim=1), torch.randn(6, 16, generator=draw)

    def rows(classes):
        h, noise = (torch.randn(len(classes), width, generator=draw) for width in (6, 16))
        return torch.cat([normalize(texts[classes] + 0.25 * h @ spoils + 0.05 * noise, dim=1), h], 1)

    few, every = torch.arange(400) % 2, torch.arange(800) % 8
    table, labels, new = FeatureTable(rows(few)), 8.0 * one_hot(few, 8), rows(every)

    def right(side, asked):
        return accuracy(SCALE * side(new)[asked] @ texts.T, every[asked])

    kept, head, facts = refit(table, labels, texts, SCALE)
    pushed = fit_image_side(table, labels.softmax(1), texts, SCALE, module.PENALTY)  # the same without the offset
    before = ImageSide.identity(16)
    assert facts["even"] is False and facts["coverage"] < 0.3 and head is None  # no text side, though it was asked for
    assert right(kept, every >= 2) > right(before, every >= 2) - 1
    assert right(pushed, every >= 2) < right(before, every >= 2) - 5
    assert right(kept, every < 2) > right(before, every < 2) + 5  # it learns all the same
    # To say that these images are even is to take labels from the two: worse on what the images show.
    wrong, text, _ = refit(table, labels, texts, SCALE, even=True)
    assert right(wrong, every < 2) < right(before, every < 2) - 10 and text is not None
    for even, none in ((None, True), (False, True), (True, False)):
        assert (refit(table, labels, texts, SCALE, even=even)[1] is None) == none


# How it is computed


def test_blocks_and_processes_do_not_matter(monkeypatch):
    one = Problem()
    expected = [refit(one.table, one.labels, one.texts, SCALE, even=even) for even in (True, False)]
    batches = FeatureTable.batches
    monkeypatch.setattr(FeatureTable, "batches", lambda self, size: batches(self, 7))

    for wanted, even in zip(expected, (True, False), strict=True):
        alone = refit(one.table, one.labels, one.texts, SCALE, even=even)
        for side, head, facts in (alone, *_in_two_processes(one, even)):
            torch.testing.assert_close(side.matrix, wanted[0].matrix, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(side.shift, wanted[0].shift, atol=1e-5, rtol=1e-4)
            assert facts["steps"] == wanted[2]["steps"]
            assert facts["held_out_kl"] == pytest.approx(wanted[2]["held_out_kl"], rel=1e-4)
            if even:
                torch.testing.assert_close(head, wanted[1], atol=1e-5, rtol=1e-4)


def _in_two_processes(one, even):
    """As threads, which wait for each other wherever processes add up."""
    barrier, given = threading.Barrier(2), [None, None]

    def process(rank):
        def reduce(tensor, how):
            assert how == "sum"
            given[rank] = tensor.clone()
            barrier.wait(60)
            found = given[0] + given[1]
            barrier.wait(60)
            return found

        accelerator = SimpleNamespace(num_processes=2, process_index=rank, device="cpu", reduce=reduce)
        return refit(one.table, one.labels, one.texts, SCALE, even=even, accelerator=accelerator)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, range(2)))


def test_only_blocks_and_a_sample_are_in_memory(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 100)
    monkeypatch.setattr(data_table, "BLOCK", 64)
    asked = []

    class Counted(FeatureTable):
        @property
        def embeds(self):
            raise AssertionError("all rows at once")

        def share(self, accelerator=None):
            for rows, x in super().share(accelerator):
                asked.append(len(x))
                yield rows, x

        def select(self, indices):
            asked.append(len(indices))
            return FeatureTable(self._stored[indices])

    one = Problem()
    side, head, facts = refit(Counted(one.rows), one.labels, one.texts, SCALE, even=True)
    assert max(asked) == 100 and asked.count(100) == 1
    assert len(asked) == 1 + 7 * (1 + 2 * module.ROUNDS)  # passes: sums, then each step, held out and on all
    whole = refit(one.table, one.labels, one.texts, SCALE, even=True)
    torch.testing.assert_close(one.said(side, head), one.said(*whole[:2]), atol=1.5, rtol=0.2)
    assert facts["held_out_agreement"] > 90


# What it refuses


def test_refusals():
    one = Problem(120)
    few = FeatureTable(one.rows[:99])
    with pytest.raises(ValueError, match="^a refit needs at least 100 images, got 99: pass more, or leave it out.$"):
        refit(few, one.labels[:99], one.texts, SCALE)
    refit(FeatureTable(one.rows[:100]), one.labels[:100], one.texts, SCALE)
    for wrong, shape in ((one.labels[:100], r"\(100, 5\)"), (one.labels[:, :4], r"\(120, 4\)")):
        with pytest.raises(ValueError, match=rf"^label logits must be \(120, 5\), got {shape}.$"):
            refit(one.table, wrong, one.texts, SCALE)
    assert fewest_images(2) == 100 and fewest_images(121) == 121  # or one per class
    many = normalize(torch.randn(121, D), dim=1)
    with pytest.raises(ValueError, match="^a refit needs at least 121 images, got 120: pass more, or leave it out.$"):
        refit(one.table, torch.zeros(120, 121), many, SCALE)
    strange = one.labels.clone()
    strange[3, 1] = torch.nan
    with pytest.raises(ValueError, match="the label logits"):
        refit(one.table, strange, one.texts, SCALE)
    rows = one.rows.clone()
    rows[2, 0] = torch.inf
    with pytest.raises(ValueError, match="the embeddings"):
        refit(FeatureTable(rows), one.labels, one.texts, SCALE)
    for count in (1, 2, 5):
        with pytest.raises(ValueError, match=f"^a fit needs at least 6 images, .* out, got {count}.$"):
            fit_image_side(FeatureTable(one.rows[:count]), one.labels[:count].softmax(1), one.texts, SCALE, 1.0)
    fit_image_side(FeatureTable(one.rows[:6]), one.labels[:6].softmax(1), one.texts, SCALE, 1.0)


def test_hard_labels_are_no_problem():
    one = Problem()
    side, head, facts = refit(one.table, 1000.0 * one_hot(one.classes, CLASSES), one.texts, SCALE)
    assert facts["coverage"] == pytest.approx(1, abs=0.05) and facts["even"] is True and head is not None
    assert accuracy(one.said(side, head), one.classes) > 95
