"""Training runs on a simulated GPU: tensors are on the right device, launches are valid, only listed places wait."""

import pytest

from tests.simulated_gpu.waits import WAITS
from univitar_ds.model.config import PRESETS

pytestmark = pytest.mark.slow
LAYERS, TEACHER_LAYERS = PRESETS["tiny"].num_hidden_layers, 2
DISTILLS = {"stages.0.distill": {"kind": "linear", "start": 1.0, "end": 1.0}}
IMAGES = {"logging.tensorboard": True, "logging.images_every_steps": 1}
CASES = {
    "ZeRO 2, one rank": {
        "zero": 2, "ranks": 1, "packs": 2, "steps": 1, "resumed": 1, "changes": {"optimizer.ema_decay": 0.99},
    },
    "ZeRO 1, undone": {
        "zero": 1, "ranks": 1, "packs": 1, "steps": 3, "not_finite": [2, 3],
        "changes": {"guard.max_skipped_in_a_row": 1, "checkpoint.every_steps": 1, "optimizer.ema_decay": 0.99},
    },
    "ZeRO 3 of 8, skipped": {
        "zero": 3, "ranks": 8, "packs": 1, "steps": 2, "not_finite": [2], "changes": {"optimizer.ema_decay": 0.99},
    },
    "ZeRO 1 of 8": {"zero": 1, "ranks": 8, "packs": 1, "steps": 1, "flash": "flash2"},
    "ZeRO 3 of 8": {
        "zero": 3, "ranks": 8, "packs": 2, "steps": 2, "flash": "flash3", "teacher": "own", "evaluates": True,
        "changes": {**DISTILLS, "optimizer.ema_decay": 0.99, "model.checkpoint_every": 1, "objective.kind": "softmax"},
    },
    "ZeRO 2 of 8": {"zero": 2, "ranks": 8, "packs": 1, "steps": 1},
    "ZeRO 3, one rank": {"zero": 3, "ranks": 1, "packs": 1, "steps": 1, "resumed": 1},
    "ZeRO 1 of 256": {"zero": 1, "ranks": 256, "packs": 1, "steps": 1},
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


def evaluated_packs(record):
    """The packs of an evaluation, each of which two models embed."""
    return record["launches"]["patch_embed.embed_kernel"] // 2


@pytest.mark.parametrize("name", CASES)
def test_a_run_waits_for_the_device_only_at_the_listed_places(runs, name):
    for phase in WAITS.keys() & runs[name].keys():
        record = runs[name][phase]
        counts = {
            "phase": 1,
            "pack": evaluated_packs(record) if phase == "evaluation" else CASES[name]["packs"],
            "collective": sum(record["collectives"].values()),
            "copy": record["launches"].get("copy_", 0),
        }
        for place, times in record["waits"].items():
            assert place in WAITS[phase], f"a new wait, {times} times in {phase}: {place}; remove it, or list it"
            wait = WAITS[phase][place]
            limit = wait.most * counts[wait.per]
            assert times <= limit, f"{phase}, {place}: {times} waits instead of at most {limit} ({wait.reason})"


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
    assert run["save"]["launches"] == {"stack": 1}, "of the numbers of updates; tensors are copied and not computed"
    assert {"loss", "grad_norm", "grad_norm_text", "mfu_pct"} <= set(run["metrics"])
    assert {"loss_distill_patch", "teacher_agreement"} <= set(runs["ZeRO 2 of 256"]["metrics"])


def test_the_engine_on_8_ranks_with_zero_1_needs_less_memory_than_on_one_rank(runs):
    bytes_of = {name: sum(run["build"]["peak"].values()) for name, run in runs.items()}
    assert bytes_of["ZeRO 1 of 8"] < 0.6 * bytes_of["ZeRO 2, one rank"]


def test_a_resumed_run_copies_the_checkpoint_into_memory_that_the_engine_has(runs):
    for name in ("ZeRO 2, one rank", "ZeRO 1, undone"):
        built, load = runs[name]["build"], runs[name]["load"]
        stored = load["waits"]["copy to the device univitar_ds/formats/elastic.py:_fill"]
        assert stored == 4 * built["collectives"]["broadcast"], "weights, two moments and the average of each parameter"
        assert load["peak"]["load"] < 0.01 * load["peak"]["build"]


def test_a_skipped_update_runs_no_kernel_of_the_optimizer_or_the_average(runs):
    updates = ("_fused_adamw_", "_foreach_lerp_")
    for name in ("ZeRO 1, undone", "ZeRO 3 of 8, skipped"):
        launches = runs[name]["step"]["launches"]
        assert not [update for update in updates if update in launches], name
        assert launches["rope2d_qk_norm.backward_kernel"] == LAYERS * CASES[name]["packs"], "all ranks run it backward"
    assert set(updates) <= runs["ZeRO 2, one rank"]["step"]["launches"].keys()


def test_skipped_updates_are_events_and_one_too_many_returns_to_the_last_checkpoint(runs):
    events = {name: [event["event"] for event in run["events"]] for name, run in runs.items()}
    assert events["ZeRO 3 of 8, skipped"] == ["stage", "skipped"]
    assert events["ZeRO 1, undone"] == ["stage", "skipped", "rollback"]
    skipped, rollback = runs["ZeRO 1, undone"]["events"][1:]
    assert (skipped["step"], len(skipped["keys"])) == (2, skipped["samples"])
    assert (rollback["step"], rollback["undone_step"]) == (2, 3)


def test_an_evaluation_packs_items_runs_the_fused_kernels_and_leaves_no_memory(runs):
    run = runs["ZeRO 3 of 8"]
    launches, packs = run["evaluation"]["launches"], evaluated_packs(run["evaluation"])
    assert packs >= 1
    for kernel in ("rope2d_qk_norm", "swiglu_norm", "add_norm"):
        assert launches[f"{kernel}.forward_kernel"] == LAYERS * 2 * packs, "weights and their average"
    assert launches["flash3.forward"] >= LAYERS * 2 * packs
    assert not [name for name in launches if "backward" in name]
    assert run["evaluation"]["peak"]["evaluation"]
    assert not run["step"]["peak"].get("evaluation")
    assert "evaluation_failed" not in [event["event"] for event in run["events"]]
