"""Checkpoints of Megatron-Core: bitwise round trips, slices on several processes, Megatron's own reader and writer."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
import sys
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from tests.support.closeness import assert_sums_close, transformer_terms
from tests.support.distributed import run_distributed
from tests.support.finished import run_config
from tests.unit.model.made import drawn_patches, small_encoder
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.model import TextConfig
from univitar_ds.errors import CheckpointError, ConfigError, InstallationError
from univitar_ds.formats.distributed import megatron
from univitar_ds.formats.distributed.megatron import (
    load_slices,
    read,
    recognises,
    sharded_state_dict,
    split_axis,
    write,
)
from univitar_ds.formats.stored_model import VISION, JointConfig, OptimizerState, StoredModel, Tensors
from univitar_ds.kernels import reference
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.encoder import grid_positions
from univitar_ds.model.towers import build_text_tower

HEADS, WIDTH, INNER = 4, 64, 64
GRID = [1, 4, 6]
BLOCK = f"{VISION}encoder.layers.0."


def _model() -> ContrastiveModel:
    text = TextConfig(hidden_size=32, layers=1, heads=HEADS, intermediate_size=64, context_length=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = build_text_tower(text, vocab_size=50, eos_id=49, pad_id=0)
        model = ContrastiveModel(small_encoder(num_attention_heads=HEADS, qkv_bias=True), tower, run_config().model)
        for parameter in model.parameters():  # ones and zeros would hide that one is at another's place
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def _stored(model: ContrastiveModel | None = None) -> StoredModel:
    """A whole model with moments; one tensor is in another precision."""
    model = model or _model()
    state = model.state_dict()
    state["pool.query"] = state["pool.query"].bfloat16()
    names = [name for name in state if "qkv" in name or "text_proj" in name]
    moments = [Tensors.of({name: state[name].sin() * scale for name in names}) for scale in (1, 2)]
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": names}
    joint = JointConfig(16, 3, "sigmoid", {"model_type": "clip_text_model", "num_attention_heads": HEADS}, 12, "{}")
    return StoredModel(
        Path("nowhere"), "test", model.vision.config, Tensors.of(state), joint, OptimizerState(7, *moments, [group])
    )


@pytest.fixture(scope="module")
def source() -> StoredModel:
    return _stored()


@pytest.fixture
def folder(source: StoredModel, tmp_path: Path) -> Path:
    write(source, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def _assert_equal(got: Tensors, wanted: Tensors) -> None:
    assert got.infos == wanted.infos
    assert list(got) == list(wanted)
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name
        assert got[name].is_contiguous()


def _assert_same(got: StoredModel, wanted: StoredModel) -> None:
    assert (got.encoder, got.joint) == (wanted.encoder, wanted.joint)
    _assert_equal(got.tensors, wanted.tensors)
    assert (got.optimizer is None) == (wanted.optimizer is None)
    if wanted.optimizer is not None:
        assert (got.optimizer.step, got.optimizer.groups) == (wanted.optimizer.step, wanted.optimizer.groups)
        _assert_equal(got.optimizer.exp_avg, wanted.optimizer.exp_avg)
        _assert_equal(got.optimizer.exp_avg_sq, wanted.optimizer.exp_avg_sq)


def test_a_whole_model_with_moments_is_read_back_bitwise(source, folder):
    found = read(folder)
    _assert_same(found, source)
    assert (found.path, found.format) == (folder, "megatron")
    assert sorted(path.name for path in folder.iterdir()) == [
        ".metadata", "__0_0.distcp", "common.pt", "metadata.json", "univitar.json",
    ]  # fmt: skip


def test_an_encoder_alone_is_read_back_bitwise(source, tmp_path):
    encoder = source.encoder_only()
    write(encoder, tmp_path)
    _assert_same(read(tmp_path), encoder)


def test_one_tensor_is_in_memory_at_a_time(source, tmp_path):
    alive: list[weakref.ref] = []

    def read_one(name: str) -> Tensor:
        assert sum(ref() is not None for ref in alive) <= 1, "earlier tensors are kept"
        tensor = source.tensors[name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    write(dataclasses.replace(source, tensors=Tensors(source.tensors.infos, read_one), optimizer=None), tmp_path)
    assert len(alive) == len(source.tensors)


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path):
    encoder = small_encoder(num_attention_heads=HEADS)
    state = {VISION + name: value for name, value in encoder.state_dict().items()}
    large = torch.zeros(1000, WIDTH)
    state[f"{BLOCK}ls1"] = large[3]
    write(StoredModel(Path("x"), "test", encoder.config, Tensors.of(state)), tmp_path)
    assert (tmp_path / "__0_0.distcp").stat().st_size < sum(v.nbytes for v in state.values()) + 2000 * len(state)


def test_reading_opens_only_the_tensor_that_is_asked_for(folder):
    found = read(folder)
    name = list(found.tensors)[3]
    wanted = found.tensors[name].clone()
    (folder / "__0_0.distcp").unlink()
    assert len(found.tensors) == len(found.tensors.infos)
    with pytest.raises(CheckpointError, match="distcp"):
        found.tensors[name]
    assert wanted.shape == found.tensors.infos[name].shape


@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_put_together_are_the_whole(size, source, folder):
    parts = [load_slices(folder, rank, size) for rank in range(size)]
    assert parts[0].keys() == source.tensors.infos.keys()
    for name, whole in source.tensors.items():
        slices = [part[name] for part in parts]
        axis = split_axis(name)
        if axis is None:
            assert all(torch.equal(one, whole) for one in slices), name
        elif ".qkv." in name:
            rows = [one.unflatten(0, (HEADS // size, 3, -1)) for one in slices]
            assert torch.equal(torch.cat(rows).transpose(0, 1).flatten(0, 2), whole), name
        else:
            assert torch.equal(torch.cat(slices, axis), whole), name
            assert len(slices) == 1 or slices[0].shape != whole.shape


def test_the_split_tensors_are_those_of_a_parallel_transformer(source):
    names = {0: [], 1: []}
    for name in source.tensors:
        if split_axis(name) is not None and ".1." not in name:
            names[split_axis(name)].append(name)
    text = next(name for name in source.tensors if "q_proj" in name).removesuffix("self_attn.q_proj.weight")
    text = text.removesuffix("self_attn.q_proj.bias")
    both = ("weight", "bias")
    assert sorted(names[0]) == sorted(
        [f"{BLOCK}{part}.{kind}" for part in ("attn.qkv", "mlp.fc1", "mlp.fc3") for kind in both]
        + [f"{BLOCK}{part}.weight" for part in ("attn.q_norm", "attn.k_norm", "mlp.norm")]
        + [f"{text}{part}.{kind}" for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
           for kind in both]
    )  # fmt: skip
    assert sorted(names[1]) == sorted(
        f"{part}.weight"
        for part in (f"{BLOCK}attn.proj", f"{BLOCK}mlp.fc2", f"{text}self_attn.out_proj", f"{text}mlp.fc2")
    )


def test_moments_are_split_like_their_parameters(source, folder):
    name = f"{BLOCK}attn.qkv.weight"
    slices = [load_slices(folder, rank, 2, optimizer=True) for rank in range(2)]
    for kind, wanted in (("exp_avg", source.optimizer.exp_avg), ("exp_avg_sq", source.optimizer.exp_avg_sq)):
        rows = torch.cat([part[f"optimizer.state.{kind}.{name}"] for part in slices]).unflatten(0, (HEADS, 3, -1))
        assert torch.equal(rows.transpose(0, 1).flatten(0, 2), wanted[name])
    assert not any(name.startswith("optimizer.") for name in load_slices(folder, 0, 2))


def _parallel_norm(x: Tensor, weight: Tensor, eps: float, size: int) -> Tensor:
    """RMSNorm over a width that is split: the ranks add their sums of squares."""
    squares = x.square().sum(-1, keepdim=True)
    dist.all_reduce(squares)
    return x * torch.rsqrt(squares / (x.shape[-1] * size) + eps) * weight


def _parallel_block(folder: Path, x: Tensor, config: EncoderConfig) -> Tensor:
    """The first block on one rank of tensor parallelism: a column- and a row-parallel layer in each branch."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    w = {name.removeprefix(BLOCK): value for name, value in load_slices(folder, rank, size).items()}
    eps, heads = config.layer_norm_eps, HEADS // size
    normed = reference.rms_norm(x, w["norm1.weight"], eps)
    qkv = F.linear(normed, w["attn.qkv.weight"], w["attn.qkv.bias"]).view(len(x), heads, 3, -1)
    q, k, v = qkv.unbind(2)
    positions = grid_positions([GRID], 1)
    q, k = (reference.rope2d(part, positions, config.rope_theta).flatten(1) for part in (q, k))
    q = _parallel_norm(q, w["attn.q_norm.weight"], eps, size).view_as(v)
    k = _parallel_norm(k, w["attn.k_norm.weight"], eps, size).view_as(v)
    seen = F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in (q, k, v))).transpose(0, 1).flatten(1)
    branch = F.linear(seen, w["attn.proj.weight"])
    dist.all_reduce(branch)
    x = x + w["ls1"] * (branch + w["attn.proj.bias"])
    normed = reference.rms_norm(x, w["norm2.weight"], eps)
    gate, up = (F.linear(normed, w[f"mlp.{name}.weight"], w[f"mlp.{name}.bias"]) for name in ("fc1", "fc3"))
    branch = F.linear(_parallel_norm(F.silu(gate) * up, w["mlp.norm.weight"], eps, size), w["mlp.fc2.weight"])
    dist.all_reduce(branch)
    return x + w["ls2"] * (branch + w["mlp.fc2.bias"])


@pytest.mark.distributed
@pytest.mark.numeric
@pytest.mark.parametrize("size", [2, 4])
def test_a_block_computed_with_slices_equals_that_of_one_process(size, folder):
    model = _model().vision
    x = model.embeddings["patch_embedding"](drawn_patches([GRID])).detach()
    states = model(drawn_patches([GRID]), [GRID], output_hidden_states=True)[1]
    terms = transformer_terms(width=WIDTH, inner=INNER, head=WIDTH // HEADS, layers=1, longest=len(x))
    for rank, got in enumerate(run_distributed(_parallel_block, size, folder, x, model.config)):
        assert_sums_close(got, states[1], terms, f"rank {rank}")


def _quiet_cuda() -> None:
    """Megatron's writer calls CUDA functions although its tensors are on the CPU."""
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: torch.device("cpu")


def _with_megatron(folder: Path, out: Path | None) -> None:
    """Reads the checkpoint by Megatron's own reader, and writes `out` by its own writer."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    from megatron.core import dist_checkpointing, parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    wanted = load_slices(folder, rank, size, optimizer=True)
    empty = {name: torch.empty_like(value) for name, value in wanted.items()}
    found = dist_checkpointing.load(sharded_state_dict(empty, rank, size), str(folder))
    assert found.pop("optimizer")["step"] == 7
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    _read_into_layers(folder, wanted)
    if out is not None:
        _quiet_cuda()
        common = {"optimizer": torch.load(folder / "common.pt")["optimizer"]}
        dist_checkpointing.save({**sharded_state_dict(wanted, rank, size), **common}, str(out))


def _read_into_layers(folder: Path, wanted: dict[str, Tensor]) -> None:
    """Megatron's parallel layers read their slices by the names and axes that they give themselves."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.transformer.transformer_config import TransformerConfig

    size = int(os.environ["WORLD_SIZE"])
    config = TransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=HEADS, use_cpu_initialization=True,
        tensor_model_parallel_size=size, params_dtype=torch.float32, gradient_accumulation_fusion=False,
    )  # fmt: skip
    options = {"config": config, "init_method": config.init_method, "skip_bias_add": False, "bias": True}
    layers = {
        "attn.qkv": tensor_parallel.ColumnParallelLinear(WIDTH, 3 * WIDTH, gather_output=False, **options),
        "attn.proj": tensor_parallel.RowParallelLinear(WIDTH, WIDTH, input_is_parallel=True, **options),
    }
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    described = {}
    for name, layer in layers.items():
        described |= layer.sharded_state_dict(prefix=f"{BLOCK}{name}.", metadata=groups)
    described = {name: value for name, value in described.items() if not name.endswith("_extra_state")}
    found = dist_checkpointing.load(described, str(folder))
    for name in described:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.distributed
@pytest.mark.slow
def test_megatron_reads_it_on_2_processes_and_what_they_write_is_read_back(source, folder, tmp_path):
    out = tmp_path / "trained"
    out.mkdir()
    run_distributed(_with_megatron, 2, folder, out)
    shutil.copy(folder / "univitar.json", out)
    assert len(list(out.glob("*.distcp"))) > 1
    found = read(out)
    assert found.tensors.infos.keys() == source.tensors.infos.keys()
    for name, value in source.tensors.items():
        assert torch.equal(found.tensors[name], value), name
    for kind in ("exp_avg", "exp_avg_sq"):
        got, wanted = getattr(found.optimizer, kind), getattr(source.optimizer, kind)
        assert got.infos == {name: wanted.infos[name] for name in got}
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.distributed
def test_megatron_reads_it_on_4_processes(folder):
    run_distributed(_with_megatron, 4, folder, None)


def test_without_the_extra_one_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.dist_checkpointing", None)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(InstallationError, match=r"pip install 'univitar_ds\[megatron\]'"):
        sharded_state_dict({}, 0, 1)


@pytest.mark.parametrize(
    ("rank", "size", "words"),
    [(2, 2, "from 0 to 1"), (-1, 2, "got -1"), (0, 0, "got 0"), (0, 3, "the 4 heads of the encoder")],
)
def test_impossible_ranks_are_refused(rank, size, words, folder):
    with pytest.raises(ConfigError, match=words):
        load_slices(folder, rank, size)


def test_an_inner_width_that_does_not_divide_is_refused(tmp_path):
    encoder = small_encoder(num_attention_heads=4, intermediate_size=99)
    state = {VISION + name: value for name, value in encoder.state_dict().items()}
    write(StoredModel(Path("x"), "test", encoder.config, Tensors.of(state)), tmp_path)
    with pytest.raises(
        ConfigError, match=r"tp_size 4 does not divide the 66 values of .*mlp\.fc1\.weight along axis 0"
    ):
        load_slices(tmp_path, 0, 4)


def test_a_checkpoint_is_recognized_by_its_files(folder, tmp_path):
    assert recognises(folder)
    assert not recognises(tmp_path)
    assert not recognises(tmp_path / "missing")
    for content in ("", "[]", "7", "{}", '{"format": "pt"}'):
        (folder / "metadata.json").write_text(content)
        assert not recognises(folder), content
    (folder / "metadata.json").write_bytes(b"\xff\xfe")
    assert not recognises(folder)


class _Runs:
    """Unpickling it would call a function."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def _changed(folder: Path, change) -> None:
    """Changes the records of `.metadata`."""
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _place(metadata, name=f"{BLOCK}ls1"):
    return metadata.storage_data[MetadataIndex(name, torch.Size([0]))]


@pytest.mark.parametrize("where", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_pickle_that_names_code_is_refused_with_the_name(where, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if where == ".metadata":
        _changed(folder, lambda metadata: setattr(metadata, "planner_data", _Runs()))
    elif where == "common.pt":
        torch.save({"optimizer": _Runs()}, folder / where)
    else:
        size = (folder / where).stat().st_size
        with (folder / where).open("ab") as file:
            torch.save([_Runs(), torch.zeros(WIDTH)], file)
            length = file.tell() - size
        _changed(folder, lambda metadata: _place(metadata).__dict__.update(offset=size, length=length))
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir"):
        read(folder).tensors[f"{BLOCK}ls1"]
    assert not (tmp_path / "ran").exists()


def test_metadata_may_not_import_even_harmless_names_by_another_path(folder):
    for module, name in (("torch", "load"), ("torch.serialization", "load"), ("builtins", "eval"), ("os", "system")):
        (folder / ".metadata").write_bytes(b"\x80\x02c" + f"{module}\n{name}\n".encode() + b".")
        with pytest.raises(CheckpointError, match=rf"names {module}\.{name}"):
            read(folder)


DAMAGES = {
    "a path out of the folder": (lambda m: _place(m).__dict__.update(relative_path="../secret"), "own folder"),
    "an absolute path": (lambda m: _place(m).__dict__.update(relative_path="/etc/passwd"), "own folder"),
    "a missing file": (lambda m: _place(m).__dict__.update(relative_path="__9_0.distcp"), "__9_0"),
    "bytes beyond the end": (lambda m: _place(m).__dict__.update(offset=10**9), "bytes from 1000000000"),
    "too few bytes": (lambda m: _place(m).__dict__.update(length=3), "3 bytes"),
    "a negative offset": (lambda m: _place(m).__dict__.update(offset=-4), "no lengths"),
    "an extension": (lambda m: _place(m).__dict__.update(transform_descriptors=["zstd"]), "zstd"),
    "a box that is absent": (lambda m: m.state_dict_metadata[f"{BLOCK}ls1"].chunks.clear(), "do not fill"),
    "a box twice": (lambda m: m.state_dict_metadata[f"{BLOCK}ls1"].chunks.append(
        m.state_dict_metadata[f"{BLOCK}ls1"].chunks[0]), "do not fill"),
    "a huge tensor": (lambda m: setattr(m.state_dict_metadata[f"{BLOCK}ls1"], "size", torch.Size([2**50])), "fill"),
    "no places": (lambda m: setattr(m, "storage_data", None), "damaged"),
    "no shapes": (lambda m: setattr(m, "state_dict_metadata", None), "damaged"),
    "a name that is a number": (lambda m: m.state_dict_metadata.update({7: None}), "no name"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), DAMAGES.values(), ids=DAMAGES)
def test_impossible_records_are_refused_before_anything_is_read(change, words, folder):
    _changed(folder, change)
    with pytest.raises(CheckpointError, match=words):
        read(folder)


def test_overlapping_boxes_of_the_right_size_are_refused(folder):
    def overlap(metadata):
        stored = metadata.state_dict_metadata[f"{BLOCK}ls1"]
        place = _place(metadata)
        stored.chunks = [
            dataclasses.replace(stored.chunks[0], offsets=torch.Size([start]), sizes=torch.Size([32]))
            for start in (0, 16)
        ]
        metadata.storage_data |= {MetadataIndex(f"{BLOCK}ls1", torch.Size([start])): place for start in (0, 16)}

    _changed(folder, overlap)
    with pytest.raises(CheckpointError, match="do not fill it once"):
        read(folder)


def test_other_bytes_than_the_tensor_are_refused(folder):
    _changed(folder, lambda m: _place(m).__dict__.update(vars(_place(m, f"{BLOCK}mlp.fc1.bias"))))
    _changed(folder, lambda m: m.state_dict_metadata.pop("text_proj.weight"))
    other = folder / "__0_0.distcp"
    content = bytearray(other.read_bytes())
    content[:400] = bytes(400)
    other.write_bytes(content)
    first = next(iter(read(folder).tensors))
    with pytest.raises(CheckpointError, match="damaged"):
        read(folder).tensors[first]


@pytest.mark.parametrize("seed", range(5))
def test_random_damage_gives_an_error_or_the_model(seed, folder):
    draw = random.Random(seed)
    whole = (folder / ".metadata").read_bytes()
    for _ in range(40):
        content = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(draw.randrange(1, 4)):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
        (folder / ".metadata").write_bytes(content)
        with suppress(CheckpointError):
            read(folder)


def test_moments_without_step_and_groups_are_refused(folder):
    for common in ({}, {"optimizer": {"step": "7", "groups": []}}, {"optimizer": {"step": 7, "groups": [{}]}}, []):
        torch.save(common, folder / "common.pt")
        with pytest.raises(CheckpointError, match="no step and groups"):
            read(folder)


def test_another_format_of_the_tensors_and_a_missing_configuration_are_refused(folder):
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="'zarr', only torch_dist"):
        read(folder)
    (folder / "univitar.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no univitar\.json"):
        read(folder)


def test_weights_that_do_not_fit_the_heads_are_refused(source, tmp_path):
    with pytest.raises(CheckpointError, match="instead of 384 rows"):
        write(dataclasses.replace(source, encoder=dataclasses.replace(source.encoder, hidden_size=128)), tmp_path)


def test_an_object_of_another_program_is_left_alone(source, folder):
    """Megatron stores random states and the like as pickles among the tensors; nothing here opens them."""
    _changed(folder, lambda m: m.state_dict_metadata.update({"rng_state/shard_0_1": BytesStorageMetadata()}))
    _assert_same(read(folder), source)


def test_configuration_objects_are_stored_as_json(source, folder):
    content = json.loads((folder / "univitar.json").read_text())
    assert content == {
        "format": 1, "encoder": source.encoder.to_dict(), "joint": dataclasses.asdict(source.joint)
    }  # fmt: skip
    assert json.loads((folder / "metadata.json").read_text()) == megatron._BACKENDS
