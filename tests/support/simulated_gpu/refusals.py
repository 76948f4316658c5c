"""A program that tries wrong and correct uses of a simulated GPU, counts the kernels of the contrastive losses, and
prints all results as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from univitar_ds.simulation import attention, patches
from univitar_ds.simulation.gpu import SimulatedGPU


def main() -> None:
    gpu = SimulatedGPU()
    patches.patch_torch(gpu)
    answers: dict[str, Any] = {}

    def attempt(name: str, action: Callable[[], Any]) -> None:
        gpu.reset()
        try:
            result = action()
            answers[name] = {"result": result if isinstance(result, (int, float, list, str)) else None}
        except Exception as error:
            answers[name] = {"error": f"{type(error).__name__}: {error}"}
        answers[name]["waits"] = sorted(place.partition(" tests/")[0] for place in gpu.record.waits)

    with patches.world(8), gpu, patches.launches_counted(gpu):
        from univitar_ds.kernels import fused

        rows = torch.empty(6, 64, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(64, dtype=torch.bfloat16, device="cuda")
        qkv = torch.empty(6, 3, 2, 32, dtype=torch.bfloat16, device="cuda")
        bounds = torch.tensor([0, 2, 6], dtype=torch.int32).pin_memory().to("cuda", non_blocking=True)
        counts = torch.tensor([3, 4], device="cuda")

        attempt("two devices", lambda: rows + torch.ones(6, 64))
        attempt("an addition on the device", lambda: str((rows + rows).device))
        attempt(
            "a kernel with a weight on the host",
            lambda: fused.rms_norm(rows, torch.ones(64, dtype=torch.bfloat16), 1e-6),
        )
        attempt("a kernel", lambda: str(fused.rms_norm(rows, weight, 1e-6).device))
        attempt("reading a number", lambda: counts.sum().item())
        attempt("reading a list", lambda: counts.tolist())
        attempt("a number whose value is not known", lambda: rows.float().sum().item())
        attempt("a pinned copy", lambda: str(torch.ones(3).pin_memory().to("cuda", non_blocking=True).device))
        attempt("a pageable copy", lambda: str(torch.ones(3).to("cuda", non_blocking=True).device))
        attempt("a copy that waits", lambda: str(torch.ones(3).pin_memory().to("cuda").device))
        attempt("a collective on the host", lambda: dist.all_reduce(torch.ones(3)))

        def summed() -> list[int]:
            total = counts.clone()
            dist.all_reduce(total)
            return total.tolist()

        attempt("a sum over 8 ranks", summed)
        attempt("indexing with a mask", lambda: str(rows[counts > 3].shape))
        for name in attention.MODULES:
            with attention.installed(name, gpu):
                flash = partial(attention.function(name), cu_seqlens_k=bounds, max_seqlen_k=4)
                right = {"cu_seqlens_q": bounds, "max_seqlen_q": 4}
                q, k, v = qkv.unbind(1)
                attempt(name, partial(flash, q, k, v, **right))
                attempt(f"{name} in float32", partial(flash, q.float(), k.float(), v.float(), **right))
                attempt(
                    f"{name}, cu_seqlens_q in int64",
                    partial(flash, q, k, v, **{**right, "cu_seqlens_q": bounds.long()}),
                )
                longest = {**right, "max_seqlen_q": counts.max()}
                attempt(f"{name}, max_seqlen_q on the device", partial(flash, q, k, v, **longest))
        answers |= kernels_of_losses(gpu)
    print(json.dumps(answers))


def kernels_of_losses(gpu: SimulatedGPU) -> dict[str, Any]:
    """Returns for each loss the number of kernels that one more chunk of texts adds, and the peak memory with 2 chunks
    and with 6, in bytes, without the memory that was in use before the call."""
    from univitar_ds.objectives.sigmoid import sigmoid_loss
    from univitar_ds.objectives.softmax import softmax_loss

    width, chunk = 96, 128
    found = {}
    scale, bias = (torch.ones(1, device="cuda") for _ in range(2))
    for loss_of in (sigmoid_loss, softmax_loss):
        kernels, peaks = [], []
        for size in (chunk * 2 // 8, chunk * 6 // 8):
            vision, text = (torch.empty(size, width, device="cuda") for _ in range(2))
            before, record = gpu.live.total(), gpu.reset()
            loss_of(vision, text, scale, bias, torch.arange(size), chunk=chunk, same_caption_positive=True)
            kernels.append(record.launches.total())
            peaks.append(sum(record.peak.values()) - before)
        found[loss_of.__name__] = {"kernels_of_a_chunk": (kernels[1] - kernels[0]) / 4, "peaks": peaks}
    return found


if __name__ == "__main__":
    main()
