"""Checkpoints of torch.distributed.checkpoint: bitwise round trip, torch programs on both sides, hostile files."""

import dataclasses
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from tests.support.distributed import run_distributed
from tests.unit.formats.made import (
    ENCODER,
    Counted,
    Trap,
    assert_equal,
    assert_same,
    damages,
    tiny_model,
    tiny_stored,
    with_sidecar,
)
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.distributed import dcp as format_dcp
from univitar_ds.formats.distributed import dcp_files
from univitar_ds.formats.stored_model import Tensors
from univitar_ds.training.distributed.process_group import start_world

NAME = "model.vision.encoder.layers.0.attn.qkv.weight"


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_model_is_written_and_read_bitwise(tmp_path, optimizer):
    stored = tiny_stored(optimizer=optimizer)
    assert not format_dcp.recognises(tmp_path)
    format_dcp.write(stored, tmp_path)
    assert format_dcp.recognises(tmp_path)
    assert_same(format_dcp.read(tmp_path), stored)
    assert tmp_path.name.encode() not in (tmp_path / ".metadata").read_bytes()  # pickled part by part


def test_other_types_and_an_encoder_alone_are_written_and_read(tmp_path):
    stored = tiny_stored().encoder_only().converted(torch.bfloat16)
    state = {**stored.tensors, "vision.count": torch.tensor(3), "vision.mask": torch.tensor([True, False])}
    stored = dataclasses.replace(stored, tensors=Tensors.of(state))
    format_dcp.write(stored, tmp_path)
    assert_same(format_dcp.read(tmp_path), stored)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    stored = tiny_stored()
    counted = Counted(stored.tensors)
    format_dcp.write(counted.model(stored), tmp_path)
    assert counted.most <= 2  # DCP keeps a tensor until it reads the next
    assert counted.alive == 0


def test_an_error_while_a_tensor_is_read_keeps_its_type(tmp_path):
    def broken(name):
        raise CheckpointError(f"{name} is gone")

    stored = tiny_stored(optimizer=False)
    with pytest.raises(CheckpointError, match="is gone"):
        format_dcp.write(dataclasses.replace(stored, tensors=Tensors(stored.tensors.infos, broken)), tmp_path)


def program(seed=5):
    """A torch program's model and optimizer, after a step."""
    model = tiny_model(seed=seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained:
        parameter.grad = torch.rand(parameter.shape, generator=generator)
    optimizer.step()
    return model, optimizer


def test_a_torch_program_loads_what_is_written(tmp_path):
    stored = tiny_stored()
    format_dcp.write(stored, tmp_path)
    model, optimizer = program()
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert_equal(state["model"], stored.tensors)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    named = dict(model.named_parameters())
    for group, wanted in zip(optimizer.param_groups, stored.optimizer.groups, strict=True):
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.98), wanted["weight_decay"])
        for name in wanted["params"]:
            found = optimizer.state[named[name]]
            assert found["step"] == wanted["step"]
            assert torch.equal(found["exp_avg"], stored.optimizer.exp_avg[name])
            assert torch.equal(found["exp_avg_sq"], stored.optimizer.exp_avg_sq[name])


@pytest.mark.parametrize("layout", ["model", "flat", "deep"])
def test_what_a_torch_program_saves_is_read(tmp_path, layout):
    model, optimizer = program()
    weights, moments = model.state_dict(), get_optimizer_state_dict(model, optimizer)
    state = {
        "model": {"model": weights, "optim": moments, "step": 7},
        "flat": weights,
        "deep": {"app": {"net": {f"module.{name}": value for name, value in weights.items()}, "opt": moments}},
    }[layout]
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    with_sidecar(tmp_path)
    found = format_dcp.read(tmp_path)
    assert_equal(found.tensors, weights)
    if layout == "flat":
        assert found.optimizer is None
        return
    assert found.optimizer.step == 1
    assert [group["weight_decay"] for group in found.optimizer.groups] == [0.1, 0.0]
    for kind in ("exp_avg", "exp_avg_sq"):
        wanted = {name: entry[kind] for name, entry in moments["state"].items()}
        assert_equal(getattr(found.optimizer, kind), wanted)


def test_the_encoder_alone_is_read_from_an_encoders_program(tmp_path):
    encoder = tiny_model().vision
    dcp.save(encoder.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    found = format_dcp.read(tmp_path, heads=2)
    assert found.encoder.architecture() == ENCODER.architecture()
    assert_equal(found.tensors, {f"vision.{name}": value for name, value in encoder.state_dict().items()})


def sharded(folder):
    """Saves the model from two ranks, each matrix split by rows, and reads what is written by the format."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    start_world()
    mesh = init_device_mesh("cpu", (2,))
    state = tiny_model(seed=5).state_dict()
    parts = {name: distribute_tensor(value, mesh, [Shard(0)]) if value.ndim else value for name, value in state.items()}
    dcp.save({"model": parts}, checkpoint_id=folder / "theirs")
    loaded = {name: distribute_tensor(torch.zeros_like(value), mesh, [Shard(0)]) for name, value in state.items()}
    dcp.load({"model": loaded}, checkpoint_id=folder / "ours")
    return {name: value.full_tensor() for name, value in loaded.items()}


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_read_and_write_parts_of_tensors(tmp_path):
    stored = tiny_stored()
    format_dcp.write(stored, tmp_path / "ours")
    for loaded in run_distributed(sharded, 2, tmp_path):
        assert_equal(loaded, stored.tensors)
    assert len(list((tmp_path / "theirs").glob("*.distcp"))) == 2
    found = format_dcp.read(tmp_path / "theirs", with_sidecar(tmp_path))
    assert_equal(found.tensors, tiny_model(seed=5).state_dict())


@pytest.fixture
def own(tmp_path):
    format_dcp.write(tiny_stored(), tmp_path / "own")
    return tmp_path / "own"


def edit(folder, change):
    """Change the metadata, which `change` gets as torch's own objects."""
    path = folder / ".metadata"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(content) or content))


def place_of(content, name=NAME):
    return next(info for index, info in content.storage_data.items() if index.fqn == name)


@pytest.mark.parametrize("what", ["planner_data", "storage_meta", "version"])
def test_metadata_that_names_a_function_is_refused_and_nothing_is_run(own, tmp_path, what):
    edit(own, lambda content: setattr(content, what, Trap(tmp_path / "made")))
    with pytest.raises(CheckpointError, match=r"\.metadata: the metadata needs (_io|io)\.open to be read"):
        format_dcp.read(own)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name",
    [("builtins", "eval"), ("torch", "load"), ("torch", "Size.__new__"), ("torch.serialization", "load"),
     ("torch.distributed.checkpoint.filesystem", "os"), ("copyreg", "_reconstructor")],
)  # fmt: skip
def test_other_names_are_refused(own, name):
    module, attribute = name
    (own / ".metadata").write_bytes(b"\x80\x04c" + f"{module}\n{attribute}\n".encode() + b".")
    with pytest.raises(CheckpointError, match=f"needs {module}.{attribute} to be read"):
        format_dcp.read(own)


def test_a_pickle_cannot_change_the_stand_ins_of_other_reads(own):
    before = dict(vars(dcp_files.Fields))
    # GLOBAL of a class, then BUILD with (None, {"get": 1}), which sets an attribute of the class itself
    (own / ".metadata").write_bytes(
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x03\x00\x00\x00getK\x01s\x86b."
    )
    with pytest.raises(CheckpointError, match="is damaged"):
        format_dcp.read(own)
    assert dict(vars(dcp_files.Fields)) == before


def test_a_tensor_file_that_names_a_function_is_refused_and_nothing_is_run(own, tmp_path):
    found = {}
    edit(own, lambda content: found.update(place=place_of(content)))
    buffer = io.BytesIO()
    torch.save(Trap(tmp_path / "made"), buffer)
    path = own / found["place"].relative_path
    assert len(buffer.getvalue()) < found["place"].length
    path.write_bytes(buffer.getvalue())
    edit(own, lambda content: setattr(place_of(content), "length", len(buffer.getvalue())))
    with pytest.raises(CheckpointError):
        format_dcp.read(own).tensors[NAME.removeprefix("model.")]
    path.write_bytes(buffer.getvalue().ljust(found["place"].length, b"\0"))
    edit(own, lambda content: setattr(place_of(content), "length", found["place"].length))
    model = format_dcp.read(own)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        model.tensors[NAME.removeprefix("model.")]
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("damage", range(5))
def test_damaged_metadata_is_one_error_message(own, damage):
    (own / ".metadata").write_bytes(list(damages((own / ".metadata").read_bytes()))[damage])
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        format_dcp.read(own)


def chunk(content):
    return content.state_dict_metadata[NAME].chunks[0]


CHANGES = {
    "outside": (lambda c: setattr(place_of(c), "relative_path", "../own/__0_9.distcp"), "must be in its own folder"),
    "absolute": (lambda c: setattr(place_of(c), "relative_path", "/etc/passwd"), "must be in its own folder"),
    "missing": (lambda c: setattr(place_of(c), "relative_path", "__9_9.distcp"), "__9_9.distcp is missing"),
    "beyond the end": (lambda c: setattr(place_of(c), "offset", 10**9), "ends before byte"),
    "negative": (lambda c: setattr(place_of(c), "offset", -1), "has the range"),
    "compressed": (lambda c: setattr(place_of(c), "transform_descriptors", ["zstd"]), "compressed or encrypted"),
    "huge": (lambda c: setattr(c.state_dict_metadata[NAME], "size", torch.Size([10**6, 10**6])), "do not fill"),
    "huge part": (lambda c: setattr(chunk(c), "sizes", torch.Size([10**6, 24])), "outside of the shape"),
    "other rank": (lambda c: setattr(c.state_dict_metadata[NAME], "size", torch.Size([72])), "outside of the shape"),
    "no place": (lambda c: c.storage_data.clear(), "KeyError"),
    "no type": (lambda c: setattr(c.state_dict_metadata[NAME].properties, "dtype", 3), "has the type 3"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_metadata_that_does_not_fit_is_one_error_message(own, change):
    make, message = CHANGES[change]
    edit(own, make)
    with pytest.raises(CheckpointError, match=message):
        format_dcp.read(own)


def test_a_tensor_that_differs_from_its_metadata_is_refused(own):
    def swap(content):
        content.state_dict_metadata[NAME].properties.dtype = torch.int32

    edit(own, swap)
    model = format_dcp.read(own)
    with pytest.raises(CheckpointError, match=r"has other content for model\.vision"):
        model.tensors[NAME.removeprefix("model.")]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CheckpointError, match=r"has 0 tensors embeddings\.patch_embedding\.weight"):
        format_dcp.read(tmp_path)
