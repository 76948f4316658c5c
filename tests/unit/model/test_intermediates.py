"""Outputs of single blocks and attention probabilities, against a plain computation."""

import copy

import pytest
import torch

from tests.support.closeness import assert_sums_close, encoder_terms
from tests.unit.model.made import drawn_patches, small_encoder
from univitar_ds.errors import UserError
from univitar_ds.geometry import token_count
from univitar_ds.kernels.reference import rope2d
from univitar_ds.model.encoder import UniViTAR, grid_positions, token_maps

GRIDS = [[1, 4, 6], [2, 2, 4], [1, 2, 2]]
LAYERS = 4


@pytest.fixture(scope="module")
def encoder() -> UniViTAR:
    return small_encoder(num_hidden_layers=LAYERS, num_attention_heads=2, spatial_merge_size=2, qkv_bias=True)


@pytest.mark.parametrize(("indices", "blocks"), [
    (None, [0, 1, 2, 3]), (2, [2, 3]), (4, [0, 1, 2, 3]), ([-1], [3]), ([2, 0, -4], [2, 0, 0]), ([], []),
])  # fmt: skip
def test_each_index_gives_the_output_of_its_block(encoder, indices, blocks):
    patches = drawn_patches(GRIDS)
    output, states = encoder(patches, GRIDS, output_hidden_states=True)
    final, found = encoder.forward_intermediates(patches, torch.tensor(GRIDS), indices, output_fmt="NLC")
    assert torch.equal(final, output)
    assert len(found) == len(blocks)
    assert all(torch.equal(one, states[block + 1]) for one, block in zip(found, blocks, strict=True))


def test_maps_have_the_rows_and_columns_of_the_image(encoder):
    patches = drawn_patches(GRIDS)
    (packed,) = encoder.forward_intermediates(patches, GRIDS, [1], output_fmt="NLC", intermediates_only=True)
    (maps,) = encoder.forward_intermediates(patches, GRIDS, [1], intermediates_only=True)
    assert [list(one.shape) for one in maps] == [[t, 64, h, w] for t, h, w in GRIDS]
    places = grid_positions(GRIDS, 2).tolist()
    token = 0
    for one, (t, h, w) in zip(maps, GRIDS, strict=True):
        for index in range(t * h * w):
            row, column = places[token]
            assert torch.equal(one[index // (h * w), :, row, column], packed[token])
            token += 1
    assert token == len(packed)


def test_blocks_that_no_result_needs_are_not_computed(encoder):
    patches, ran = drawn_patches(GRIDS), []
    handles = [
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(encoder.encoder["layers"])
    ]
    try:
        only = encoder.forward_intermediates(patches, GRIDS, [1, 0], output_fmt="NLC", intermediates_only=True)
        assert ran == [0, 1]
        early, both = encoder.forward_intermediates(patches, GRIDS, [1, 0], output_fmt="NLC", stop_early=True)
        assert ran == [0, 1] * 2
        encoder.forward_intermediates(patches, GRIDS, [1, 0])
        assert ran == [0, 1] * 2 + [0, 1, 2, 3]
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(early, both[0])
    assert all(torch.equal(a, b) for a, b in zip(only, both, strict=True))


def test_norm_divides_each_token_by_its_root_mean_square_but_not_the_output(encoder):
    patches = drawn_patches(GRIDS) * 5
    final, plain = encoder.forward_intermediates(patches, GRIDS, [0, -1], output_fmt="NLC")
    same, normed = encoder.forward_intermediates(patches, GRIDS, [0, -1], output_fmt="NLC", norm=True)
    assert torch.equal(final, same)
    for one, other in zip(plain, normed, strict=True):
        wide = one.double()
        assert_sums_close(other, wide / (wide.square().mean(dim=1, keepdim=True) + 1e-6).sqrt(), terms=64)


@pytest.mark.parametrize("every", [0, 1])
def test_gradients_flow_from_a_map_to_the_blocks_below_it_only(every):
    encoder = small_encoder(num_hidden_layers=3)
    encoder.checkpoint_every = every
    _, (maps,) = encoder.forward_intermediates(drawn_patches(GRIDS), GRIDS, [1])
    sum(one.square().sum() for one in maps).backward()
    reached = [
        any(parameter.grad is not None for parameter in part.parameters())
        for part in (encoder.embeddings["patch_embedding"], *encoder.encoder["layers"])
    ]
    assert reached == [True, True, True, False]


def plain_probabilities(encoder: UniViTAR, x: torch.Tensor, grids, layer: int) -> list[torch.Tensor]:
    """Softmax of q k / sqrt(K) of a block, item by item and head by head. Args: x: (T, D) inputs of the block."""
    block, heads = encoder.encoder["layers"][layer], encoder.config.num_attention_heads
    width = x.shape[1] // heads
    places = grid_positions(grids, encoder.config.spatial_merge_size)

    def normed(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return values / (values.square().mean(dim=1, keepdim=True) + encoder.config.layer_norm_eps).sqrt() * weight

    q, k, _ = (normed(x, block.norm1.weight) @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=1)
    q, k = (
        normed(rope2d(part.view(-1, heads, width), places, encoder.config.rope_theta).flatten(1), norm.weight)
        for part, norm in ((q, block.attn.q_norm), (k, block.attn.k_norm))
    )
    found, start = [], 0
    for grid in grids:
        item = slice(start, start := start + token_count(grid))
        rows = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            rows.append((q[item, part] @ k[item, part].T / width**0.5).softmax(dim=1))
        found.append(torch.stack(rows))
    return found


@pytest.mark.numeric
@pytest.mark.parametrize("layer", [0, 2, -1])
def test_attention_maps_are_the_softmax_of_a_plain_computation(encoder, layer):
    encoder, patches = copy.deepcopy(encoder), drawn_patches(GRIDS)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        maps = encoder.attention_maps(patches, GRIDS, layer)
        _, states = encoder(patches, GRIDS, output_hidden_states=True)
        wanted = plain_probabilities(encoder, states[:-1][layer], GRIDS, layer)
    assert [list(one.shape) for one in maps] == [[2, 24, 24], [2, 16, 16], [2, 4, 4]]
    for one, other in zip(maps, wanted, strict=True):
        assert_sums_close(one, other, encoder_terms(encoder.config, 24))
        assert one.std() > 0.001  # not the same for all tokens


@pytest.mark.numeric
def test_attention_maps_are_the_weights_that_the_block_gives_to_the_values(encoder):
    patches = drawn_patches(GRIDS)
    with torch.no_grad():
        maps = encoder.attention_maps(patches, GRIDS, 1)
        before = encoder.forward_intermediates(patches, GRIDS, [0], output_fmt="NLC", intermediates_only=True)[0]
        block = encoder.encoder["layers"][1]
        normed, seen = block.norm1(before), []
        handle = block.attn.proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        encoder(patches, GRIDS)
        handle.remove()
        values = block.attn.qkv(normed).view(len(patches), 3, 2, 32)[:, 2]
        lengths = [token_count(grid) for grid in GRIDS]
        mixed = [(one @ part.transpose(0, 1)).transpose(0, 1).flatten(1)
                 for one, part in zip(maps, values.split(lengths), strict=True)]  # fmt: skip
    assert_sums_close(seen[0], torch.cat(mixed), encoder_terms(encoder.config, 24))


def test_a_map_of_probabilities_shows_which_places_are_seen(encoder):
    grid = GRIDS[0]
    (one,) = encoder.attention_maps(drawn_patches([grid]), [grid])
    (seen,) = token_maps(one.mean(dim=(0, 1))[:, None], [grid], encoder.config.spatial_merge_size)
    assert seen.shape == (1, 1, 4, 6)
    assert_sums_close(seen.sum(), 1.0, terms=2 * 24)
    places = grid_positions([grid], 2).tolist()
    assert torch.equal(seen[0, 0, places[9][0], places[9][1]], one.mean(dim=(0, 1))[9])


def test_half_precision_gives_probabilities_in_float32():
    encoder = small_encoder().bfloat16()
    maps = encoder.attention_maps(drawn_patches(GRIDS), GRIDS)
    assert all(one.dtype == torch.float32 for one in maps)
    for one in maps:
        assert_sums_close(one.sum(dim=-1), torch.ones(one.shape[:2]), terms=24)


def test_an_empty_pack_has_no_maps(encoder):
    empty, none = torch.empty(0, 1176), torch.empty(0, 3, dtype=torch.int64)
    assert encoder.attention_maps(empty, none) == []
    assert encoder.forward_intermediates(empty, none, 1, intermediates_only=True) == [[]]


@pytest.mark.parametrize(("arguments", "said"), [
    ({"indices": [0, 4]}, "no block 4; its 4 blocks are -4 to 3"), ({"indices": [-5]}, "no block -5"),
    ({"indices": 0}, "the last 0 blocks were asked for, the encoder has 4; give 1 to 4"),
    ({"indices": 5}, "the last 5 blocks"), ({"output_fmt": "NHWC"}, 'got \'NHWC\''),
])  # fmt: skip
def test_blocks_and_formats_that_do_not_exist_are_named(encoder, arguments, said):
    with pytest.raises(UserError, match=said):
        encoder.forward_intermediates(drawn_patches(GRIDS), GRIDS, **arguments)


def test_attention_of_a_block_that_does_not_exist_is_refused(encoder):
    with pytest.raises(UserError, match="no block 4; its 4 blocks"):
        encoder.attention_maps(drawn_patches(GRIDS), GRIDS, 4)
