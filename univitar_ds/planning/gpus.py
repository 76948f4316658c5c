"""The GPUs for which step times are predicted: published figures, and the rates that kernels are assumed to reach."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, get_args

GPUS_OF_A_NODE = 8
"""GPUs of a DGX or HGX machine (published)."""
Kind = Literal["published", "derived", "measured", "chosen"]
KINDS = get_args(Kind)


@dataclass(frozen=True)
class Assumption:
    """A number that the prediction uses, with its unit and source.

    `kind`: "published" by a maker or in a paper; "derived" by counting, which a test repeats; "measured" on a CPU;
    "chosen" as plausible, without a measurement.
    """

    value: float
    unit: str
    kind: Kind
    source: str


@dataclass(frozen=True)
class Gpu:
    """A GPU and its links. `peak`, `products` and `attention_*` are in FLOP/s, `memory` in bytes, the others in
    bytes/s.

    `peak`: published rate of bf16 matrix products; `products`: the rate that matrix products reach;
    `attention_forward`, `attention_backward`: the rates that attention reaches, with flash-attn 4 on a B200 and
    flash-attn 2 on the others (torch's varlen attention has the same kernels); `memory`: size of the GPU's memory;
    `bandwidth`: rate of this memory; `node_link`: rate to the other GPUs of a node; `network`: rate to other nodes. The
    rates of both links are for one direction and one GPU.
    """

    peak: Assumption
    memory: Assumption
    bandwidth: Assumption
    node_link: Assumption
    network: Assumption
    products: Assumption
    attention_forward: Assumption
    attention_backward: Assumption

    def assumptions(self) -> Iterator[tuple[str, Assumption]]:
        """Yields the name of each field and its assumption."""
        yield from ((field.name, getattr(self, field.name)) for field in fields(self))


def _published(value: float, unit: str, source: str) -> Assumption:
    return Assumption(value, unit, "published", source)


def _chosen(value: float, unit: str, source: str) -> Assumption:
    return Assumption(value, unit, "chosen", source)


def _hopper(name: str, memory: float, bandwidth: float) -> Gpu:
    sheet = f"NVIDIA's data sheet of the {name} SXM"
    return Gpu(
        peak=_published(989e12, "FLOP/s", f"{sheet}, bf16 without sparsity"),
        memory=_published(memory, "bytes", sheet),
        bandwidth=_published(bandwidth, "bytes/s", sheet),
        node_link=_published(450e9, "bytes/s", f"{sheet}: NVLink 900 GB/s in both directions together"),
        network=_published(50e9, "bytes/s", "NVIDIA's data sheet of the DGX H100: a port of 400 Gbit/s per GPU"),
        products=_chosen(600e12, "FLOP/s", "0.61 of the peak, for products of 32,768 rows and 1,024 to 7,680 columns"),
        attention_forward=_chosen(
            250e12,
            "FLOP/s",
            "flash-attn 2 at heads of 64 to 80; its paper (arXiv 2307.08691) has 335e12 FLOP/s with backward",
        ),
        attention_backward=_chosen(170e12, "FLOP/s", "flash-attn 2 at heads of 64 to 80, items of 500 to 6,000 tokens"),
    )


_A100 = "NVIDIA's data sheet of the A100 SXM 80GB"
_B200 = "NVIDIA's data sheet of the DGX B200"
GPUS = {
    "A100": Gpu(
        peak=_published(312e12, "FLOP/s", f"{_A100}, bf16 without sparsity"),
        memory=_published(80e9, "bytes", _A100),
        bandwidth=_published(2.039e12, "bytes/s", _A100),
        node_link=_published(300e9, "bytes/s", f"{_A100}: NVLink 600 GB/s in both directions together"),
        network=_published(25e9, "bytes/s", "NVIDIA's data sheet of the DGX A100: a port of 200 Gbit/s per GPU"),
        products=_chosen(230e12, "FLOP/s", "0.74 of the peak, for products of 32,768 rows and 1,024 to 7,680 columns"),
        attention_forward=_chosen(
            160e12,
            "FLOP/s",
            "flash-attn 2 at heads of 64 to 80; its paper (arXiv 2307.08691) has up to 230e12 FLOP/s at heads of 128",
        ),
        attention_backward=_chosen(120e12, "FLOP/s", "flash-attn 2 at heads of 64 to 80, items of 500 to 6,000 tokens"),
    ),
    "H100": _hopper("H100", 80e9, 3.35e12),
    "H200": _hopper("H200", 141e9, 4.8e12),
    "B200": Gpu(
        peak=_published(2.25e15, "FLOP/s", f"{_B200}, bf16 without sparsity (4.5e15 FLOP/s with)"),
        memory=_published(180e9, "bytes", f"{_B200}: 1,440 GB for 8"),
        bandwidth=_published(8e12, "bytes/s", f"{_B200}: 64 TB/s for 8"),
        node_link=_published(900e9, "bytes/s", f"{_B200}: NVLink 1.8 TB/s in both directions together"),
        network=_published(50e9, "bytes/s", f"{_B200}: a port of 400 Gbit/s per GPU"),
        products=_chosen(1.35e15, "FLOP/s", "0.6 of the peak, about the share of an H100"),
        attention_forward=_chosen(600e12, "FLOP/s", "flash-attn 4 at heads of 64 to 80"),
        attention_backward=_chosen(400e12, "FLOP/s", "flash-attn 4 at heads of 64 to 80"),
    ),
}
"""GPUs by name. The key is one of the words in the name that the driver reports."""


def known_gpu(name: str) -> str | None:
    """Returns the key of a device in GPUS, or None if GPUS has no figures for it.

    GPUS has none for MIG instances, the A100 of 40 GB, and PCIe cards, which have lower clocks and no NVLink.

    Args: name: as the driver reports it, such as "NVIDIA H100 80GB HBM3".
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if words & {"PCIE", "NVL", "MIG", "40GB"}:
        return None
    return next((known for known in GPUS if known in words), None)
