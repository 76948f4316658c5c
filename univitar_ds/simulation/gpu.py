"""One simulated GPU: tensors on `cuda` have shape, dtype, device and lifetime, but no data. Host tensors are real.

`SimulatedGPU` runs every operation on a tensor of the device in torch's FakeTensorMode, so that mixed devices are an
error as on a GPU. It records where the host waits for the device, the collectives, and the memory by phase.

Small tensors that come from the host keep their values (`_Storage.values`), so that counts, flags and messages between
ranks are correct: all ranks of the fake process group are assumed to do what this one does. For other tensors, the host
reads `SimulatedGPU.unknown` in floating-point numbers, and 0 in integers and flags.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
KNOWN_BYTES = 1 << 22
"""Tensors up to this size keep their values: messages of 256 ranks to one fit."""
UNKNOWN_RESULT = (aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided)
WRITES_ALL = (aten.zero_, aten.fill_, aten.copy_)
SIMULATION = "/univitar_ds/simulation/"
LEFT_OUT = (SIMULATION, "/torch/")
"""Parts of paths that are not places in `Record.waits`: a checkout may be in a folder with a name of OWN_FILES."""
OWN_FILES = ("/univitar_ds/", "/kernels/", "/deepspeed/", "/transformers/", "/tests/simulated_gpu/")


@dataclass
class _Storage:
    """Memory of the device. `values`: its bytes if they are known."""

    bytes: int
    phase: str
    values: Tensor | None = None


@dataclass
class Record:
    """What the device did in the body of a context manager.

    `waits` counts the places at which the host waits for the device, as "kind file:function". `collectives` and
    `collective_bytes`, in and out, are by operation, `launches` by kernel or operation. `peak` has the bytes by the
    phase that allocated them, at the moment at which most memory was in use, and `moment` is the phase of that moment.
    """

    waits: Counter[str]
    collectives: Counter[str]
    collective_bytes: Counter[str]
    launches: Counter[str]
    peak: dict[str, int]
    moment: str = "build"


class SimulatedGPU(TorchDispatchMode):
    """The simulated GPU, see the module. A context manager."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.phase = "build"
        self.unknown = 1.0
        """What the host reads from floating-point tensors whose values are not known."""
        self.live: Counter[str] = Counter()
        self._storages: dict[int, _Storage] = {}
        self.reset()

    def __enter__(self) -> SimulatedGPU:
        # `torch.tensor(..., device="cuda")` builds its tensor on the host and copies it, seen by this mode.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*error)

    def reset(self) -> Record:
        """Begins a new record and returns it."""
        self.record = Record(Counter(), Counter(), Counter(), Counter(), dict(self.live), self.phase)
        return self.record

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Attributes the memory that the block allocates to `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def waits(self, kind: str) -> None:
        """Records that the host waits for the device, with the place of the caller."""
        self.record.waits[f"{kind} {_place()}"] += 1

    def host(self, tensor: Tensor) -> Tensor:
        """Returns the values of a tensor of the device as a new tensor on the host; `unknown` or 0 if they are not
        known."""
        known = self._known(tensor)
        if known is not None:
            return known.clone()
        return torch.full(tensor.shape, self.unknown if tensor.is_floating_point() else 0, dtype=tensor.dtype)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        fakes = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        device = kwargs.get("device")
        to_device = device is not None and torch.device(device).type == "cuda"
        exchanged = function.namespace == "c10d" and function.overloadpacket.__name__ != "barrier"
        packet = function.overloadpacket
        if not fakes and not to_device and not exchanged:  # on the host only
            made = function(*args, **kwargs)
            # Values that were never written would make results differ from run to run.
            return made.zero_() if packet in UNKNOWN_RESULT else made
        if packet is aten.record_stream:
            return None
        if packet is aten._local_scalar_dense and fakes[0].device.type == "cuda":
            self.waits("read")
            return self.host(fakes[0]).item()
        if packet is aten._to_copy and device is not None and not to_device and fakes[0].device.type == "cuda":
            return self._read(fakes[0], kwargs)
        if packet is aten.copy_ and not isinstance(args[0], FakeTensor):
            return self._read_into(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        self._check_upload(packet, args, kwargs, to_device)
        if exchanged:
            return self._collective(function, args, kwargs)
        with self.fake:
            # The CUDA build crashes in cumsum of a tensor without data. All uses are along the rows of integers.
            result = torch.empty_like(args[0]) if packet is aten.cumsum else function(*args, **kwargs)
        self._follow(function, args, kwargs, fakes, result)
        return result

    def _read(self, tensor: FakeTensor, kwargs: dict[str, Any]) -> Tensor:
        self.waits("copy to the host")  # into pageable memory, so that it waits also with non_blocking
        return self.host(tensor).to(dtype=kwargs.get("dtype") or tensor.dtype)

    def _read_into(self, target: Tensor, tensor: Tensor, non_blocking: bool) -> Tensor:
        if not (non_blocking and target.is_pinned()):
            self.waits("copy to the host")
        return target.copy_(self.host(tensor))

    def _check_upload(self, packet: Any, args: Any, kwargs: dict[str, Any], to_device: bool) -> None:
        """Records a copy to the device if the host waits for it: from pageable memory, or without non_blocking."""
        if packet is aten._to_copy and to_device and args[0].device.type == "cpu":
            source, non_blocking = args[0], kwargs.get("non_blocking", False)
        elif packet is aten.copy_ and args[0].device.type == "cuda" and args[1].device.type == "cpu":
            source, non_blocking = args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            if packet in (aten.index, aten.index_put, aten.index_put_) and args[0].device.type == "cuda":
                if any(isinstance(i, Tensor) and i.device.type == "cpu" for i in args[1]):
                    self.waits("copy of indices to the device")
                if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                    self.waits("positions of a mask")
            return
        if isinstance(source, FakeTensor):
            return  # weights, which are moved once
        if not non_blocking:
            self.waits("copy to the device")
        elif not source.is_pinned():
            self.waits("copy from pageable memory")  # the host waits until the driver has read it

    def _collective(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type != "cuda" for tensor in tensors):
            raise RuntimeError(f"{function} on {sorted({str(t.device) for t in tensors})}: NCCL sends only from GPUs")
        name = function.overloadpacket.__name__.strip("_")
        self.record.collectives[name] += 1
        self.record.collective_bytes[name] += sum(tensor.nbytes for tensor in tensors)
        with self.fake:
            result = function(*args, **kwargs)
        self._follow_collective(name, args)
        return result

    def _follow_collective(self, name: str, args: Any) -> None:
        """Computes the results of a collective, under the assumption that all ranks do what this rank does."""
        if name == "allgather_base":
            self._assign(args[0], [args[1]] * (args[0].numel() // max(1, args[1].numel())))
        elif name in ("allgather", "gather"):
            for outputs, tensor in zip(args[0], args[1], strict=True):
                for output in outputs:
                    self._assign(output, [tensor])
        elif name == "scatter":  # from rank 0, which is this one
            for output, inputs in zip(args[0], args[1], strict=True):
                self._assign(output, [inputs[0]])
        elif name == "allreduce":
            operation, ranks = args[2].op(), dist.ProcessGroup.unbox(args[1]).size()
            for tensor in args[0]:
                known = self._known(tensor)
                if known is None:
                    continue
                if operation == dist.ReduceOp.SUM:
                    known.mul_(ranks) if known.dtype != torch.bool else None
                elif known.is_floating_point() and not torch.isfinite(known).all():
                    self._forget(tensor)  # this rank has no value, and another one has
        elif name != "broadcast" and name != "barrier" and args and not isinstance(args[0], int):
            for tensor in tree_leaves(args[0]):
                if isinstance(tensor, Tensor):
                    self._forget(tensor)

    def _assign(self, target: Tensor, parts: list[Tensor]) -> None:
        known = [self._known(part) for part in parts]
        storage = self._storage(target)
        if any(part is None for part in known) or storage.bytes > KNOWN_BYTES:
            return self._forget(target)
        if storage.values is None:
            storage.values = torch.zeros(storage.bytes, dtype=torch.uint8)
        self._known(target).view(-1).copy_(torch.cat([part.reshape(-1) for part in known]))

    def _follow(self, function: Any, args: Any, kwargs: dict[str, Any], fakes: list[FakeTensor], result: Any) -> None:
        """Records the memory of the results, and computes their values if those of the inputs are known."""
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        packet = function.overloadpacket
        old = {leaf.untyped_storage()._cdata for leaf in fakes}
        made = [leaf for leaf in results if leaf.device.type == "cuda" and leaf.untyped_storage()._cdata not in old]
        for leaf in made:
            self._storage(leaf)
        names = [argument.name for argument in function._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}  # `out` is a keyword
        written = [
            leaf
            for argument in function._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(given.get(argument.name))
            if isinstance(leaf, FakeTensor)
        ]
        if made or written:
            self.record.launches[packet.__name__] += packet not in UNKNOWN_RESULT
        whole = packet in WRITES_ALL and args[0].device.type == "cuda" and self._own_storage(args[0])
        if whole and self._storage(args[0]).values is None:
            self._storage(args[0]).values = torch.zeros(args[0].untyped_storage().nbytes(), dtype=torch.uint8)
        inputs = [leaf for leaf in fakes if not (whole and leaf is args[0])]
        sizes = sum(leaf.nbytes for leaf in (*fakes, *results))
        known = {id(leaf): self._known(leaf) for leaf in fakes}
        computable = packet not in UNKNOWN_RESULT and torch.Tag.nondeterministic_seeded not in function.tags
        if not computable or sizes > KNOWN_BYTES or any(known[id(leaf)] is None for leaf in inputs):
            for leaf in written:
                self._forget(leaf)
            return
        if not made and not written:
            return  # a view

        def on_host(leaf: Any) -> Any:
            if isinstance(leaf, FakeTensor):
                return known[id(leaf)]
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        values = function(*tree_map(on_host, args), **tree_map(on_host, kwargs))
        values = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        for leaf, value in zip(results, values, strict=True):
            if any(leaf is one for one in made):
                storage = self._storage(leaf)
                storage.values = torch.zeros(storage.bytes, dtype=torch.uint8)
                self._known(leaf).copy_(value)

    def _own_storage(self, tensor: Tensor) -> bool:
        return tensor.nbytes == tensor.untyped_storage().nbytes() <= KNOWN_BYTES

    def _storage(self, tensor: Tensor) -> _Storage:
        memory = tensor.untyped_storage()
        key = memory._cdata
        if key not in self._storages:
            self._storages[key] = storage = _Storage(memory.nbytes(), self.phase)
            if tensor.device.type == "cuda":
                self._grow(storage)
                weakref.finalize(memory, self._freed, key)
            else:
                weakref.finalize(memory, self._storages.pop, key, None)
        return self._storages[key]

    def _grow(self, storage: _Storage) -> None:
        self.live[storage.phase] += storage.bytes
        if self.live.total() > sum(self.record.peak.values()):
            self.record.peak, self.record.moment = dict(self.live), self.phase

    def _freed(self, key: int) -> None:
        storage = self._storages.pop(key)
        self.live[storage.phase] -= storage.bytes

    def _known(self, tensor: Tensor) -> Tensor | None:
        """Returns a view of the values of a tensor of the device, None if they are not known."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is None or storage.values is None:
            return None
        values = torch.empty(0, dtype=tensor.dtype)
        return values.set_(storage.values.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    def _forget(self, tensor: Tensor) -> None:
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is not None:
            storage.values = None


def _place() -> str:
    """Returns the file and function of the project, DeepSpeed or transformers that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        for folder in OWN_FILES:
            if folder in name and not any(part in name for part in LEFT_OUT):
                return f"{folder.strip('/')}/{name.rpartition(folder)[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
