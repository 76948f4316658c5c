"""Checkpoints of a small model: on other ranks and ZeRO stages, damaged, of another model, killed while they are
saved."""

import hashlib
import json
import os
import shutil
import signal

import pytest
import torch

from tests.support.closeness import assert_all_close, assert_sums_close
from tests.support.dense import dense_training
from tests.support.distributed import RankFailed, run_distributed
from tests.support.standin import HALF_NUMBER_TERMS, STANDIN_TERMS, StandIn
from tests.support.training import engine_of, losses, lr, steps
from univitar_ds.errors import CheckpointError, StorageError, writing
from univitar_ds.formats import checkpoint_dir, elastic
from univitar_ds.formats.elastic import read_full, read_state
from univitar_ds.training.checkpoint import atomic_dir
from univitar_ds.training.checkpoint.atomic_dir import LocalFolder
from univitar_ds.training.checkpoint.sharded import load_checkpoint, save_checkpoint
from univitar_ds.training.distributed.process_group import PeerFailure, start_world

pytestmark = pytest.mark.distributed
MIDDLE, END = 3, 6
NODE_FILE = "node00000.safetensors"


def cursors(world):
    return {lane: {"lane": lane, "step": MIDDLE} for lane in world.lanes(4)}


def first_half(folder):
    """Saves at MIDDLE and trains to END, then loads the checkpoint in the same engine and trains to END again.

    Also returns the number of bytes that this rank hashed, and the files of tensors that it opened, to load it.
    """
    world = start_world()
    engine = engine_of(world)
    steps(engine, 0, MIDDLE)
    saved = save_checkpoint(engine, folder, MIDDLE, {"note": [1, "two"]}, cursors(world), keep=2)
    straight = steps(engine, MIDDLE, END)
    save_checkpoint(engine, folder, END, {}, {}, keep=2)
    hashed, opened = [], []
    with pytest.MonkeyPatch.context() as patch:
        digest, safe_open = checkpoint_dir._sha256_of_part, elastic.safe_open
        patch.setattr(
            checkpoint_dir,
            "_sha256_of_part",
            lambda path, offset, size: hashed.append(size * path.name.startswith("node")) or digest(path, offset, size),
        )
        patch.setattr(elastic, "safe_open", lambda path, kind: opened.append(path.name) or safe_open(path, kind))
        load_checkpoint(engine, saved)
    again = steps(engine, MIDDLE, END)
    save_checkpoint(engine, folder.with_name("again"), END, {}, {}, keep=2)
    return straight, again, sum(hashed), opened


def second_half(folder, settings):
    """Continues from the checkpoint at MIDDLE in new engines: by name, (results, saved state, optimizer's state)."""
    world = start_world()
    answers = {}
    for name, setting in settings.items():
        engine = engine_of(world, StandIn(seed=99), **setting)
        saved = load_checkpoint(engine, folder / f"step-{MIDDLE:08d}")
        state = engine.optimizer_state()
        results = steps(engine, MIDDLE, END)
        save_checkpoint(engine, folder.with_name(f"{name}-{world.size}"), END, {}, {}, keep=1)
        answers[name] = results, saved, state
        engine.close()
    return answers


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("base") / "checkpoints"


@pytest.fixture(scope="module")
def straight(base):
    return run_distributed(first_half, 2, base)


@pytest.fixture(scope="module")
def dense():
    return dense_training(StandIn(), END, lr=lr, clip=1.0)


@pytest.fixture(scope="module")
def resumed(base, straight):
    by_size = {
        1: {"zero3": {}},
        2: {"zero3": {}, "zero2": {"stage": 2}, "bf16": {"bf16": True}, "bf16-1": {"bf16": True, "stage": 1}},
        4: {"zero3": {}, "offload": {"offload": True}, "zero1": {"stage": 1}},
    }
    return {size: run_distributed(second_half, size, base, settings)[0] for size, settings in by_size.items()}


def end(base, name):
    return base.with_name(name) / f"step-{END:08d}"


def hashes(folder):
    manifest = checkpoint_dir.read_manifest(folder)
    return {name: manifest[name].get("parts", manifest[name]) for name in manifest if name.endswith(".safetensors")}


def test_a_new_engine_on_as_many_ranks_continues_bit_for_bit(base, straight, resumed):
    assert resumed[2]["zero3"][0] == straight[0][0]
    assert hashes(end(base, "zero3-2")) == hashes(end(base, "checkpoints"))


def test_loading_in_the_same_engine_is_bit_for_bit_too(base, straight):
    assert straight[0][0] == straight[0][1]
    assert hashes(end(base, "again")) == hashes(end(base, "checkpoints"))


def test_as_many_ranks_hash_half_of_the_tensors_each_and_open_the_file_of_their_node(base, straight):
    size = (base / f"step-{MIDDLE:08d}" / NODE_FILE).stat().st_size
    assert sum(hashed for _, _, hashed, _ in straight) == size
    assert max(hashed for _, _, hashed, _ in straight) < 0.6 * size
    assert [opened for *_, opened in straight] == [[NODE_FILE]] * 2


FP32 = [(1, "zero3"), (4, "zero3"), (2, "zero2"), (4, "zero1"), (4, "offload")]


@pytest.mark.numeric
@pytest.mark.parametrize(("size", "name"), FP32)
def test_other_ranks_and_stages_continue_with_the_same_losses_and_weights(dense, base, straight, resumed, size, name):
    pairs = zip(losses(resumed[size][name][0]), losses(straight[0][0]), strict=True)
    for step, (got, wanted) in enumerate(pairs, MIDDLE + 1):
        assert_sums_close(got, wanted, step * STANDIN_TERMS, f"loss of step {step}")
    whole, wanted = read_full(end(base, f"{name}-{size}")), read_full(end(base, "checkpoints"))
    assert_all_close(whole, wanted, END * STANDIN_TERMS, reach=dense.reach)


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["bf16", "bf16-1"])
def test_fp32_continues_in_bf16_up_to_its_rounding(straight, resumed, name):
    found, wanted = losses(resumed[2][name][0]), losses(straight[0][0])
    assert_sums_close(found, wanted, HALF_NUMBER_TERMS, dtype=torch.bfloat16)


def test_state_that_is_saved_with_the_tensors_is_loaded_on_any_number_of_ranks(resumed):
    for answers in resumed.values():
        for _, saved, state in answers.values():
            assert saved.state == {"note": [1, "two"]}
            assert saved.cursors == {lane: {"lane": lane, "step": MIDDLE} for lane in range(4)}
            assert state["updates"] == state["global_steps"] == MIDDLE
            assert [group["weight_decay"] for group in state["groups"]] == [0.1, 0.0]
            assert state["groups"][0]["betas"] == (0.9, 0.98)


@pytest.mark.numeric
def test_one_process_reads_whole_weights_buffers_and_frozen_weights(base, straight):
    model = StandIn()
    dense = dense_training(model, MIDDLE, lr=lr, clip=1.0)
    whole = read_full(base / f"step-{MIDDLE:08d}")
    assert {value.dtype for value in whole.values()} == {torch.float32}
    assert_all_close(whole, dense.weights, MIDDLE * STANDIN_TERMS, reach=dense.reach)
    assert torch.equal(whole["fixed.weight"], model.fixed.weight)
    assert read_state(base / f"step-{MIDDLE:08d}") == {"note": [1, "two"]}


class Renamed(StandIn):
    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Linear(2, 3)
        self.text_proj = torch.nn.Linear(24, 8)
        self.vision_proj = torch.nn.Linear(24, 8, bias=False)
        self.logit_bias.requires_grad_(False)
        del self.spare, self.mean
        self.register_buffer("more", torch.zeros(2))


def refused(folder, damaged):
    """The errors of each rank for a checkpoint of another model and for a damaged one."""
    world = start_world()
    messages = []
    for model, path in ((Renamed(), folder), (StandIn(), damaged)):
        engine = engine_of(world, model)
        try:
            load_checkpoint(engine, path)
        except (CheckpointError, PeerFailure) as error:
            messages.append((type(error).__name__, str(error)))
        engine.close()
    return messages


def test_a_checkpoint_from_another_model_or_a_damaged_one_is_refused_on_all_ranks(base, straight, tmp_path):
    shutil.copytree(base, tmp_path / "checkpoints")
    damaged = tmp_path / "checkpoints" / f"step-{END:08d}"
    with (damaged / NODE_FILE).open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    answers = run_distributed(refused, 2, base / f"step-{MIDDLE:08d}", damaged)
    for foreign, _ in answers:
        assert foreign[0] == "CheckpointError"
        for part in (
            "checkpoint from another model",
            "it lacks more, other.bias, other.weight",
            "it has mean, spare.weight that the model lacks",
            "vision_proj.weight is [16, 24], not [8, 24]",
            "logit_bias trained in one of them and frozen in the other",
        ):
            assert part in foreign[1]
    kinds = sorted(kind for _, (kind, _) in answers)
    assert kinds == ["CheckpointError", "PeerFailure"]
    for _, (_, message) in answers:
        assert f"{NODE_FILE} has a different sha256" in message
        assert f"step-{MIDDLE:08d}" in message


def test_a_checkpoint_whose_ranges_have_a_hole_is_damaged(base, straight, tmp_path):
    folder = tmp_path / "step-00000003"
    shutil.copytree(base / f"step-{MIDDLE:08d}", folder)
    index = json.loads((folder / "index.json").read_text())
    parts = index["pieces"]["spare.weight"]["parts"]
    assert [part[0] for part in parts] == [0, 1]
    del parts[1]
    atomic_dir.write_json(folder / "index.json", index)
    manifest = json.loads((folder / checkpoint_dir.MANIFEST).read_text())
    content = (folder / "index.json").read_bytes()
    manifest["files"]["index.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    atomic_dir.write_json(folder / checkpoint_dir.MANIFEST, manifest)
    with pytest.raises(CheckpointError, match=r"has fp32 of spare\.weight up to element 288 only, 576 are needed"):
        read_full(folder)


def one_rank_has_no_space(folder):
    """The second rank cannot write its tensors: the error of each rank, and whether a later save works."""
    world = start_world()
    engine = engine_of(world)
    steps(engine, 0, 1)
    save_checkpoint(engine, folder, 1, {}, {}, keep=2)
    put = LocalFolder.put
    if world.rank == 1:

        def full(self, part):
            with writing(self.folder):
                raise OSError(28, "No space left on device")

        LocalFolder.put = full
    try:
        save_checkpoint(engine, folder, 2, {}, {}, keep=2)
        message = None
    except (StorageError, PeerFailure) as error:
        message = type(error).__name__, str(error), checkpoint_dir.latest(folder).name
    LocalFolder.put = put
    return message, save_checkpoint(engine, folder, 2, {}, {}, keep=2).name


def test_a_rank_without_disk_space_ends_the_save_on_all_ranks_and_the_previous_checkpoint_stays(tmp_path):
    answers = run_distributed(one_rank_has_no_space, 2, tmp_path / "c")
    assert answers[0][0][0] == "PeerFailure"
    assert answers[1][0][0] == "StorageError"
    for message, later in answers:
        assert "No space left on device" in message[1]
        assert message[2] == "step-00000001"
        assert later == "step-00000002"


def one_rank_is_killed(folder):
    """The second rank is killed with half of its tensors on the disk."""
    world = start_world()
    engine = engine_of(world)
    save_checkpoint(engine, folder, 1, {}, {}, keep=2)
    if world.rank == 1:
        put = LocalFolder.put

        def cut(self, part):
            put(self, part._replace(content=part.content[: len(part.content) // 2]))
            os.kill(os.getpid(), signal.SIGKILL)

        LocalFolder.put = cut
    save_checkpoint(engine, folder, 2, {}, {}, keep=2)


def test_a_rank_that_is_killed_while_it_saves_hangs_no_rank_and_the_previous_checkpoint_stays(tmp_path):
    with pytest.raises(RankFailed, match=r"exit code -9"):
        run_distributed(one_rank_is_killed, 2, tmp_path / "c")
    folder = checkpoint_dir.latest(tmp_path / "c")
    assert folder.name == "step-00000001"
    checkpoint_dir.verify(folder, checkpoint_dir.read_manifest(folder))
    assert read_full(folder).keys() == StandIn().state_dict().keys()
