"""Which packs of a run are drawn."""

from univitar_ds.training.logging.run_logs import ImageSchedule


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
