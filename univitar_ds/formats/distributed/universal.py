"""DeepSpeed's universal checkpoints, which DeepSpeed loads on any number of ranks under ZeRO 1, 2 and 3.

    latest_universal                       the name of the newest checkpoint's folder
    univitar.json                          configuration, see `sidecar`; DeepSpeed ignores it
    <tag>/zero/<parameter>/fp32.pt         {"param": weights}; so are exp_avg.pt and exp_avg_sq.pt
    <tag>/zero/<parameter>/step.pt         number of updates, a float32 tensor as in torch's AdamW
    <tag>/zero/optimizer_state.pt          settings of the parameter groups
    <tag>/mp_rank_00_model_states.pt       names, shapes, counters; under ZeRO-3 DeepSpeed reads them from
                                           zero_pp_rank_0_mp_rank_00_model_states.pt, which is the same

An engine with `{"checkpoint": {"load_universal": true}}` continues with `engine.load_checkpoint(folder)`. Its parameter
groups must be those of the stored optimizer, in their order. Limits of loading in DeepSpeed:
- It loads no frozen parameters and no buffers: they must be in the model before `deepspeed.initialize`.
- Under ZeRO-3 it sets every group to the settings of the first, and every step to the first. `write` stores there only
  settings that all groups share, so that each group of the engine keeps the others, such as its weight decay.
- Under ZeRO-3 all groups share one step tensor, which torch's AdamW increments once per group. After loading, give each
  group its own: `for state in engine.optimizer.optimizer.state.values(): state["step"] = state["step"].clone()`.
- The folder has no state of a scheduler: an engine with a scheduler needs `load_lr_scheduler_states=False`.

`read` also reads what DeepSpeed's own `ds_to_universal` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from univitar_ds.atomic_write import replace_text, replacing
from univitar_ds.errors import CheckpointError, writing
from univitar_ds.formats.configuration import (
    Configuration,
    canonical_names,
    find_configuration,
    whole_or_encoder,
)
from univitar_ds.formats.distributed.deepspeed import (
    group_names,
    load_pt,
    plain,
    settings,
    size,
    tag_folder,
    understanding,
)
from univitar_ds.formats.sidecar import SIDECAR, write_sidecar
from univitar_ds.formats.stored_model import MOMENTS, OptimizerState, StoredModel, TensorInfo, Tensors
from univitar_ds.formats.weight_files import save_pt, some
from univitar_ds.owned import Names

LATEST = "latest_universal"
ZERO = "zero"
OPTIMIZER = "optimizer_state.pt"
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
FILES: Names = {
    re.escape(LATEST): None,
    re.escape(SIDECAR): None,
    r"global_step\d+": {
        "|".join(map(re.escape, MODEL_FILES)): None,
        ZERO: {re.escape(OPTIMIZER): None, r"[\w.]+": {r"(fp32|exp_avg|exp_avg_sq|step)\.pt": None}},
    },
}
"""All entries that `write` makes."""
LAYOUT = "0.19.8"
"""The version of DeepSpeed that `write` follows. DeepSpeed refuses checkpoints without a version."""


def recognises(folder: Path) -> bool:
    """Returns whether `folder` is a universal checkpoint of DeepSpeed, or contains some and `latest_universal`."""
    try:
        return (tag_folder(folder, LATEST) / ZERO / OPTIMIZER).is_file()
    except (CheckpointError, OSError):
        return False


def read(
    folder: Path,
    config_folder: Path | None = None,
    *,
    configuration: Configuration | None = None,
    heads: int | None = None,
) -> StoredModel:
    """Returns the model in a folder with `latest_universal`, or in one of its checkpoints. Tensors are read when
    accessed. Arguments, result and errors are those of `deepspeed.read`."""
    tag = tag_folder(folder, LATEST)
    source = _Source(tag)
    renamed = canonical_names(source.infos, tag)
    tensors = source.tensors("fp32").renamed(renamed)
    encoder, joint = find_configuration(tensors.infos, (tag, tag.parent), config_folder, heads, configuration)
    optimizer = source.optimizer()
    if optimizer is not None:
        groups = [{**group, "params": [renamed(name) for name in group["params"]]} for group in optimizer.groups]
        moments = (optimizer.exp_avg.renamed(renamed), optimizer.exp_avg_sq.renamed(renamed))
        optimizer = OptimizerState(optimizer.step, *moments, groups)
    origin = {"path": str(tag), "step": source.global_steps}
    return whole_or_encoder(StoredModel(tag, "universal", encoder, tensors, joint, optimizer, origin))


def write(model: StoredModel, folder: Path) -> None:
    """Writes a universal checkpoint with `latest_universal`, one tensor at a time.

    Floating-point weights are written as float32. Without an optimizer's state, the moments and steps of all tensors
    are zeros, as at the start of AdamW.
    Raises: StorageError if the folder cannot be written; CheckpointError if a tensor's name cannot be a folder's.
    """
    state = model.optimizer
    step = 0 if state is None else state.step
    tag = folder / f"global_step{step}"
    floating = [name for name, info in model.tensors.infos.items() if info.dtype.is_floating_point]
    # A group for each parameter: DeepSpeed ignores groups beyond those of the engine, whose number is unknown here.
    trained = [{"params": [name]} for name in floating] if state is None else state.groups
    step_of = {name: group.get("step", step) for group in trained for name in group["params"]}
    with writing(folder):
        (tag / ZERO).mkdir(parents=True)
    for name in model.tensors:
        if Path(name).name != name or name == "..":
            raise CheckpointError(f"the tensor's name {name!r} cannot be the name of a folder")
        with writing(tag):
            (tag / ZERO / name).mkdir()
        weights = model.tensors[name]
        _save({"param": weights.float() if weights.is_floating_point() else weights}, tag / ZERO / name / "fp32.pt")
        if name in step_of:
            for kind in MOMENTS:
                moment = torch.zeros_like(weights) if state is None else getattr(state, kind)[name]
                _save({"param": moment.float()}, tag / ZERO / name / f"{kind}.pt")
            _save(torch.tensor(float(step_of[name])), tag / ZERO / name / "step.pt")
        del weights
    _save(_optimizer_content(trained, step), tag / ZERO / OPTIMIZER)
    for name in MODEL_FILES:
        _save(_model_content(model, trained, step), tag / name)
    write_sidecar(model, folder)
    replace_text(folder / LATEST, tag.name)


def _optimizer_content(groups: list[dict[str, Any]], step: int) -> dict[str, Any]:
    own = [{**settings(group), "params": [index]} for index, group in enumerate(groups)]
    shared = {
        key: value for key, value in settings(groups[0]).items() if all(group.get(key) == value for group in groups)
    }
    shared = {key: value for key, value in shared.items() if key != "step"}
    return {
        "ds_version": LAYOUT,
        "param_groups": [{key: value for key, value in group.items() if key != "step"} for group in own],
        "optimizer_state_dict": {
            "state": {0: {"step": torch.tensor(float(step))}},
            "param_groups": [{**shared, "params": [0]}],
        },
    }


def _model_content(model: StoredModel, groups: list[dict[str, Any]], step: int) -> dict[str, Any]:
    infos = model.tensors.infos
    return {
        "module": {name: torch.empty(0) for name in infos},  # DeepSpeed reads the weights from the folder `zero`
        "buffer_names": [],
        "param_shapes": [{name: torch.Size(infos[name].shape) for name in group["params"]} for group in groups],
        "shared_params": {},
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": step,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": LAYOUT,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }


def _save(content: Any, path: Path) -> None:
    if isinstance(content, dict) and "param" in content:
        content["param"] = content["param"].contiguous()
    with replacing(path) as partial:
        save_pt(content, partial)


class _Source:
    """A universal checkpoint's files; names are those in the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._zero = folder / ZERO
        model_file = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
        if not (self._zero / OPTIMIZER).is_file() or model_file is None:
            raise CheckpointError(f"{folder} lacks {ZERO}/{OPTIMIZER} or {MODEL_FILES[0]}; name a universal checkpoint")
        content = load_pt(model_file)
        with understanding(model_file):
            self._shapes = [{name: size(shape) for name, shape in group.items()} for group in content["param_shapes"]]
            self.global_steps = int(content.get("global_steps", 0))
            order, frozen = list(content["module"]), list(content.get("frozen_param_shapes") or {})
        flat = {name: shape for group in self._shapes for name, shape in group.items()}
        folders = sorted(path.name for path in self._zero.iterdir() if (path / "fp32.pt").is_file())
        if lacking := sorted({*flat, *frozen} - set(folders)):
            raise CheckpointError(
                f"{self._zero} lacks {some(lacking)}; fetch it again. DeepSpeed leaves out frozen parameters of stage "
                "3: read its own checkpoint, from which this one was made."
            )
        names = [name for name in dict.fromkeys([*order, *flat, *folders]) if name in folders]
        self.infos = {name: self._info(name, "fp32", flat.get(name)) for name in names}
        self._moments = {
            kind: {
                name: self._info(name, kind, self.infos[name].shape)
                for name in self.infos
                if (self._zero / name / f"{kind}.pt").is_file()
            }
            for kind in MOMENTS
        }

    def tensors(self, kind: str) -> Tensors:
        """Returns weights (`kind` "fp32") or a moment."""
        infos = self.infos if kind == "fp32" else self._moments[kind]
        return Tensors(infos, lambda name: self._stored(name, kind).reshape(infos[name].shape).clone())

    def optimizer(self) -> OptimizerState | None:
        """Returns the optimizer's state; None if a moment of a trained parameter is missing."""
        path = self._zero / OPTIMIZER
        content = load_pt(path)
        with understanding(path):
            common = content.get("optimizer_state_dict", {}).get("state", {}).get(0, {}).get("step", 0)
            groups = [dict(group) for group in content["param_groups"]]
            names = group_names([group["params"] for group in groups], self._shapes)
        if not any("lr" in group for group in groups):  # written without an optimizer's state
            return None
        if any(name not in self._moments[kind] for members in names for name in members for kind in MOMENTS):
            return None
        kept = []
        for group, members in zip(groups, names, strict=True):
            if members:
                kept.append({**settings(group), "step": self._step(members[0], common), "params": members})
        step = max((group["step"] for group in kept), default=0)
        return OptimizerState(step, self.tensors("exp_avg"), self.tensors("exp_avg_sq"), kept)

    def _step(self, name: str, common: Any) -> int:
        path = self._zero / name / "step.pt"
        with understanding(path):
            return int(load_pt(path) if path.is_file() else common)

    def _info(self, name: str, kind: str, shape: tuple[int, ...] | None) -> TensorInfo:
        stored = self._stored(name, kind)
        if shape is not None and stored.numel() != math.prod(shape):
            raise CheckpointError(f"{name}/{kind}.pt has {stored.numel()} values for the shape {shape}; fetch it again")
        return TensorInfo(tuple(stored.shape) if shape is None else shape, stored.dtype)

    def _stored(self, name: str, kind: str) -> Tensor:
        path = self._zero / name / f"{kind}.pt"
        content = load_pt(path)
        with understanding(path):
            # DeepSpeed writes a flat tensor alone for checkpoints of stage 3.
            return plain(content["param"] if isinstance(content, Mapping) else content, name)
