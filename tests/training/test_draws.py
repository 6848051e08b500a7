"""Numbers drawn for the examples of a batch do not depend on how many processes share it."""

import torch

from hf_transmiter.training.augmentation import augment
from hf_transmiter.training.draws import BatchGenerator, per_example


def draw(generator, count):
    first = per_example(generator, count, lambda n: torch.randn(n, 2, generator=generator))
    return torch.cat((first, per_example(generator, count, lambda n: torch.rand(n, 1, generator=generator))), 1)


def test_two_processes_draw_what_one_does():
    """An odd batch: shares of 3 and 2."""
    whole = draw(torch.Generator().manual_seed(7), 5)
    shares = [draw(BatchGenerator(7, 5, slice(rank, None, 2)), 3 - rank) for rank in range(2)]
    assert torch.equal(torch.stack([whole[0], whole[2], whole[4]]), shares[0])
    assert torch.equal(torch.stack([whole[1], whole[3]]), shares[1])


def test_pictures_are_augmented_alike():
    pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for kind in ("shift", "crop"):
        whole = augment(pixels, torch.Generator().manual_seed(3), kind)
        for rank in range(2):
            mine = slice(rank, None, 2)
            assert torch.equal(augment(pixels[mine], BatchGenerator(3, 6, mine), kind), whole[mine])
