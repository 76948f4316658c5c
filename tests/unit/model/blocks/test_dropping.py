"""Dropped tokens and branches of a pack: which and how often, and the output of the encoder for the rest."""

import pytest
import torch

from tests.support.closeness import assert_sums_close, encoder_terms
from tests.unit.model.made import GRIDS, drawn_patches, small_config, small_encoder
from univitar_ds.config.stage import StageConfig
from univitar_ds.geometry import cumulative, token_count
from univitar_ds.model.blocks.attention import CuSeqlens
from univitar_ds.model.blocks.dropping import NO_DROPPING, DropConfig, DropPlan
from univitar_ds.model.blocks.layers import scale_branch
from univitar_ds.model.encoder import grid_positions

BOTH = DropConfig(patches=0.4, depth=0.5, blocks=2, seed=3, step=5)


def same(a: DropPlan, b: DropPlan) -> bool:
    return a.lengths == b.lengths and torch.equal(a.kept, b.kept) and torch.equal(a.factors, b.factors)


def keeping(kept: list[list[int]], grids=GRIDS) -> DropPlan:
    """A plan that leaves the given tokens of each item."""
    starts = cumulative([token_count(grid) for grid in grids])
    flat = [start + token for start, item in zip(starts, kept, strict=False) for token in item]
    return DropPlan(tuple(len(item) for item in kept), torch.tensor(flat, dtype=torch.int64), None)


@pytest.mark.parametrize(
    ("rate", "merge", "tokens", "kept"),
    [(0.0, 1, 7, 7), (0.5, 1, 24, 12), (0.29, 1, 100, 71), (0.9, 1, 4, 1), (0.99, 1, 1, 1), (0.5, 2, 24, 12),
     (0.4, 2, 20, 12), (0.9, 2, 8, 4)],
)  # fmt: skip
def test_the_number_of_kept_tokens_is_whole_blocks_and_at_least_one(rate, merge, tokens, kept):
    assert DropConfig(patches=rate, merge=merge).kept(tokens) == kept


def test_without_rates_nothing_is_drawn():
    assert NO_DROPPING.of_pack(GRIDS, 0) is None
    assert DropConfig(patches=0.5).of_pack(GRIDS, 0).factors is None
    assert DropConfig(depth=0.5, blocks=2).of_pack(GRIDS, 0).kept is None


def test_a_stage_and_its_encoder_make_the_rule_of_a_step():
    stage = StageConfig(name="s", samples=9, lr=1e-3, patch_dropout=0.25, stochastic_depth=0.125)
    rule = DropConfig.of(stage, small_config(num_hidden_layers=5, spatial_merge_size=2), seed=7, step=11)
    assert rule == DropConfig(0.25, 0.125, blocks=5, merge=2, seed=7, step=11)


@pytest.mark.parametrize("merge", [1, 2])
def test_kept_tokens_stay_in_their_order_and_item_and_whole_blocks_are_dropped(merge):
    drops = DropConfig(patches=0.4, merge=merge, seed=1).of_pack(GRIDS, 2)
    bounds, cell = cumulative([token_count(grid) for grid in GRIDS]), merge**2
    assert drops.kept.tolist() == sorted(set(drops.kept.tolist()))
    for start, end, length in zip(bounds, bounds[1:], drops.lengths, strict=False):
        mine = [token - start for token in drops.kept.tolist() if start <= token < end]
        assert len(mine) == length == DropConfig(patches=0.4, merge=merge).kept(end - start)
        blocks = sorted({token // cell for token in mine})
        assert mine == [block * cell + i for block in blocks for i in range(cell)]


def test_drops_are_a_function_of_seed_step_lane_and_place_in_the_pack():
    drops = BOTH.of_pack(GRIDS, 1)
    assert same(drops, DropConfig(**vars(BOTH)).of_pack(torch.tensor(GRIDS).tolist(), 1))
    first = BOTH.of_pack(GRIDS[:1], 1)
    assert first.kept.tolist() == drops.kept[: len(first.kept)].tolist()
    assert torch.equal(first.factors, drops.factors[:, :, :1])
    others = [DropConfig(**{**vars(BOTH), name: 9}).of_pack(GRIDS, 1) for name in ("seed", "step")]
    for other in [*others, BOTH.of_pack(GRIDS, 2)]:
        assert other.lengths == drops.lengths
        assert not torch.equal(other.kept, drops.kept)
        assert not torch.equal(other.factors, drops.factors)
    twins = BOTH.of_pack([[1, 4, 6], [1, 4, 6]], 1).kept.split(BOTH.kept(24))
    assert not torch.equal(twins[0], twins[1] - 24)


def test_every_token_stays_as_often_as_any_other():
    kept = torch.stack([DropConfig(patches=0.4, step=step).of_pack([[1, 2, 5]], 0).kept for step in range(2000)])
    share = torch.bincount(kept.flatten(), minlength=10) / 2000
    assert (share - 0.6).abs().max() < 5 * (0.6 * 0.4 / 2000) ** 0.5


def test_branches_are_dropped_more_often_from_block_to_block_and_scaled_where_they_are_kept():
    n, rates = 4000, [0.0, 0.1, 0.2, 0.3]
    factors = DropConfig(depth=0.3, blocks=4).of_pack([[1, 1, 1]] * n, 0).factors
    assert factors.shape == (4, 2, n)
    for rate, branches in zip(rates, factors, strict=True):
        for branch in branches:
            assert set(branch.tolist()) <= {0.0, torch.tensor(1 / (1 - rate)).item()}
            assert abs((branch == 0).float().mean().item() - rate) <= 5 * (rate * (1 - rate) / n) ** 0.5
    both = (factors[3] == 0).all(0).float().mean().item()
    assert abs(both - 0.09) < 5 * (0.09 * 0.91 / n) ** 0.5, "attention and feed-forward fall together"


def test_the_mean_over_many_draws_is_the_branch_without_drops():
    n, rate = 2000, 0.4
    model = small_encoder().double()
    model.encoder["layers"][1].mlp.fc2.requires_grad_(False).weight.zero_()  # what is left is linear in the factor
    patches = drawn_patches([[1, 1, 1]]).double()
    _, (_, before, after) = model(patches, [[1, 1, 1]], output_hidden_states=True)
    drops = DropConfig(depth=rate, blocks=2).of_pack([[1, 1, 1]] * n, 0)
    many = model(patches.expand(n, -1), [[1, 1, 1]] * n, drops=drops)
    branch, mean = after - before, (many - before).mean(0)
    assert (mean - branch).norm() < 5 * (rate / (1 - rate) / n) ** 0.5 * branch.norm()
    assert not torch.equal(many[0], many[1]) or not torch.equal(many[1], many[2])


def test_scaling_in_bfloat16_has_no_bias():
    branch = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)).add(0.5).bfloat16()
    scaled = scale_branch(branch, torch.full((20_000, 1), 1 / 0.9))
    assert scaled.dtype == torch.bfloat16
    # One rounding a value is 2^-9 of it at most and even both ways; 1 / 0.9 itself rounds by 1.6e-3.
    assert abs((scaled.float() * 0.9 / branch.float() - 1).mean().item()) < 5 * 2**-9 * 20_000**-0.5


@pytest.mark.numeric
def test_an_encoder_that_keeps_the_corner_of_an_image_has_the_tokens_of_the_cropped_corner():
    model, patches = small_encoder().double(), drawn_patches(GRIDS).double()
    corner = [row * 6 + column for row in range(3) for column in range(2)]
    first_step = [0, 1, 4, 5]  # rows and columns 0 and 1 of the first time step of the video
    drops = keeping([corner, first_step, [0, 1, 2, 3], list(range(12))])
    seen = model(patches, GRIDS, drops=drops)
    cut = model(patches[drops.kept], [[1, 3, 2], [1, 2, 2], [1, 2, 2], [1, 6, 2]])
    assert_sums_close(seen, cut, encoder_terms(model.config, 24))


@pytest.mark.numeric
@pytest.mark.parametrize("merge", [1, 2])
def test_kept_tokens_keep_their_positions_and_do_not_attend_to_dropped_ones(merge):
    model = small_encoder(spatial_merge_size=merge).double()
    patches = drawn_patches(GRIDS).double()
    drops = DropConfig(patches=0.5, merge=merge).of_pack(GRIDS, 0)
    x = model.embeddings["patch_embedding"](patches[drops.kept])
    positions = grid_positions(GRIDS, merge)[drops.kept]
    for block in model.encoder["layers"]:
        x = block(x, positions, CuSeqlens.of(drops.lengths, x.device))
    seen, states = model(patches, GRIDS, drops=drops, output_hidden_states=True)
    assert_sums_close(seen, x, encoder_terms(model.config, 24))
    assert [len(state) for state in states] == [len(drops.kept)] * 3
    others = torch.ones(len(patches), dtype=torch.bool).index_fill(0, drops.kept, False)
    assert torch.equal(model(patches + others[:, None], GRIDS, drops=drops), seen)


@pytest.mark.numeric
def test_an_item_with_dropped_branches_passes_a_block_unchanged_and_others_are_not_affected():
    model, patches = small_encoder().double(), drawn_patches(GRIDS).double()
    factors = torch.ones(2, 2, len(GRIDS))
    factors[1, :, 1] = 0
    lengths = tuple(token_count(grid) for grid in GRIDS)
    plain, (_, before, _) = model(patches, GRIDS, output_hidden_states=True)
    seen = model(patches, GRIDS, drops=DropPlan(lengths, None, factors))
    ours, theirs, inputs = (rows.split(lengths) for rows in (seen, plain, before))
    assert torch.equal(ours[1], inputs[1])
    assert all(torch.equal(ours[item], theirs[item]) for item in (0, 2, 3))
    factors[1, :, 1] = torch.tensor([0.0, 1.0])  # feed-forward alone
    block = model.encoder["layers"][1]
    wanted = inputs[1] + block.ls2 * block.mlp(torch.nn.functional.rms_norm(inputs[1], (64,), block.norm2.weight, 1e-6))
    seen = model(patches, GRIDS, drops=DropPlan(lengths, None, factors)).split(lengths)
    assert_sums_close(seen[1], wanted, encoder_terms(model.config, 24))


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_drop_the_same_branches(every):
    grads = []
    for checkpoint_every in (0, every):
        model = small_encoder(num_hidden_layers=3)
        model.checkpoint_every = checkpoint_every
        drops = DropConfig(patches=0.4, depth=0.6, blocks=3).of_pack(GRIDS, 0)
        model(drawn_patches(GRIDS), GRIDS, drops=drops).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("grids", [[], [[1, 1, 1]]], ids=["an empty pack", "an item that every branch misses"])
def test_every_parameter_has_a_gradient_with_any_drops(grids):
    model = small_encoder()
    drops = DropConfig(patches=0.9, depth=0.9, blocks=2).of_pack(grids, 0)
    drops = DropPlan(drops.lengths, drops.kept, torch.zeros_like(drops.factors))
    tokens = model(drawn_patches(grids), grids, drops=drops)
    assert tokens.shape == (len(grids), 64)
    tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.encoder["layers"][0].attn.qkv.weight.grad.any()


def test_bfloat16_stays_bfloat16():
    drops = BOTH.of_pack(GRIDS, 0)
    assert small_encoder().bfloat16()(drawn_patches(GRIDS), GRIDS, drops=drops).dtype == torch.bfloat16
