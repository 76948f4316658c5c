"""Selective activation checkpointing changes no bit, and what it keeps and recomputes."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bench_recompute import TOKENS, counted
from tests.unit.model.made import drawn_patches, small_config, small_encoder
from univitar_ds.kernels.dispatch import compile_on_cpu
from univitar_ds.model.blocks import recompute
from univitar_ds.model.blocks.activations import (
    LADDER,
    bytes_of_block,
    bytes_of_pack,
    bytes_per_token,
    least_recomputation,
)
from univitar_ds.model.blocks.dropping import DropConfig
from univitar_ds.model.config import PRESETS

GRIDS = [[1, 4, 6], [1, 2, 2], [2, 3, 3]]


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_kind_of_recomputation_changes_a_bit_of_the_gradients(dropping, dtype):
    drops = DropConfig(patches=0.5, depth=0.5, blocks=3).of_pack(GRIDS, 0) if dropping else None
    grads = {}
    for kind in LADDER:
        model, patches = small_encoder(num_hidden_layers=3).to(dtype), drawn_patches(GRIDS).requires_grad_()
        model.checkpoint_every = kind
        model(patches, GRIDS, drops=drops).float().square().sum().backward()
        grads[kind] = [patches.grad, *(parameter.grad for parameter in model.parameters())]
    for kind in LADDER:
        assert all(torch.equal(a, b) for a, b in zip(grads[kind], grads[0], strict=True)), kind


class Operations(TorchDispatchMode):
    """Counts the calls of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.calls[operation.name()] += 1
        return operation(*args, **kwargs or {})


def calls(kind) -> Counter:
    model = small_encoder(num_hidden_layers=3)
    model.checkpoint_every = kind
    with Operations() as operations:
        model(drawn_patches(GRIDS), GRIDS).square().sum().backward()
    return operations.calls


def test_selective_computes_no_product_and_no_attention_again_but_norms_and_gates():
    plain, selective, whole = (calls(kind) for kind in (0, "selective", 1))
    kept = {name for name in plain if name in recompute.KEPT}
    assert {"aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= kept
    for name in kept:
        assert selective[name] == plain[name], name
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert whole[attention] == 2 * plain[attention]
    for name in ("aten::rsqrt", "aten::sigmoid", "aten::silu"):
        assert selective[name] == whole[name], name
    assert selective["aten::rsqrt"] > plain["aten::rsqrt"] > 0


def test_every_kept_operation_of_torch_exists():
    """A name that is wrong would be computed again without a word."""
    import torch.nn.attention.varlen

    for name in recompute.KEPT:
        space, _, operation = name.partition("::")
        if not space.startswith("flash_attn"):  # of packages that are not installed here
            assert hasattr(getattr(torch.ops, space), operation), name


def test_a_kept_result_is_freed_by_the_backward_pass():
    model = small_encoder(num_hidden_layers=2)
    model.checkpoint_every = "selective"
    made = []
    keep = recompute._contexts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "_contexts", lambda: made.append(keep()) or made[-1])
        output = model(drawn_patches(GRIDS), GRIDS)
        results = [first.results for first, _ in made]
        assert all(sum(map(len, one.values())) >= 6 for one in results), "five products and attention of a block"
        output.sum().backward()
    assert [sum(map(len, one.values())) for one in results] == [0, 0]


def test_a_second_pass_with_more_products_than_the_first_is_an_error_with_a_remedy():
    first, second = recompute._contexts()
    x, y = torch.eye(2), torch.ones(2, 2)
    with first:
        product = x @ y
    with second:
        assert (x @ y).data_ptr() == product.data_ptr(), "computed again"
        with pytest.raises(RuntimeError, match=r"calls aten.mm.default more often.*Set checkpoint_every: 1"):
            x @ y


@pytest.mark.slow
def test_the_bytes_that_the_choice_counts_with_are_those_of_the_tensors():
    """But for one copy of the attention's result, which a CPU makes of the results of single items."""
    compile_on_cpu(True)
    try:
        for kind in LADDER:
            (less, _), (more, _) = (counted(config_of(layers), kind) for layers in (2, 4))
            config, copies = config_of(4), {0: 1, 2: 0.5}.get(kind, 0)
            predicted = bytes_per_token(config, kind, width=2) / 4 + copies * 2 * config.hidden_size
            assert (more - less) / 2 / TOKENS == predicted, kind
    finally:
        compile_on_cpu(False)


def config_of(layers: int):
    return small_config(hidden_size=128, num_attention_heads=2, intermediate_size=384, num_hidden_layers=layers)


def test_kinds_keep_less_and_less():
    for config in (PRESETS[size] for size in ("0.3b", "0.6b", "1b")):
        kept = [bytes_per_token(config, kind, width=2) for kind in LADDER]
        assert kept == sorted(kept, reverse=True)
        assert bytes_per_token(config, 3, width=2) > bytes_per_token(config, "selective", width=2)
        assert bytes_of_pack(config, 0, 100, width=2) == 100 * kept[0]
        assert bytes_of_pack(config, 1, 100, width=2) == 100 * (kept[-1] + bytes_of_block(config, width=2))


@pytest.mark.parametrize(
    ("size", "free", "kind"),
    [("0.3b", 60, 0), ("0.6b", 60, 0), ("1b", 60, "selective"), ("1b", 46, 2), ("1b", 10, 1), ("1b", 1, 1)],
)
def test_the_least_recomputation_that_fits_is_chosen(size, free, kind):
    assert least_recomputation(PRESETS[size], 32_768, free * 1e9, width=2) == kind
