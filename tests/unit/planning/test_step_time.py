"""The predicted step, compared with counts on a CPU: launches, bytes, FLOPs and collectives."""

import json
import sys
from dataclasses import replace

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.support.launches import block_launches, kept_bytes
from tests.support.paths import ROOT
from tests.support.progress import run_watched
from tests.unit.model.made import drawn_patches, small_encoder
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.model import TextConfig
from univitar_ds.planning import gpus, step_time
from univitar_ds.planning.gpus import GPUS, known_gpu
from univitar_ds.planning.step_time import Method, Work, predict

SHAPES = [EncoderConfig(64, 1, 2, 192), EncoderConfig(96, 1, 2, 192), EncoderConfig(64, 1, 2, 384)]
FAST = Method(
    zero=2,
    host_ratio={8: 1.0, 1024: 1.0},
    update_collectives=10,
    recompute_by_memory=True,
    kept_packs=1,
    ring=False,
    loss_kernels=8,
    teacher_by_size=False,
    packed_text=True,
    imbalance=1.0,
    fused_host=0.0,
)


def work(**changes) -> Work:
    text = TextConfig(hidden_size=1024, layers=12, heads=16, intermediate_size=4096, context_length=64)
    encoder = EncoderConfig(1280, 32, 16, 5184)
    given = {"name": "w", "encoder": encoder, "text": text, "embed_dim": 1024, "parameters": 840_000_000}
    given |= {"token_budget": 32768, "tokens_per_item": 1024, "attended": 1500, "sizes": 24, "lanes": 256}
    return Work(**{**given, "checkpoint_every": 1, **changes})


@pytest.mark.parametrize(("tensor", "sequence"), [(2, 1), (1, 2), (2, 4)])
def test_ranks_that_share_packs_or_weights_compute_their_part_and_wait_for_each_other(tensor, sequence):
    gpu = GPUS["H100"]
    alone = predict(work(lanes=64), gpu, 64, FAST)
    shared = predict(work(lanes=64), gpu, 64 * tensor * sequence, replace(FAST, tensor=tensor, sequence=sequence))
    ratio = tensor * sequence
    assert shared.flops * ratio == pytest.approx(alone.flops)
    assert shared.parts["attention"] * ratio == pytest.approx(alone.parts["attention"])
    assert shared.parts["token-wise"] * sequence == pytest.approx(alone.parts["token-wise"])
    assert shared.parts["sharing"] > 0
    assert "sharing" not in alone.parts
    slow = replace(gpu, node_link=replace(gpu.node_link, value=gpu.node_link.value / 2))
    waits = predict(work(lanes=64), slow, 64 * ratio, replace(FAST, tensor=tensor, sequence=sequence)).parts["sharing"]
    assert 1 < waits / shared.parts["sharing"] < 2


@pytest.mark.parametrize("config", SHAPES)
def test_launches_of_a_block_are_those_of_the_real_one(monkeypatch, config):
    forward, backward = block_launches(monkeypatch, config, 64)
    assert dict(forward.counts) == step_time.FORWARD_LAUNCHES
    assert dict(backward.counts) == step_time.BACKWARD_LAUNCHES


@pytest.mark.parametrize("config", SHAPES)
def test_bytes_per_token_are_those_of_the_tensors_that_the_kernels_get(monkeypatch, config):
    """The difference of two numbers of tokens leaves out weights and partial sums."""
    few, many = block_launches(monkeypatch, config, 4096), block_launches(monkeypatch, config, 8192)
    moved = [
        sum(after.sizes[kind] - before.sizes[kind] for kind in ("fused", "other")) / 4096
        for before, after in zip(few, many, strict=True)
    ]
    assert moved == [step_time.forward_bytes(config), step_time.backward_bytes(config)]


@pytest.mark.parametrize("config", SHAPES)
def test_a_block_keeps_the_stated_bytes_for_its_backward_pass(monkeypatch, config):
    few, many = (kept_bytes(monkeypatch, config, tokens) for tokens in (512, 1024))
    assert (many - few) / 512 == step_time.kept_bytes(config)


def test_flops_of_a_pack_are_what_torch_counts_forward_and_backward():
    model = small_encoder(num_hidden_layers=3, num_attention_heads=2)
    grids = [[1, 4, 6]] * 3
    patches = drawn_patches(grids).requires_grad_()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(patches, grids).sum().backward()
    pack = work(encoder=model.config, token_budget=72, tokens_per_item=24, attended=24)
    assert pack.flops == counter.get_total_flops()


@pytest.mark.slow
def test_bytes_of_collectives_are_those_of_the_engine_in_a_fake_process_group():
    command = [sys.executable, "-m", "tests.support.fake_world", "16", "2"]
    done = run_watched(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    for zero in (1, 2, 3):
        for kind, size in step_time.step_bytes(8 * 256 * 256, zero, passes=2, backwards=2).items():
            assert size <= counted[str(zero)][kind] <= size + 64, (zero, kind)  # norms and flags are a few bytes


def test_parts_add_up_and_peak_flops_are_never_reached():
    for gpu in GPUS.values():
        for ranks in (1, 8, 256, 1024):
            step = predict(work(), gpu, ranks, FAST)
            assert step.seconds == sum(step.parts.values())
            assert all(seconds >= 0 for seconds in step.parts.values())
            assert 0 < step.mfu < gpu.products.value / gpu.peak.value
            assert step.tokens == max(256, ranks) // ranks * 32768


def test_a_step_on_more_gpus_takes_less_time_until_each_has_one_pack():
    times = [predict(work(), GPUS["H100"], ranks, FAST).seconds for ranks in (8, 64, 256)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(
    "fault",
    [
        {"ring": True},
        {"teacher_by_size": True, "sizes": 100},
        {"recompute_by_memory": False},
        {"imbalance": 1.3},
        {"host_ratio": {8: 20.0}},
        {"packed_text": False},
    ],
)
def test_each_inefficiency_of_a_step_costs_time(fault):
    pack = work(tokens_per_item=128, sizes=fault.pop("sizes", 24))
    good = predict(pack, GPUS["H100"], 256, FAST).seconds
    assert predict(pack, GPUS["H100"], 256, replace(FAST, **fault)).seconds > 1.01 * good


def test_packs_whose_graph_is_kept_run_once():
    """Of four packs of a rank three run twice, or all four."""
    kept, none = (predict(work(), GPUS["H100"], 64, replace(FAST, kept_packs=k)).parts["GradCache"] for k in (1, 0))
    assert round(none / kept, 9) == round(4 / 3, 9)
    assert predict(work(), GPUS["H100"], 256, FAST).parts["GradCache"] == 0


def test_zero_3_moves_more_than_zero_2():
    slow = replace(GPUS["H100"], network=replace(GPUS["H100"].network, value=1e8))
    two, three = (predict(work(), slow, 256, replace(FAST, zero=zero)).parts["collectives"] for zero in (2, 3))
    assert three >= two > 0
    assert predict(work(), slow, 1, FAST).parts["collectives"] == 0


def test_blocks_are_recomputed_only_as_far_as_memory_demands():
    share = step_time.recomputed_share
    assert share(work(), GPUS["H200"], 256, FAST) == 0
    tight = share(work(token_budget=65536), GPUS["H100"], 256, FAST)
    assert 0 < tight < 1
    assert share(work(token_budget=131072), GPUS["H100"], 256, FAST) > tight
    assert share(work(checkpoint_every=2), GPUS["H100"], 256, replace(FAST, recompute_by_memory=False)) == 0.5


def test_host_ratios_between_measured_ones_are_interpolated_linearly():
    ratio = step_time._ratio
    assert [ratio({8: 2.0, 16: 4.0}, ranks) for ranks in (1, 8, 12, 16, 32)] == [2.0, 2.0, 3.0, 4.0, 8.0]


def test_attention_takes_more_time_per_flop_on_every_gpu():
    for gpu in GPUS.values():
        assert 1.2 < step_time.attention_weight(work().encoder, gpu) < 3


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_gpus_are_known_by_the_name_that_the_driver_reports(reported, name):
    assert known_gpu(reported) == name


def test_every_assumption_has_a_source():
    named = [*step_time.ASSUMPTIONS.items(), *(pair for gpu in GPUS.values() for pair in gpu.assumptions())]
    for name, one in named:
        assert one.value > 0, name
        assert one.kind in gpus.KINDS, name
        assert len(one.source) > 10, name
