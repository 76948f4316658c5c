"""Training runs on a simulated GPU: tensors are on the right device, launches are valid, only listed places wait."""

import pytest

from tests.simulated_gpu.waits import STEP_WAITS
from univitar_ds.model.config import PRESETS

pytestmark = pytest.mark.slow
LAYERS, TEACHER_LAYERS = PRESETS["tiny"].num_hidden_layers, 2
DISTILLS = {"stages.0.distill": {"kind": "linear", "start": 1.0, "end": 1.0}}
IMAGES = {"logging.tensorboard": True, "logging.images_every_steps": 1}
CASES = {
    "ZeRO 2, one rank": {"zero": 2, "ranks": 1, "packs": 2, "steps": 1},
    "ZeRO 1 of 8": {"zero": 1, "ranks": 8, "packs": 1, "steps": 1, "flash": "flash2"},
    "ZeRO 3 of 8": {
        "zero": 3, "ranks": 8, "packs": 2, "steps": 1, "flash": "flash3", "teacher": "own",
        "changes": {**DISTILLS, "optimizer.ema_decay": 0.99, "model.checkpoint_every": 1, "objective.kind": "softmax"},
    },
    "ZeRO 3 of 256": {
        "zero": 3, "ranks": 256, "packs": 1, "steps": 1, "changes": {"optimizer.ema_decay": 0.99},
    },
    "ZeRO 3 within nodes of 8": {
        "zero": 3, "ranks": 16, "packs": 2, "steps": 1,
        "changes": {"deepspeed": "zero3_node", "objective.kind": "classification"},
    },
    "ZeRO 2 of 256": {
        "zero": 2, "ranks": 256, "packs": 1, "steps": 1, "flash": "flash4", "teacher": "dinov2",
        "changes": {**DISTILLS, **IMAGES},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(trained):
    return dict(zip(CASES, trained(list(CASES.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_the_device_only_at_the_listed_places(runs, name):
    step = runs[name]["step"]
    counts = {"step": 1, "pack": CASES[name]["packs"], "collective": sum(step["collectives"].values())}
    for place, times in step["waits"].items():
        assert place in STEP_WAITS, f"a new wait, {times} times a step: {place}; remove it, or list it in waits.py"
        wait = STEP_WAITS[place]
        limit = wait.most * counts[wait.per]
        assert times <= limit, f"{place}: {times} waits instead of at most {limit} ({wait.reason})"


@pytest.mark.parametrize("name", CASES)
def test_every_pack_goes_through_the_fused_kernels_as_often_as_the_step_needs(runs, name):
    """The forward kernels of a block run twice for a pack, or once if the pack keeps its graph or the objective is
    classification. They run once more if the block is recomputed, and once in each block of a teacher of kind "own"."""
    case, launches = CASES[name], runs[name]["step"]["launches"]
    changes = case.get("changes", {})
    alone = changes.get("objective.kind") == "classification"
    passes = case["packs"] if alone else 2 * case["packs"] - 1  # the first steps of a stage keep the graph of one pack
    recomputed = case["packs"] if changes.get("model.checkpoint_every") else 0
    taught = case["packs"] if case.get("teacher") == "own" else 0
    for kernel in ("rope2d_qk_norm", "swiglu_norm", "add_norm"):
        expected = LAYERS * (passes + recomputed) + TEACHER_LAYERS * taught
        assert launches[f"{kernel}.forward_kernel"] == expected, kernel
        assert launches[f"{kernel}.backward_kernel"] == LAYERS * case["packs"], kernel
    assert launches["patch_embed.embed_kernel"] == passes + taught


@pytest.mark.parametrize("name", CASES)
def test_attention_runs_on_the_back_end_that_is_installed(runs, name):
    case, launches = CASES[name], runs[name]["step"]["launches"]
    flash = case.get("flash")
    forward, backward = (
        (f"{flash}.forward", f"{flash}.backward") if flash else ("_varlen_attn", "_varlen_attn_backward")
    )
    assert launches[backward] >= LAYERS * case["packs"]
    assert launches[forward] >= launches[backward]
    assert flash is None or "_varlen_attn" not in launches


def test_one_rank_gathers_nothing(runs):
    assert "allgather_base" not in runs["ZeRO 2, one rank"]["step"]["collectives"]
    assert "allgather_base" in runs["ZeRO 3 of 8"]["step"]["collectives"]


def test_a_run_saves_a_checkpoint_and_logs_metrics(runs):
    run = runs["ZeRO 2, one rank"]
    assert {"manifest.json", "rank00000.safetensors", "state.json"} <= set(run["checkpoint"])
    assert {"loss", "grad_norm", "grad_norm_text", "mfu_pct"} <= set(run["metrics"])
    assert {"loss_distill_patch", "teacher_agreement"} <= set(runs["ZeRO 2 of 256"]["metrics"])


def test_the_engine_on_8_ranks_with_zero_1_needs_less_memory_than_on_one_rank(runs):
    bytes_of = {name: sum(run["build"]["peak"].values()) for name, run in runs.items()}
    assert bytes_of["ZeRO 1 of 8"] < 0.6 * bytes_of["ZeRO 2, one rank"]
