"""The state of a run, without tensors."""

import json

from univitar_ds.data.sampler.cursor import LaneCursor
from univitar_ds.training.checkpoint.sharded import Saved
from univitar_ds.training.logging.metrics import Window
from univitar_ds.training.state import State
from univitar_ds.training.step.curriculum import Progress
from univitar_ds.training.step.guard import History


def test_a_state_is_equal_after_saving_and_loading():
    state = State(
        progress=Progress(1, 20, 5, 100, 400, 9000, 2),
        window=Window({"loss": 0.1 + 0.2, "steps": 3}, "mixed"),
        cursors={lane: LaneCursor(lane, 4, 7, "fingerprint", packs=20) for lane in (0, 3)},
        best={"loss": 1 / 3, "step": 10},
        last={"step": 10, "loss": 0.7},
        seconds=12.5,
        began={"text": 0, "rest": 12},
        history=History(1, {"image": [(0.5, 1 / 7)]}),
        events=[{"step": 0, "event": "stage"}, {"step": 4, "event": "rollback"}],
    )
    content = json.loads(json.dumps(state.to_dict()))
    cursors = {lane: json.loads(json.dumps(cursor.to_json())) for lane, cursor in state.cursors.items()}
    assert State.from_checkpoint(Saved(content, cursors)) == state


def test_skipped_updates_are_reported_only_if_there_are_any():
    assert State(events=[{"event": "stage"}, {"event": "rollback"}]).guarded == {"rollbacks": 1}
    assert State(events=[{"event": "skipped"}] * 2).guarded == {"rollbacks": 0, "skipped_updates": 2}
