"""Universal checkpoints: bitwise round trip, DeepSpeed continues from them, hostile files."""

import argparse
import dataclasses

import pytest
import torch

from tests.support.closeness import assert_sums_close
from tests.support.distributed import run_distributed
from tests.unit.formats.made import (
    TERMS,
    Counted,
    Trap,
    assert_equal,
    assert_same,
    damages,
    pieces_of,
    tiny_engine,
    tiny_stored,
    trained_to,
    whole,
    with_sidecar,
)
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.distributed import deepspeed, universal
from univitar_ds.formats.stored_model import Tensors
from univitar_ds.training.distributed.process_group import start_world

pytestmark = pytest.mark.distributed
MIDDLE, END = 3, 8
SETTINGS = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "bf16 zero2": {"stage": 2, "bf16": True},
    "bf16 zero3": {"stage": 3, "bf16": True},
}
OTHER_STAGES = {name: {**setting, "stage": setting["stage"] % 3 + 1} for name, setting in SETTINGS.items()}
NAME = "vision.encoder.layers.0.attn.qkv.weight"


def source(folder, settings):
    """By name: this rank's pieces at MIDDLE, where DeepSpeed saves, losses from there to END, pieces at END."""
    world = start_world()
    answers = {}
    for name, setting in settings.items():
        engine = tiny_engine(world, **setting)
        trained_to(engine, 0, MIDDLE)
        engine._engine.save_checkpoint(str(folder / name))
        middle = pieces_of(engine)
        answers[name] = middle, trained_to(engine, MIDDLE, END), pieces_of(engine)
        engine.close()
    return answers


def target(folder, settings):
    """By name: pieces after DeepSpeed has loaded the universal checkpoint, settings of the groups, losses to END, and
    pieces at END."""
    world = start_world()
    answers = {}
    for name, setting in settings.items():
        engine = tiny_engine(world, universal=True, **setting)
        engine._engine.load_checkpoint(str(folder / name))
        engine._share_exact()  # scale and bias in float32 are known to our engine alone
        if setting["stage"] == 3:  # DeepSpeed gives all groups the same tensor
            assert len({id(state["step"]) for state in engine._optimizer.optimizer.state.values()}) == 1
            for state in engine._optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()
        loaded, state = pieces_of(engine), engine.optimizer_state()
        answers[name] = loaded, state, trained_to(engine, MIDDLE, END), pieces_of(engine)
        engine.close()
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeed_continues_as_the_engine_that_saved(ranks, tmp_path):
    wanted = run_distributed(source, ranks, tmp_path / "source", SETTINGS)
    for name in SETTINGS:
        universal.write(deepspeed.read(tmp_path / "source" / name, with_sidecar(tmp_path)), tmp_path / "target" / name)
    same = run_distributed(target, ranks, tmp_path / "target", SETTINGS)
    others = run_distributed(target, 3 - ranks, tmp_path / "target", OTHER_STAGES)
    for name, setting in SETTINGS.items():
        middle, end = (whole([rank[name][index] for rank in wanted]) for index in (0, 2))
        for answers in (same, others):
            loaded = whole([rank[name][0] for rank in answers])
            for kind in ("fp32", "exp_avg", "exp_avg_sq"):
                assert_equal(loaded[kind], middle[kind])
            state = answers[0][name][1]
            assert (state["updates"], state["global_steps"]) == (MIDDLE, MIDDLE)
            assert [group["weight_decay"] for group in state["groups"]] == [0.1, 0.0]
        assert same[0][name][2] == wanted[0][name][1]
        finished = whole([rank[name][3] for rank in same])
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            assert_equal(finished[kind], end[kind])
        if not setting.get("bf16"):
            for step, (got, loss) in enumerate(zip(others[0][name][2], wanted[0][name][1], strict=True), MIDDLE + 1):
                assert_sums_close(got, loss, step * TERMS, f"loss of step {step} of {name}")


def converted(folder):
    """Saves with DeepSpeed and converts with its own program; returns this rank's pieces."""
    from deepspeed.checkpoint.ds_to_universal import main

    world = start_world()
    answers = {}
    for name, setting in {"zero1": {"stage": 1}, "zero3": {"stage": 3, "frozen": False}}.items():
        engine = tiny_engine(world, **setting)
        trained_to(engine, 0, 1)
        engine._engine.save_checkpoint(str(folder / name))
        answers[name] = pieces_of(engine)
        engine.close()
        if world.is_main:
            arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
            step, own = folder / name / "global_step1", folder / name / "own"
            main(argparse.Namespace(
                input_folder=str(step), output_folder=str(own), inject_missing_state=True, **arguments
            ))  # fmt: skip
    return answers


def test_what_deepspeed_converts_itself_is_read_bitwise(tmp_path):
    (answers,) = run_distributed(converted, 1, tmp_path)
    for name, pieces in answers.items():
        kinds = whole([pieces])
        model = universal.read(tmp_path / name, with_sidecar(tmp_path / "config"))
        wanted = {**kinds["fp32"], **kinds["frozen"]}
        assert_equal(model.tensors, {key: wanted[key] for key in model.tensors})
        assert model.tensors.keys() == wanted.keys()
        for kind in ("exp_avg", "exp_avg_sq"):
            moments = getattr(model.optimizer, kind)
            assert_equal(moments, {key: kinds[kind][key] for key in moments})
            assert moments.keys() == kinds[kind].keys()
        assert model.optimizer.step == 1
        assert sorted(key for group in model.optimizer.groups for key in group["params"]) == sorted(kinds["fp32"])


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_model_is_written_and_read_bitwise(tmp_path, optimizer):
    stored = tiny_stored(optimizer=optimizer)
    universal.write(stored, tmp_path / "new")
    assert universal.recognises(tmp_path / "new")
    assert not deepspeed.recognises(tmp_path / "new")
    assert_same(universal.read(tmp_path / "new"), stored)


def test_an_encoder_alone_is_written_and_read(tmp_path):
    stored = tiny_stored().encoder_only()
    universal.write(stored, tmp_path)
    assert_same(universal.read(tmp_path), stored)


def test_weights_of_half_precision_become_float32_and_indices_stay(tmp_path):
    stored = tiny_stored(optimizer=False)
    state = {**stored.tensors, "text.model.position_ids": torch.arange(8)}
    stored = dataclasses.replace(stored, tensors=Tensors.of(state)).converted(torch.bfloat16)
    universal.write(stored, tmp_path)
    wanted = {key: value.float() if value.is_floating_point() else value for key, value in stored.tensors.items()}
    assert_equal(universal.read(tmp_path).tensors, wanted)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    stored = tiny_stored()
    counted = Counted(stored.tensors)
    universal.write(counted.model(stored), tmp_path)
    assert counted.most == 1
    assert counted.alive == 0


@pytest.fixture
def own(tmp_path):
    """(folder, folder of the step)."""
    universal.write(tiny_stored(), tmp_path / "own")
    return tmp_path / "own", tmp_path / "own" / "global_step7"


FILES = ["mp_rank_00_model_states.pt", "zero/optimizer_state.pt", f"zero/{NAME}/fp32.pt", f"zero/{NAME}/exp_avg.pt"]


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_names_a_function_is_refused_and_nothing_is_run(own, tmp_path, file):
    root, step = own
    torch.save({**torch.load(step / file), "extra": Trap(tmp_path / "made")}, step / file)
    with pytest.raises(CheckpointError, match=r"needs (_io|io)\.open to be read"):
        universal.read(root)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", range(5))
def test_a_damaged_file_is_one_error_message(own, file, damage):
    root, step = own
    (step / file).write_bytes(list(damages((step / file).read_bytes()))[damage])
    with pytest.raises(CheckpointError, match=file.split("/")[-1]):
        universal.read(root)


def test_content_that_does_not_fit_is_one_error_message(own):
    root, step = own
    file = step / "zero" / NAME / "exp_avg.pt"
    torch.save({"param": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"exp_avg.pt has 3 values for the shape \(72, 24\)"):
        universal.read(root)
    torch.save({"param": torch.zeros(1).expand(72, 24)}, file)
    with pytest.raises(CheckpointError, match="fewer values than its shape"):
        universal.read(root)
    (step / "zero" / NAME / "fp32.pt").unlink()
    with pytest.raises(CheckpointError, match=f"lacks {NAME}"):
        universal.read(root)
    (root / "latest_universal").write_text("/etc")
    assert not universal.recognises(root)
    with pytest.raises(CheckpointError, match="must be folders beside it"):
        universal.read(root)


def test_a_name_that_is_a_path_is_not_written(tmp_path):
    stored = tiny_stored(optimizer=False)
    state = {**stored.tensors, "../outside": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"'\.\./outside' cannot be the name of a folder"):
        universal.write(dataclasses.replace(stored, tensors=Tensors.of(state)), tmp_path / "new")


def test_a_missing_moment_means_no_optimizer(own):
    root, step = own
    (step / "zero" / NAME / "exp_avg_sq.pt").unlink()
    assert universal.read(root).optimizer is None
