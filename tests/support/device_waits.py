"""Counts, on a CPU, the places where a training step would wait for a GPU.

A tensor counts as on the device if it was made there (`device=...`, `.to(device)`), is a weight or a state that exists
already, or was computed from such a tensor. Reading it on the host is a wait (`item`, `tolist`, `cpu`,
`float`, operations with a size that depends on values). A copy to the device that is not `non_blocking` is a wait too,
and so is a synchronization of DeepSpeed's accelerator or of its streams and events.
"""

from __future__ import annotations

import gc
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")
DATA_DEPENDENT = {"nonzero", "masked_select", "_unique2", "unique_dim", "equal", "_local_scalar_dense"}
_HERE = Path(__file__).name


class Waits:
    """The waits that were counted. `places`: their number by "file:line kind"."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self.paused = self.making = False
        self._device: dict[int, Any] = {}

    @property
    def total(self) -> int:
        return self.places.total()

    def on_device(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._device

    def put(self, values: Any) -> Any:
        """Marks tensors as on the device."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                storage = value.untyped_storage()
                self._device[storage._cdata] = storage
        return values

    def take(self, value: Tensor) -> Tensor:
        """Marks a tensor as on the host."""
        self._device.pop(value.untyped_storage()._cdata, None)
        return value

    def note(self, what: str) -> None:
        if self.paused:
            return
        for frame in reversed(traceback.extract_stack()):
            if Path(frame.filename).name != _HERE and "/torch/" not in frame.filename:
                self.places[f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} {what}"] += 1
                return


def _patches(waits: Waits) -> Iterator[Any]:
    """Patches methods of tensors, since a TorchFunctionMode is not active in hooks of the backward pass."""

    def reads(name: str, function: Any) -> Any:
        def read(self: Tensor, *args: Any, **options: Any) -> Any:
            if not waits.on_device(self):
                return function(self, *args, **options)
            waits.note(name)
            waits.paused, before = True, waits.paused
            try:
                result = function(self, *args, **options)
                return waits.take(result.clone()) if name == "cpu" else result
            finally:
                waits.paused = before

        return read

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        result = convert(self, *args, **options)
        placed = options.get("device") is not None or (args and isinstance(args[0], torch.device | str))
        placed = placed or any(waits.on_device(one) for one in args)
        if waits.on_device(self) or not placed:
            return result
        if not options.get("non_blocking", False):
            waits.note("copy to the device")
        return waits.put(result.clone())

    def makes(function: Any) -> Any:
        def make(*args: Any, **options: Any) -> Tensor:
            waits.making, before = options.get("device") is not None, waits.making
            try:
                return function(*args, **options)
            finally:
                waits.making = before

        return make

    convert = Tensor.to
    for name in READS:
        yield patch.object(Tensor, name, reads(name, getattr(Tensor, name)))
    yield patch.object(Tensor, "to", to)
    for name in ("tensor", "as_tensor"):
        yield patch.object(torch, name, makes(getattr(torch, name)))


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits, options = self.waits, kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        sources = [leaf for leaf in leaves if waits.on_device(leaf)]
        name = function.overloadpacket.__name__
        result = function(*args, **options)
        if waits.making and name == "lift_fresh":  # an operation of torch.tensor
            waits.note("copy to the device")
            return waits.put(result)
        if not sources:
            return waits.put(result) if options.get("device") is not None and not leaves else result
        masks = any(leaf.dtype in (torch.bool, torch.uint8) for leaf in leaves[1:]) and name.startswith("index")
        if name in DATA_DEPENDENT or masks:
            waits.note(name)
        if name == "copy_" and not waits.on_device(args[0]):
            waits.note("copy to the host")
            return result
        waits.put(result)
        return result


class _Stream:
    """A stream that only counts waits."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def synchronize(self) -> None:
        self.waits.note("stream.synchronize")

    def wait_stream(self, other: object) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Event:
    """An event of the device that is complete. It only counts waits."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def synchronize(self) -> None:
        self.waits.note("event.synchronize")

    def query(self) -> bool:
        return True

    def record(self, *_: object) -> None:
        pass

    wait = record


@contextmanager
def _started(patches: Iterable[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        yield


@contextmanager
def prepared(waits: Waits) -> Iterator[None]:
    """Makes DeepSpeed build and run its engine in the body as on an asynchronous accelerator."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    changed = {name: lambda *_, **__: _Stream(waits) for name in ("current_stream", "default_stream", "stream")}
    changed |= dict.fromkeys(("resolves_data_dependency", "is_synchronized_device"), lambda self: False)
    changed["synchronize"] = lambda self, *_: waits.note("synchronize")
    patches = [patch.object(kind, name, value) for name, value in changed.items()]
    for name, value in (("Stream", _Stream), ("Event", _Event)):
        patches.append(patch.object(kind, name, property(lambda self, value=value: lambda *_, **__: value(waits))))
    patches.append(patch.object(Tensor, "record_stream", lambda self, stream: None))
    with _started(patches):
        yield


@contextmanager
def counted(waits: Waits) -> Iterator[None]:
    """Counts the waits in the body. All existing float tensors are on the device, except Adam's counts of updates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from `isinstance` of deprecated objects
        existing = gc.get_objects()
        counts = {id(value["step"]) for value in existing if type(value) is dict and "step" in value}
        for value in existing:
            if isinstance(value, Tensor) and value.is_floating_point() and id(value) not in counts:
                waits.put(value.data)
    with _Operations(waits), _started(_patches(waits)):
        yield
