import pytest
import torch

from univitar_ds.errors import ConfigError
from univitar_ds.training.distributed import World


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def test_lanes_are_shared_in_ranges_and_all_of_them():
    assert [world(rank, 2).lanes(6) for rank in range(2)] == [[0, 1, 2], [3, 4, 5]]


def test_a_number_of_ranks_that_does_not_divide_the_lanes_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"lanes is 6 .* 4 ranks; run 1, 2, 3, 6 ranks"):
        world(0, 4).lanes(6)
