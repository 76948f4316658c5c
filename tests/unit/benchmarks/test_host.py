"""The benchmark of host time: its configuration splits the narrow model as the shipped one splits the full model."""

import pytest

from benchmarks.bench_host import CONFIGURATIONS, NODE_RANKS, THRESHOLD, Collectives, Shape, build, configuration
from univitar_ds.config.deepspeed import SHARDING, read_deepspeed

SHAPE = Shape(2, 1)


@pytest.fixture(scope="module")
def sizes():
    return [[p.numel() for p in build(SHAPE, whole=whole).parameters()] for whole in (False, True)]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_buckets_hold_as_many_blocks_of_the_narrow_model_as_of_the_whole(name, sizes):
    narrow, whole = map(sum, sizes)
    shipped = read_deepspeed(name)["zero_optimization"]
    found = configuration(name, SHAPE, build(SHAPE))["zero_optimization"]
    assert found.keys() == shipped.keys()
    share, shipped_share = found["reduce_bucket_size"] / narrow, shipped["reduce_bucket_size"] / whole
    assert 0.98 * shipped_share < share <= shipped_share


def test_machines_of_the_fake_world_have_a_fixed_number_of_ranks():
    assert configuration("zero3_node", SHAPE, build(SHAPE))[SHARDING] == NODE_RANKS


def test_tensors_that_stay_whole_stay_so_in_the_narrow_model(sizes, monkeypatch):
    shipped = read_deepspeed("zero3")
    shipped["zero_optimization"][THRESHOLD] = 100_000
    monkeypatch.setattr("benchmarks.bench_host.read_deepspeed", lambda name: shipped)
    limit = configuration("zero3", SHAPE, build(SHAPE))["zero_optimization"][THRESHOLD]
    narrow, whole = sizes
    assert limit == 1 + max(mine for mine, full in zip(narrow, whole, strict=True) if full < 100_000)


def test_collectives_are_summed_by_kind():
    collectives = Collectives()
    collectives.calls.update({"allgather_base": 3, "allgather_": 1, "reduce_scatter_base": 2, "broadcast_": 5})
    counts = collectives.by_kind()
    assert (counts["all_gathers"], counts["reduce_scatters"], counts["all_reduces"]) == (4, 2, 0)
    assert (counts["other_collectives"], counts["collectives"]) == (5, 11)
