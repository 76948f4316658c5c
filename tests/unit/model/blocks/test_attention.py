"""Packed attention against the softmax formula, and the choice of the back end."""

import inspect
import re
import sys
from types import ModuleType

import pytest
import torch

from tests.support.closeness import assert_sums_close
from univitar_ds.errors import ConfigError
from univitar_ds.model.blocks import attention as module
from univitar_ds.model.blocks.attention import CuSeqlens, Gpu, attention, choose_backend, select

CPU = torch.device("cpu")


def dense(q, k, v, queries, keys, causal=False):
    outputs, a, b = [], 0, 0
    for m, n in zip(queries, keys, strict=True):
        scores = torch.einsum("qhk,thk->hqt", q[a : a + m], k[b : b + n]) * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones(m, n, dtype=torch.bool).triu(1), -torch.inf)
        outputs.append(torch.einsum("hqt,thk->qhk", scores.softmax(-1), v[b : b + n]))
        a, b = a + m, b + n
    return torch.cat(outputs).flatten(1)


@pytest.mark.numeric
@pytest.mark.parametrize("width", [64, 80, 120])
@pytest.mark.parametrize(
    ("queries", "causal"),
    [((5, 1, 7), False), ((5, 1, 7), True), ((1, 1, 1), False)],
    ids=["self", "causal", "pool"],
)
def test_values_and_gradients_equal_the_formula(width, queries, causal):
    keys = (5, 1, 7)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(sum(lengths), 2, width, dtype=torch.float64, generator=generator, requires_grad=True)
        for lengths in (queries, keys, keys)
    ]
    result = attention(*drawn, CuSeqlens.of(queries, CPU), CuSeqlens.of(keys, CPU), causal=causal)
    wanted = dense(*drawn, queries, keys, causal)
    assert_sums_close(result, wanted, width + 7)
    upstream = torch.randn(result.shape, dtype=torch.float64, generator=generator)
    for mine, exact in zip(
        torch.autograd.grad(result, drawn, upstream), torch.autograd.grad(wanted, drawn, upstream), strict=True
    ):
        assert_sums_close(mine, exact, 2 * (width + 7))


def test_spans_keep_lengths_on_the_host_and_bounds_as_int32():
    spans = CuSeqlens.of([3, 5, 1], CPU)
    assert (spans.lengths, spans.max_length) == ((3, 5, 1), 5)
    assert spans.cu_seqlens.tolist() == [0, 3, 8, 9]
    assert spans.cu_seqlens.dtype == torch.int32
    assert CuSeqlens.of([], CPU).max_length == 0


HOPPER, BLACKWELL, AMPERE, VOLTA, DESKTOP = (
    Gpu(capability, name)
    for capability, name in (
        ((9, 0), "NVIDIA H100"),
        ((10, 0), "NVIDIA B200"),
        ((8, 0), "NVIDIA A100-SXM4-80GB"),
        ((7, 0), "Tesla V100"),
        ((12, 0), "NVIDIA RTX PRO 6000"),
    )
)
BF16 = torch.bfloat16


# The signatures of flash_attn_varlen_func as they are published, by the names and the order of their parameters:
# flash-attn 2.8 (flash_attn/flash_attn_interface.py), 3 (hopper/flash_attn_interface.py) and flash-attn-4 4.0.0b36
# (flash_attn/cute/interface.py). 4 has other things between the tensors and the bounds, and returns a pair.


def version_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    return packed_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic, causal)


def version_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    return packed_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic, causal)


def version_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    return packed_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic, causal), None


def packed_kernel(q, k, v, bounds_q, bounds_k, longest_q, longest_k, deterministic=False, causal=False):
    """What a packed kernel computes from its arguments."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    lengths_q, lengths_k = bounds_q.diff().tolist(), bounds_k.diff().tolist()
    assert (longest_q, longest_k) == (max(lengths_q), max(lengths_k))
    assert all(type(length) is int for length in (longest_q, longest_k))
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    return dense(q, k, v, lengths_q, lengths_k, causal).view_as(q)


def torchs_own(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
    assert window_size in ((-1, -1), (-1, 0)), "all tokens, or those up to itself"
    return packed_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=window_size == (-1, 0))


PACKED = {"flash2": version_2, "flash3": version_3, "flash4": version_4, "varlen": torchs_own}
MODULES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}


@pytest.fixture
def install(monkeypatch):
    """Puts stand-ins of packages in the place of the real ones, or of nothing."""
    for name in ("flash_attn", *MODULES.values()):
        monkeypatch.setitem(sys.modules, name, None)

    def put(*names):
        if {"flash2", "flash4"} & set(names):  # the folder both share
            monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        for name in names:
            module = sys.modules[MODULES[name]] or ModuleType(MODULES[name])
            module.flash_attn_varlen_func = PACKED[name]
            monkeypatch.setitem(sys.modules, MODULES[name], module)

    return put


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("width", [64, 80, 120])
@pytest.mark.parametrize("causal", [False, True])
def test_a_packed_back_end_gets_the_bounds_of_the_items(name, width, causal, install, monkeypatch):
    if name == "varlen":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torchs_own)
    else:
        install(name)
    monkeypatch.setattr(module, "choose_backend", lambda *_: name)
    keys = (5, 1, 7)
    queries = keys if causal else (1, 1, 1)
    q, k, v = (torch.randn(sum(lengths), 2, width) for lengths in (queries, keys, keys))
    result = attention(q, k, v, CuSeqlens.of(queries, CPU), CuSeqlens.of(keys, CPU), name, causal=causal)
    assert torch.equal(result, dense(q, k, v, queries, keys, causal))


def test_torchs_own_has_the_parameters_it_is_given():
    from torch.nn.attention.varlen import varlen_attn

    parameters = list(inspect.signature(varlen_attn).parameters)
    assert parameters[:7] == list(inspect.signature(torchs_own).parameters)[:7]
    assert "window_size" in parameters


@pytest.mark.parametrize("width", [64, 80, 120])
@pytest.mark.parametrize(
    ("installed", "gpu", "chosen"),
    [
        ((), HOPPER, "varlen"),
        (("flash2",), HOPPER, "flash2"),
        (("flash2", "flash3", "flash4"), AMPERE, "flash2"),
        (("flash2", "flash3", "flash4"), HOPPER, "flash3"),
        (("flash2", "flash4"), HOPPER, "flash4"),
        (("flash2", "flash3", "flash4"), BLACKWELL, "flash4"),
        (("flash4",), BLACKWELL, "flash4"),
    ],
)
def test_auto_chooses_the_flash_attn_made_for_the_gpu_then_torchs_own(installed, gpu, chosen, width, install):
    install(*installed)
    assert select("auto", "cuda", gpu, BF16, width)[0] == chosen
    if installed:
        assert select("flash", "cuda", gpu, BF16, width)[0] == chosen


def test_auto_is_item_by_item_where_no_packed_kernel_can_run(install):
    install("flash2")
    assert choose_backend("auto", CPU, BF16, 64) == "sdpa"
    assert select("auto", "cuda", HOPPER, torch.float32, 64)[0] == "sdpa"
    assert select("auto", "cuda", VOLTA, torch.float16, 64)[0] == "sdpa"


def test_heads_that_a_back_end_does_not_support_are_computed_by_the_next(install):
    install("flash2", "flash4")
    assert select("auto", "cuda", BLACKWELL, BF16, 136)[0] == "flash2"
    assert select("auto", "cuda", HOPPER, BF16, 136)[0] == "flash4"
    assert select("auto", "cuda", HOPPER, BF16, 20)[0] == "flash2"
    assert select("auto", "cuda", HOPPER, BF16, 264)[0] == "sdpa"


@pytest.mark.parametrize(
    ("backend", "help"),
    [
        ("flash2", "pip install flash-attn --no-build-isolation"),
        ("flash3", "hopper/ of github.com/Dao-AILab/flash-attention"),
        ("flash4", "pip install --pre flash-attn-4"),
        ("flash", "pip install flash-attn --no-build-isolation"),
    ],
)
def test_the_error_for_a_missing_back_end_has_its_installation(backend, help, install):
    with pytest.raises(ConfigError, match=f"attention {backend} cannot run on cuda .* is not installed") as raised:
        select(backend, "cuda", HOPPER, BF16, 64)
    assert help in str(raised.value)
    assert "Usable here: varlen, sdpa" in str(raised.value)


def test_the_folder_that_versions_2_and_4_share_is_not_taken_for_version_2(install):
    install("flash4")
    assert select("auto", "cuda", BLACKWELL, BF16, 64)[0] == "flash4"
    with pytest.raises(ConfigError, match="flash2 is not installed"):
        select("flash2", "cuda", BLACKWELL, BF16, 64)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
@pytest.mark.parametrize("wanted", ["flash4", "flash"])
def test_flash_attn_4_is_refused_where_its_backward_cannot_run(capability, wanted, install):
    """As flash-attn-4 4.0.0b36 asserts in `_flash_attn_bwd`; its forward runs there."""
    install("flash4")
    gpu = Gpu(capability, "NVIDIA A100-SXM4-80GB")
    assert select("auto", "cuda", gpu, BF16, 64)[0] == "varlen"
    with pytest.raises(ConfigError) as raised:
        select(wanted, "cuda", gpu, BF16, 64)
    said = str(raised.value)
    dotted = f"{capability[0]}.{capability[1]}"
    assert f"flash4 has no backward pass on NVIDIA A100-SXM4-80GB (compute capability {dotted}), only from" in said
    assert "compute capability 9.0 on (use flash2: pip install flash-attn" in said
    assert "Usable here: varlen, sdpa, or auto" in said


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_steps_refuse_flash_attn_4_only_where_it_cannot_repeat_its_bits(deterministic, install):
    install("flash4")
    for gpu in (HOPPER, BLACKWELL):
        assert select("auto", "cuda", gpu, BF16, 64, deterministic=deterministic)[0] == "flash4"
    chosen, reason = select("auto", "cuda", DESKTOP, BF16, 64, deterministic=deterministic)
    assert chosen == ("varlen" if deterministic else "flash4")
    if deterministic:
        sentence = r"flash4 has no deterministic backward pass on NVIDIA RTX PRO 6000 \(compute capability 12.0\)"
        assert re.search(sentence, reason)
        with pytest.raises(ConfigError, match=f"{sentence} .*set deterministic: false"):
            select("flash4", "cuda", DESKTOP, BF16, 64, deterministic=True)


def test_the_gpu_and_torchs_setting_decide(install, monkeypatch):
    """Not one choice for all settings of a process: a run may set them after a choice was made."""
    install("flash4")
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX PRO 6000")
    module._gpu.cache_clear()
    try:
        assert choose_backend("auto", device, BF16, 72) == "flash4"
        torch.use_deterministic_algorithms(True)
        assert choose_backend("auto", device, BF16, 72) == "varlen"
        with pytest.raises(ConfigError, match="RTX PRO 6000"):
            choose_backend("flash4", device, BF16, 72)
    finally:
        torch.use_deterministic_algorithms(False)
        module._gpu.cache_clear()


def test_a_package_that_is_broken_is_not_called_missing(monkeypatch, install):
    def fail(name):
        raise ImportError("libcudart.so.11.0: cannot open shared object file")

    monkeypatch.setattr(module.importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=r"flash3 does not import \(libcudart"):
        select("flash3", "cuda", HOPPER, BF16, 64)


@pytest.mark.parametrize("backend", ["flash", "flash3", "varlen"])
def test_a_back_end_that_cannot_run_here_is_refused(backend):
    with pytest.raises(ConfigError, match=f"model.attention {backend} cannot run on cpu in float32.*Usable here: sdpa"):
        choose_backend(backend, CPU, torch.float32, 64)


def test_the_choice_is_logged_once_with_its_reason(caplog):
    with caplog.at_level("INFO"):
        module._report.cache_clear()
        for width in (104, 104, 112):  # widths that no other test has
            choose_backend("auto", CPU, BF16, width)
    assert caplog.messages == ["attention on cpu in bfloat16: sdpa (the others need a GPU)"]
