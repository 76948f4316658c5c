"""The number of small messages between ranks in a step, in addition to those of the loss and of ZeRO."""

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.runs import counted_rank, metrics, small_config
from tests.support.shards import write_demo_shards
from univitar_ds.run import create_run
from univitar_ds.training.distributed.process_group import PeerFailure, all_ranks_or_none, start_world

pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_a_step_has_two_small_messages(tmp_path):
    stage = {"image": {"min_tokens": 4, "max_tokens": 24, "divisor_px": 14}, "token_budget": 96, "lr": 1e-3}
    changes = {"stages": [{"name": "images", "samples": 60, **stage}], "checkpoint": {"every_steps": 100}}
    run = create_run(small_config(write_demo_shards(tmp_path / "shards"), tmp_path, **changes), "test", 2)
    for steps, between in run_distributed(counted_rank, 2, run):
        assert set(steps) == {1}, "the metrics"
        assert set(between) == {2}, "the metrics, and before the step the vote with the numbers of items"
    assert len(metrics(run)) == len(steps)


def counts_of(failing, ready=()):
    world = start_world()
    try:
        is_ready = lambda: world.rank in ready  # noqa: E731
        with all_ranks_or_none(world, ready=is_ready) as alone:
            pass
        with all_ranks_or_none(world, lambda: world.rank == 1, lambda: [10 + world.rank, 3], 2, is_ready) as vote:
            if failing == world.rank:
                raise ValueError("no pack")
    except (ValueError, PeerFailure) as error:
        return str(error)
    assert alone.ready == vote.ready
    return vote.yes, vote.counts.tolist(), vote.counts.dtype is torch.int64, vote.ready


@pytest.mark.parametrize("ready", [(0, 1), (1,)])
def test_the_ranks_agree_and_count_in_one_message(ready):
    """`ready` is true only if it is true on both ranks."""
    expected = True, [[10, 3], [11, 3]], True, len(ready) == 2
    assert run_distributed(counts_of, 2, None, ready) == [expected] * 2


def test_a_rank_that_fails_ends_both_without_counts():
    assert run_distributed(counts_of, 2, 1) == ["rank 1 ended the run: no pack", "no pack"]
