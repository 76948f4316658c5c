"""Plans of the recipes: what they take, what fits, how they scale, and what they say where nothing fits."""

import json
from functools import cache

import pytest

from univitar_ds.config.load import load_config
from univitar_ds.errors import ConfigError
from univitar_ds.planning.forecast.cluster import cluster_of, of_ranks
from univitar_ds.planning.forecast.items import items_of
from univitar_ds.planning.forecast.plan import plan_model, plan_run, scaling
from univitar_ds.planning.forecast.sweep import best_of, candidates, stage_named, sweep
from univitar_ds.planning.forecast.text import plan_object, plan_text
from univitar_ds.planning.gpus import GPUS
from univitar_ds.planning.sizes import checkpoint_bytes


@cache
def planned(nodes: int = 4, gpu: str = "h100", *overrides: str, recipe: str = "univitar_0p3b"):
    return plan_run(load_config(recipe, list(overrides)), cluster_of(nodes, 8, gpu))


def test_a_plan_adds_up():
    plan = planned()
    assert plan.misfit() is None
    for stage, own in zip(plan.stages, plan.config.stages, strict=True):
        assert stage.peak.bytes == sum(stage.peak.parts.values()) <= plan.cluster.room
        assert stage.steps == -int(-own.samples // stage.pairs)
        assert stage.flops == pytest.approx(stage.mfu * stage.step_s * plan.cluster.ranks * 989e12)
        assert stage.hours == stage.steps * stage.step_s / 3600
        assert stage.budgets[1] > stage.budgets[2] > stage.budgets["selective"] > stage.budgets[0] > 0
    assert plan.stages[0].pairs == 256 * 128, "packs of 128 images of 256 tokens"
    assert plan.gpu_hours == 32 * plan.hours
    assert plan.hours > sum(stage.hours for stage in plan.stages), "and the checkpoints"
    size = checkpoint_bytes(plan.config, plan.config.stages[0], plan.model.counts, plan.place.resolved)
    assert plan.checkpoints.bytes == size


def test_checkpoints_at_the_end_of_stages_and_those_that_stay_are_counted():
    plan, forever = planned(), planned(4, "h100", "checkpoint.every_steps=1000", "checkpoint.keep_every_steps=10000")
    ends = [sum(stage.steps for stage in forever.stages[:number]) for number in (1, 2, 3)]
    assert plan.checkpoints.disk == plan.checkpoints.bytes * (plan.config.checkpoint.keep + 1)
    assert forever.checkpoints.count == len({*range(1000, ends[-1] + 1, 1000), *ends})
    assert forever.checkpoints.disk == forever.checkpoints.bytes * (plan.config.checkpoint.keep + 1 + ends[-1] // 10000)


def test_recomputation_and_kept_packs_are_the_least_and_the_most_that_fit():
    roomy, tight = planned(4, "h200").stages[0], planned(4, "a100", "stages.0.token_budget=98304").stages[0]
    assert roomy.kind == 0
    assert roomy.kept > 1
    assert tight.kind != 0
    assert planned(4, "h200", "objective.grad_cache_keep=1").stages[0].kept == 1
    assert planned(4, "h200", "model.checkpoint_every=1").stages[0].kind == 1


def test_what_does_not_fit_is_said_with_value_limit_and_remedy():
    few = planned(4, "h100", "model.checkpoint_every=0", "stages.0.token_budget=131072").misfit()
    assert "token_budget 131,072" in few
    assert "72 GB may be filled" in few
    assert "set checkpoint_every: 1" in few
    kept = planned(4, "h100", "model.checkpoint_every=0", "objective.grad_cache_keep=8", "stages.0.token_budget=32768")
    assert "lower objective.grad_cache_keep (8), or set it to auto" in kept.misfit()
    large = planned(4, "h100", "stages.0.token_budget=10000000", "deepspeed=zero2").misfit()
    fits = planned(4, "h100", "stages.0.token_budget=10000000", "deepspeed=zero2").stages[0].budgets[1]
    assert f"stages.0.token_budget to at most {fits:,} with checkpoint_every: 1" in large
    assert planned(4, "h100", f"stages.0.token_budget={fits}", "deepspeed=zero2").misfit() is None
    assert planned(4, "h100", f"stages.0.token_budget={fits + 1024}", "deepspeed=zero2").misfit() is not None


def test_more_gpus_take_less_time_and_more_than_the_lanes_get_as_many_lanes():
    plan = planned()
    found = {one.cluster.ranks: one for one in scaling(plan, {})}
    assert list(found) == [2**power for power in range(11)]
    hours = [one.hours for one in found.values()]
    assert hours == sorted(hours, reverse=True)
    assert found[32].hours == plan.hours
    assert (found[1024].config.data.lanes, found[64].config.data.lanes) == (1024, 256)
    assert found[512].stages[0].pairs == 2 * plan.stages[0].pairs
    assert of_ranks(plan.cluster, 4).per_node == 4


def test_items_follow_from_the_size_rule_the_manifests_or_the_user():
    fixed, native, video = load_config("univitar_0p3b", []).stages
    (item,) = items_of(fixed, {}, None)
    assert (item.tokens, item.attended, item.sizes, item.source) == (256, 256, 1, "one size")
    (item,) = items_of(native, {}, None)
    assert (item.tokens, item.source) == (1024, "assumed")
    assert items_of(native, {("native", "image"): 2000.0}, None)[0].tokens == 2000
    assert items_of(native, {("native", "image"): 2000.0}, 600)[0].source == "given"
    images, videos = items_of(video, {}, None)
    assert (images.share, videos.share, videos.tokens) == (0.5, 0.5, 5832), "16 frames of 1,024 tokens, and the limit"
    with pytest.raises(ConfigError, match=r"--tokens-per-item 100 is outside of 576 to 5832"):
        items_of(native, {}, 100)


def test_a_sweep_marks_the_fastest_that_fits():
    plan = planned()
    stage = stage_named(plan, "native")
    trials = sweep(plan, stage)
    assert {one.zero for one in trials} == set(candidates(plan)) == {"zero1", "zero2", "zero3", "zero3_node"}
    assert {one.kind for one in trials} == {0, "selective", 2, 1}
    best = best_of(trials)
    assert best.fits
    assert best.speed == max(one.speed for one in trials if one.fits)
    assert any(not one.fits for one in trials)
    assert stage.token_budget in {one.budget for one in trials}
    (own,) = [
        one
        for one in trials
        if (one.budget, one.kind, one.zero) == (stage.token_budget, plan.stages[1].kind, plan.zero)
    ]
    assert own.step_s == plan.stages[1].step_s
    known = plan_model(plan.model, plan.cluster, {("native", "image"): 2000.0})
    (own,) = [
        one
        for one in sweep(known, stage)
        if (one.budget, one.kind, one.zero) == (stage.token_budget, known.stages[1].kind, known.zero)
    ]
    assert own.step_s == known.stages[1].step_s != plan.stages[1].step_s, "manifests count"
    assert stage_named(plan, None).name == max(plan.stages, key=lambda one: one.hours).name
    with pytest.raises(ConfigError, match=r"--stage other is no stage.*fixed224, native, video"):
        stage_named(plan, "other")
    text = plan_text(plan, [plan], trials)
    assert f"* deepspeed: {best.zero}, checkpoint_every: {best.kind}, token_budget: {best.budget}" in text
    assert text.count("*") == 3, "the legend, the cell and the line below"


def test_text_and_object_have_all_parts_and_every_assumption():
    plan = planned()
    text, found = plan_text(plan, [plan]), plan_object(plan, [plan])
    assert json.loads(json.dumps(found)) == found
    for stage in found["stages"]:
        assert sum(stage["memory_bytes"].values()) == stage["memory_total_bytes"]
        assert f"stage {stage['name']}" in text
        for part in stage["memory_bytes"]:
            assert part in text
    for name, one in GPUS["H100"].assumptions():
        assert any(line.startswith(f"{name}: ") and one.source in line for line in found["assumptions"])
    assert all(line in text for line in found["assumptions"])
    assert found["scaling"][0]["gpus"] == 32
    assert found["host"]["memory_bytes"]["model while it is built"] == 8 * 4 * plan.model.counts.total


def test_a_classifier_without_data_and_a_cluster_that_nobody_has():
    plan = plan_run(load_config("labels", ["data.lanes=8"]), cluster_of(1, 8, "A100"))
    assert any("classes are assumed" in note for note in plan.notes)
    assert all("text tower" not in stage.peak.parts for stage in plan.stages)
    with pytest.raises(ConfigError, match="--gpu v100 is not known; give one of a100, h100, h200, b200"):
        cluster_of(1, 8, "v100")
    with pytest.raises(ConfigError, match="80,000 GPUs; give at most 65,536"):
        cluster_of(10_000, 8, "h100")
