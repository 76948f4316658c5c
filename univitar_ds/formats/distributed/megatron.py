"""Checkpoints of Megatron-Core's `dist_checkpointing`, in its format torch_dist, for training with tensor parallelism.

A folder holds `__*.distcp` with the tensors, `.metadata` with their places, `common.pt` with the optimizer's step and
groups, `metadata.json` with the name of the format, and `univitar.json` with the configuration. Tensors have the names
of `StoredModel`, moments the same names after "optimizer.state.exp_avg." and "optimizer.state.exp_avg_sq.", as
Megatron's optimizer names them. Any number of processes can read the folder, each its own slices, and write one.

Slices of tensor parallelism are equal contiguous parts along one axis:

    encoder, in each block                                axis
    attn.qkv.weight, attn.qkv.bias                        0, whole heads; the rows are (head, q or k or v, K)
    attn.q_norm.weight, attn.k_norm.weight                0, whole heads
    attn.proj.weight                                      1, whole heads
    mlp.fc1, mlp.fc3: weight, bias; mlp.norm.weight       0
    mlp.fc2.weight                                        1
    text tower, in each layer
    self_attn.q_proj, k_proj, v_proj: weight, bias        0, whole heads
    self_attn.out_proj.weight                             1, whole heads
    mlp.fc1: weight, bias                                 0
    mlp.fc2.weight                                        1

All others are whole on every rank. The rows of attn.qkv are stored head by head, as Megatron's linear_qkv has them, so
that a slice has q, k and v of its heads; `read` restores the order (q or k or v, head, K). In a module, attn.qkv,
mlp.fc1 and mlp.fc3 are column-parallel, attn.proj and mlp.fc2 row-parallel. attn.q_norm, attn.k_norm and mlp.norm are
over the whole width: the ranks must add their sums of squares before they divide.

    from megatron.core import dist_checkpointing
    slices = load_slices(folder, tp_rank, tp_size)                        # to train with
    dist_checkpointing.save(sharded_state_dict(slices, tp_rank, tp_size, dp_rank), out)   # and univitar.json beside it

Reading and writing need neither Megatron nor a process group: Megatron's own writer needs a GPU and holds the whole
model in memory.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from univitar_ds.config.encoder import EncoderConfig, read_object
from univitar_ds.errors import CheckpointError, ConfigError, writing
from univitar_ds.extras import extra
from univitar_ds.formats.distributed.dcp_files import DCP, METADATA, DcpFiles, StandIns
from univitar_ds.formats.sidecar import SIDECAR, read_sidecar, write_sidecar
from univitar_ds.formats.stored_model import MOMENTS, JointConfig, OptimizerState, StoredModel, Tensors
from univitar_ds.formats.weight_files import load_plain, remembering, save_pt
from univitar_ds.owned import Names
from univitar_ds.regular_files import read_utf8

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedTensor

FORMAT = "megatron"
BACKEND = "metadata.json"
COMMON = "common.pt"
DATA = "__0_0.distcp"
FILES: Names = {"|".join(map(re.escape, (BACKEND, METADATA, COMMON, DATA, SIDECAR))): None}
"""All entries that `write` makes."""
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Content of `metadata.json`."""
OPTIMIZER = "optimizer."
"""Prefix of the optimizer's tensors. Those of other states than the moments are not read."""
_MOMENTS = {kind: f"{OPTIMIZER}state.{kind}." for kind in MOMENTS}
_MOMENT = re.compile(r"optimizer\.state\.\w+\.")
_VISION = r"vision\.encoder\.layers\.\d+\."
_TEXT = r"text\.model\.(\w+\.)*layers\.\d+\."
_QKV = re.compile(rf"{_VISION}attn\.qkv\.(weight|bias)")
_SPLIT = {
    0: re.compile(
        rf"{_VISION}(attn\.(qkv\.(weight|bias)|[qk]_norm\.weight)|mlp\.(fc[13]\.(weight|bias)|norm\.weight))|"
        rf"{_TEXT}(self_attn\.[qkv]_proj|mlp\.fc1)\.(weight|bias)"
    ),
    1: re.compile(rf"{_VISION}(attn\.proj|mlp\.fc2)\.weight|{_TEXT}(self_attn\.out_proj|mlp\.fc2)\.weight"),
}
"""Names of the tensors that are split along each axis."""
_PLANS: StandIns = {
    **{
        (f"{DCP}.planner", name): name
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    },
    (f"{DCP}.filesystem", "_StoragePrefix"): "_StoragePrefix",
}
"""Names in `.metadata` of checkpoints that Megatron-Core has written."""


def recognises(folder: Path) -> bool:
    """Returns whether the files of `folder` are those of a Megatron-Core checkpoint. Never raises."""
    try:
        return (folder / METADATA).is_file() and "sharded_backend" in json.loads(read_utf8(folder / BACKEND))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def read(folder: Path) -> StoredModel:
    """Returns the model in `folder`, whichever number of processes has written it. Tensors are read when accessed.

    Raises: CheckpointError if the folder is damaged, lacks `univitar.json`, or has a pickle that names anything but the
        records of a checkpoint.
    """
    folder = Path(folder)
    encoder, joint = read_sidecar(folder)
    stored = _open(folder)
    weights = stored.renamed(lambda name: None if name.startswith(OPTIMIZER) else name)
    moments = [
        _split_qkv(stored.renamed(lambda name, prefix=prefix: _after(name, prefix)), encoder)
        for prefix in _MOMENTS.values()
    ]
    optimizer = None
    if any(moments):
        common = _read_common(folder)
        optimizer = OptimizerState(common["step"], *moments, common["groups"])
    return StoredModel(folder, FORMAT, encoder, _split_qkv(weights, encoder), joint, optimizer)


def write(model: StoredModel, folder: Path) -> None:
    """Writes a model to `folder`, which is new or empty. One tensor is in memory at a time.

    Raises: StorageError if the folder cannot be written; CheckpointError if attn.qkv does not fit the configuration.
    """
    folder = Path(folder)
    parts = {"": model.tensors}
    common: dict[str, Any] = {}
    if model.optimizer is not None:
        parts |= {prefix: getattr(model.optimizer, kind) for kind, prefix in _MOMENTS.items()}
        common["optimizer"] = {"step": model.optimizer.step, "groups": model.optimizer.groups}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shapes: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        with (folder / DATA).open("wb") as opened, remembering(opened) as file:
            for prefix, tensors in parts.items():
                tensors = _by_head(tensors, model.encoder)
                for name, info in tensors.infos.items():
                    size, offsets = torch.Size(info.shape), torch.Size([0] * len(info.shape))
                    chunks = [ChunkStorageMetadata(offsets, size)]
                    shapes[prefix + name] = TensorStorageMetadata(TensorProperties(dtype=info.dtype), size, chunks)
                    start = file.tell()
                    torch.save(_compact(tensors[name]), file)
                    index = MetadataIndex(prefix + name, offsets)
                    places[index] = _StorageInfo(DATA, start, file.tell() - start)
        save_pt(common, folder / COMMON)
        metadata = Metadata(shapes, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")
        (folder / METADATA).write_bytes(pickle.dumps(metadata))
        write_sidecar(model, folder)
        (folder / BACKEND).write_text(json.dumps(_BACKENDS), encoding="utf-8")


def load_slices(folder: str | Path, tp_rank: int, tp_size: int, *, optimizer: bool = False) -> dict[str, Tensor]:
    """Returns the slices of one rank of tensor parallelism, by name, on the CPU; see the table of this module.

    Only one whole tensor is in memory at a time. A process group is not needed.

    Args: tp_rank, tp_size: rank and number of ranks; optimizer: whether to return the slices of the moments as well,
        with the prefixes of the checkpoint.
    Raises: ConfigError if `tp_size` does not divide the heads or a split width; CheckpointError as `read`.
    """
    folder = Path(folder)
    if not 0 <= tp_rank < tp_size:
        raise ConfigError(f"tp_rank must be from 0 to {tp_size - 1} with tp_size {tp_size}, got {tp_rank}")
    encoder, joint = read_sidecar(folder)
    _check_heads(tp_size, encoder, joint)
    stored = _open(folder)
    slices = {}
    for name, info in stored.infos.items():
        if name.startswith(OPTIMIZER) and not (optimizer and name.startswith(tuple(_MOMENTS.values()))):
            continue
        axis = split_axis(name)
        if axis is None:
            slices[name] = stored[name]
            continue
        width, rest = divmod(info.shape[axis], tp_size)
        if rest:
            raise ConfigError(
                f"tp_size {tp_size} does not divide the {info.shape[axis]} values of {name} along axis {axis}; choose "
                "a divisor"
            )
        slices[name] = stored[name].narrow(axis, tp_rank * width, width).clone(memory_format=torch.contiguous_format)
    return slices


def split_axis(name: str) -> int | None:
    """Returns the axis along which a tensor or its moments are split, None if every rank has the whole tensor."""
    name = _MOMENT.sub("", name, count=1) if name.startswith(OPTIMIZER) else name
    return next((axis for axis, names in _SPLIT.items() if names.fullmatch(name)), None)


def sharded_state_dict(
    slices: Mapping[str, Tensor], tp_rank: int, tp_size: int, dp_rank: int = 0
) -> dict[str, ShardedTensor]:
    """Returns Megatron's descriptions of slices, for its `dist_checkpointing.save` and `load`.

    Args: slices: tensors as `load_slices` returns them; dp_rank: rank among the processes with equal slices.
    Raises: InstallationError without the extra `megatron`.
    """
    with extra("megatron"):
        from megatron.core.dist_checkpointing import ShardedTensor
    described = {}
    for name, tensor in slices.items():
        axis = split_axis(name)
        parts = () if axis is None else ((axis, tp_rank, tp_size),)
        replica = (0, tp_rank if axis is None else 0, dp_rank)
        described[name] = ShardedTensor.from_rank_offsets(name, tensor, *parts, replica_id=replica)
    return described


def _check_heads(tp_size: int, encoder: EncoderConfig, joint: JointConfig | None) -> None:
    towers = {"encoder": encoder.num_attention_heads}
    if joint is not None:
        towers["text tower"] = joint.text.get("num_attention_heads")
    for tower, heads in towers.items():
        if not isinstance(heads, int) or heads % tp_size:
            raise ConfigError(f"tp_size {tp_size} does not divide the {heads} heads of the {tower}; choose a divisor")


def _open(folder: Path) -> Tensors:
    """Returns all tensors of a checkpoint as they are stored. Raises: CheckpointError."""
    backend = read_object(folder / BACKEND)
    if backend.get("sharded_backend") != "torch_dist":
        raise CheckpointError(
            f"{folder / BACKEND} has sharded_backend {backend.get('sharded_backend')!r}, only torch_dist can be read; "
            "save the checkpoint with torch_dist"
        )
    return DcpFiles(folder, _PLANS).tensors()


def _read_common(folder: Path) -> dict[str, Any]:
    """Returns step and groups of the optimizer. Raises: CheckpointError."""
    path = folder / COMMON
    common = load_plain(path, path)
    state = common.get("optimizer") if isinstance(common, dict) else None
    step, groups = (state.get(name) for name in ("step", "groups")) if isinstance(state, dict) else (None, None)
    if type(step) is not int or not isinstance(groups, list) or not all(map(_is_group, groups)):
        raise CheckpointError(
            f"{path} has no step and groups of an optimizer, although there are moments; remove the tensors of the "
            "optimizer, or save its state as {'optimizer': {'step': ..., 'groups': [...]}}"
        )
    return {"step": step, "groups": groups}


def _is_group(group: Any) -> bool:
    names = group.get("params") if isinstance(group, dict) else None
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _after(name: str, prefix: str) -> str | None:
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def _split_qkv(stored: Tensors, config: EncoderConfig) -> Tensors:
    """Returns tensors with attn.qkv in the order (q or k or v, head, K), from (head, q or k or v, K)."""
    return _reordered(stored, config, lambda rows: rows.unflatten(0, (config.num_attention_heads, 3, -1)))


def _by_head(tensors: Tensors, config: EncoderConfig) -> Tensors:
    """Returns tensors with attn.qkv in the order (head, q or k or v, K), from (q or k or v, head, K)."""
    return _reordered(tensors, config, lambda rows: rows.unflatten(0, (3, config.num_attention_heads, -1)))


def _reordered(tensors: Tensors, config: EncoderConfig, cut: Any) -> Tensors:
    rows = 3 * config.hidden_size
    for name, info in tensors.infos.items():
        if _QKV.fullmatch(name) and info.shape[:1] != (rows,):
            raise CheckpointError(
                f"{name} has the shape {info.shape} instead of {rows} rows; use weights and configuration of one model"
            )

    def read_one(name: str) -> Tensor:
        tensor = tensors[name]
        return cut(tensor).transpose(0, 1).flatten(0, 2) if _QKV.fullmatch(name) else tensor

    return Tensors(tensors.infos, read_one)


def _compact(tensor: Tensor) -> Tensor:
    """Returns a tensor whose storage has its values only, since torch.save writes whole storages."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
