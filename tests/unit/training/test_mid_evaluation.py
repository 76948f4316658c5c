"""Evaluation during training: when it is due, the best result, and what is logged. Whole runs: tests/distributed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.finished import run_config
from univitar_ds.training.distributed.preemption import Stop
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.logging.run_logs import RunLogs
from univitar_ds.training.mid_evaluation import MidEvaluation, score_of
from univitar_ds.training.state import State
from univitar_ds.training.step.curriculum import Progress
from univitar_ds.training.watch.phases import MID_EVALUATION, StepClock

ALONE = World(0, 1, 0, torch.device("cpu"))


def figure(value: float, measure: str = "top-1", task: str = "zero-shot", modality: str = "image") -> dict:
    return {"task": task, "measure": measure, "modality": modality, "value": value, "chance": 0.1, "n": 8}


class Run:
    """A run whose evaluations return `answers` one after the other; an exception is raised."""

    def __init__(self, folder: Path, answers: list, step: int = 0, **evaluation):
        self.cfg = run_config("data", name="tried", optimizer={"ema_decay": 0.9})
        given = {"every_samples": 100, **evaluation}
        self.cfg = self.cfg.model_copy(update={"evaluation": self.cfg.evaluation.model_copy(update=given)})
        self.state, self.events, self.sections, self.folder = State(), [], [], folder
        self.logs, self.clock = RunLogs(self.cfg, folder, ALONE), StepClock()
        self.logs.open(Progress(step=step), [])
        self._answers = iter(answers)
        self.evaluation = MidEvaluation(self.cfg, ALONE, self._evaluate, self.logs, self.clock, Stop())

    def _evaluate(self, engine, stopped):
        self.sections.append(self.clock.position.section)
        random.random(), np.random.rand(), torch.rand(1)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            answer.all_ranks_know = True
            raise answer
        return answer

    def after(self, step: int, samples: int) -> bool | None:
        """Whether the result after a step is the best; None if no evaluation is due."""
        self.state.progress = Progress(step=step, samples=samples)
        due = self.evaluation.due(self.state)
        return self.evaluation.run(SimpleNamespace(), self.state, self.events.append) if due else None

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def results(*figures: dict) -> list[dict]:
    return [{"weights": "averaged", "figures": list(figures), "notes": []}]


def test_it_is_due_when_a_multiple_is_reached_and_once_for_several(tmp_path):
    run = Run(tmp_path, [results(figure(0.5))] * 9)
    assert [run.after(*at) is not None for at in ((1, 60), (2, 120), (3, 180), (4, 420), (5, 499), (6, 500))] == [
        False, True, False, True, False, True,
    ]  # fmt: skip
    assert run.sections == [MID_EVALUATION] * 3
    assert run.clock.position.section != MID_EVALUATION
    assert [line["step"] for line in run.lines()] == [2, 4, 6]


@pytest.mark.parametrize("evaluation", [{"every_samples": 0}, {"every_samples": None}, {"sources": []}])
def test_it_is_never_due_without_interval_or_sources(tmp_path, evaluation):
    assert Run(tmp_path, [], **evaluation).after(1, 1000) is None


def test_the_best_has_the_highest_figure_and_a_tie_does_not_replace_it(tmp_path):
    values = (0.3, 0.2, 0.3, 0.4, float("nan"), 0.5)
    run = Run(tmp_path, [results(figure(value)) for value in values])
    assert [run.after(step, 100 * step) for step in range(1, 7)] == [True, False, False, True, False, True]
    assert run.state.best_evaluation == {"step": 6, "figure": "mean top-1", "value": 0.5}
    again = State.from_checkpoint(SimpleNamespace(state=json.loads(json.dumps(run.state.to_dict())), cursors={}))
    assert (again.best_evaluation, again.evaluated) == (run.state.best_evaluation, 600)


def test_a_checkpoint_of_an_earlier_version_has_no_evaluation():
    content = State().to_dict()
    del content["evaluated"], content["best_evaluation"]
    assert State.from_checkpoint(SimpleNamespace(state=content, cursors={})) == State()


def test_the_figure_that_decides_is_the_named_one_or_the_mean_of_its_kind():
    figures = [figure(0.2), figure(0.4, modality="video"), figure(0.9, "top-5"), figure(0.6, "R@1", "text to image")]
    values = {"eval/zero-shot_top-5_image": 0.9, "eval/trained/zero-shot_top-5_image": 0.8}
    assert score_of(figures, values, None) == ("mean top-1", pytest.approx(0.3))
    assert score_of(figures[2:], values, None) == ("mean R@1", 0.6)
    assert score_of(figures[2:3], values, None) is None
    for name, value in (("eval/zero-shot_top-5_image", 0.9), ("zero-shot_top-5_image", 0.9), ("trained/x", None)):
        found = score_of(figures, values, name)
        assert (None if found is None else found[1]) == value


def test_a_warning_for_a_missing_figure_names_the_existing_ones(tmp_path, caplog):
    run = Run(tmp_path, [results(figure(0.5))], best="eval/zero-shot_top-1_video")
    assert run.after(1, 100) is False
    assert "choose one of eval/zero-shot_top-1_image" in caplog.text


def test_with_another_figure_the_comparison_for_the_best_restarts(tmp_path):
    run = Run(tmp_path, [results(figure(0.5), figure(0.2, "R@1", "text to image"))] * 2)
    assert run.after(1, 100)
    run.evaluation._cfg = run.cfg.evaluation.model_copy(update={"best": "eval/text-to-image_R@1_image"})
    assert run.after(2, 200)
    assert run.state.best_evaluation["value"] == 0.2


def test_figures_of_both_weights_are_lines_and_curves_under_their_own_names(tmp_path):
    trained = {"weights": "trained", "figures": [figure(0.25)], "notes": []}
    run = Run(tmp_path, [[*results(figure(0.5)), trained]])
    run.after(3, 120)
    run.logs.close()
    run.logs.raise_unwritten()
    (line,) = run.lines()
    assert line.pop("evaluation_s") >= 0
    values = {"eval/zero-shot_top-1_image": 0.5, "eval/trained/zero-shot_top-1_image": 0.25}
    assert line == {"step": 3, "samples_seen": 120, **values}
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {name: [(p.step, p.value) for p in board.Scalars(name)] for name in board.Tags()["scalars"]} == {
        name: [(3, value)] for name, value in values.items()
    }


def test_an_evaluation_that_fails_is_an_event_and_the_next_multiple_has_another(tmp_path):
    run = Run(tmp_path, [MemoryError("no memory for 3 GB"), results(figure(0.5))])
    assert run.after(1, 100) is False
    assert run.events == [
        {"step": 1, "event": "evaluation_failed", "rank": 0, "reason": "MemoryError: no memory for 3 GB"}
    ]
    assert run.after(2, 150) is None
    assert run.after(3, 200) is True


def test_an_error_of_a_single_rank_is_raised(tmp_path):
    run = Run(tmp_path, [])  # StopIteration, which does not reach other ranks
    with pytest.raises(StopIteration):
        run.after(1, 100)


def test_an_interrupted_evaluation_stays_due(tmp_path):
    run = Run(tmp_path, [None, results(figure(0.5))])
    assert run.after(1, 100) is False
    assert run.lines() == run.events == []
    assert run.after(1, 100) is True


def test_an_evaluation_repeated_after_a_resume_is_one_line(tmp_path):
    for step in (4, 4, 5):
        run = Run(tmp_path, [results(figure(0.5))], step=4)
        run.after(step, 100)
        run.logs.close()
        run.logs.raise_unwritten()
    assert [line["step"] for line in run.lines()] == [4, 5]


def test_generators_of_random_numbers_are_as_before(tmp_path):
    run = Run(tmp_path, [results(figure(0.5))])
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    wanted = random.random(), np.random.rand(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    run.after(1, 100)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == wanted
