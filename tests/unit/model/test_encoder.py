"""Properties of the encoder besides the golden numbers: packing, heads, empty packs, dtypes, initial weights."""

import pytest
import torch

from tests.support.closeness import STORED, assert_sums_close, encoder_terms
from tests.unit.model.made import GRIDS, drawn_patches, small_encoder
from univitar_ds.geometry import cumulative, token_count
from univitar_ds.model.blocks.dropping import DropConfig
from univitar_ds.model.encoder import _step_positions, grid_positions


@pytest.mark.numeric
@pytest.mark.parametrize(("hidden", "heads"), [(128, 2), (160, 2), (240, 2)], ids=["64", "80", "120"])
def test_the_output_of_an_item_is_the_same_alone_and_in_a_pack(hidden, heads):
    model = small_encoder(hidden_size=hidden, num_attention_heads=heads).double()
    patches = drawn_patches(GRIDS).double()
    together = model(patches, GRIDS)
    bounds = cumulative([token_count(grid) for grid in GRIDS])
    for grid, start, end in zip(GRIDS, bounds, bounds[1:], strict=False):
        alone = model(patches[start:end], torch.tensor([grid]))
        assert_sums_close(together[start:end], alone, encoder_terms(model.config, 24))


def test_a_changed_item_does_not_change_the_output_of_other_items():
    model, patches = small_encoder(), drawn_patches(GRIDS)
    changed = patches.clone()
    changed[:24] += 1
    assert torch.equal(model(patches, GRIDS)[24:], model(changed, GRIDS)[24:])
    assert not torch.equal(model(patches, GRIDS)[:24], model(changed, GRIDS)[:24])


def test_an_empty_pack_gives_every_parameter_a_gradient_of_zero():
    model = small_encoder(qkv_bias=True)
    tokens = model(torch.empty(0, 1176), torch.empty(0, 3, dtype=torch.int64))
    assert tokens.shape == (0, 64)
    tokens.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_hidden_states_start_with_the_embedding_and_end_with_the_output():
    model, patches = small_encoder(), drawn_patches(GRIDS)
    output, states = model(patches, GRIDS, output_hidden_states=True)
    assert len(states) == 3
    assert torch.equal(states[0], model.embeddings["patch_embedding"](patches))
    assert torch.equal(states[-1], output)
    assert torch.equal(output, model(patches, GRIDS))


@pytest.mark.numeric
def test_bfloat16_agrees_with_float32_and_packed_items_with_single_ones():
    grids = GRIDS * 16  # enough entries for their errors to cancel
    model, patches = small_encoder(), drawn_patches(grids)
    exact = model(patches, grids)
    rounded = model.bfloat16()(patches, grids)
    assert rounded.dtype == torch.bfloat16
    assert_sums_close(rounded, exact, STORED * model.config.num_hidden_layers, dtype=torch.bfloat16)
    items = patches.split([token_count(grid) for grid in grids])
    alone = torch.cat([model(item, torch.tensor([grid])) for item, grid in zip(items, grids, strict=True)])
    assert_sums_close(rounded, alone, STORED * model.config.num_hidden_layers, dtype=torch.bfloat16)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputing_blocks_changes_no_bit_of_the_gradients(every):
    grads = []
    for checkpoint_every in (0, every):
        model = small_encoder(num_hidden_layers=3)
        model.checkpoint_every = checkpoint_every
        model(drawn_patches(GRIDS), GRIDS).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_recomputing_blocks_keeps_fewer_tensors():
    def kept(every: int) -> int:
        model, sizes = small_encoder(num_hidden_layers=4), []
        model.checkpoint_every = every
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(drawn_patches(GRIDS), GRIDS)
        return sum(sizes)

    assert kept(1) < kept(2) < kept(0)


def test_the_encoder_draws_no_random_numbers_and_recomputing_does_not_save_the_rng_state(monkeypatch):
    model, patches = small_encoder(num_hidden_layers=3), drawn_patches(GRIDS)
    model.checkpoint_every = 1
    drops = DropConfig(patches=0.5, depth=0.5, blocks=3).of_pack(GRIDS, 0)
    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_rng_state", lambda: pytest.fail("the RNG state is saved"))
        model.train()(patches, GRIDS, drops=drops).square().sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_positions_follow_the_merge_blocks_and_repeat_over_time():
    assert grid_positions([[1, 2, 2]], 1).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    block_order = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert grid_positions([[2, 2, 4]], 2).tolist() == block_order * 2
    assert grid_positions([], 1).shape == (0, 2)
    assert grid_positions([], 1).dtype == grid_positions([[1, 2, 2]], 1).dtype == torch.int64


def test_cached_positions_are_computed_once_per_size_and_cannot_be_changed():
    _step_positions.cache_clear()
    with torch.device("meta"):
        first = grid_positions([[1, 3, 5]], 1)
    wanted = first.tolist()
    first += 1
    assert grid_positions([[1, 3, 5], [2, 3, 5]], 1).tolist() == wanted * 3
    assert _step_positions.cache_info().misses == 1
    assert _step_positions.cache_info().maxsize is not None
    with pytest.raises(ValueError, match="read-only"):
        _step_positions(3, 5, 1)[0] = 7


def test_initial_weights_are_small_and_layer_scale_starts_at_initializer_factor():
    model = small_encoder(initializer_factor=0.25)
    for name, parameter in model.named_parameters():
        if name.endswith(("ls1", "ls2")):
            assert (parameter == 0.25).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0 < parameter.std() < 0.2, name


def test_patches_that_do_not_match_the_grids_are_a_bug_and_raise():
    with pytest.raises(ValueError, match="3 patches, the grids take 4"):
        small_encoder()(drawn_patches([[1, 1, 3]]), [[1, 2, 2]])
