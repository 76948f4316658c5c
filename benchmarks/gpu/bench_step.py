"""Times a training step of the encoder, forward and backward, from bytes: images of equal and of mixed lengths.

MFU is the FLOP of the matrix products and the attention (`univitar_ds.model.flops`), divided by the FLOP that the
fastest matrix product of the same run computes in the same time. The padded baseline is the same code on the same
items, each padded to the longest item, in batches of as many tokens; only real tokens are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import packs as packs
from benchmarks.gpu.timing import Timer
from benchmarks.rows import rounded
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.model.blocks.attention import choose_backend
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.flops import BACKWARD, flops_per_item


def lengths(tokens: int, equal: Sequence[int]) -> dict[str, list[packs.Grid]]:
    """Returns packs of about `tokens` tokens: one per length in `equal`, by that length, and one named "mixed"."""
    packs_by_name = {str(length): packs.equal_images(tokens, length) for length in equal}
    return {**packs_by_name, "mixed": packs.mixed_images(tokens)}


def build(config: EncoderConfig, device: torch.device, dtype: torch.dtype) -> UniViTAR:
    """Builds an encoder with random weights, in training mode."""
    with torch.device(device):
        return UniViTAR(config).to(dtype).train()


def measure(
    name: str, model: UniViTAR, items: str, grids: list[packs.Grid], timer: Timer, peak_tflops: float
) -> dict[str, Any]:
    """Returns the row of one encoder on one pack.

    Args: name: of the encoder. items: the name of the pack. peak_tflops: of the fastest matrix product of this run.
    """
    tokens = sum(map(math.prod, grids))
    ours_ms, ours_gb = _step(model, [grids], timer)
    batches = packs.padded_batches(grids, max(tokens, max(map(math.prod, grids))))
    padded_tokens = sum(math.prod(grid) for batch in batches for grid in batch)
    padded_ms, padded_gb = (ours_ms, ours_gb) if padded_tokens == tokens else _step(model, batches, timer)
    flops = (1 + BACKWARD) * sum(flops_per_item(model.config, grid) for grid in grids)
    weight = model.embeddings["patch_embedding"].weight
    return {
        "encoder": name,
        "items": items,
        "item_count": len(grids),
        "tokens": tokens,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "attention": choose_backend("auto", weight.device, weight.dtype, model.config.head_width),
        "step_ms": rounded(ours_ms),
        "tokens_per_s": rounded(1e3 * tokens / ours_ms),
        "tflops": rounded(flops / ours_ms / 1e9),
        "matmul_tflops": rounded(peak_tflops),
        "mfu_pct": rounded(100 * flops / ours_ms / 1e9 / peak_tflops, 3),
        "peak_gb": rounded(ours_gb),
        "padded_tokens": padded_tokens,
        "padded_step_ms": rounded(padded_ms),
        "padded_mfu_pct": rounded(100 * flops / padded_ms / 1e9 / peak_tflops, 3),
        "padded_peak_gb": rounded(padded_gb),
        "over_padded": rounded(padded_ms / ours_ms, 3),
    }


def _step(model: UniViTAR, batches: list[list[packs.Grid]], timer: Timer) -> tuple[float, float | None]:
    """Returns the milliseconds of forward and backward over all batches, and the peak memory in GB (None on a CPU)."""
    on_gpu = timer.device.type == "cuda"
    inputs = [(batch, _pixels(batch, timer.device)) for batch in batches]
    run = _forward_backward(model, inputs)
    if not on_gpu:
        return timer.median_ms(run), None
    torch.cuda.reset_peak_memory_stats(timer.device)
    run()
    peak_gb = torch.cuda.max_memory_allocated(timer.device) / 1e9
    return timer.median_ms(run), peak_gb


def _forward_backward(model: UniViTAR, inputs: list[tuple[list[packs.Grid], Tensor]]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        for grids, pixels in inputs:
            model(pixels, grids, frames=packs.frames_of(grids)).square().mean().backward()

    return run


def _pixels(grids: Sequence[packs.Grid], device: torch.device) -> Tensor:
    return torch.randint(0, 256, (packs.pixel_bytes(grids),), dtype=torch.uint8, device=device)
