"""Messages of a step, counted in a fake process group: within a machine independent of the number of machines."""

import pytest

from benchmarks.bench_collectives import Collectives, fake_world
from tests.support.distributed import run_distributed
from tests.support.standin import StandIn, inputs, pack
from tests.support.training import ds_config
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.training.engine.engine import build_engine

pytestmark = pytest.mark.distributed
NODE = 4


def counted(ranks, cases):
    """Calls by kind, calls and bytes of the fourth step, in which DeepSpeed has recorded the order of the modules."""
    world, answers = fake_world(ranks), {}
    for name, settings in cases.items():
        engine = build_engine(StandIn(), OptimizerConfig(), ds_config(1, **settings), world)
        count = Collectives()
        for _ in range(4):
            count.clear()
            engine.zero_grad(1e-3)
            with count:
                vision, text, scale, bias = engine(*inputs(pack(0, 0)))
                engine.backward(((vision * text).sum() * scale + bias).sum())
                engine.step()
        answers[name] = dict(count.calls), count.calls.total(), count.sent
        engine.close()
    return answers


def test_a_group_adds_two_messages_and_the_bytes_of_a_shard_for_any_number_of_groups():
    cases = {"groups": {"sharing": NODE}}
    few, many = (run_distributed(counted, 1, ranks, cases)[0]["groups"] for ranks in (2 * NODE, 64 * NODE))
    alone = run_distributed(counted, 1, NODE, {"all": {}})[0]["all"]
    assert few == many
    assert few[1] == alone[1] + 2, "the gradient shard and the norms"
    trained = sum(p.numel() for p in StandIn().parameters() if p.requires_grad)
    added = few[2] - alone[2]
    assert 4 * trained / NODE <= added < 4.1 * trained / NODE + 100
