"""Which packs of a run are drawn, and the names of their images."""

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.finished import run_config
from tests.support.grey import grey_pack
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.logging.run_logs import ImageSchedule, RunLogs
from univitar_ds.training.step.curriculum import Progress
from univitar_ds.training.step.feature_snapshot import FeatureSnapshot


def drawn_at(schedule, modalities):
    steps = []
    for step, modality in enumerate(modalities, start=schedule.start + 1):
        if schedule.due(step, modality):
            steps.append(step)
            schedule.drawn[modality] = step
    return steps


def test_each_modality_is_drawn_once_in_every_so_many_steps():
    assert drawn_at(ImageSchedule(4, 0), ["image", "video"] * 6) == [4, 5, 8, 9, 12]
    assert drawn_at(ImageSchedule(4, 6), ["image"] * 4) == [8]
    assert drawn_at(ImageSchedule(4, 0), ["image"] * 9 + ["video"]) == [4, 8, 10]
    assert drawn_at(ImageSchedule(0, 0), ["image"] * 9) == []


def test_images_have_the_name_of_the_run_and_the_step(tmp_path, drawn):
    logs = RunLogs(
        run_config(logging={"images_every_steps": 1}), tmp_path / "tried", World(0, 1, 0, torch.device("cpu"))
    )
    (tmp_path / "tried").mkdir()
    logs.open(Progress(), [])
    assert logs.draws(3, "image")
    logs.draw(3, grey_pack((1, 2, 2)), FeatureSnapshot(1, torch.eye(4), torch.arange(4)), 1)
    logs.close()
    logs.raise_unwritten()
    assert "Run tried, step 3: 1 of 1 images of a pack" in drawn
    board = EventAccumulator(str(tmp_path / "tried" / "tb"))
    board.Reload()
    assert board.Images("pack_image")[0].step == 3
