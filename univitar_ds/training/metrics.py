"""What is measured while training: from one rank's numbers of a step to one line over ranks and steps.

Each number declares how it is joined over ranks. The numbers of a step travel in one small exchange; they
are summed over the steps of a line in `Window`, which is part of the checkpoint, so a resumed run writes
the lines of the uninterrupted one.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from univitar_ds.config.schema import Modality
from univitar_ds.data.batch import PackedBatch
from univitar_ds.geometry import token_count
from univitar_ds.training.curriculum import Progress
from univitar_ds.training.distributed import World, gather_numbers
from univitar_ds.training.step import StepResult

OVER_RANKS = {
    "tokens": "sum",
    "token_budget": "sum",
    "flops": "sum",
    "busiest_flops": "max",
    "bad_samples": "sum",
    "step_s": "max",
    "data_wait_s": "mean",
    "memory_gb": "max",
}
"""Numbers of a rank at a step, and how ranks join them."""
JOIN = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}


def rank_numbers(
    batches: Sequence[PackedBatch], *, cost: tuple[float, float], token_budget: int, step_s: float, data_wait_s: float
) -> dict[str, float]:
    """The numbers of this rank at a step, by the names of OVER_RANKS. `cost`: FLOPs a token, FLOPs a token squared."""
    lengths = [token_count(grid) for batch in batches for grid in batch.grid_thw.tolist()]
    flops = cost[0] * sum(lengths) + cost[1] * sum(length**2 for length in lengths)
    return {
        "tokens": sum(lengths),
        "token_budget": token_budget * len(batches),
        "flops": flops,
        "busiest_flops": flops,
        "bad_samples": sum(sum(batch.bad.values()) for batch in batches),
        "step_s": step_s,
        "data_wait_s": data_wait_s,
        "memory_gb": memory_gb(),
    }


def join_ranks(numbers: dict[str, float], world: World) -> dict[str, float]:
    """The numbers of all ranks as one; the same on every rank, which all call it."""
    table = gather_numbers([float(numbers[name]) for name in OVER_RANKS], world)
    return {name: JOIN[how](table[:, column]).item() for column, (name, how) in enumerate(OVER_RANKS.items())}


@dataclass
class Window:
    """Sums over the steps since the last line."""

    sums: dict[str, float] = field(default_factory=dict)
    modality: str | None = None

    def add(self, result: StepResult, joined: dict[str, float], modality: Modality) -> None:
        steps = {"steps": 1, "loss": result.loss, "samples": result.items, f"{modality}_steps": 1}
        for name, value in (joined | steps | {f"loss_{modality}": result.loss}).items():
            if name == "memory_gb":
                self.sums[name] = max(self.sums.get(name, 0.0), value)
            else:
                self.sums[name] = self.sums.get(name, 0) + value
        self.modality = modality if self.modality in (None, modality) else "mixed"

    def line(
        self, progress: Progress, stage: str, result: StepResult, *, lr: float, peak_tflops: float, ranks: int
    ) -> dict[str, Any]:
        """One line of metrics, names with units. `result`, `lr`: of the last step; `peak_tflops`: of all ranks."""
        sums = self.sums
        seconds, steps = max(sums["step_s"], 1e-9), sums["steps"]
        tflops = sums["flops"] / seconds / 1e12
        by_modality = {
            f"loss_{m}": sums[f"loss_{m}"] / sums[f"{m}_steps"] for m in ("image", "video") if f"{m}_steps" in sums
        }
        return {
            "step": progress.step,
            "stage": stage,
            "modality": self.modality,
            "loss": sums["loss"] / steps,
            **by_modality,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "logit_scale": result.logit_scale,
            "logit_bias": result.logit_bias,
            "samples_per_s": sums["samples"] / seconds,
            "tokens_per_s": sums["tokens"] / seconds,
            "step_s": seconds / steps,
            "data_wait_pct": 100 * sums["data_wait_s"] / seconds,
            "fill_pct": 100 * sums["tokens"] / max(sums["token_budget"], 1),
            "mfu_pct": 100 * tflops / peak_tflops,
            "tflops_per_rank": tflops / ranks,
            "flop_imbalance_pct": 100 * (sums["busiest_flops"] * ranks / sums["flops"] - 1) if sums["flops"] else 0.0,
            "samples_seen": progress.samples,
            "tokens_seen": progress.tokens,
            "bad_samples": progress.bad_samples,
            "memory_gb": sums["memory_gb"],
        }


def memory_gb() -> float:
    """Most memory this rank has held so far: of its GPU if it has one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measured_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """TFLOP/s of a large matrix product in this process, as it stands: threads, and what other ranks use meanwhile."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.matmul(a, b)
    done, start = 0, 0.0
    while not done or time.perf_counter() - start < seconds:
        if not done:
            _wait(device)
            start = time.perf_counter()
        torch.matmul(a, b)
        _wait(device)
        done += 1
    return done * 2 * side**3 / (time.perf_counter() - start) / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
