"""Random numbers for the examples of a batch that several processes share: the same as one process would draw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class BatchGenerator(torch.Generator):
    """Alike in every process that works on a batch of `size` examples; `mine` are this process's."""

    def __new__(cls, seed: int, size: int, mine: slice):
        return super().__new__(cls)  # torch's own takes a device

    def __init__(self, seed: int, size: int, mine: slice):
        self.manual_seed(seed)
        self.size, self.mine = size, mine


def per_example(generator: torch.Generator, count: int, draw: Callable[[int], Tensor]) -> Tensor:
    """``draw(B)`` for a batch of B examples, of which a shared batch's process gets its own rows.

    So the numbers of an example do not depend on the number of processes, and the generators of all processes stay
    alike. `draw` uses the `generator`; `count` examples are at hand.
    """
    if isinstance(generator, BatchGenerator):
        return draw(generator.size)[generator.mine]
    return draw(count)
