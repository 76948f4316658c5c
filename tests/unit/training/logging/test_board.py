"""The TensorBoard files of a run, read as TensorBoard reads them."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from tests.support.runs import small_config
from univitar_ds.training.logging.board import Board, code_block, results, tag
from univitar_ds.training.logging.writers import MetricLog, write_results
from univitar_ds.training.step.curriculum import Progress


@pytest.fixture(autouse=True)
def first_files(monkeypatch):
    """TensorBoard reads a folder's files in the order of their names, which end with the second and the number of the
    file in this process: of two files of one second, the 10th would come before the 9th."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def line(step, **values):
    return {"step": step, "stage": "a", "modality": "image", "loss": 1.5, "mfu_pct": 3.0, **values}


def board_of(run):
    return EventAccumulator(str(run / "tb")).Reload()


def curve(board, name):
    return [(point.step, point.value) for point in board.Scalars(name)]


def text(board, name):
    return [point.tensor_proto.string_val[0].decode() for point in board.Tensors(f"{name}/text_summary")]


def written(run, lines, step=0):
    with (run / "metrics.jsonl").open("a") as file:
        board = Board(run, step)
        for entry in lines:
            board.scalars(entry)
            file.write(json.dumps(entry) + "\n")
        board.close()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("loss", "loss/loss"),
        ("loss_distill_patch_video", "loss/loss_distill_patch_video"),
        ("grad_norm", "grad_norm/grad_norm"),
        ("grad_norm_text", "grad_norm/grad_norm_text"),
        ("tokens_per_s", "speed/tokens_per_s"),
        ("fill_pct", "speed/fill_pct"),
        ("tokens_seen", "data/tokens_seen"),
        ("downscaled_pct", "data/downscaled_pct"),
        ("bad_cut", "data/bad_cut"),
        ("contrastive_weight", "schedule/contrastive_weight"),
        ("lr", "schedule/lr"),
    ],
)
def test_a_metric_is_shown_in_its_group_under_its_own_name(name, shown):
    assert tag(name) == shown


def test_a_curve_that_rests_at_0_or_1_begins_when_it_moves_and_the_others_are_a_table(tmp_path):
    steps = [(10, 0, 0, 1.0, 1), (20, 0, 0, 1.0, 1), (30, 2, 0, 1.0, 1), (40, 2, 0, 0.5, 1)]
    names = ("bad_samples", "rollbacks", "distill_weight", "contrastive_weight")
    written(tmp_path, [line(step, **dict(zip(names, values, strict=True))) for step, *values in steps])
    board = board_of(tmp_path)
    assert curve(board, "data/bad_samples") == [(10, 0), (30, 2), (40, 2)]
    assert curve(board, "schedule/distill_weight") == [(10, 1.0), (40, 0.5)]
    assert curve(board, "loss/loss") == [(10, 1.5), (20, 1.5), (30, 1.5), (40, 1.5)], "1.5 is no resting value"
    assert not {"schedule/rollbacks", "schedule/contrastive_weight"} & set(board.Tags()["scalars"])
    (table,) = text(board, "unchanged")
    assert table.splitlines()[2:] == ["| schedule/contrastive_weight | 1 |", "| schedule/rollbacks | 0 |"]


@pytest.mark.parametrize("end", ["", '{"step": 2'])
def test_a_curve_that_changed_before_a_resume_continues_although_it_is_constant_since(tmp_path, end):
    written(tmp_path, [line(1, rollbacks=0, bad_samples=0), line(2, rollbacks=1, bad_samples=0)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(end)
    written(tmp_path, [line(3, rollbacks=1, bad_samples=0), line(4, rollbacks=1, bad_samples=0)], step=2)
    board = board_of(tmp_path)
    if not end:
        assert curve(board, "schedule/rollbacks") == [(1, 0), (2, 1), (3, 1), (4, 1)]
    assert "data/bad_samples" not in board.Tags()["scalars"]


def test_a_line_of_an_evaluation_is_not_a_line_of_a_step(tmp_path):
    evaluated = {"step": 2, "samples_seen": 9, "eval/zero-shot_top-1_image": 0.5}
    written(tmp_path, [line(1, rollbacks=0), line(2, rollbacks=1)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evaluated) + "\n")
    written(tmp_path, [line(3, rollbacks=1)], step=2)
    assert curve(board_of(tmp_path), "schedule/rollbacks") == [(1, 0), (2, 1), (3, 1)]


def test_a_value_that_is_not_a_number_is_drawn(tmp_path):
    written(tmp_path, [line(1, loss_image=float("nan")), line(2, loss_image=float("nan"))])
    assert len(curve(board_of(tmp_path), "loss/loss_image")) == 2


def test_the_run_file_is_a_text_without_the_credentials_in_its_addresses(tmp_path, monkeypatch):
    config = small_config(tmp_path, tmp_path, logging={"tensorboard": True})
    monkeypatch.setitem(vars(config.data.s3), "endpoint_url", "http://me:secret@127.0.0.1:9000")  # a shared default
    MetricLog(config, tmp_path, Progress()).close()
    (shown,) = text(board_of(tmp_path), "config")
    assert "    name: small\n" in shown
    assert "http://***@127.0.0.1:9000" in shown
    assert "secret" not in shown


def test_results_have_a_name_and_a_point_each_at_the_step_of_their_checkpoint(tmp_path):
    config = small_config(tmp_path, tmp_path, logging={"tensorboard": True})
    figures = [
        {"task": "zero-shot", "measure": "top-1, mean of classes", "modality": "image", "value": 0.25},
        {"task": "image to text", "measure": "R@5", "modality": "image", "value": 0.5, "set": "köpek / 犬"},
    ]
    log = MetricLog(config, tmp_path, Progress())
    log.close()
    write_results(config, tmp_path, figures, "| a | table |", 70)
    board = board_of(tmp_path)
    assert curve(board, "eval/zero-shot_top-1-mean-of-classes_image") == [(70, 0.25)]
    assert curve(board, "eval/image-to-text_R@5_image_köpek-犬") == [(70, 0.5)]
    assert text(board, "eval/results") == ["    | a | table |\n"]


def test_figures_of_all_sets_have_different_names():
    figure = {"task": "zero-shot", "measure": "top-1", "modality": "image", "value": 0.5}
    assert len(results([figure, {**figure, "set": "a"}, {**figure, "set": "b"}])) == 3


def test_a_code_block_keeps_its_lines():
    assert code_block("a:\n  b: 1\n") == "    a:\n      b: 1\n"
