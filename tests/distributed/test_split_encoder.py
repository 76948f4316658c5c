"""An encoder whose packs or weights are split over ranks has the outputs and gradients of the whole encoder."""

import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.bench_recompute import GRIDS as PACK
from benchmarks.bench_recompute import TOKENS, Counter
from tests.support.closeness import assert_all_close, assert_sums_close, encoder_terms, gradient_terms
from tests.support.distributed import run_distributed
from tests.support.golden import CASES, golden
from tests.support.launches import kept_bytes
from univitar_ds import UniViTAR
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.formats.distributed.megatron import load_slices, write
from univitar_ds.formats.recognise import open_stored
from univitar_ds.geometry import token_count
from univitar_ds.model.blocks import activations
from univitar_ds.model.blocks.dropping import DropConfig
from univitar_ds.model.blocks.rank_group import RankGroup, sharing_bytes, sharing_collectives
from univitar_ds.model.blocks.sequence_parallel import owned_items
from univitar_ds.model.blocks.tensor_parallel import split_encoder
from univitar_ds.model.from_stored import build_encoder
from univitar_ds.planning import memory
from univitar_ds.training.distributed.process_group import start_world

pytestmark = pytest.mark.distributed
WIDTH, LAYERS = 96, 2
GRIDS = [[1, 2, 4], [3, 4, 6], [1, 2, 2], [2, 2, 6]]
"""Grids of the items. The second item has 72 of 108 tokens, so that more than two of four ranks share it."""
FRAMES = [1, 6, 1, 4]
DROPS = DropConfig(patches=0.3, depth=0.4, blocks=LAYERS, merge=1, seed=3, step=5)
KINDS = (0, 1, "selective")


def encoder(heads: int, *, every=0) -> UniViTAR:
    shape = EncoderConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        intermediate_size=72,
        qkv_bias=True,
        initializer_factor=0.7,
    )
    with torch.random.fork_rng():
        torch.manual_seed(heads)
        model = UniViTAR(shape, checkpoint_every=every)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def pixels(grids, frames) -> torch.Tensor:
    size = sum(588 * count * h * w for count, (_, h, w) in zip(frames, grids, strict=True))
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def weights_of_loss(grids, drops) -> torch.Tensor:
    lengths = [token_count(grid) for grid in grids] if drops is None else drops.lengths
    return torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(2))


def results(model, grids, frames, drops):
    """The tokens that `forward` returns, and the gradients of a weighted sum of all tokens of the pack."""
    tokens = model(pixels(grids, frames), grids, frames=frames, drops=drops)
    lengths = [token_count(grid) for grid in grids] if drops is None else list(drops.lengths)
    first, end = owned_items(grids, model.sequence.size)[model.sequence.rank]
    begin = sum(lengths[:first])
    own = weights_of_loss(grids, drops)[begin : begin + sum(lengths[first:end])]
    assert list(model.lengths(grids, drops)) == lengths[first:end]
    (tokens * own).sum().backward()
    return tokens.detach(), {name: p.grad for name, p in model.named_parameters()}


def summed(gradients: list[dict]) -> dict:
    return {name: torch.stack([one[name] for one in gradients]).sum(0) for name in gradients[0]}


def joined(parts: list[dict]) -> dict:
    """Whole tensors from (slice, tensor) of each rank. Without a slice, all ranks must have equal tensors."""
    found = {}
    for name, (part, tensor) in parts[0].items():
        if part is None:
            assert all(torch.equal(tensor, other[name][1]) for other in parts), name
            found[name] = tensor
            continue
        found[name] = torch.full((tensor.numel() * part.count,), torch.nan)
        for one, values in (other[name] for other in parts):
            one.put(values, found[name])
    return found


def with_slices(model) -> dict:
    return {name: (getattr(p, "slice", None), p.grad) for name, p in model.named_parameters()}


def assert_gradients_close(found: dict, wanted: dict, terms: float) -> None:
    """The K part of the qkv bias has no gradient but rounding errors."""
    assert_all_close({n: found[n].view(g.shape) for n, g in wanted.items()}, wanted, terms)


CASES_OF_SPLIT = {
    "4 heads": (4, GRIDS, FRAMES, None),
    "24 heads, dropped tokens and branches": (24, GRIDS, FRAMES, 7),
    "one item": (24, [[4, 3, 3]], [8], None),
    "fewer tokens than ranks": (24, [[1, 1, 1]], [1], None),
    "no item": (24, [], [], None),
}


def drops_of(grids, lane):
    return None if lane is None else DROPS.of_pack(grids, lane)


@contextmanager
def counted(sent: list[int]):
    """Appends to `sent` the bytes that a rank sends in each collective."""
    reduce, exchange = dist.all_reduce, dist.all_to_all_single

    def all_reduce(tensor, *given, group=None, **options):
        ranks = dist.get_world_size(group)
        sent.append(2 * tensor.nbytes * (ranks - 1) // ranks)
        return reduce(tensor, *given, group=group, **options)

    def all_to_all_single(out, tensor, received, to, *, group=None):
        sent.append(tensor.nbytes - to[dist.get_rank(group)] * tensor.shape[1])
        return exchange(out, tensor, received, to, group=group)

    dist.all_reduce, dist.all_to_all_single = all_reduce, all_to_all_single
    try:
        yield
    finally:
        dist.all_reduce, dist.all_to_all_single = reduce, exchange


def split_packs():
    world = start_world()
    group = RankGroup(world.rank, world.size, dist.group.WORLD)
    found = {}
    for case, (heads, grids, frames, lane) in CASES_OF_SPLIT.items():
        for every in KINDS:
            model = encoder(heads, every=every)
            model.sequence = group
            found[case, every] = results(model, grids, frames, drops_of(grids, lane))
    model, sent = encoder(24), []
    model.sequence = group
    with counted(sent):
        results(model, *EVEN, None)
    del sent[2 * LAYERS : 2 * LAYERS + 2]  # tokens to the owners of the items, and their gradients
    return found, sent


EVEN = ([[1, 4, 8], [1, 4, 8]], [1, 1])
"""Two items of 32 tokens, which two and four ranks share evenly."""


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_packs_split_over_ranks_have_the_tokens_and_gradients_of_whole_packs(ranks):
    answers, sent = zip(*run_distributed(split_packs, ranks), strict=True)
    assert_sends(sent, 1, ranks, tokens=64 // ranks)
    for case, (heads, grids, frames, lane) in CASES_OF_SPLIT.items():
        whole = encoder(heads)
        tokens, gradients = results(whole, grids, frames, drops_of(grids, lane))
        forward = encoder_terms(whole.config, max(map(token_count, grids), default=1))
        for every in KINDS:
            own = [answer[case, every] for answer in answers]
            assert_sums_close(torch.cat([one for one, _ in own]), tokens, forward, f"{case}, {every}")
            found = summed([one for _, one in own])
            assert_gradients_close(found, gradients, gradient_terms(forward, max(1, len(tokens))))


def assert_sends(sent, tensor, sequence, *, tokens) -> None:
    """Checks that the collectives of the blocks, forward and backward, and their bytes are those of the cost model."""
    shape = encoder(24).config
    for one in sent:
        assert len(one) == 2 * sharing_collectives(shape, tensor, sequence)
        assert sum(one) == 2 * tokens * sharing_bytes(shape, tensor, sequence, number=4)


def split_weights(folders):
    """Args: folders: of checkpoints of Megatron-Core, by case."""
    world = start_world()
    group, found = RankGroup(world.rank, world.size, dist.group.WORLD), {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warnings of libraries that are imported
        for case in CASES:
            for every in KINDS:
                numbers = golden(case)
                model = build_encoder(open_stored(folders[case]), checkpoint_every=every)
                split_encoder(model, group)
                assert_has_slices(model, load_slices(folders[case], world.rank, world.size))
                output = model(numbers.pixel_values, numbers.grid_thw)
                ((output * numbers.loss_weight).sum() / output.numel()).backward()
                found[case, every] = output.detach(), with_slices(model), list(model.state_dict())
        model, sent = encoder(24), []
        split_encoder(model, group)
        with counted(sent):
            results(model, *EVEN, None)
    return found, sent


def assert_has_slices(model, slices) -> None:
    """Checks that the weights of a rank are its slices of a checkpoint, in which rows of attn.qkv are ordered by
    head."""
    heads = model.config.num_attention_heads // 2
    for name, parameter in model.named_parameters():
        wanted = slices.pop(f"vision.{name}")
        if "attn.qkv" in name:
            wanted = wanted.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        assert torch.equal(parameter, wanted), name
    assert not slices


@pytest.mark.numeric
def test_weights_split_over_ranks_have_the_tokens_and_gradients_of_the_release(tmp_path):
    folders = {case: tmp_path / case for case in CASES}
    for case, folder in folders.items():
        write(open_stored(golden(case).folder), folder)
    answers, sent = zip(*run_distributed(split_weights, 2, folders), strict=True)
    assert_sends(sent, 2, 1, tokens=64)
    for case in CASES:
        numbers = golden(case)
        for every in KINDS:
            own = [answer[case, every] for answer in answers]
            for output, _, names in own:
                assert_sums_close(output, numbers.last_hidden_state, numbers.terms)
                assert names == list(UniViTAR.from_pretrained(numbers.folder).state_dict())
            assert_gradients_close(joined([one for _, one, _ in own]), numbers.grads, numbers.gradient_terms)


def split_both():
    world = start_world()
    tensor, sequence = world.rank % 2, world.rank // 2
    pairs = {ranks: dist.new_group(list(ranks)) for ranks in ((0, 1), (2, 3), (0, 2), (1, 3))}
    own = {ranks: group for ranks, group in pairs.items() if world.rank in ranks}
    model = encoder(24, every="selective")
    split_encoder(model, RankGroup(tensor, 2, own[2 * sequence, 2 * sequence + 1]))
    model.sequence = RankGroup(sequence, 2, own[tensor, tensor + 2])
    tokens, _ = results(model, GRIDS, FRAMES, drops_of(GRIDS, 7))
    return tokens, with_slices(model)


@pytest.mark.slow
def test_weights_and_packs_can_be_split_together():
    answers = run_distributed(split_both, 4)
    whole = encoder(24)
    tokens, gradients = results(whole, GRIDS, FRAMES, drops_of(GRIDS, 7))
    forward = encoder_terms(whole.config, max(map(token_count, GRIDS)))
    assert_sums_close(torch.cat([answers[0][0], answers[2][0]]), tokens, forward)
    halves = [joined([answers[first][1], answers[first + 1][1]]) for first in (0, 2)]
    assert_gradients_close(summed(halves), gradients, gradient_terms(forward, len(tokens)))


DTYPES = {2: torch.bfloat16, 4: torch.float32}
BLOCK = EncoderConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=1152)


def kept_of_a_split_block(ranks):
    """The bytes that a block of this rank keeps for a token: on this CPU by (bytes of a value, kind), and with the
    operations of a GPU by bytes of a value."""
    # In a fake group: the threads of a real one hold tensors for a moment after a collective.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    group = RankGroup(0, ranks, dist.group.WORLD)
    here, on_gpu = {}, {}
    for width, dtype in DTYPES.items():
        for kind in KINDS:
            kept = []
            for layers in (1, 2):
                model = UniViTAR(replace(BLOCK, num_hidden_layers=layers), checkpoint_every=kind)
                split_encoder(model, group)
                model.to(dtype)
                patches = torch.zeros(TOKENS, 1176, dtype=dtype)
                with Counter([*model.parameters(), patches]) as counter:
                    output = model(patches, PACK)
                    kept.append(counter.alive())
                del output
            here[width, kind] = (kept[1] - kept[0]) / TOKENS
        with pytest.MonkeyPatch.context() as patch:
            block = UniViTAR(BLOCK)
            split_encoder(block, group)
            found = kept_bytes(patch, BLOCK, TOKENS, block.encoder["layers"][0], dtype)
            on_gpu[width] = found / TOKENS
    return here, on_gpu


@pytest.mark.slow
def test_the_predicted_activations_of_a_split_block_are_those_of_its_tensors():
    """Roots of norms, a few float32 of a token, are not foreseen; nor are they of a whole block."""
    roots = 40
    for size in (2, 4):
        for here, on_gpu in run_distributed(kept_of_a_split_block, 1, size):
            for (width, kind), counted in here.items():
                seen = memory.kept_bytes(BLOCK, kind, width=width, kernels="plain", tensor=size)
                allowed = roots + 0.02 * seen if kind == 0 else 0
                assert abs(counted - seen) <= allowed, (size, width, kind)
            for width, counted in on_gpu.items():
                statistics = 4 * BLOCK.num_attention_heads / size  # of attention, which is counted without them
                seen = activations.bytes_of_block(BLOCK, width=width, tensor=size) - statistics
                assert 0 <= counted - seen <= roots, (size, width)
                whole = activations.bytes_of_block(BLOCK, width=width)
                assert (seen < whole) == (size == 4 or width == 4), "in bf16 each of two ranks keeps more than one does"
