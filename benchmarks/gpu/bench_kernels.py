"""Times each fused operation against plain torch and against torch.compile of plain torch, at the encoders' widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import counts as counts
from benchmarks.gpu import packs as packs
from benchmarks.gpu.timing import Timer, copy_gb_s, matmul_tflops
from benchmarks.rows import rounded
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.kernels import dispatch, reference

EPS, THETA = 1e-6, 10000.0
STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "merge": 1}


@dataclass(frozen=True)
class Case:
    """One operation on one pack. `ours` and `eager` are called with `inputs`.

    Inputs with `requires_grad` get gradients. `bytes` is the number of bytes that each pass moves."""

    op: str
    pack: str
    tokens: int
    width: int
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    bytes: dict[str, int]
    product: tuple[int, int, int] | None = None
    """(m, k, n) of the operation's matrix product; None if the operation has no matrix product."""


def cases(config: EncoderConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yields all operations at the widths of `config`, on packs of `tokens` tokens."""
    draw = partial(torch.randn, dtype=dtype, device=device, requires_grad=True)
    width, inner, heads = config.hidden_size, config.inner_width, config.num_attention_heads
    grids = packs.mixed_images(tokens)
    cells = torch.cartesian_prod(torch.arange(64, device=device), torch.arange(64, device=device))
    positions = cells.repeat(-(-tokens // len(cells)), 1)[:tokens].contiguous()
    rows = {
        "rms_norm": (width, (draw(tokens, width), draw(width)), {"eps": EPS}),
        "add_norm": (width, (draw(tokens, width), draw(tokens, width), draw(width), draw(width)), {"eps": EPS}),
        "swiglu_norm": (inner, (draw(tokens, inner), draw(tokens, inner), draw(inner)), {"eps": EPS}),
        "rope2d_qk_norm": (
            width,
            (draw(tokens, 3, heads, width // heads), positions, draw(width), draw(width)),
            {"theta": THETA, "eps": EPS},
        ),
    }
    for op, (op_width, inputs, kwargs) in rows.items():
        moved = {name: counts.moved_bytes(op, name, tokens, op_width, dtype.itemsize) for name in counts.PASSES}
        ours, eager = partial(getattr(dispatch, op), **kwargs), partial(getattr(reference, op), **kwargs)
        yield Case(op, "rows", tokens, op_width, inputs, ours, eager, moved)
    del rows, inputs
    for name, grids in (("images", packs.mixed_images(tokens)), ("videos", packs.videos(tokens))):
        yield patch_embed_case(name, grids, width, device, dtype)


def patch_embed_case(
    name: str, grids: Sequence[packs.Grid], width: int, device: torch.device, dtype: torch.dtype
) -> Case:
    """Returns the case of the patch embedding.

    The eager version computes float32 `pixel_values` as `Preprocessor` does, then applies a linear layer.
    """
    frames, tokens = packs.frames_of(grids), sum(map(math.prod, grids))
    size = packs.pixel_bytes(grids)
    pixels = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    weight = (torch.randn(width, 3, 2, 14, 14, device=device) * 0.03).to(dtype).requires_grad_()
    bias = torch.randn(width, dtype=dtype, device=device, requires_grad=True)

    def ours(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dispatch.patch_embed(pixels, frames, grids, weight, bias, **STATISTICS)

    def eager(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        patches = reference.patchify(pixels, frames, grids, 1)
        return embed_patches(patches, weight, bias)

    moved = counts.patch_embed_bytes(size, tokens, width, dtype.itemsize)
    product = counts.patch_embed_product(tokens, width, still=all(count == 1 for count in frames))
    inputs = (pixels, weight, bias)
    moved_by_pass = dict.fromkeys(counts.PASSES, moved)
    return Case("patch_embed", name, tokens, width, inputs, ours, eager, moved_by_pass, product)


def embed_patches(patches: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    values = reference.normalise(patches, STATISTICS["mean"], STATISTICS["std"])
    return F.linear(values.to(weight.dtype), weight.flatten(1), bias)


def compiled(case: Case, backend: str) -> Callable[..., Any]:
    """Compiles `case.eager` with torch.compile. `patchify` stays eager, because torch.compile would unroll its loop
    over the items."""
    if case.op != "patch_embed":
        return torch.compile(case.eager, backend=backend, dynamic=False)
    embed = torch.compile(embed_patches, backend=backend, dynamic=False)
    patchify = torch.compiler.disable(reference.patchify)
    frames, grids = _pack_of(case)
    return lambda pixels, weight, bias: embed(patchify(pixels, frames, grids, 1), weight, bias)


def _pack_of(case: Case) -> tuple[list[int], list[packs.Grid]]:
    grids = packs.videos(case.tokens) if case.pack == "videos" else packs.mixed_images(case.tokens)
    return packs.frames_of(grids), grids


def measure(case: Case, timer: Timer, copy: float, backend: str) -> list[dict[str, Any]]:
    """Returns one row for each pass.

    Args: copy: GB/s of a large copy on this device in this run. backend: the backend of torch.compile."""
    contenders = {"ours": case.ours, "eager": case.eager, "compiled": compiled(case, backend)}
    times = {name: _times(timer, run, case.inputs) for name, run in contenders.items()}
    dtype = next(x.dtype for x in case.inputs if x.requires_grad)
    return [row(case, direction, times, timer, copy, dtype) for direction in counts.PASSES]


def _times(timer: Timer, run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    def forward() -> Any:
        with torch.no_grad():
            return run(*inputs)

    outputs = run(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    differentiable = [x for x in inputs if x.requires_grad]
    grads = [torch.randn_like(output) for output in outputs]

    def backward() -> Any:
        return torch.autograd.grad(outputs, differentiable, grads, retain_graph=True)

    return {"forward": timer.median_ms(forward), "backward": timer.median_ms(backward)}


def row(
    case: Case, direction: str, times: dict[str, dict[str, float]], timer: Timer, copy: float, dtype: torch.dtype
) -> dict[str, Any]:
    ours = times["ours"][direction]
    speed = case.bytes[direction] / ours / 1e6
    same_size_copy = copy_gb_s(timer, case.bytes[direction] // 2)  # a copy reads and writes every byte
    tflops = product = None
    if case.product is not None:
        m, k, n = case.product
        # cuBLAS needs an aligned k for its fast kernels; the padding is not counted as work.
        padded_k = counts.aligned(k, dtype.itemsize)
        shape = (m, padded_k, n) if direction == "forward" else (n, m, padded_k)
        tflops, product = 2 * m * k * n / ours / 1e9, matmul_tflops(timer, *shape, dtype) * k / padded_k
    return {
        "op": case.op,
        "pass": direction,
        "pack": case.pack,
        "tokens": case.tokens,
        "width": case.width,
        "dtype": str(dtype).removeprefix("torch."),
        "ours_ms": rounded(ours),
        "eager_ms": rounded(times["eager"][direction]),
        "compiled_ms": rounded(times["compiled"][direction]),
        "over_eager": rounded(times["eager"][direction] / ours, 3),
        "over_compiled": rounded(times["compiled"][direction] / ours, 3),
        "gb": rounded(case.bytes[direction] / 1e9),
        "gb_s": rounded(speed),
        "copy_gb_s": rounded(copy),
        "copy_pct": rounded(100 * speed / copy, 3),
        "copy_same_gb_s": rounded(same_size_copy),
        "copy_same_pct": rounded(100 * speed / same_size_copy, 3),
        "tflops": rounded(tflops),
        "matmul_tflops": rounded(product),
        "matmul_pct": None if product is None else rounded(100 * tflops / product, 3),
    }
