"""Training metrics: combines the numbers of each rank at each step into lines for all ranks and several steps.

`OVER_RANKS` declares how each number is reduced over ranks. Each rank sends all its numbers of a step in one small
message. `Window` sums the numbers over the steps of a line. It is part of the checkpoint, so a resumed run writes the
same lines as an uninterrupted run.
"""

from __future__ import annotations

import math
import resource
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.sampler.bad_samples import KINDS
from univitar_ds.data.shards.captions import IGNORED
from univitar_ds.geometry import PATCH, Modality, token_count
from univitar_ds.model.blocks.dropping import NO_DROPPING, DropConfig
from univitar_ds.training.distributed.process_group import World, gather_numbers, uses_cuda
from univitar_ds.training.engine.optim import GRADIENT_PARTS
from univitar_ds.training.step.curriculum import Progress
from univitar_ds.training.step.pack_share import PackShare, whole_of
from univitar_ds.training.step.peak_flops import Peak
from univitar_ds.training.step.train_step import StepResult

BAD_OF_KIND = {f"bad_{kind.removeprefix('bad_')}": kind for kind in KINDS}
"""Kinds of bad samples, by the name of their count in a line."""
IGNORED_OF_KIND = {f"ignored_{kind.removeprefix('bad_')}": kind for kind in IGNORED}
"""Kinds of texts that were ignored while the rest of their sample was used, by the name of their count in a line."""
FILTERED = "filtered_samples"
"""Name of the count of samples that the conditions of sources (`where`) left out."""
COUNTS = (*BAD_OF_KIND, *IGNORED_OF_KIND, FILTERED)
"""Names of counts since the start of the run. A line omits those that are 0."""
SQUARES = {part: f"grad_square_{part}" for part in GRADIENT_PARTS}
"""Names of the sums of squares of the gradient, by part of the model."""
OVER_RANKS = {
    "tokens": "sum",
    "token_budget": "sum",
    "flops": "sum",
    "busiest_flops": "max",
    "side_px": "sum",
    "downscaled": "sum",
    "bad_samples": "sum",
    **dict.fromkeys(COUNTS, "sum"),
    "step_s": "max",
    "data_wait_s": "mean",
    "memory_gb": "max",
    **dict.fromkeys(SQUARES.values(), "sum"),
}
"""Names of a rank's numbers at a step, with their reduction over ranks. All kinds of bad samples are included, so that
all ranks exchange the same number of values."""
REDUCTIONS = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}


def local_metrics(
    batches: Sequence[PackedBatch],
    *,
    cost: tuple[float, float],
    token_budget: int,
    step_s: float,
    data_wait_s: float,
    dropping: DropConfig = NO_DROPPING,
    squares: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Returns the numbers of this rank at a step, by the names of OVER_RANKS.

    Args:
        cost: (a, b), where an item of n tokens takes a * n + b * n**2 FLOPs.
        dropping: dropping of the step; FLOPs count only the tokens that are kept.
        squares: `Engine.gradient_squares`, for a step with `read_gradient`.
    """
    bad, ignored = Counter[str](), Counter[str]()
    for batch in batches:
        bad.update(batch.bad)
        ignored.update(batch.ignored)
    assert bad.keys() <= set(KINDS), set(bad) - set(KINDS)
    assert ignored.keys() <= set(IGNORED), set(ignored) - set(IGNORED)
    # The number of ranks that share a pack.
    ranks = next((batch.ranks for batch in batches if isinstance(batch, PackShare)), 1)
    lengths = _lengths(batches)
    return {
        "tokens": sum(lengths),
        "token_budget": token_budget * len(batches) / ranks,
        "flops": _flops(lengths, cost, dropping),
        "busiest_flops": _flops(_lengths([whole_of(batch) for batch in batches]), cost, dropping) / ranks,
        "side_px": _sides_px(batches),
        "downscaled": sum(batch.downscaled for batch in batches),
        "bad_samples": bad.total(),
        **{name: bad[kind] for name, kind in BAD_OF_KIND.items()},
        **{name: ignored[kind] for name, kind in IGNORED_OF_KIND.items()},
        FILTERED: sum(sum(batch.filtered.values()) for batch in batches),
        "step_s": step_s,
        "data_wait_s": data_wait_s,
        "memory_gb": memory_gb(),
        **{name: (squares or {}).get(part, 0.0) for part, name in SQUARES.items()},
    }


def _lengths(batches: Sequence[PackedBatch]) -> list[int]:
    return [token_count(grid) for batch in batches for grid in batch.grid_thw.tolist()]


def _sides_px(batches: Sequence[PackedBatch]) -> float:
    """Returns the sum over items of the square root of their area in pixels."""
    return PATCH * sum(math.sqrt(h * w) for batch in batches for _, h, w in batch.grid_thw.tolist())


def _flops(lengths: Sequence[int], cost: tuple[float, float], dropping: DropConfig) -> float:
    kept = [dropping.kept(length) for length in lengths]
    return cost[0] * sum(kept) + cost[1] * sum(length**2 for length in kept)


def exchange_metrics(
    numbers: dict[str, float], others: Sequence[float], world: World, *, equal: int = 1
) -> tuple[dict[str, float], torch.Tensor]:
    """Returns the numbers reduced over all ranks, and a table of `others`, (size / equal, others) float64 on the host.

    All ranks must call it, with the same number of `others`. All values are sent in one message.
    Args: equal: number of consecutive ranks that have the same packs and share their FLOPs. Sums and the table include
        only the first of these ranks; squares of the gradient are summed over all ranks.
    """
    return exchange_with_times(numbers, others, (), world, equal=equal)[:2]


def exchange_with_times(
    numbers: dict[str, float], others: Sequence[float], times: Sequence[float], world: World, *, equal: int = 1
) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Returns the results of `exchange_metrics`, and `times` of every rank, (size, times) float64 on the host.

    All values are sent in one message."""
    table = gather_numbers([*(float(numbers[name]) for name in OVER_RANKS), *others, *times], world)
    metrics = {}
    for column, (name, how) in enumerate(OVER_RANKS.items()):
        step = equal if how == "sum" and name not in SQUARES.values() else 1
        metrics[name] = REDUCTIONS[how](table[::step, column]).item()
    metrics["busiest_flops"] /= equal
    first, last = len(OVER_RANKS), len(OVER_RANKS) + len(others)
    return metrics, table[::equal, first:last], table[:, last:]


def part_norms(reduced: Mapping[str, float]) -> dict[str, float]:
    """Returns the 2-norms of the gradient's parts over all ranks, by their names in a line.

    Args: reduced: metrics over all ranks of a step with `read_gradient`."""
    return {f"grad_norm_{part}": math.sqrt(reduced[name]) for part, name in SQUARES.items()}


@dataclass
class Window:
    """Sums over the steps since the last line, and counts over the whole run.

    `bad` has these counts by the names of COUNTS: bad samples, ignored texts and filtered samples. For losses, loss
    weights, the teacher's agreement and the sizes of items, a line has the mean over the steps that have the value;
    `<name>_steps` counts these steps.
    """

    sums: dict[str, float] = field(default_factory=dict)
    modality: str | None = None
    bad: dict[str, float] = field(default_factory=dict)

    def add(
        self, result: StepResult, reduced: dict[str, float], modality: Modality, weights: Mapping[str, float]
    ) -> None:
        """Adds a step. Args: reduced: metrics over all ranks; weights: loss weights by the names of their schedules."""
        means = {"loss": result.loss, f"loss_{modality}": result.loss}
        for part, value in result.losses.items():
            means |= {f"loss_{part}": value, f"loss_{part}_{modality}": value}
        means |= {f"{name}_weight": weight for name, weight in weights.items()}
        if result.items:
            means[f"side_px_{modality}"] = reduced["side_px"] / result.items
        if result.agreement is not None:
            means["teacher_agreement"] = result.agreement
        self._sum({"samples": result.items, **{f"{name}_steps": 1 for name in means}, **means}, reduced, modality)

    def add_skipped(self, items: int, reduced: dict[str, float], modality: Modality) -> None:
        """Adds a step whose update was skipped: its time, items and tokens count, its loss does not."""
        self._sum({"samples": items}, reduced, modality)

    def _sum(self, numbers: Mapping[str, float], reduced: Mapping[str, float], modality: Modality) -> None:
        for name, value in ({**reduced, "steps": 1, **numbers}).items():
            if name in SQUARES.values():
                continue  # not summed: a line has the norms of its last step, see `part_norms`
            if name in COUNTS:
                if value:  # lines and checkpoints omit kinds that did not occur
                    self.bad[name] = self.bad.get(name, 0) + value
            elif name == "memory_gb":
                self.sums[name] = max(self.sums.get(name, 0.0), value)
            else:
                self.sums[name] = self.sums.get(name, 0) + value
        self.modality = modality if self.modality in (None, modality) else "mixed"

    def next(self) -> Window:
        """Returns an empty window for the steps after a line, with the counts of the whole run."""
        return Window(bad=self.bad)

    def line(
        self,
        progress: Progress,
        stage: tuple[int, str],
        result: StepResult,
        *,
        lr: float,
        peak: Peak,
        ranks: int,
        guarded: Mapping[str, int] | None = None,
        further: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Returns one line of metrics by name. The names contain the units, for example `step_s`.

        Args:
            progress: progress after the last step.
            stage: (index, name) of the last step's stage.
            result, lr: of the last step.
            peak: peak TFLOP/s of all ranks together.
            ranks: number of ranks.
            guarded: result of `State.guarded`.
            further: results of `part_norms` and `slow_ranks.times_over_ranks`, if the last step exchanged them.
        """
        sums = self.sums
        seconds, steps = max(sums["step_s"], 1e-9), sums["steps"]
        tflops = sums["flops"] / seconds / 1e12
        means = {name: sums[name] / sums[f"{name}_steps"] for name in sums if f"{name}_steps" in sums}
        mfu_pct = 100 * tflops / peak.tflops
        note = peak.note(mfu_pct)
        return {
            "step": progress.step,
            "stage": stage[1],
            "stage_index": stage[0],
            "modality": self.modality,
            **means,
            "lr": lr,
            "grad_norm": result.grad_norm,
            **(further or {}),
            **{
                name: value
                for name, value in (("logit_scale", result.logit_scale), ("logit_bias", result.logit_bias))
                if value is not None
            },
            "samples_per_s": sums["samples"] / seconds,
            "tokens_per_s": sums["tokens"] / seconds,
            "step_s": seconds / steps,
            "data_wait_pct": 100 * sums["data_wait_s"] / seconds,
            "fill_pct": 100 * sums["tokens"] / max(sums["token_budget"], 1),
            "mfu_pct": mfu_pct,
            **({} if note is None else {"mfu_note": note}),
            "tflops_per_rank": tflops / ranks,
            "flop_imbalance_pct": 100 * (sums["busiest_flops"] * ranks / sums["flops"] - 1) if sums["flops"] else 0.0,
            "samples_seen": progress.samples,
            "tokens_seen": progress.tokens,
            "downscaled_pct": 100 * sums["downscaled"] / max(sums["samples"], 1),
            "bad_samples": progress.bad_samples,
            **{name: int(self.bad[name]) for name in COUNTS if name in self.bad},
            **(guarded or {"rollbacks": 0}),
            "memory_gb": sums["memory_gb"],
        }


def memory_gb() -> float:
    """Returns the peak memory of this rank so far in GB: memory of its GPU on CUDA, else memory of the process."""
    if uses_cuda():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
