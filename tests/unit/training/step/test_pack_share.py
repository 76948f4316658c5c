"""A rank's share of a pack that several ranks encode together."""

from collections import Counter

import pytest
import torch

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.data.batch import PackedBatch, rows
from univitar_ds.geometry import token_count
from univitar_ds.model.blocks.dropping import DropConfig
from univitar_ds.model.blocks.rank_group import RankGroup
from univitar_ds.model.flops import cost_coefficients
from univitar_ds.training.logging.metrics import local_metrics
from univitar_ds.training.step.pack_share import own_drops, own_pixels, own_rows, share_of, whole_of

GRIDS = [[1, 2, 3], [1, 4, 4], [1, 1, 2], [1, 5, 3], [1, 2, 2]]


def pack(grids=GRIDS) -> PackedBatch:
    """Item i has pixels of value i."""
    count = len(grids)
    pixels = [torch.full((588 * token_count(grid),), i, dtype=torch.uint8) for i, grid in enumerate(grids)]
    return PackedBatch(
        pixels=torch.cat(pixels) if pixels else torch.empty(0, dtype=torch.uint8),
        frames=rows([1] * count),
        grid_thw=rows(grids, 3),
        token_ids=rows([[i, 0] for i in range(count)], 2),
        text_lengths=rows(list(range(count))),
        caption_ids=rows(list(range(count))),
        captions=[f"caption {i}" for i in range(count)],
        labels=[str(i) for i in range(count)],
        sets=[None] * count,
        keys=[f"shard/{i}" for i in range(count)],
        modality="image",
        lane=3,
        index=7,
        bad={"cut": 2},
        downscaled=1,
        ignored={"bad_caption": 1},
        filtered={"rule": 4},
    )


def shares(batch, ranks):
    return [share_of(batch, RankGroup(rank, ranks)) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_every_item_has_one_owner_with_all_that_belongs_to_it(ranks):
    batch = pack()
    parts = shares(batch, ranks)
    assert [key for part in parts for key in part.keys] == batch.keys
    for name in ("pixels", "frames", "grid_thw", "token_ids", "text_lengths", "caption_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name
    for part in parts:
        assert part.captions == [f"caption {label}" for label in part.labels]
        assert part.pixels.unique().tolist() == part.caption_ids.tolist() == own_rows(part, list(range(len(batch))))
        assert part.tokens == len(part.pixels) // 588
        assert torch.equal(own_pixels(part, batch.pixels), part.pixels)
        assert whole_of(part) is batch
        assert (part.lane, part.index, part.modality) == (3, 7, "image")


def test_counts_of_the_loader_are_counted_once():
    total = Counter()
    for part in shares(pack(), 4):
        total.update(part.bad | part.ignored | part.filtered | {"downscaled": part.downscaled})
    assert total == {"cut": 2, "bad_caption": 1, "rule": 4, "downscaled": 1}


def test_a_rank_alone_has_the_pack_itself():
    batch = pack()
    assert share_of(batch, RankGroup()) is batch
    assert whole_of(batch) is batch


def test_an_empty_pack_has_empty_shares():
    assert [len(part) for part in shares(pack([]), 3)] == [0, 0, 0]


def test_drops_of_an_owners_items_are_those_of_the_whole_pack():
    batch = pack()
    whole = DropConfig(patches=0.4, depth=0.5, blocks=3, seed=1, step=2).of_pack(GRIDS, batch.lane)
    parts = [own_drops(part, whole) for part in shares(batch, 3)]
    assert [length for part in parts for length in part.lengths] == list(whole.lengths)
    assert torch.equal(torch.cat([part.factors for part in parts], 2), whole.factors)
    starts = torch.tensor([0, *[part.tokens for part in shares(batch, 3)]]).cumsum(0)
    assert torch.equal(torch.cat([part.kept + start for part, start in zip(parts, starts, strict=False)]), whole.kept)
    assert all(len(part.kept) == sum(part.lengths) for part in parts)


def test_tokens_and_flops_of_all_shares_are_those_of_the_pack_and_all_ranks_are_as_busy():
    cost = cost_coefficients(EncoderConfig(96, 1, 4, 192))
    given = {"cost": cost, "token_budget": 64, "step_s": 1.0, "data_wait_s": 0.0}
    whole = local_metrics([pack()], **given)
    parts = [local_metrics([part], **given) for part in shares(pack(), 4)]
    for name in ("tokens", "token_budget", "flops", "bad_samples", "filtered_samples"):
        assert sum(part[name] for part in parts) == pytest.approx(whole[name]), name
    assert {part["busiest_flops"] for part in parts} == {whole["flops"] / 4}
