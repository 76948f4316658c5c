"""Of the ranks that read the same lanes, one warns about them."""

from contextlib import nullcontext

import pytest
import torch

from tests.support.finished import run_config
from univitar_ds.model.blocks.rank_group import RankGroup
from univitar_ds.training import loop
from univitar_ds.training.distributed.groups import Groups
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.state import State

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.mark.parametrize(("place", "part"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_first_rank_of_a_group_that_shares_packs_warns_about_its_lanes(monkeypatch, tmp_path, place, part):
    given = []
    monkeypatch.setattr(loop, "PackLoader", lambda data, stage, lanes, **_: given.append(lanes) or nullcontext())
    groups = Groups(ALONE, ALONE, tensor=RankGroup(place, 2), sequence=RankGroup(part, 2))
    trainer, config = object.__new__(loop._Trainer), run_config()
    vars(trainer).update(
        cfg=config, run=tmp_path, world=ALONE, groups=groups, lanes=[0, 1], state=State(), classes=None, cost=(0.0, 0.0)
    )
    with trainer._loader(config.stages[0]):
        pass
    assert [lanes.warns for lanes in given] == [(place, part) == (0, 0)]
