"""Checkpoints of `torch.distributed.checkpoint` (DCP), of any number of ranks, read one tensor at a time.

    .metadata        names, shapes and places of everything, a pickle
    __0_0.distcp     tensors and values, each as by `torch.save`
    univitar.json    configuration, see `sidecar`; DCP ignores it

`write` stores {"model": state dict, "optimizer": what `get_optimizer_state_dict` returns}, so a torch program reads it
with `dcp.load({"model": model.state_dict()}, checkpoint_id=folder)`. `read` also reads checkpoints of other programs,
with the tensors of this project's model below any prefix.

The files are read by `dcp_files`, which rejects a pickle that could run code.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from univitar_ds.errors import writing
from univitar_ds.formats.configuration import (
    Configuration,
    canonical_names,
    find_configuration,
    whole_or_encoder,
)
from univitar_ds.formats.distributed.dcp_files import METADATA, DcpFiles, StandIns
from univitar_ds.formats.sidecar import SIDECAR, write_sidecar
from univitar_ds.formats.stored_model import MOMENTS, VISION, OptimizerState, StoredModel, Tensors
from univitar_ds.formats.weight_files import remembering
from univitar_ds.owned import Names

MODEL, OPTIMIZER, STATE, GROUPS = "model", "optimizer", "state", "param_groups"
FILES: Names = {r"\.metadata(\.tmp)?": None, r"__\d+_\d+\.distcp": None, re.escape(SIDECAR): None}
"""All entries that `write` makes."""
DEFAULTS: dict[str, Any] = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
    "decoupled_weight_decay": True,
}  # fmt: skip
"""Settings that torch's AdamW has in its state and that other formats may lack."""


_PATHS: StandIns = {
    (module, name): "" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")
}
"""Names in `.metadata` of checkpoints that torch's own writer has written."""


def recognises(folder: Path) -> bool:
    """Returns whether `folder` is a checkpoint of DCP."""
    try:
        return (folder / METADATA).is_file()
    except OSError:
        return False


def read(
    folder: Path,
    config_folder: Path | None = None,
    *,
    configuration: Configuration | None = None,
    heads: int | None = None,
) -> StoredModel:
    """Returns the model in a checkpoint. Tensors are read when accessed.

    Without a configuration of the whole model the result is the encoder alone. `optimizer` is None unless both moments
    and the parameter groups of the trained parameters are stored in the layout of `get_optimizer_state_dict`.

    Args: config_folder: folder with the configuration, see `configuration.find_configuration`; configuration: the
        configuration itself, instead of a folder; heads: number of the encoder's attention heads, if there is neither.
    Raises: CheckpointError if files are missing, damaged, of another model, or do not fit the configuration.
    """
    source = _Source(folder)
    moments = {name for name, path in source.paths.items() if STATE in path[:-1]}
    weights = source.tensors().renamed(lambda name: None if name in moments else name)
    renamed = canonical_names(weights, folder)
    tensors = weights.renamed(renamed)
    encoder, joint = find_configuration(tensors.infos, (folder,), config_folder, heads, configuration)

    def member(name: str) -> str | None:
        """Returns the canonical name of a parameter that the optimizer names."""
        return next((found for found in (name, VISION + name, renamed(name)) if found in tensors), None)

    optimizer = source.optimizer(member)
    return whole_or_encoder(
        StoredModel(folder, "dcp", encoder, tensors, joint, optimizer, {"path": str(folder)}),
    )


def write(model: StoredModel, folder: Path) -> None:
    """Writes a checkpoint, one file per tensor, with one tensor in memory at a time.

    Raises: StorageError if the folder cannot be written.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystem

    tensors, state = _state_dict(model)

    class Planner(DefaultSavePlanner):
        """Reads each tensor when it is written. The state dict has tensors without values."""

        def lookup_object(self, index: Any) -> Any:
            return tensors[index.fqn]() if index.fqn in tensors else super().lookup_object(index)

    class Files(FileSystem):
        @contextmanager
        def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[bytes]]:
            with super().create_stream(path, mode) as file, remembering(file) as stream:
                yield stream

    class Writer(dcp.FileSystemWriter):
        def storage_meta(self) -> None:
            """Leaves out the folder's path on this machine."""

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # A file of several tensors would be held in memory as a whole.
        writer = Writer(folder, single_file_per_rank=False, sync_files=False)
        writer.fs = Files()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
                dcp.save(state, storage_writer=writer, planner=Planner(), no_dist=True)
        except dcp.CheckpointException as error:  # wraps the error of each rank
            for failure in error.failures.values():
                raise failure[0] from error
            raise
    write_sidecar(model, folder)


def _state_dict(model: StoredModel) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Any]]:
    """Returns functions that read the tensors, by name in the checkpoint, and the state dict without values."""
    readers: dict[str, Callable[[], Tensor]] = {}

    def empty(tensors: Tensors, name: str, path: str) -> Tensor:
        readers[path] = lambda: tensors[name].contiguous()
        return torch.empty(tensors.infos[name].shape, dtype=tensors.infos[name].dtype, device="meta")

    state: dict[str, Any] = {MODEL: {name: empty(model.tensors, name, f"{MODEL}.{name}") for name in model.tensors}}
    if model.optimizer is not None:
        moments = {kind: getattr(model.optimizer, kind) for kind in MOMENTS}
        step_of = {
            name: float(group.get("step", model.optimizer.step))
            for group in model.optimizer.groups
            for name in group["params"]
        }
        entries: dict[str, dict[str, Tensor]] = {}
        for name in model.optimizer.exp_avg:
            path = f"{OPTIMIZER}.{STATE}.{name}"
            entries[name] = {kind: empty(moments[kind], name, f"{path}.{kind}") for kind in MOMENTS}
            entries[name]["step"] = torch.tensor(step_of[name])
        groups = [
            {**DEFAULTS, **{key: value for key, value in group.items() if key != "step"}}
            for group in model.optimizer.groups
        ]
        state[OPTIMIZER] = {STATE: entries, GROUPS: groups}
    return readers, state


class _Source(DcpFiles):
    """A checkpoint with the layout of a state dict."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, _PATHS)

    def optimizer(self, member: Callable[[str], str | None]) -> OptimizerState | None:
        """Returns the optimizer's state; None if a moment or the groups are missing.

        Args: member: returns the canonical name of a parameter, None if there is none."""
        entries: dict[str, dict[str, str]] = {kind: {} for kind in (*MOMENTS, "step")}
        values: dict[int, dict[str, Any]] = {}
        for name, path in self.paths.items():
            if STATE in path[:-2] and path[-1] in entries and (found := member(str(path[-2]))):
                entries[path[-1]][found] = name
            elif GROUPS in path[:-2] and isinstance(path[-2], int):
                values.setdefault(path[-2], {})[str(path[-1])] = self.value(name)
        groups = []
        for _, group in sorted(values.items()):
            names = [found for name in group.get("params") or () if (found := member(str(name)))]
            if not all(name in entries[kind] for name in names for kind in MOMENTS):
                return None
            if names:
                step = int(self.value(entries["step"][names[0]])) if names[0] in entries["step"] else 0
                groups.append({**group, "step": step, "params": names})
        if not groups:
            return None
        stored = self.tensors()
        moments = [
            Tensors(
                {name: self.infos[place] for name, place in entries[kind].items()},
                lambda name, kind=kind: stored[entries[kind][name]],
            )
            for kind in MOMENTS
        ]
        return OptimizerState(max(group["step"] for group in groups), *moments, groups)
