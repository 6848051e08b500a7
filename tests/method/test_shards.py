"""Sums add up: rows dealt out to any machines, a few or none to each, end in the adapter of all rows at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hf_transmiter.algebra import discriminant_head, ridge
from hf_transmiter.data.embeddings import FeatureTable
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.moments import sum_pairs
from hf_transmiter.method.refit import fit_image_side, refit


seeds, machines = st.integers(0, 2**31), st.integers(1, 4)
WEAK, STRONG = (ModelId(name, None, name[0] * 64) for name in ("weak", "strong"))


def rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def deal(count, world, seed):
    """Row numbers of each machine, in any order; a machine may have none."""
    draw = torch.Generator().manual_seed(seed)
    order, cuts = torch.randperm(count, generator=draw), torch.randint(count + 1, (world - 1,), generator=draw)
    return order.tensor_split(cuts.sort().values)


def everywhere(world, work):
    """`work(accelerator)` on each machine, as threads that wait for each other wherever sums are added up."""
    barrier, given = threading.Barrier(world), [None] * world

    def machine(rank):
        def reduce(tensor, how):
            given[rank] = tensor.clone()
            barrier.wait(60)
            found = sum(given)
            barrier.wait(60)
            return found

        return work(SimpleNamespace(num_processes=world, process_index=rank, device="cpu", reduce=reduce))

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(machine, range(world)))


class Shards(FeatureTable):
    """A table of which each machine goes through the rows that it was dealt, three at a time."""

    def deal(self, world, seed):
        self.dealt = deal(len(self), world, seed)
        return self

    def share(self, accelerator=None):
        for own in self.dealt[accelerator.process_index].split(3):
            yield own, self.embeds[own]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@given(seeds, machines, st.sampled_from(["embedding", "logit"]))
def test_a_bridge_and_what_crosses_it(seed, world, space):
    weak, strong = rows(60, 4, seed), rows(60, 4, seed + 1)

    def build(accelerator=None, own=slice(None)):
        moment, _ = sum_pairs([(strong[own], weak[own])], 4, 4, accelerator)
        return Bridge.from_moment(moment, WEAK, STRONG, space=space, beta=3.0)

    dealt, whole = deal(60, world, seed), build()
    text, tuned = (normalize(rows(5, 4, seed + k), dim=1) for k in (2, 3))
    names = (normalize(rows(4, 4, seed + 4), dim=1),) * 2
    for bridge in everywhere(world, lambda accelerator: build(accelerator, dealt[accelerator.process_index])):
        for name in ("matrix", "mean_strong", "mean_weak"):
            assert_same(getattr(bridge, name), getattr(whole, name))
        assert abs(bridge.scale - whole.scale) < 1e-6 and bridge.num_pairs == 60
        found, expected = (each.carry_class_vectors(tuned, text, text, names) for each in (bridge, whole))
        assert_same(found["delta"], expected["delta"])


@given(seeds, machines)
@settings(max_examples=10)
def test_a_refit_and_an_image_side(seed, world):
    texts = normalize(rows(4, 6, seed), dim=1)
    x = torch.cat([normalize(rows(150, 6, seed + 1), dim=1), rows(150, 3, seed + 2)], dim=1)
    said = 8 * x[:, :6] @ texts.T + 2 * x[:, 6:] @ rows(3, 4, seed + 3)
    whole, table = FeatureTable(x), Shards(x).deal(world, seed)

    def fit(table, accelerator=None):
        side, head, _ = refit(table, said, texts, 8.0, even=True, accelerator=accelerator)
        alone = fit_image_side(table, said.softmax(1), texts, 8.0, 1.0, accelerator)
        weight, bias = head
        return side(x), alone(x), weight / weight.norm(), bias / bias.norm()

    expected = fit(whole)
    for found in everywhere(world, lambda accelerator: fit(table, accelerator)):
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)


@given(seeds, machines)
@settings(max_examples=20)
def test_class_vectors_of_an_extraction(seed, world):
    x, prior = normalize(rows(60, 5, seed), dim=1), normalize(rows(4, 5, seed + 1), dim=1)
    said, dealt = 8 * x @ prior.T + rows(60, 4, seed + 2), deal(60, world, seed)

    def fit(accelerator=None, own=slice(None)):
        def blocks():
            return [(x[own], said[own])]

        solution = ridge(blocks, prior.T, accelerator=accelerator)
        return solution.weight, solution.bias, discriminant_head(blocks, prior, 0.5, accelerator)

    expected = fit()
    for found in everywhere(world, lambda accelerator: fit(accelerator, dealt[accelerator.process_index])):
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
