"""The training state without the tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from univitar_ds.config.renamed import present_sums
from univitar_ds.data.sampler.cursor import LaneCursor, parse
from univitar_ds.training.checkpoint.sharded import Saved
from univitar_ds.training.logging.metrics import Window
from univitar_ds.training.step.curriculum import Progress
from univitar_ds.training.step.guard import History


@dataclass
class State:
    """The state; all of it is in the checkpoint."""

    progress: Progress = field(default_factory=Progress)
    window: Window = field(default_factory=Window)
    cursors: dict[int, LaneCursor] = field(default_factory=dict)
    """By lane: of all lanes at the start, later of this rank's lanes."""
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """Seconds spent in training, over all starts of the run."""
    began: dict[str, int] = field(default_factory=dict)
    """Parts that are trained now, with the number of updates before they were first trained."""
    history: History = field(default_factory=History)
    events: list[dict[str, Any]] = field(default_factory=list)
    """Stages that began and rollbacks, each with the step after which it occurred."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the cursors, which belong to ranks."""
        return {
            "progress": self.progress.to_dict(),
            "window": asdict(self.window),
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
            "began": self.began,
            "history": self.history.to_dict(),
            "events": self.events,
        }

    @classmethod
    def of(cls, saved: Saved) -> State:
        content = saved.state
        return cls(
            Progress(**content["progress"]),
            Window(**{**content["window"], "sums": present_sums(content["window"]["sums"])}),
            {lane: parse(cursor) for lane, cursor in saved.cursors.items()},
            content["best"],
            content["last"],
            content["seconds"],
            content["began"],
            History.from_dict(content["history"]),
            content["events"],
        )

    @property
    def rollbacks(self) -> int:
        """The number of rollbacks."""
        return sum(event["event"] == "rollback" for event in self.events)
