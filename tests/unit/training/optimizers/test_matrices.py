"""Matrices sharded over ranks: each is whole on one rank, by two messages."""

import pytest
import torch

from benchmarks.bench_collectives import Collectives
from tests.support.distributed import run_distributed
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine.node_sharding import Sharding
from univitar_ds.training.optimizers.matrices import Part, WholeMatrices

pytestmark = pytest.mark.distributed
SHAPES = [(8, 8), (6, 4), (8, 6), (3, 2), (8, 8), (6, 6)]
CUTS = [(64, 0, 0), (5, 18, 1), (0, 0, 48), (2, 2, 2), (0, 63, 1), (30, 0, 6)]
"""Elements of each matrix on each of three ranks."""


def values(number):
    return torch.randn(SHAPES[number], generator=torch.Generator().manual_seed(number))


def applied():
    world = start_world()
    offset, parts, own = 1, [], [torch.full((1,), torch.nan)]  # not all of a flat tensor is in matrices
    for number, lengths in enumerate(CUTS):
        parts.append(Part(SHAPES[number], 0, offset, lengths))
        start = sum(lengths[: world.rank])
        own.append(values(number).flatten()[start : start + lengths[world.rank]])
        offset += lengths[world.rank]
    whole = WholeMatrices(parts, Sharding(world.rank, world.size), world.device)
    seen = []

    def squared(matrix):
        seen.append(tuple(matrix.shape))
        return matrix.T.square().T

    with Collectives() as messages:
        found = whole.apply(squared, torch.cat(own))
    return seen, [part.clone() for part in found], dict(messages.calls)


def test_each_matrix_is_whole_on_one_rank_and_its_parts_return_in_two_messages():
    answers = run_distributed(applied, 3)
    assert sorted(shape for seen, *_ in answers for shape in seen) == sorted(SHAPES)
    # 8 x 8 takes 1,536 multiplications, and 8 x 6, 6 x 6, 6 x 4 and 3 x 2 take 792, 648, 256 and 32.
    assert sorted(sorted(seen) for seen, *_ in answers) == [[(3, 2), (8, 8)], [(6, 4), (6, 6), (8, 6)], [(8, 8)]]
    for number in range(len(SHAPES)):
        parts = torch.cat([found[number] for _, found, _ in answers])
        assert torch.equal(parts, values(number).square().flatten())
    assert [len(found[0]) for _, found, _ in answers] == [64, 0, 0]
    assert [calls for *_, calls in answers] == [{"alltoall_base": 2}] * 3
