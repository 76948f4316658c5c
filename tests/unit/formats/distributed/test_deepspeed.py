"""DeepSpeed's checkpoints, of all ZeRO stages and one or two ranks, are read bit for bit; hostile files are refused."""

import dataclasses
import shutil

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.unit.formats.made import (
    ENCODER,
    JOINT,
    Trap,
    assert_equal,
    damages,
    pieces_of,
    tiny_engine,
    tiny_stored,
    trained_to,
    whole,
    with_sidecar,
)
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.distributed import deepspeed
from univitar_ds.formats.sidecar import write_sidecar
from univitar_ds.formats.weight_files import write_weights
from univitar_ds.training.distributed.process_group import start_world

pytestmark = pytest.mark.distributed
STEPS = 2
SETTINGS = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "sub-groups": {"stage": 3, "sub_group": 2000},
    "wrapped": {"stage": 2, "wrapped": True, "frozen": False},
    "bf16 zero1": {"stage": 1, "bf16": True},
    "bf16 zero2": {"stage": 2, "bf16": True},
    "bf16 zero3": {"stage": 3, "bf16": True, "wrapped": True},
}


def trained(folder, settings):
    """Trains an engine for each of `settings` and saves it with DeepSpeed.

    Returns by name: this rank's pieces, and the optimizer's groups."""
    world = start_world()
    answers = {}
    for name, setting in settings.items():
        engine = tiny_engine(world, **setting)
        trained_to(engine, 0, STEPS)
        engine._engine.save_checkpoint(str(folder / name))
        answers[name] = pieces_of(engine), engine.optimizer_state()["groups"]
        engine.close()
    return answers


@pytest.fixture(scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
def saved(request, tmp_path_factory):
    """The folder of the checkpoints; by setting: whole tensors by kind and name, and the optimizer's groups."""
    folder = tmp_path_factory.mktemp("saved")
    ranks = run_distributed(trained, request.param, folder, SETTINGS)
    return folder, {name: (whole([rank[name][0] for rank in ranks]), ranks[0][name][1]) for name in SETTINGS}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_masters_moments_and_frozen_weights_are_read_bitwise(saved, name, tmp_path):
    folder, answers = saved
    kinds, groups = answers[name]
    kinds = {
        kind: {key.removeprefix("module."): value for key, value in found.items()} for kind, found in kinds.items()
    }
    wanted = {**kinds["fp32"], **kinds["frozen"]}
    assert deepspeed.recognises(folder / name)
    model = deepspeed.read(folder / name, with_sidecar(tmp_path))
    assert (model.encoder, model.joint) == (ENCODER, JOINT)
    assert model.origin["step"] == STEPS
    assert list(model.tensors) == list(tiny_stored().tensors)
    assert_equal(model.tensors, {key: wanted[key] for key in model.tensors})
    assert model.optimizer.step == STEPS
    for kind in ("exp_avg", "exp_avg_sq"):
        moments = getattr(model.optimizer, kind)
        assert moments.keys() == kinds[kind].keys()
        assert_equal(moments, {key: kinds[kind][key] for key in moments})
    assert len(model.optimizer.groups) == len(groups) == 2
    for group, setting in zip(model.optimizer.groups, groups, strict=True):
        assert group["step"] == STEPS
        assert {key: group[key] for key in ("lr", "weight_decay", "eps", "lr_scale")} == {
            key: setting[key] for key in ("lr", "weight_decay", "eps", "lr_scale")
        }
        assert all((wanted[key].ndim > 1) == (group["weight_decay"] > 0) for key in group["params"])
    assert sorted(key for group in model.optimizer.groups for key in group["params"]) == sorted(kinds["fp32"])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with checkpoints of two ranks, one of stage 2, which tests copy, and one of stage 3."""
    folder = tmp_path_factory.mktemp("two-ranks")
    run_distributed(trained, 2, folder, {"zero2": {"stage": 2}, "zero3": {"stage": 3}})
    return folder


@pytest.fixture
def own_copy(two_ranks, tmp_path):
    """A copy of the checkpoint of stage 2 that a test may damage: its folder, and the folder of its step."""
    root = shutil.copytree(two_ranks / "zero2", tmp_path / "own")
    return root, root / f"global_step{STEPS}"


@pytest.mark.slow
def test_files_are_closed_when_the_limit_of_mapped_bytes_is_read(two_ranks, tmp_path, monkeypatch):
    opened = []
    load = deepspeed.load_pt
    monkeypatch.setattr(deepspeed, "load_pt", lambda path: opened.append(path) or load(path))
    monkeypatch.setattr(deepspeed, "_MAPPED", 10_000)
    model = deepspeed.read(two_ranks / "zero3", with_sidecar(tmp_path))
    before = len(opened)
    assert before == 4
    read = sum(model.tensors[name].nbytes for name in model.tensors)
    assert len(opened) - before > read / 50_000


def test_the_encoder_alone_is_read_without_a_configuration(own_copy):
    root, step = own_copy
    with pytest.raises(CheckpointError, match="no tensor shows how many heads"):
        deepspeed.read(root)
    for folder in (root, step):
        model = deepspeed.read(folder, heads=2)
        assert model.joint is None
        assert model.optimizer is None
        assert model.encoder.architecture() == ENCODER.architecture()
        assert all(name.startswith("vision.") for name in model.tensors)


def test_a_configuration_beside_the_checkpoint_or_in_memory_is_used(own_copy, tmp_path):
    root, _ = own_copy
    (tmp_path / "encoder").mkdir()
    write_weights(tiny_stored().encoder_only().tensors, tmp_path / "encoder")
    with pytest.raises(CheckpointError, match=r"has none of univitar.json, config.yaml and config.json"):
        deepspeed.read(root, tmp_path / "encoder")
    assert deepspeed.read(root, configuration=(ENCODER, JOINT)).joint == JOINT
    with_sidecar(root)
    assert deepspeed.read(root).joint == JOINT
    wrong = dataclasses.replace(tiny_stored(), encoder=dataclasses.replace(ENCODER, num_hidden_layers=3))
    write_sidecar(wrong, root)
    with pytest.raises(CheckpointError, match="num_hidden_layers 3 instead of 2"):
        deepspeed.read(root)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_file_that_names_a_function_is_refused_and_nothing_is_run(own_copy, tmp_path, file):
    root, step = own_copy
    trap = tmp_path / "made"
    content = torch.load(step / file, weights_only=False)
    torch.save({**content, "extra": Trap(trap)}, step / file)
    with pytest.raises(CheckpointError, match=r"needs (_io|io)\.open to be read, which could run code"):
        deepspeed.read(root, heads=2)
    assert not trap.exists()
    torch.save({**content, "extra": dataclasses.field}, step / file)
    with pytest.raises(CheckpointError, match=r"needs dataclasses\.field to be read"):
        deepspeed.read(root, heads=2)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("damage", range(5))
def test_a_damaged_file_raises_an_error_that_names_it(own_copy, file, damage):
    root, step = own_copy
    content = list(damages((step / file).read_bytes()))[damage]
    (step / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file):
        deepspeed.read(root, heads=2)


def edit_file(path, change):
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


QKV = "vision.encoder.layers.0.attn.qkv.weight"
CHANGES = {
    "no optimizer": ("optim", lambda c: c.pop("optimizer_state_dict")),
    "short group": ("optim", lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].pop()),
    "short flat": (
        "optim",
        lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].__setitem__(0, torch.zeros(3)),
    ),
    "repeated values": (
        "optim",
        lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].__setitem__(
            0, torch.zeros(1).expand(10**9)
        ),
    ),
    "unknown name": ("optim", lambda c: c["optimizer_state_dict"]["param_slice_mappings"][0].update(other=1)),
    "experts": ("first", lambda c: c["optimizer_state_dict"].update(ds_zero_partition_groups=[{}])),
    "huge shape": ("model", lambda c: c["param_shapes"][0].__setitem__(QKV, torch.Size([10**6, 10**6]))),
    "negative shape": ("model", lambda c: c["param_shapes"][0].__setitem__(QKV, [-1, 5])),
    "shape of text": ("model", lambda c: c["param_shapes"][0].__setitem__(QKV, "wide")),
    "a list": ("model", lambda c: c.update(module=[1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_content_that_does_not_fit_raises_a_checkpoint_error(own_copy, change):
    root, step = own_copy
    where, edit = CHANGES[change]
    rank = "0" if where == "first" else "1"
    name = "mp_rank_00_model_states.pt" if where == "model" else f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    edit_file(step / name, edit)
    with pytest.raises(CheckpointError):
        deepspeed.read(root, heads=2)


def test_a_folder_elsewhere_a_split_model_a_missing_rank_and_no_checkpoint_are_refused(own_copy, tmp_path):
    root, step = own_copy
    (root / "latest").write_text("../elsewhere")
    assert not deepspeed.recognises(root)
    with pytest.raises(CheckpointError, match=r"names '\.\./elsewhere'; checkpoints must be folders beside it"):
        deepspeed.read(root)
    second = step / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    second.rename(step / "zero_pp_rank_1_mp_rank_01_optim_states.pt")
    with pytest.raises(CheckpointError, match="is of tensor or pipeline parallelism"):
        deepspeed.read(step)
    (step / "zero_pp_rank_1_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="is of 2 ranks but has files of 1"):
        deepspeed.read(step)
    assert not deepspeed.recognises(tmp_path)
    with pytest.raises(CheckpointError, match="name a checkpoint of DeepSpeed"):
        deepspeed.read(tmp_path)


def test_without_moments_there_is_no_optimizer(own_copy, tmp_path):
    root, step = own_copy
    for rank in (0, 1):
        edit_file(
            step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            lambda c: c["optimizer_state_dict"]["base_optimizer_state"].update(state={}),
        )
    model = deepspeed.read(root, with_sidecar(tmp_path / "config"))
    assert model.optimizer is None
    assert len(model.tensors) == len(tiny_stored().tensors)
