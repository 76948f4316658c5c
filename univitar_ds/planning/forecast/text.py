"""Formats a plan as text, and as an object for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from univitar_ds.planning.forecast.cluster import assumption_lines
from univitar_ds.planning.forecast.plan import Plan
from univitar_ds.planning.forecast.stage import HOST_RATIOS, StagePlan
from univitar_ds.planning.forecast.step_load import group_size
from univitar_ds.planning.forecast.sweep import Trial, best_of
from univitar_ds.planning.gpus import Assumption
from univitar_ds.planning.sizes import amount
from univitar_ds.planning.step_time import ASSUMPTIONS
from univitar_ds.training.step.recomputation import NAMES

_UNUSED = ("free_memory", "buffers")
"""Assumptions of `step_time` that a plan does not use, since `planning.memory` computes its memory."""


def plan_text(plan: Plan, scales: Sequence[Plan], trials: Sequence[Trial] = ()) -> str:
    """Returns a plan as text in sections. Args: scales: plans from `scaling`; trials: from `sweep`."""
    sections = {
        "run": list(_run(plan)),
        **{f"stage {stage.name}": list(_stage(plan, stage)) for stage in plan.stages},
        "whole run": list(_whole(plan)),
        "machines": list(_machines(plan)),
        "scaling": list(_scaling(plan, scales)),
        **({"sweep": list(_sweep(trials))} if trials else {}),
        "assumptions": list(_assumptions(plan)),
    }
    lines = [line for title, body in sections.items() for line in [title, *(f"  {line}" for line in body), ""]]
    return "\n".join(lines).rstrip()


def plan_object(plan: Plan, scales: Sequence[Plan], trials: Sequence[Trial] = ()) -> dict[str, Any]:
    """Returns a plan as an object for JSON. Numbers are in bytes, seconds and FLOPs unless a key names another unit.

    Args: as `plan_text`.
    """
    best = best_of(trials)
    return {
        "run": plan.config.name,
        "cluster": {
            "nodes": plan.cluster.nodes, "gpus_per_node": plan.cluster.per_node, "gpus": plan.cluster.ranks,
            "gpu": plan.cluster.name.lower(), "memory_bytes": plan.cluster.gpu.memory.value,
            "usable_bytes": plan.cluster.room,
        },
        "parameters": dict(plan.model.counts.by_part),
        "deepspeed": plan.zero,
        "deepspeed_reason": None if plan.choice is None else plan.choice.line,
        "fits": plan.misfit() is None,
        "misfit": plan.misfit(),
        "stages": [_stage_object(stage) for stage in plan.stages],
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "host": {"memory_bytes": dict(plan.host.memory), "cores": plan.host.cores, "workers": plan.host.workers},
        "checkpoint": {
            "bytes": plan.checkpoints.bytes, "seconds": plan.checkpoints.seconds, "pause_s": plan.checkpoints.pause,
            "count": plan.checkpoints.count, "disk_bytes": plan.checkpoints.disk, "hours": plan.checkpoints.hours,
        },
        "evaluations": None if plan.evaluations is None else {
            "count": plan.evaluations.count, "items": dict(plan.evaluations.items), "source": plan.evaluations.source,
            "parts_s": dict(plan.evaluations.parts), "seconds": plan.evaluations.seconds,
            "hours": plan.evaluations.hours,
        },
        "reading": {
            "samples": plan.reading.samples, "bytes": plan.reading.bytes, "requests": plan.reading.requests,
            "s3": plan.reading.remote,
        },
        "scaling": [
            {
                "gpus": one.cluster.ranks, "deepspeed": one.zero, "hours": one.hours, "gpu_hours": one.gpu_hours,
                "fits": one.misfit() is None, "lanes": one.config.data.lanes,
                "stages": {
                    own.name: {"step_s": own.step_s, "mfu": own.mfu, "checkpoint_every": own.kind} for own in one.stages
                },
            }
            for one in scales
        ],
        "sweep": [{**vars(one), "best": one is best} for one in trials],
        "notes": list(plan.notes),
        "assumptions": list(_assumptions(plan)),
    }  # fmt: skip


def _stage_object(stage: StagePlan) -> dict[str, Any]:
    return {
        "name": stage.name,
        "items": [vars(one) for one in stage.items],
        "checkpoint_every": stage.kind,
        "grad_cache_keep": stage.kept,
        "packs_per_gpu": stage.packs,
        "memory_bytes": dict(stage.peak.parts),
        "memory_total_bytes": stage.peak.bytes,
        "memory_moment": stage.peak.moment,
        "memory_of_moments_bytes": dict(stage.peak.by_moment),
        "memory_of_evaluation_bytes": dict(stage.peak.evaluation),
        "step_s": stage.step_s,
        "step_parts_s": dict(stage.step),
        "mfu": stage.mfu,
        "flops_per_step": stage.flops,
        "recomputed_flops_per_step": stage.recomputed_flops,
        "collective_bytes_per_step": dict(stage.collectives),
        "collectives_per_step": stage.messages,
        "group_bytes_per_step": stage.group_bytes,
        "group_collectives_per_step": stage.group_messages,
        "muon_flops_per_step": stage.muon_flops,
        "pairs_per_step": stage.pairs,
        "tokens_per_step": stage.tokens,
        "steps": stage.steps,
        "hours": stage.hours,
        "largest_token_budget": {str(kind): budget for kind, budget in stage.budgets.items()},
        "pack_tflops": stage.pack_tflops,
        "simulated": [vars(step) for step in stage.simulated],
    }


def _run(plan: Plan) -> Iterator[str]:
    config, cluster = plan.config, plan.cluster
    yield f"{config.name} on {cluster.title}"
    counts = ", ".join(
        f"{part} {count / 1e6:,.1f}M" for part, count in plan.model.counts.by_part.items() if count > 1e5
    )
    yield f"{plan.model.counts.total / 1e6:,.0f}M parameters ({counts})"
    each = group_size(config)
    packs, whom = config.data.lanes * each // cluster.ranks, "GPU" if each == 1 else f"group of {each} GPUs"
    yield f"{config.data.lanes:,} packs a step, {packs:,} for each {whom}; {config.objective.kind} loss"
    yield plan.choice.line if plan.choice is not None else f"deepspeed: {plan.zero}, as in the run file"
    yield from plan.notes


def _stage(plan: Plan, stage: StagePlan) -> Iterator[str]:
    own = next(one for one in plan.config.stages if one.name == stage.name)
    for item in stage.items:
        share = "" if len(stage.items) == 1 else f"{100 * item.share:.0f} % of the steps: "
        yield f"{share}{item.modality}s of {item.tokens:,.0f} tokens ({item.source})"
    yield (
        f"a step: {stage.step_s:.3g} s, MFU {percent(stage.mfu)}, {stage.pairs:,.0f} pairs, "
        f"{stage.tokens / stage.step_s / plan.cluster.ranks:,.0f} tokens/s a GPU"
    )
    parts = sorted(stage.step.items(), key=lambda part: -part[1])
    shares = ", ".join(
        f"{name} {100 * size / stage.step_s:.0f} %" for name, size in parts if size > 0.005 * stage.step_s
    )
    yield f"    by part: {shares}"
    again = f" + {100 * stage.recomputed_flops / stage.flops:.0f} % recomputed" if stage.recomputed_flops else ""
    yield f"a step computes {flops_text(stage.flops)}{again}; a full pack is {stage.pack_tflops:.3g} TFLOP"
    yield from _collectives(stage)
    if stage.group_messages:
        moved = f"{amount(stage.group_bytes)} in {stage.group_messages:,} collectives"
        yield f"within groups of {group_size(plan.config)} GPUs that share packs or weights, each GPU: {moved}"
    if stage.muon_flops:
        yield f"an update by Muon computes {flops_text(stage.muon_flops)}, distributed over the GPUs"
    yield from _memory(plan, stage)
    wanted = own.cost_budget_tflops
    cost = "auto: set from the first samples so that packs take equal time" if wanted == "auto" else wanted or "none"
    yield f"cost_budget_tflops: {cost}"
    yield f"{stage.steps:,} steps, {duration(stage.hours)}, {short(stage.hours * plan.cluster.ranks)} GPU hours"


def _collectives(stage: StagePlan) -> Iterator[str]:
    moved = ", ".join(f"{kind} {amount(size)}" for kind, size in stage.collectives.items())
    if not stage.simulated:
        if moved:
            yield f"weights and gradients of a step, each GPU: {moved}, in about {stage.messages} collectives"
        return
    for step in stage.simulated:
        own = ", ".join(
            f"{kind} {amount(step.collective_bytes[kind])} in {count}" for kind, count in step.collectives.items()
        )
        yield (
            f"a step of {step.modality}s, simulated, each GPU: {step.launches:,} launches, {step.waits} waits of the "
            f"host; collectives, in and out: {own or 'none'}"
        )


def _memory(plan: Plan, stage: StagePlan) -> Iterator[str]:
    free = plan.cluster.room - stage.peak.bytes
    yield (
        f"memory of a GPU: {amount(stage.peak.bytes)} of the {amount(plan.cluster.room)} that may be filled, most in "
        f"'{stage.peak.moment}'{', simulated' if stage.simulated else ''}"
        + ("" if free >= 0 else f": {amount(-free)} TOO MUCH")
    )
    for name, size in sorted(stage.peak.parts.items(), key=lambda part: -part[1]):
        yield f"    {name:<22} {amount(size):>10}"
    if stage.peak.evaluation:
        own = sorted(stage.peak.evaluation.items(), key=lambda part: -part[1])
        listed = ", ".join(f"{name} {amount(size)}" for name, size in own)
        yield f"during an evaluation: {amount(sum(stage.peak.evaluation.values()))}: {listed}"
    yield (
        f"checkpoint_every: {stage.kind} (recomputes {NAMES.get(stage.kind, f'every {stage.kind}th block')}); "
        f"grad_cache_keep: {stage.kept} of {stage.packs} packs"
    )
    fits = ", ".join(f"{budget:,} with {kind}" for kind, budget in stage.budgets.items())
    yield f"largest token_budget that fits, by checkpoint_every: {fits}"


def _whole(plan: Plan) -> Iterator[str]:
    made = plan.checkpoints
    yield f"{duration(plan.hours)}, {short(plan.gpu_hours)} GPU hours"
    yield (
        f"a checkpoint: {amount(made.bytes)}, written in {made.seconds:.3g} s, of which training waits "
        f"{made.pause:.3g} s; {made.count:,} are written ({duration(made.hours)} of waiting); those that are kept and "
        f"one being written need {amount(made.disk)} of disk"
    )
    yield from _evaluations(plan)
    read = plan.reading
    where = "from S3" if read.remote else "from shards"
    yield (
        f"{read.samples:,.0f} samples, {amount(read.bytes)} {where} in {read.requests:,.0f} requests"
        + f", {amount(read.bytes / max(plan.hours, 1e-9) / 3600)}/s"
    )


def _evaluations(plan: Plan) -> Iterator[str]:
    own = plan.evaluations
    if own is None:
        return
    items = " and ".join(f"{count:,} {modality}s" for modality, count in own.items.items())
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in own.parts.items())
    kinds = "averaged and trained weights" if own.kinds > 1 else "trained weights"
    yield (
        f"{own.count:,} evaluations during training, of {items} ({own.source}), {kinds}: {own.seconds:.3g} s each "
        f"({parts}), {duration(own.hours)} together; captions are not counted, nor is the evaluation after training"
    )


def _machines(plan: Plan) -> Iterator[str]:
    host = plan.host
    yield f"host memory of each machine: {amount(host.bytes)}"
    for name, size in sorted(host.memory.items(), key=lambda part: -part[1]):
        yield f"    {name:<26} {amount(size):>10}"
    per_node = plan.cluster.per_node
    verdict = "enough" if host.given >= host.workers else f"TOO FEW: set data.workers to at least {host.workers}"
    yield (
        f"cores: {per_node} for the ranks and {host.cores:.1f} busy with decoding; "
        f"data.workers {host.given} of each rank: {verdict}"
    )


def _scaling(plan: Plan, scales: Sequence[Plan]) -> Iterator[str]:
    names = [stage.name for stage in plan.stages]
    heads = "  ".join(f"{name + ', s (MFU)':>20}" for name in names)
    yield f"{'GPUs':>6}  {'':<13}{'whole run':>14} {'GPU hours':>11}  {heads}"
    for one in scales:
        cells = "  ".join(f"{f'{own.step_s:.3g} ({percent(own.mfu)})':>20}" for own in one.stages)
        mark = " <" if one.cluster.ranks == plan.cluster.ranks else ""
        length = duration(one.hours) if one.misfit() is None else "does not fit"
        lanes = "" if one.config.data.lanes == plan.config.data.lanes else f"  {one.config.data.lanes:,} lanes"
        yield f"{one.cluster.ranks:>6,}  {one.zero:<13}{length:>14} {short(one.gpu_hours):>11}  {cells}{lanes}{mark}"


def _sweep(trials: Sequence[Trial]) -> Iterator[str]:
    best = best_of(trials)
    yield "thousand tokens/s a GPU, predicted, and GB of a GPU; - does not fit; * the best"
    budgets = sorted({one.budget for one in trials})
    yield f"{'checkpoint_every, ZeRO':<23}" + "".join(f"{budget:>13,}" for budget in budgets)
    rows: dict[tuple[str, str], dict[int, Trial]] = {}
    for one in trials:
        rows.setdefault((str(one.kind), one.zero), {})[one.budget] = one
    for (kind, zero), cells in rows.items():
        text = "".join(_cell(cells[budget], best) for budget in budgets)
        yield f"{kind + ', ' + zero:<23}{text}"
    if best is None:
        yield "nothing fits: use more GPUs, GPUs with more memory, or a smaller encoder"
    else:
        yield (
            f"* deepspeed: {best.zero}, checkpoint_every: {best.kind}, token_budget: {best.budget}; "
            f"{best.pairs:,.0f} pairs a step, {best.step_s:.3g} s, MFU {percent(best.mfu)}"
        )


def _cell(one: Trial, best: Trial | None) -> str:
    speed = f"{one.speed / 1e3:.3g}" if one.fits else "-"
    return f"{f'{speed} {one.memory / 1e9:.3g}' + ('*' if one is best else ' '):>13}"


def _assumptions(plan: Plan) -> Iterator[str]:
    by_formulas = [stage.name for stage in plan.stages if not stage.simulated]
    yield "nothing was measured on a GPU; times follow from the rates below"
    if len(by_formulas) < len(plan.stages):
        yield (
            "memory, collectives, launches and waits are those of the trainer's step on a simulated GPU (the second "
            "step, packs full of items of one size, captions of full length, an H100 for every GPU); formulas predict "
            "the memory of scaling, sweep and evaluations, and the largest token_budget"
        )
    if by_formulas:
        yield f"formulas predict memory and collectives from shapes (stages {', '.join(by_formulas)})"
    own: Mapping[str, Assumption] = {name: one for name, one in ASSUMPTIONS.items() if name not in _UNUSED}
    for zero, ratios in HOST_RATIOS.items():
        found = ", ".join(f"{ratio} at {ranks:,} ranks" for ranks, ratio in ratios.items())
        yield f"host_ratio {zero}: {found} (measured: benchmarks/results/bench_host.csv)"
    if plan.evaluations is not None:
        yield "evaluations reach the MFU of the last stage with their modality (chosen)"
    yield from assumption_lines(plan.cluster, dict(own))


def duration(hours: float) -> str:
    """Returns a duration in minutes, hours or days."""
    if hours < 1:
        return f"{60 * hours:.3g} minutes"
    return f"{hours:.3g} hours" if hours < 48 else f"{hours / 24:,.1f} days"


def percent(share: float) -> str:
    """Returns a share in percent, with two digits below 10 %."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def short(number: float) -> str:
    """Returns a number with commas, or with three digits if it is small."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def flops_text(flops: float) -> str:
    """Returns a number of FLOPs with a unit, such as "79.4 PFLOP"."""
    for unit, factor in (("EFLOP", 1e18), ("PFLOP", 1e15)):
        if flops >= factor:
            return f"{flops / factor:.3g} {unit}"
    return f"{flops / 1e12:.3g} TFLOP"
