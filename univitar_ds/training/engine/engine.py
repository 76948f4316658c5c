"""DeepSpeed behind a small interface: only this file and `zero3.py` of the trainer import DeepSpeed.

This file handles six behaviours of DeepSpeed, most of which would give wrong results without an error:
- DeepSpeed averages gradients over ranks and over accumulation. The loss is already divided by a global count, so
  `backward` undoes both averages.
- Under ZeRO-3 a parameter that a step does not use is updated again with its previous gradient, so `zero_grad` clears
  the gradients of the last step.
- Under ZeRO-3 a weight is gathered only while the module that owns it runs. The `external_parameters` of a module are
  gathered with the module's own weights, in forward and in backward.
- If `module(...)` is called instead of `engine(...)`, a second pack overwrites the gradients of the first pack.
- DeepSpeed treats two backward passes without a forward pass between them as one: under ZeRO-3 the gradients of the
  second replace those of the first. `backward` marks each as new.
- DeepSpeed's checkpoints load only on the same number of ranks, so `training/checkpoint/sharded.py` writes the shards
  of this rank, which `pieces` returns.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import math
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from univitar_ds.config.deepspeed import OFFLOADED_OPTIMIZER, SHARDING, on_disk
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.errors import ConfigError, InstallationError
from univitar_ds.extras import extra
from univitar_ds.formats.elastic import EMA, FROZEN, MASTER
from univitar_ds.formats.slices import Slice
from univitar_ds.locked_folder import LockedFolder
from univitar_ds.training.distributed.groups import Groups, ModelParallel
from univitar_ds.training.distributed.process_group import World, all_ranks_or_none, uses_cuda
from univitar_ds.training.engine.compiled_ops import prepare_extensions
from univitar_ds.training.engine.device_waits import NO_TIMERS, NormReader, order_streams, streams_in_order
from univitar_ds.training.engine.disk import OnDisk, check_space, folder_for, with_folder
from univitar_ds.training.engine.free_engine import free_engine
from univitar_ds.training.engine.memory import memory_by_part
from univitar_ds.training.engine.node_sharding import Sharding, sharding_of
from univitar_ds.training.engine.optim import (
    GRADIENT_PARTS,
    build_optimizer,
    counted_updates,
    moments_of,
    part_of,
    put_unaligned_last,
    set_learning_rate,
    settings,
)
from univitar_ds.training.engine.zero3 import Blocks, cut_for_all_ranks
from univitar_ds.training.optimizers.elementwise import new_moment
from univitar_ds.training.optimizers.matrices import part_of_matrix
from univitar_ds.training.optimizers.muon import MatricesAndAdamW
from univitar_ds.training.watch.phases import BACKWARD, FORWARD, OPTIMIZER, phase

OWN_OPTIMIZER = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
"""Settings that keep torch's AdamW if the optimizer is offloaded, so that results do not depend on offloading."""

UNUSED_OPERATION = "deepspeed_shm_comm"
"""An operation that DeepSpeed compiles and starts on CPU ranks, although only tensor-parallel inference needs it.

The operation leaves 67 MB per rank in /dev/shm after each run, and ranks die of SIGBUS if /dev/shm is full.
"""


@dataclass(frozen=True)
class ParamShard:
    """The part of one parameter that a rank owns, as flat views of the same length that begin at element `start`.

    `shape` is that of the whole parameter, also with tensor parallelism.
    `tensors` has the keys `fp32`, the moments and, if an average is kept, `ema`; a frozen parameter has only `frozen`.
    Writing into the views changes the training state, except the working copy of the weights, which
    `Engine.refresh_params` updates.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]
    written: bool = True
    """Whether this rank writes it to checkpoints. False: another rank writes the same elements."""
    slice: Slice | None = None
    """The tensor-parallel slice of which it is a part; `start` then counts the elements of the slice. None: it is a
    part of the whole parameter."""

    @property
    def length(self) -> int:
        """Number of elements of each view."""
        return next(iter(self.tensors.values())).numel()


class Engine:
    """A model under ZeRO 1, 2 or 3 with its optimizer. Built by `build_engine`."""

    def __init__(
        self,
        engine: Any,
        world: World,
        cfg: OptimizerConfig,
        exact: Mapping[str, Tensor] | None = None,
        sharding: Sharding | None = None,
        groups: Groups | None = None,
        folder: LockedFolder | None = None,
    ) -> None:
        """Args: engine: DeepSpeed's; exact: float32 values of the model's `exact_parameters`, which DeepSpeed has
        rounded to bfloat16; sharding: None: over all ranks; groups: None: no tensor and no sequence parallelism;
        folder: of this rank's files if the optimizer is on a disk."""
        self._engine = engine
        self._cfg = cfg
        self._ema_decay = cfg.ema_decay
        self._optimizer = engine.optimizer
        self._sharded = engine.zero_optimization_stage() == 3
        self.world = world
        self.groups = groups or Groups.alone(world)
        self._sharding = sharding or Sharding(world.rank, world.size)
        self.gradient_squares: dict[str, float] = {}
        """Sum of squares of this rank's share of the gradient before clipping, for each of GRADIENT_PARTS, in the last
        step with `read_gradient`.

        The sum over all parts and ranks is the square of `grad_norm`.
        """
        self.reported: list[float] = []
        """The values of `report` in the last `step`, read together with the gradient's norm."""
        self.initial: dict[str, float] = {}
        """The initial values of moments, by name."""
        self._read_gradient = False
        self._closed = False
        self._disk = None if folder is None else OnDisk(self._optimizer, folder)
        self._make_moments()
        self._place_matrices()
        self._exact = self._exact_masters(exact or {})
        self._share_exact()
        self._norm_reader: NormReader | None = None
        offload = engine.zero_offload_optimizer()
        if offload is None or offload.device == "none":  # an offloaded optimizer reads gradients on the host
            self._norm_reader = NormReader(self._optimizer, self._sharded)
            order_streams(self._optimizer, _accelerator())

    @property
    def module(self) -> nn.Module:
        """The model, for its names and buffers. Forward passes must call the engine."""
        return self._engine.module

    @property
    def disk(self) -> Path | None:
        """This rank's folder on the disk that has its optimizer states; None if they are in memory."""
        return None if self._disk is None else self._disk.folder.path

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the forward pass."""
        return torch.bfloat16 if self._engine.bfloat16_enabled() else torch.float32

    def __call__(self, *inputs: Tensor) -> Any:
        """Runs the forward pass of the model."""
        with phase(FORWARD):
            return self._engine(*inputs)

    def zero_grad(self, lr: float, *, read_gradient: bool = False) -> None:
        """Sets the learning rate and clears all gradients. Must be called before the first backward pass of every step.

        Args:
            lr: learning rate of the stage.
            read_gradient: whether this step fills `gradient_squares`, which reads this rank's share of the gradient
                once more.
        """
        self._read_gradient = read_gradient
        set_learning_rate(self._optimizer.param_groups, lr)
        if not self._sharded:
            return  # stages 1 and 2 build new gradients, zeros for unused parameters
        self._optimizer.grad_partitions_flat_buffer.zero_()
        for flat in self._optimizer.fp32_partitioned_groups_flat:
            if flat.grad is not None:  # partitions of an offloaded optimizer persist
                flat.grad.zero_()

    def backward(self, surrogate: Tensor) -> None:
        """Accumulates the gradient of `surrogate`, a scalar whose gradient is one pack's part of that of the loss.
        Gradients are summed over packs and ranks.

        The forward passes of several packs may come before the backward pass of the first; see `HookCounts`.
        """
        self._optimizer.clear_backward_seen_flag()  # only `forward` calls it otherwise
        with phase(BACKWARD), self._streams_in_order():
            self._engine.backward(surrogate * self._sharding.size, scale_wrt_gas=False)

    def step(self, report: Tensor | None = None) -> None:
        """Must be called after every pack. The last call of a step updates the parameters and their average.

        Args: report: (n,) numbers of the step on the device, in the last call only. They are copied to `reported`
        together
            with the norm, since the device runs out of work during each wait for it.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        with phase(OPTIMIZER):
            self._update(report)

    def _update(self, report: Tensor | None) -> None:
        self._sharding.sum_gradients(self._optimizer)
        numbers = [] if report is None else [report.double()]
        if self._read_gradient:
            numbers.append(self._squares_by_part())
        self._apply(torch.cat(numbers) if numbers else None)
        if self._read_gradient:
            self.gradient_squares = dict(zip(GRADIENT_PARTS, self.reported[-len(GRADIENT_PARTS) :], strict=True))
            self.reported = self.reported[: -len(GRADIENT_PARTS)]
        if self._sharded:
            self._forget_forwards(but=self.module)
        if self.updated:
            self._updates = [done + 1 for done in self._updates]
            if self._ema_decay is not None and self._disk is None:
                self._update_average(self._ema_decay)
            self._share_exact()

    def _apply(self, report: Tensor | None) -> None:
        """Updates the parameters, and reads `report` (n,) float64 into `reported`."""
        reader = self._norm_reader
        if reader is not None:
            reader.also, reader.numbers = report, None
        with self._streams_in_order():
            self._engine.step()
        read = None if reader is None else reader.numbers
        self.reported = read if read is not None else [] if report is None else report.tolist()

    def _streams_in_order(self) -> contextlib.AbstractContextManager[None]:
        if self._norm_reader is None:
            return contextlib.nullcontext()
        return streams_in_order(self._optimizer, _accelerator())

    @property
    def grad_norm(self) -> float:
        """2-norm of the last update's gradient before clipping, the same on all ranks; inf if it is not finite."""
        return float(self._engine.get_global_grad_norm())

    def _squares_by_part(self) -> Tensor:
        """Returns the values of `gradient_squares`, in the order of GRADIENT_PARTS, float64 on the device.

        Must be called between the last backward pass and the update, which frees or scales the gradients."""
        sums = {part: torch.zeros((), dtype=torch.float64, device=self.world.device) for part in GRADIENT_PARTS}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and (share := self._gradient_share(parameter)) is not None:
                # An offloaded share is copied, one share at a time.
                norm = torch.linalg.vector_norm(share, dtype=torch.float32)
                equal = 1 if _slice_of(parameter) else self.groups.tensor.size  # ranks that have this share
                sums[part_of(name, GRADIENT_PARTS)] += norm.double().square().to(self.world.device) / equal
        return torch.stack(list(sums.values())) / self._sharding.copies

    def _gradient_share(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns this rank's flat share of a parameter's gradient; None if the rank has no share."""
        if self._disk is not None:
            return self._disk.gradient(parameter)
        if self._sharded:
            return self._optimizer.get_local_fp32_grad_for_param(parameter)  # padded with zeros
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        fragment = mapping.lp_fragment_address
        # bf16 with ZeRO 1 has the whole gradient on every rank.
        start, length = fragment.start, fragment.numel
        return gradient if gradient.numel() == length else gradient.narrow(0, start, length)

    @property
    def updated(self) -> bool:
        """Whether the last `step` changed the parameters. All ranks skip an update if a gradient is not finite."""
        return self._engine.was_step_applied()

    @property
    def global_steps(self) -> int:
        """Number of completed steps, including those whose update was skipped."""
        return self._engine.global_steps

    def pieces(self) -> Iterator[ParamShard]:
        """Yields this rank's shard of every parameter, in the order of the model. Tied parameters are yielded once.

        All ranks together own every element. Under stages 1 and 2 every rank owns all elements of a frozen parameter.
        """
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                yield self._frozen_piece(name, parameter)
            elif self._sharded:
                yield self._sharded_piece(name, parameter)
            else:
                mapping = parameter._hp_mapping
                if mapping is None:  # owned by other ranks
                    yield self._piece(name, parameter, 0, {MASTER: torch.empty(0)})
                    continue
                tensors = {MASTER: mapping.get_hp_fragment(), **mapping.optim_fragment}
                tensors = {key: tensor.detach() for key, tensor in tensors.items()}
                yield self._piece(name, parameter, mapping.lp_fragment_address.start, tensors)

    def _piece(self, name: str, parameter: nn.Parameter, start: int, tensors: dict[str, Tensor]) -> ParamShard:
        part, shape = _slice_of(parameter), tuple(getattr(parameter, "ds_shape", parameter.shape))
        if part is not None:
            shape = part.whole_shape
        written = self._sharding.first and (part is not None or self.groups.writes)
        if FROZEN in tensors and not self._sharded:  # in full on every rank
            written = self.groups.data.rank == 0 and (part is not None or self.groups.writes)
        return ParamShard(name, shape, start, tensors, written, part)

    def _frozen_piece(self, name: str, parameter: nn.Parameter) -> ParamShard:
        if not self._sharded:
            return self._piece(name, parameter, 0, {FROZEN: parameter.data.view(-1)})
        start, length = self._range(parameter)
        return self._piece(name, parameter, start, {FROZEN: parameter.ds_tensor.data.view(-1)[:length]})

    def _sharded_piece(self, name: str, parameter: nn.Parameter) -> ParamShard:
        start, length = self._range(parameter)
        group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        if self._disk is not None and group in self._disk:
            tensors = self._disk.tensors(group)
        else:
            flat = self._optimizer.fp32_partitioned_groups_flat[group]
            state = self._optimizer.optimizer.state[flat]
            tensors = {MASTER: flat.data, **{key: kept for key, kept in state.items() if key != "step"}}
        own = {kind: tensor.narrow(0, offset, length) for kind, tensor in tensors.items()}
        return self._piece(name, parameter, start, own)

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Returns (start, length) of this rank's part, without the padding of the last parts."""
        total, part = parameter.ds_numel, parameter.partition_numel()
        start = min(self._sharding.rank * part, total)
        return start, min(part, total - start)

    def agree(self) -> None:
        """Copies parameters that every tensor-parallel rank has in full, with their moments, from the first of these
        ranks to the others.

        The ranks compute them from equal numbers, but kernels that add in no fixed order round differently on each GPU.
        Called before a checkpoint, to which only the first rank writes them.
        """
        group = self.groups.tensor
        if group.size == 1:
            return
        for piece in self.pieces():
            for tensor in piece.tensors.values() if piece.slice is None else ():
                torch.distributed.broadcast(tensor, group=group.group, group_src=0)
        self.refresh_params()

    def refresh_params(self) -> None:
        """Copies the master weights to the weights of the forward pass.

        Must be called after writing into the tensors of `pieces`."""
        if self._disk is not None:
            self._disk.flush()
        self._share_exact()
        if not self._sharded:
            self._optimizer.update_lp_params()
            return
        self._optimizer.checkpoint_event_prologue()
        for piece, parameter in zip(self.pieces(), self.module.parameters(), strict=True):
            if MASTER in piece.tensors:
                parameter.ds_tensor.data.view(-1)[: piece.length].copy_(piece.tensors[MASTER])
        self._optimizer.checkpoint_event_epilogue()  # also updates the full copies of hpZ and of persistent parameters

    def memory_by_part(self, teacher: nn.Module | None = None) -> dict[str, int]:
        """Returns the bytes that the parts of the training state hold on this rank, see `memory.memory_by_part`."""
        return memory_by_part(self.module, self._optimizer, teacher)

    def optimizer_state(self) -> dict[str, Any]:
        """Returns the optimizer's state without tensors: the number of updates and the settings of the groups."""
        groups = [group for _, group in self._masters_and_groups()]
        updates = {count + group["began"] for count, group in zip(self._counted(), groups, strict=True)}
        assert len(updates) == 1, f"parameter groups disagree on the number of updates: {updates}"
        groups = [settings(group) for group in self._optimizer.param_groups]
        return {"updates": updates.pop(), "groups": groups, "global_steps": self.global_steps}

    def restore_optimizer_state(self, state: dict[str, Any], *, stage_transition: bool = False) -> None:
        """Restores the result of `optimizer_state`. At a stage transition the groups keep their own settings."""
        if not stage_transition:
            for group, saved in zip(self._optimizer.param_groups, state["groups"], strict=True):
                group.update({k: tuple(v) if isinstance(v, list) else v for k, v in settings(saved).items()})
        for flat, group in self._masters_and_groups():
            updates = counted_updates(state["updates"] - group["began"], flat, group)
            self._optimizer.optimizer.state[flat]["step"] = updates
        self._updates = self._counted()
        self._engine.global_steps = state["global_steps"]

    def close(self) -> None:
        """Releases hooks and all memory. The engine and the model cannot be used afterwards. Can be called again."""
        if self._closed:
            return
        self._closed = True  # set first: after a failure close cannot be repeated
        module, owners = self.module, (self._engine, self._optimizer, self._optimizer.optimizer)
        self._engine.destroy()
        self._forget_forwards()
        if self._disk is not None:
            self._disk.close()
        free_engine(module, *owners)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forget_forwards(self, but: nn.Module | None = None) -> None:
        """Removes this model's modules from ZeRO-3's list of modules in forward, which is global to the process.

        The recomputation of a block stops before the block's forward ends, and so leaves the block in the list.
        """
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK as running

        own = set(self.module.modules())
        running[:] = [module for module in running if module is but or module not in own]

    def _flat_masters(self) -> list[Tensor]:
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(list(getattr(self._optimizer, name)) for name in names if hasattr(self._optimizer, name))

    def _masters_and_groups(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yields each flat master tensor with its parameter group. ZeRO-3 splits large groups into several tensors."""
        for index, flat in enumerate(self._flat_masters()):
            group = self._optimizer.sub_group_to_group_id[index] if self._sharded else index
            yield flat, self._optimizer.param_groups[group]

    @torch.no_grad()
    def _update_average(self, decay: float) -> None:
        """Updates the average of the master weights that this rank owns. Early updates have more weight.

        The host counts the updates, since Adam's counts may be on the device, one for each master tensor. Master
        tensors with equal counts share a kernel.
        """
        state = self._optimizer.optimizer.state
        masters = [flat for flat, _ in self._masters_and_groups()]
        for done in dict.fromkeys(self._updates):
            alike = [flat for flat, count in zip(masters, self._updates, strict=True) if count == done]
            averages = [state[flat][EMA] for flat in alike]
            torch._foreach_lerp_(averages, [flat.data for flat in alike], _new_share(decay, done))

    @torch.no_grad()
    def _average_on_disk(self, group: int) -> None:
        """Updates the average of a sub-group that was just updated, while its states are in memory."""
        flat = self._optimizer.fp32_partitioned_groups_flat[group]
        self._optimizer.optimizer.state[flat][EMA].lerp_(
            flat.data, _new_share(self._ema_decay, self._updates[group] + 1)
        )

    @torch.no_grad()
    def _exact_masters(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns this rank's part, of 0 or 1 elements, of each master weight whose exact value the model uses.

        In bfloat16 the forward pass would use such a number with three digits, see `ContrastiveModel.exact`.
        Args: values: the initial values, (1,) each, by name.
        """
        if self.dtype == torch.float32:
            return {}
        masters = {}
        for piece in self.pieces():
            if piece.name in values and MASTER in piece.tensors:  # a frozen parameter has no master
                masters[piece.name] = piece.tensors[MASTER]
                for key in {MASTER, EMA} & piece.tensors.keys():
                    piece.tensors[key].copy_(values[piece.name][: piece.length])
        if self._disk is not None:
            self._disk.flush()
        return masters

    @torch.no_grad()
    def _share_exact(self) -> None:
        """Sets the model's `exact` to the values of `_exact_masters`, with one collective and no wait for the
        device."""
        if not self._exact:
            return
        nothing = torch.full((1,), -math.inf, device=self.world.device)
        values = torch.cat([part.to(self.world.device) if len(part) else nothing for part in self._exact.values()])
        if self.world.size > 1:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)  # owners have equal values
        self.module.exact = dict(zip(self._exact, values.split(1), strict=True))

    def _counted(self) -> list[float]:
        """Returns the number of Adam's updates of each master tensor. Waits for the device once."""
        steps = [self._optimizer.optimizer.state[flat]["step"] for flat, _ in self._masters_and_groups()]
        devices = {step.device for step in steps}  # groups that are not fused count on the host
        read = {at: iter(torch.stack([step for step in steps if step.device == at]).tolist()) for at in devices}
        return [next(read[step.device]) for step in steps]

    def _make_moments(self) -> None:
        """Creates the optimizer's state. Adam creates it at the first update, but a checkpoint may be loaded or saved
        earlier.

        The average of the weights is stored in the same state: DeepSpeed moves it like a moment, and the optimizer
        ignores it.
        """
        for index, (flat, group) in enumerate(self._masters_and_groups()):
            on_disk = self._disk is not None and index in self._disk
            with self._disk.in_memory(index) if on_disk else contextlib.nullcontext():
                self._make_state(flat, group)
        if self._disk is not None:
            self._disk.check()
            if self._ema_decay is not None:
                self._disk.after_update(self._average_on_disk)
        if not self._sharded:
            self._optimizer._lazy_init_hp_params_optimizer_state()
        self._updates = self._counted()

    def _make_state(self, flat: Tensor, group: Mapping[str, Any]) -> None:
        state = self._optimizer.optimizer.state[flat]
        state.setdefault("step", counted_updates(0.0, flat, group))
        for key, moment in moments_of(self._cfg, group).items():
            self.initial[key] = moment.initial
            if key not in state:
                state[key] = new_moment(moment, flat.data)
        if self._ema_decay is not None:
            state[EMA] = flat.data.clone()

    def _place_matrices(self) -> None:
        """Passes the positions of its matrices in the flat tensors to Muon."""
        optimizer = self._optimizer.optimizer
        if not isinstance(optimizer, MatricesAndAdamW):
            return
        parameters = dict(self.module.named_parameters())
        parts = {name: part_of_matrix(self._optimizer, parameters[name], self._sharding) for name in optimizer.scales}
        optimizer.place(self._flat_masters(), parts, self._sharding, self.world.device)


def build_engine(
    model: nn.Module,
    cfg: OptimizerConfig,
    ds_config: dict[str, Any],
    world: World,
    began: Mapping[str, int] | None = None,
    groups: Groups | None = None,
) -> Engine:
    """Wraps `model` with DeepSpeed. Frozen parameters must have `requires_grad` False already, and keep it.

    The model must not draw random numbers in its forward pass, since a step runs the forward pass twice.
    Args: began: see `optim.parameter_groups`; groups: None: no tensor and no sequence parallelism.
    Raises: ConfigError if the ZeRO stage of the DeepSpeed configuration is not 1, 2 or 3.
    """
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(f"zero_optimization.stage is {stage}; stages 1, 2 and 3 can be checkpointed, choose one")
    deepspeed = load_deepspeed()
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # required even without a launcher
    for module, parameter in external_parameters(model):
        deepspeed.zero.register_external_parameter(module, parameter)
    exact = {name: getattr(model, name).detach().clone() for name in getattr(model, "exact_parameters", ())}
    groups = groups or Groups.alone(world)
    sharding = sharding_of(groups.data, ds_config.get(SHARDING))
    sharding.mark(model)
    blocks = Blocks(model)
    for block, parameter in blocks.parameters() if stage == 3 else ():
        deepspeed.zero.register_external_parameter(block, parameter)
    optimizer = build_optimizer(model, cfg, began)
    folder = None
    if on_disk(ds_config):
        with all_ranks_or_none(world):
            folder = _folder_on_disk(ds_config, cfg, optimizer, sharding.size)
        ds_config = with_folder(ds_config, folder, _kinds(cfg, optimizer))
    if stage == 1 and ds_config.get("bf16", {}).get("enabled"):
        put_unaligned_last(optimizer)
    with _silence():
        deepspeed.init_distributed(verbose=False)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                key: value for key, value in {**NO_TIMERS, **ds_config, **OWN_OPTIMIZER}.items() if key != SHARDING
            },
            mpu=None if groups.tensor.size == 1 else ModelParallel(groups),
        )
    if stage == 3:
        blocks.remove_inner_hooks()
        cut_for_all_ranks(engine)
    sharding.agree_on_norms(engine.optimizer)
    sharding.start_equal(engine.optimizer, model)
    built = Engine(engine, world, cfg, exact, sharding, groups, folder)
    if sharding.copies > 1:
        built.refresh_params()
    return built


def _new_share(decay: float, done: int) -> float:
    """Returns the share of the new weights in their average. Args: done: number of updates, this one included."""
    return 1 - min(decay, (1 + done) / (10 + done))


def _folder_on_disk(
    config: dict[str, Any], cfg: OptimizerConfig, optimizer: torch.optim.Optimizer, sharing: int
) -> LockedFolder:
    """Creates the folder for this rank's optimizer states, after checking that they can be on the disk.

    Args: optimizer: before DeepSpeed partitions its parameters; sharing: ranks that share a training state.
    Raises: InstallationError without libaio; ConfigError if a moment is not in float32, or as `folder_for`;
        StorageError if the disk has too little space.
    """
    _check_asynchronous_io()
    for group in optimizer.param_groups:
        for name, moment in moments_of(cfg, group).items():
            if moment.dtype != "float32":
                raise ConfigError(
                    f"{OFFLOADED_OPTIMIZER}.device is nvme, and the moment {name} of {cfg.kind} is in {moment.dtype}; "
                    "only float32 can be on a disk: set the device to cpu"
                )
    folder = folder_for(config)
    elements = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    size = 2 * elements * _kinds(cfg, optimizer) * torch.float32.itemsize / sharing  # also of a checkpoint's copy
    check_space(folder, size, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    return folder


def _kinds(cfg: OptimizerConfig, optimizer: torch.optim.Optimizer) -> int:
    """Returns the number of values that are kept for an element at most: master weight, moments and average."""
    most = max((len(moments_of(cfg, group)) for group in optimizer.param_groups), default=0)
    return 1 + most + (cfg.ema_decay is not None)


def _slice_of(parameter: nn.Parameter) -> Slice | None:
    """Returns the tensor-parallel slice that a parameter holds, see `model.blocks.tensor_parallel`; None if it is
    whole."""
    return getattr(parameter, "slice", None)


def check_disk(config: Mapping[str, Any]) -> Path:
    """Checks that DeepSpeed can write the optimizer states of a configuration to its disk. Leaves no file there.

    Returns: the folder on the disk.
    Raises: InstallationError without libaio, ConfigError as `folder_for`.
    """
    _check_asynchronous_io()
    folder = folder_for(config)
    folder.remove()
    return folder.path.parent


def _check_asynchronous_io() -> None:
    """Raises: InstallationError without libaio."""
    load_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise InstallationError(
            f"{OFFLOADED_OPTIMIZER}.device is nvme, and libaio is missing, with which DeepSpeed compiles its "
            "asynchronous I/O; apt-get install libaio-dev, or set the device to cpu"
        )


def external_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Yields (module, parameter) for each weight of another module in a module's `external_parameters()`."""
    for module in model.modules():
        if hasattr(module, "external_parameters"):
            yield from ((module, parameter) for parameter in module.external_parameters())


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that determine the results of a run."""
    return {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")} | {
        "python": platform.python_version()
    }


def load_deepspeed() -> Any:
    """Imports `deepspeed` with a writable folder for compiled operations, without log output and unused operations."""
    prepare_extensions()
    if not uses_cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns if it has to detect the CPU
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed uses old names
    with extra("train"):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not uses_cuda():
        deepspeed.ops.__compatible_ops__ = {UNUSED_OPERATION: False}
    return deepspeed


def _accelerator() -> Any:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Captures the output of the block. If the block raises, the output becomes a note of the error."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except Exception as error:
        error.add_note(printed.getvalue())
        raise
