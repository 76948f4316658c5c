"""Plans of the recipes: memory, time, scaling, and the error if a run does not fit."""

import json
import math
import re
from dataclasses import replace
from functools import cache

import pytest

from tests.support.shards import write_demo_shards
from univitar_ds.config.load import load_config
from univitar_ds.errors import ConfigError
from univitar_ds.model.flops import cost_coefficients
from univitar_ds.planning.forecast.cluster import cluster_of, of_ranks
from univitar_ds.planning.forecast.evaluations import evaluated_items
from univitar_ds.planning.forecast.items import items_of
from univitar_ds.planning.forecast.plan import plan_model, plan_run, scaling
from univitar_ds.planning.forecast.resources import checkpoints
from univitar_ds.planning.forecast.stage import muon_of
from univitar_ds.planning.forecast.step_load import load_of, states_of
from univitar_ds.planning.forecast.sweep import best_of, candidates, stage_named, sweep
from univitar_ds.planning.forecast.text import plan_object, plan_text
from univitar_ds.planning.gpus import GPUS
from univitar_ds.planning.memory import encoder_kept
from univitar_ds.planning.sizes import checkpoint_bytes, encoder_of

GROUPS = ("tensor", "sequence")


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


def test_the_training_waits_for_the_copy_of_a_checkpoint_for_a_late_one_and_for_the_last():
    plan, waits = planned().checkpoints, planned(4, "h100", "checkpoint.asynchronous=false").checkpoints
    assert plan.pause == plan.bytes / 32 / 10e9
    assert plan.hours == pytest.approx((plan.count * plan.pause + plan.seconds) / 3600)
    assert waits.pause == waits.seconds == plan.seconds
    assert waits.hours == pytest.approx(waits.count * waits.seconds / 3600)
    assert planned().host.memory["copy of the checkpoint"] == pytest.approx(8 * plan.bytes / 32)
    quick = [replace(stage, step={"products": 1e-4 * plan.seconds}) for stage in planned().stages]
    every = planned().config.checkpoint.every_steps
    late = checkpoints(planned().model, quick, planned().cluster, planned().place)
    waiting = sum(stage.steps // every for stage in quick) * (plan.seconds * (1 - 1e-4 * every) - plan.pause)
    assert waiting > 0
    assert late.hours * 3600 == pytest.approx(waiting + plan.count * plan.pause + plan.seconds)


def test_groups_of_gpus_share_weights_or_packs_and_exchange_messages_within_blocks():
    plan = planned()
    tensor, sequence = (planned(4, "h100", f"model.{name}_parallel=2", "deepspeed=zero2") for name in GROUPS)
    counts, layers = plan.model.counts, 24
    blocks = counts.by_part["blocks"]
    assert tensor.stages[0].peak.parts["weights"] == 2 * (counts.total - blocks / 2)
    assert sequence.stages[0].peak.parts["weights"] == 2 * counts.total
    pixels = [one.stages[0].peak.parts["pixels"] / one.stages[0].packs for one in (plan, sequence)]
    assert pixels[0] == pixels[1], "each GPU of a group reads its packs whole"
    kept = [one.stages[0].peak.parts["encoder activations"] / one.stages[0].kept for one in (plan, sequence)]
    assert plan.stages[0].kind == sequence.stages[0].kind == 0
    encoder = encoder_of(plan.model.description)
    tokens = plan.config.stages[0].token_budget / 2
    exchanged = tokens * 2 * 2 * 1024 * 24  # values and the attention's result a second time, in bf16
    assert kept[1] == pytest.approx(kept[0] / 2 + exchanged)
    of_token = 24 * (6 * 1024 + (14 * 1024 + 11 * encoder.inner_width) / 2) * 2 + 24 * 4 * 16 / 2 + 4 * 1024 * 2
    assert (encoder.hidden_size, encoder.num_attention_heads) == (1024, 16)
    loads = (
        load_of(tensor.model, tensor.config.stages[0], 32, 0),
        states_of(tensor.model, tensor.config.stages[0], tensor.place),
    )
    assert encoder_kept(*loads) == pytest.approx(loads[0].tokens * of_token)
    for one, messages in ((tensor, 4), (sequence, 2)):
        stage = one.stages[0]
        assert (stage.packs, stage.pairs) == (2 * plan.stages[0].packs, plan.stages[0].pairs)
        passes = 3 * stage.packs - min(stage.kept, stage.packs) + (stage.packs if stage.kind == 1 else 0)
        assert stage.group_messages == passes * messages * layers
        assert stage.group_bytes > 0
        assert stage.step["sharing"] > 0
        assert 2 in [part.cluster.ranks for part in scaling(one, {})]
        assert 1 not in [part.cluster.ranks for part in scaling(one, {})]
        text = plan_text(one, [one])
        assert "within groups of 2 GPUs that share packs or weights" in text
        assert "for each group of 2 GPUs" in text
    assert plan.stages[0].group_messages == 0
    with pytest.raises(ConfigError, match=r"need a multiple of 2 GPUs, and --nodes 3 x --gpus-per-node 1 are 3"):
        plan_model(tensor.model, cluster_of(3, 1, "h100"), {})


EVALUATED = ("evaluation.every_samples=10_000_000", "evaluation.sources=[{path: s3://bucket/held-out}]")


def test_evaluations_while_a_run_trains_are_counted_in_memory_and_time(tmp_path):
    plan, evaluated = planned(), planned(4, "h100", *EVALUATED, "optimizer.ema_decay=0.999")
    assert plan.evaluations is None
    own = evaluated.evaluations
    assert own.count == sum(stage.samples for stage in plan.config.stages) // 10_000_000
    assert (own.items, own.source, own.kinds) == ({"image": 50_000}, "assumed", 2)
    assert evaluated.hours == pytest.approx(
        sum(stage.hours for stage in evaluated.stages) + evaluated.checkpoints.hours + own.count * own.seconds / 3600
    )
    last = evaluated.stages[-1]
    linear, square = (number / 3 for number in cost_coefficients(encoder_of(plan.model.description)))
    flops = 2 * math.ceil(50_000 / 32) * 1024 * (linear + square * 1500)
    computed, decoded = flops / (last.mfu * 989e12), math.ceil(50_000 / 32) * 0.75e-3 / plan.config.data.workers
    assert own.parts["embedding"] == pytest.approx(max(computed, decoded))
    count = evaluated.model.counts.total
    for stage in evaluated.stages:
        assert stage.peak.evaluation["weights of the evaluation"] == 2 * 2 * count + (1 << 25) * 4
    text = plan_text(evaluated, [evaluated])
    assert "evaluations during training, of 50,000 images (assumed), averaged and trained weights" in text
    assert "during an evaluation: " in text
    assert "evaluation_items: 5e+04 items (chosen" in text
    assert plan_object(evaluated, [])["evaluations"]["hours"] == own.hours
    assert plan_object(plan, [])["evaluations"] is None
    shards = write_demo_shards(tmp_path / "shards", images=8, videos=4, shards=1)
    known = load_config("univitar_0p3b", [EVALUATED[0], f"evaluation.sources=[{{path: {shards}}}]"])
    assert evaluated_items(known) == {"image": 8, "video": 4}


def test_an_evaluation_that_does_not_fit_has_a_remedy_of_its_own():
    plan = planned(1, "h100", *EVALUATED, "evaluation.token_budget=9_000_000")
    assert re.search(
        r"stage fixed224 needs .*; lower evaluation\.token_budget \(9,000,000\), .*every_samples: null", plan.misfit()
    )


def test_muon_counts_its_iterations_on_the_gpu_with_most_matrices():
    plan, muon = planned(1), planned(1, "h100", "optimizer.kind=muon", "deepspeed=zero2")
    assert plan.stages[0].muon_flops == 0
    shapes = muon.model.counts.shapes_of_muon(muon.config, muon.config.stages[0])
    assert sum(math.prod(shape) for shape in shapes) == muon.model.counts.of_muon(muon.config, muon.config.stages[0])
    each = [10 * (2 * min(shape) ** 2 * max(shape) + min(shape) ** 3) for shape in shapes]
    assert muon.stages[0].muon_flops == sum(each)
    work = muon_of(muon.model, muon.config.stages[0], muon.place)
    assert sum(each) / 8 <= work.flops <= sum(each) / 8 + max(each)
    assert muon.stages[0].collectives["alltoall"] == 4 * sum(math.prod(shape) for shape in shapes) / 8
    assert muon.stages[0].step["optimizer"] > plan.stages[0].step["optimizer"] + work.flops / 989e12
    exact = planned(1, "h100", "optimizer.kind=muon", "optimizer.muon.precision=fp32", "deepspeed=zero2").stages[0]
    assert exact.step["optimizer"] > 2 * muon.stages[0].step["optimizer"]
    assert not any("AdamW" in note for note in muon.notes)


def test_texts_are_packed_where_the_tower_packs_them():
    model, length = planned().model, planned().config.model.text.context_length
    padded = replace(model, description={**model.description, "text": {
        **model.description["text"], "model_type": "siglip_text_model", "max_position_embeddings": length,
    }})  # fmt: skip
    ours, theirs = (plan_model(one, planned().cluster, {}).stages[0].step["text"] for one in (model, padded))
    assert theirs * 20 / length <= ours < theirs


def test_recomputation_and_kept_packs_are_the_least_and_the_most_that_fit():
    roomy, tight = planned(4, "h200").stages[0], planned(4, "a100", "stages.0.token_budget=98304").stages[0]
    assert roomy.kind == 0
    assert roomy.kept > 1
    assert tight.kind != 0
    assert planned(4, "h200", "objective.grad_cache_keep=1").stages[0].kept == 1
    assert planned(4, "h200", "model.checkpoint_every=1").stages[0].kind == 1


def test_a_run_that_does_not_fit_is_an_error_with_value_limit_and_remedy():
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


def test_sources_in_a_store_are_not_read_for_their_classes(monkeypatch):
    def never(*_):
        raise AssertionError("a source in a store was read")

    monkeypatch.setattr("univitar_ds.planning.checks.find_classes", never)
    plan = planned(1, "h100", "data.sources.0.path=s3://bucket/labels", recipe="labels")
    assert any("1,000 classes are assumed" in note for note in plan.notes)


def test_a_classifier_without_data_and_an_unknown_cluster():
    plan = plan_run(load_config("labels", ["data.lanes=8"]), cluster_of(1, 8, "A100"))
    assert any("classes are assumed" in note for note in plan.notes)
    assert all("text tower" not in stage.peak.parts for stage in plan.stages)
    with pytest.raises(ConfigError, match="--gpu v100 is not known; give one of a100, h100, h200, b200"):
        cluster_of(1, 8, "v100")
    with pytest.raises(ConfigError, match="80,000 GPUs; give at most 65,536"):
        cluster_of(10_000, 8, "h100")
