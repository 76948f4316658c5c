import bisect
import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.support.runs import small_config
from univitar_ds.data.batch import PackedBatch, rows
from univitar_ds.model.blocks.dropping import DropConfig
from univitar_ds.training.distributed.process_group import World, gather_json
from univitar_ds.training.logging import board, metrics, writers
from univitar_ds.training.logging.metrics import (
    BAD_OF_KIND,
    IGNORED_OF_KIND,
    OVER_RANKS,
    Window,
    exchange_metrics,
    local_metrics,
    part_norms,
)
from univitar_ds.training.logging.writers import MetricLog, SampleLog, cut_sample_logs
from univitar_ds.training.step.curriculum import Progress
from univitar_ds.training.step.peak_flops import Peak
from univitar_ds.training.step.train_step import StepResult

WEIGHTS = {"contrastive": 1.0, "distill": 0.0}
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def batch(*grids, lane=0, bad=None, downscaled=0) -> PackedBatch:
    n = len(grids)
    return PackedBatch(
        pixels=torch.zeros(0, dtype=torch.uint8),
        frames=rows([1] * n),
        grid_thw=rows(list(grids), 3),
        token_ids=torch.zeros(n, 4, dtype=torch.int64),
        text_lengths=rows([4] * n),
        caption_ids=rows(list(range(n))),
        captions=["a"] * n,
        labels=[None] * n,
        sets=[None] * n,
        keys=[f"s/{i}" for i in range(n)],
        modality="image",
        lane=lane,
        index=0,
        bad=bad or {},
        downscaled=downscaled,
    )


def numbers(**changes) -> dict[str, float]:
    return dict.fromkeys(OVER_RANKS, 1.0) | dict.fromkeys(BAD_OF_KIND, 0.0) | changes


def result(loss: float, items: int = 4) -> StepResult:
    return StepResult(
        loss, items, grad_norm=2.0, logit_scale=10.0, logit_bias=-10.0, losses={"contrastive": loss + 1.0}
    )


def line(window: Window, *, peak=1e-9, ranks=1, norms=None) -> dict:
    progress = Progress(step=3, samples=30, tokens=40)
    return window.line(progress, (0, "a"), result(1.0), lr=0.1, peak=Peak(peak), ranks=ranks, further=norms)


def test_the_distillation_loss_is_averaged_over_the_steps_that_have_it():
    window = Window()
    parts = {"contrastive": 2.0, "distill_patch": 0.5, "distill_pooled": 0.25}
    window.add(result(2.0), numbers(), "image", WEIGHTS)
    for agreement, weight in ((0.5, 0.5), (0.7, 1.0)):
        taught = replace(result(2.75), losses=parts, agreement=agreement)
        window.add(taught, numbers(), "image", {"contrastive": 1.5 - weight, "distill": weight})
    logged = line(window)
    assert logged["loss"] == pytest.approx(2.5)
    assert logged["loss_distill_patch"] == 0.5
    assert logged["loss_distill_pooled"] == 0.25
    assert logged["teacher_agreement"] == pytest.approx(0.6)
    alone = Window()
    alone.add(result(2.0), numbers(), "image", WEIGHTS)
    assert not {"teacher_agreement", "loss_distill_patch"} & line(alone).keys()


def test_a_skipped_update_counts_for_speed_and_data_and_not_for_the_losses():
    window = Window()
    window.add(result(2.0, items=4), numbers(), "image", WEIGHTS)
    before = line(window)
    window.add_skipped(6, numbers(**dict.fromkeys(metrics.SQUARES.values(), float("nan"))), "image")
    after = line(window)
    assert (after["loss"], after["contrastive_weight"]) == (before["loss"], before["contrastive_weight"])
    assert window.sums["samples"] == 10
    assert after["step_s"] == before["step_s"] == 1.0
    assert after["samples_per_s"] == 5.0
    json.dumps(after, allow_nan=False)


def test_losses_are_reported_by_part_and_modality_and_their_weights_as_means_over_all_steps():
    window = Window()
    for loss, modality, weight in ((1.0, "image", 1.0), (2.0, "image", 0.5), (6.0, "video", 0.0)):
        window.add(result(loss), numbers(), modality, {"contrastive": weight, "distill": 1 - weight})
    logged = line(window)
    assert (logged["loss"], logged["loss_image"], logged["loss_video"]) == (3.0, 1.5, 6.0)
    assert logged["loss_contrastive"] == 4.0
    assert (logged["loss_contrastive_image"], logged["loss_contrastive_video"]) == (2.5, 7.0)
    assert (logged["contrastive_weight"], logged["distill_weight"]) == (0.5, 0.5)


def test_norms_of_parts_are_those_of_all_ranks_and_of_the_last_step_only():
    squares = {"blocks": 16.0, "logits": 9.0}
    table = local_metrics([], cost=(1.0, 0.0), token_budget=1, step_s=1.0, data_wait_s=0.0, squares=squares)
    norms = part_norms(exchange_metrics(table, [], ALONE)[0])
    assert (norms["grad_norm_blocks"], norms["grad_norm_logits"], norms["grad_norm_text"]) == (4.0, 3.0, 0.0)
    window = Window()
    window.add(result(1.0), numbers(), "image", WEIGHTS)
    assert not any("square" in name for name in window.sums)
    assert not norms.keys() & line(window).keys()
    assert norms.items() <= line(window, norms=norms).items()


def test_the_numbers_of_a_rank_are_those_of_all_its_packs():
    packs = [
        batch((1, 2, 3), (1, 4, 4), bad={"corrupt": 2}, downscaled=2),
        batch(),
        batch((2, 2, 2), bad={"corrupt": 1, "bad_json": 1}, downscaled=1),
    ]
    got = local_metrics(packs, cost=(10.0, 1.0), token_budget=20, step_s=2.0, data_wait_s=0.5)
    assert got["tokens"] == 6 + 16 + 8
    assert got["token_budget"] == 60
    assert got["flops"] == got["busiest_flops"] == 10 * 30 + (36 + 256 + 64)
    assert got["bad_samples"] == 4
    assert {name: got[name] for name in BAD_OF_KIND if got[name]} == {"bad_corrupt": 3, "bad_json": 1}
    assert got["side_px"] == pytest.approx(14 * (6**0.5 + 4 + 2))
    assert got["downscaled"] == 3
    assert got["memory_gb"] > 0.01


def test_texts_that_were_ignored_have_counts_of_their_own_since_the_run_began():
    packs = [replace(batch((1, 2, 3)), ignored={"bad_label": 2}), replace(batch(), ignored={"bad_label": 1})]
    got = local_metrics(packs, cost=(1.0, 0.0), token_budget=1, step_s=1.0, data_wait_s=0.0)
    assert {name: got[name] for name in IGNORED_OF_KIND if got[name]} == {"ignored_label": 3}
    assert got["bad_samples"] == got["bad_label"] == 0
    window, none = Window(), dict.fromkeys(IGNORED_OF_KIND, 0.0)
    for _ in range(2):
        window = window.next()
        window.add(result(1.0), numbers(**none | {"ignored_label": 3.0}), "image", WEIGHTS)
    written = line(window)
    assert {name: written[name] for name in (*BAD_OF_KIND, *IGNORED_OF_KIND) if name in written} == {"ignored_label": 6}


def test_samples_that_conditions_left_out_are_counted_and_are_not_bad():
    packs = [
        replace(batch((1, 2, 3)), filtered={"one rule": 2, "another": 5}),
        replace(batch(), filtered={"one rule": 1}),
    ]
    got = local_metrics(packs, cost=(1.0, 0.0), token_budget=1, step_s=1.0, data_wait_s=0.0)
    assert (got["filtered_samples"], got["bad_samples"]) == (8, 0)
    window = Window()
    for _ in range(2):
        window = window.next()
        window.add(result(1.0), numbers(filtered_samples=8.0), "image", WEIGHTS)
    assert line(window)["filtered_samples"] == 16
    empty = Window()
    empty.add(result(1.0), numbers(filtered_samples=0.0), "image", WEIGHTS)
    assert "filtered_samples" not in line(empty)


def test_flops_are_those_of_the_tokens_that_stay_and_fill_is_of_all():
    rule = DropConfig(patches=0.5, merge=2)
    packs = [batch((1, 2, 6), (1, 4, 4)), batch((2, 2, 2))]
    got = local_metrics(packs, cost=(10.0, 1.0), token_budget=20, step_s=2.0, data_wait_s=0.5, dropping=rule)
    kept = [8, 8, 4]  # of 3, 4 and 2 blocks of 4 tokens: 2, 2 and 1
    assert got["flops"] == got["busiest_flops"] == 10 * sum(kept) + sum(count**2 for count in kept)
    assert got["tokens"] == 12 + 16 + 8


def test_the_metrics_of_a_rank_have_the_same_names_with_any_bad_samples():
    packs = [batch((1, 2, 3)), batch((1, 2, 3), bad={"cut": 3, "crash": 1})]
    tables = [local_metrics([pack], cost=(1.0, 0.0), token_budget=1, step_s=1.0, data_wait_s=0.0) for pack in packs]
    assert [list(table) == list(OVER_RANKS) for table in tables] == [True, True]


@pytest.mark.skipif(not __debug__, reason="python -O leaves asserts out")
def test_an_unknown_kind_of_bad_sample_is_an_assertion_error():
    with pytest.raises(AssertionError, match="odd"):
        local_metrics([batch(bad={"odd": 1})], cost=(1.0, 0.0), token_budget=1, step_s=1.0, data_wait_s=0.0)


def test_ranks_join_as_declared():
    metrics, others = exchange_metrics(numbers(tokens=5.0), [7.0, 8.0], ALONE)
    assert metrics == numbers(tokens=5.0)
    assert others.tolist() == [[7.0, 8.0]]


def test_a_line_covers_all_its_steps():
    window = Window()
    first = {"tokens": 90, "token_budget": 100, "flops": 3e3, "busiest_flops": 2e3, "step_s": 2.0, "side_px": 672}
    second = {"tokens": 50, "token_budget": 100, "flops": 1e3, "busiest_flops": 1e3, "step_s": 2.0, "side_px": 168}
    window.add(result(2.0, 6), numbers(**first), "image", WEIGHTS)
    window.add(result(4.0, 2), numbers(**second), "video", WEIGHTS)
    got = line(window, ranks=2)
    assert got["loss"] == 3.0
    assert (got["loss_image"], got["loss_video"], got["modality"]) == (2.0, 4.0, "mixed")
    assert (got["side_px_image"], got["side_px_video"]) == (112.0, 84.0)
    assert (got["samples_per_s"], got["tokens_per_s"], got["step_s"]) == (2.0, 35.0, 2.0)
    assert (got["fill_pct"], got["data_wait_pct"]) == (70.0, 50.0)
    assert got["tflops_per_rank"] == pytest.approx(5e-10)
    assert got["mfu_pct"] == pytest.approx(100.0)
    assert got["flop_imbalance_pct"] == pytest.approx(50.0)
    assert (got["step"], got["samples_seen"], got["tokens_seen"]) == (3, 30, 40)


def test_bad_samples_are_counted_by_kind_since_the_run_began_and_items_made_smaller_since_the_last_line():
    window = Window()
    window.add(result(1.0, 6), numbers(bad_cut=2.0, downscaled=3.0), "image", WEIGHTS)
    first = line(window)
    assert first["downscaled_pct"] == 50.0
    window = Window(**json.loads(json.dumps(vars(window.next()))))
    window.add(result(1.0, 8), numbers(bad_cut=1.0, bad_crash=1.0, downscaled=1.0), "image", WEIGHTS)
    second = line(window)
    assert second["downscaled_pct"] == 12.5
    kinds = [{name: entry[name] for name in BAD_OF_KIND if name in entry} for entry in (first, second)]
    assert kinds == [{"bad_cut": 2}, {"bad_cut": 3, "bad_crash": 1}]


def test_a_line_of_one_modality_has_no_loss_of_the_other():
    window = Window()
    window.add(result(2.0), numbers(), "video", WEIGHTS)
    got = line(window)
    assert got["modality"] == "video"
    assert "loss_image" not in got


def test_a_step_without_items_makes_a_line_without_infinities():
    window = Window()
    window.add(result(0.0, 0), numbers(tokens=0.0, flops=0.0, busiest_flops=0.0), "image", WEIGHTS)
    json.dumps(line(window), allow_nan=False)


def test_a_window_continues_after_json():
    one, two = Window(), Window()
    for value in (0.1, 0.2, 0.3):
        two = Window(**json.loads(json.dumps(vars(two))))
        for window in (one, two):
            window.add(result(value), numbers(), "image", WEIGHTS)
    assert line(one) == line(two)


def metric_log(run, step=0) -> MetricLog:
    return MetricLog(small_config(run, run), run, Progress(step=step))


def board_log(run, step=0) -> MetricLog:
    return MetricLog(small_config(run, run, logging={"tensorboard": True}), run, Progress(step=step))


def write_lines(run, steps, start=0):
    log = metric_log(run, start)
    window = Window()
    window.add(result(1 / 3), numbers(), "image", WEIGHTS)
    for step in steps:
        log.write(line(window) | {"step": step})
    log.close()


def test_after_a_resume_each_step_is_in_the_file_once(tmp_path):
    write_lines(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    write_lines(tmp_path, [3, 4, 5], start=2)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["loss"] == 1 / 3, "digits were lost"


def test_tensorboard_has_the_names_of_the_lines(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = board_log(tmp_path)
    window = Window()
    window.add(result(2.5), numbers(), "image", WEIGHTS)
    written = line(window)
    log.write(written)
    log.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    resting = {board.tag(name) for name, value in written.items() if value in (0, 1)}
    assert set(events.Tags()["scalars"]) == board.numbers(written).keys() - resting
    assert {"schedule/rollbacks", "data/bad_samples", "schedule/distill_weight"} <= resting
    assert events.Scalars("loss/loss")[0].value == 2.5


def test_stages_and_rollbacks_are_marked_in_tensorboard_beside_images_and_stay_there(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level("INFO")
    stage = {"step": 0, "event": "stage", "stage": "native", "samples_seen": 0}
    rollback = {"step": 2, "event": "rollback", "undone_step": 4, "reason": "the loss is nan"}
    skipped = {"step": 3, "event": "skipped", "reason": "the loss is inf", "samples": 9, "not_finite": ["a/1", "b/2"]}
    log = board_log(tmp_path)
    log.mark(stage)
    log.image("pack_image", Image.new("RGB", (5, 3), (9, 8, 7)), 2)
    log.image("pack_image", Image.new("RGB", (5, 3)), 3)
    log.close()
    log = board_log(tmp_path, step=2)
    log.mark(rollback)
    log.mark(skipped)
    log.close()
    shown = [record.message for record in caplog.records]
    shown_in = EventAccumulator(str(tmp_path / "tb")).Reload()
    events = [(text.step, text.tensor_proto.string_val[0].decode()) for text in shown_in.Tensors("events/text_summary")]
    assert events == [
        (0, "stage native begins after step 0, 0 samples"),
        (2, "step 4: the loss is nan; back to step 2, the data since are skipped"),
        (3, "step 3: the loss is inf; this update is skipped; not finite: a/1, b/2"),
    ]
    assert shown == [text for _, text in events]
    (image,) = shown_in.Images("pack_image")
    assert image.step == 2
    with Image.open(io.BytesIO(image.encoded_image_string)) as image:
        assert image.size == (5, 3)
        assert image.getpixel((4, 2)) == (9, 8, 7)


def test_sample_logs_of_all_ranks_are_cut_to_the_checkpoint(tmp_path):
    for rank in (0, 3):
        log = SampleLog(tmp_path, rank)
        for step in (1, 2, 3):
            log.write(step, [batch((1, 1, 1), lane=rank)])
        log.close()
    cut_sample_logs(tmp_path, 2)
    for rank in (0, 3):
        entries = [json.loads(text) for text in (tmp_path / f"samples-rank{rank}.jsonl").read_text().splitlines()]
        assert entries == [{"step": s, "lane": rank, "modality": "image", "keys": ["s/0"]} for s in (1, 2)]


@pytest.mark.parametrize("end", ["", '{"step": 4, "keys"', "\n", "\0" * 40, '{"step": 9}\n{"ste'])
@pytest.mark.parametrize("step", [0, 1, 3, 4, 5, 8, 100])
def test_a_log_of_any_length_and_end_is_cut_after_the_last_line_of_a_step(tmp_path, monkeypatch, end, step):
    monkeypatch.setattr(writers, "BLOCK", 7)
    lines = [json.dumps({"step": s, "keys": ["k" * (11 * s), "\u00e9"]}) + "\n" for s in (1, 2, 4, 4, 5, 8)]
    path = tmp_path / "samples-rank0.jsonl"
    path.write_text("".join(lines) + end)
    cut_sample_logs(tmp_path, step, keep_as="skipped")
    assert path.read_text() == "".join(lines[: bisect.bisect_right((1, 2, 4, 4, 5, 8), step)]) + whole(end, step)
    kept = (tmp_path / "skipped-rank0.jsonl").read_text()
    assert path.read_text() + kept == "".join(lines) + whole(end, 100)


def whole(end: str, step: int) -> str:
    """The lines of `end` that are whole, are JSON and belong to steps up to `step`."""
    return '{"step": 9}\n' if end.startswith('{"step": 9') and step >= 9 else ""


def test_resuming_reads_only_the_end_of_a_log(tmp_path, monkeypatch):
    path = tmp_path / "samples-rank0.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 50_001)))
    parsed = []
    monkeypatch.setattr(json, "loads", lambda line, real=json.loads: parsed.append(line) or real(line))
    cut_sample_logs(tmp_path, 49_990, keep_as="skipped")
    assert path.read_text().endswith('{"step": 49990}\n')
    assert 0 < len(parsed) < 100


def test_a_single_rank_gathers_itself():
    assert gather_json({"a": 1}, ALONE) == [{"a": 1}]


@pytest.mark.parametrize(("steady", "mark"), [(True, {}), (False, {"mfu_note": "peak measured under load"})])
def test_a_line_marks_an_unreliable_mfu(steady, mark):
    window = Window()
    window.add(result(1.0), numbers(flops=5e2), "image", WEIGHTS)
    progress = Progress(step=3, samples=30, tokens=40)
    got = window.line(progress, (0, "a"), result(1.0), lr=0.1, peak=Peak(1e-9, steady), ranks=1)
    assert got["mfu_pct"] == pytest.approx(50.0)
    assert {name: value for name, value in got.items() if name == "mfu_note"} == mark
