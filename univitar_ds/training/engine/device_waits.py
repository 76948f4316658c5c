"""Removes the points at which DeepSpeed's ZeRO optimizers let the host wait for the device. Results do not change.

During such a wait the GPU runs out of work, since the host queues nothing. One wait in each step is left: the update
reads the norm of the gradient, which decides whether the parameters change. Numbers that the step reports are read with
it (`NormReader.also`). With an optimizer in host memory all waits stay, since it reads gradients on the host.

Under ZeRO-3 with several GPUs two more waits are left, during which the GPU still has work: DeepSpeed waits for the
gradients of three buckets ago and for the weights of three fetches ago, so that the host does not run further ahead
than the memory of the GPU allows.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NO_TIMERS = {"timers": {"throughput": {"enabled": False}}}
"""DeepSpeed setting that disables its throughput timer, which waits for the device six times per pack."""

_TENSOR = torch.tensor


class NormReader:
    """Reads the norm of each update's gradient once, together with the numbers in `also`.

    DeepSpeed reads the norm four times or more: as a flag over all elements, as a number, once for each parameter
    group, and where it is logged.
    """

    def __init__(self, optimizer: Any, sharded: bool) -> None:
        """Args: optimizer: DeepSpeed's, without offloading. sharded: whether it is that of ZeRO-3."""
        self.also: Tensor | None = None
        """(n,) float64 on the device, which are read with the next norm."""
        self.numbers: list[float] | None = None
        """The values of `also` that were read with the last norm; None if there were none."""
        if sharded:
            optimizer._get_norm_groups = self._reading(optimizer._get_norm_groups)
        elif hasattr(optimizer, "scaled_global_norm"):
            optimizer.scaled_global_norm = self._reading(optimizer.scaled_global_norm)
        else:  # of ZeRO 1 with bf16, which takes the norm from a function of its module
            _read_norm_of_bf16(optimizer, self._reading)
        # Not needed: the norm is -1 or infinite whenever an element is not finite, and DeepSpeed checks it next.
        optimizer.check_overflow = lambda partition_gradients=True: None

    def _reading(self, computed: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `computed`, which returns a norm or a list of norms on the device, to return them on the host."""

        def read(*arguments: Any, **options: Any) -> Any:
            with _NumbersAsKernels():
                norms = computed(*arguments, **options)
            return self._read(norms) if isinstance(norms, list) else self._read([norms])[0]

        return read

    def _read(self, norms: Sequence[Tensor]) -> list[Tensor]:
        """Copies the norms to the host, where DeepSpeed's checks and the clipping factor cause no further waits."""
        numbers = torch.stack([norm.reshape(()).double() for norm in norms])
        if self.also is not None:
            numbers = torch.cat([numbers, self.also])
        # The only wait of the update: the host decides from the norm whether the parameters change.
        host = numbers.cpu()
        self.numbers = None if self.also is None else host[len(norms) :].tolist()
        self.also = None
        return [value.to(norm.dtype) for value, norm in zip(host, norms, strict=False)]


class _NumbersAsKernels(TorchFunctionMode):
    """Makes torch.tensor(number, device=...) fill its result on the device; torch would wait for a copy."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if function is _TENSOR and isinstance(args[0], int | float) and "device" in options:
            return torch.full((), args[0], **options)
        return function(*args, **options)


def _read_norm_of_bf16(optimizer: Any, reading: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module = sys.modules[type(optimizer).__module__]
    update, computed = optimizer.step, module.get_global_norm_of_tensors
    read = reading(computed)

    def step(closure: Any = None) -> None:
        module.get_global_norm_of_tensors = read
        try:
            update(closure)
        finally:
            module.get_global_norm_of_tensors = computed

    optimizer.step = step


def order_streams(optimizer: Any, accelerator: Any) -> None:
    """Makes the current stream wait for the stream on which ZeRO-3 reduces gradients where DeepSpeed makes the host
    wait.

    Memory that is freed afterwards is reused on a stream that has waited. Other optimizers are not changed.
    Args: accelerator: DeepSpeed's.
    """
    stream = getattr(optimizer, "reduce_and_partition_stream", None)
    if stream is None:
        return
    kind = type(stream)

    def synchronize(self: Any) -> None:
        accelerator.current_stream().wait_stream(self)

    stream.__class__ = type(f"Ordered{kind.__name__}", (kind,), {"synchronize": synchronize})


@contextlib.contextmanager
def streams_in_order(optimizer: Any, accelerator: Any) -> Iterator[None]:
    """During the body, makes the current stream wait where DeepSpeed would make the host wait for the whole device.

    ZeRO 1 and 2 with `overlap_comm` wait before they free gradients that the other stream has reduced, and ZeRO-3 after
    it has gathered the weights that are not partitioned. Memory that is freed after such a wait is reused after it.
    """
    names = ("reduction_stream", "reduce_and_partition_stream")
    stream = next((found for name in names if (found := getattr(optimizer, name, None)) is not None), None)
    if stream is None:
        yield
        return
    accelerator.synchronize = lambda *_: accelerator.current_stream().wait_stream(stream)  # shadows the method
    try:
        yield
    finally:
        del accelerator.synchronize
