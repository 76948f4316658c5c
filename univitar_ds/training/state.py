"""The state of a training run, without tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from univitar_ds.config.keys.renamed import present_sums
from univitar_ds.data.sampler.cursor import LaneCursor, parse
from univitar_ds.training.checkpoint.sharded import Saved
from univitar_ds.training.logging.metrics import Window
from univitar_ds.training.step.curriculum import Progress
from univitar_ds.training.step.guard import History


@dataclass
class State:
    """The state of a run without tensors. Checkpoints contain all fields."""

    progress: Progress = field(default_factory=Progress)
    window: Window = field(default_factory=Window)
    cursors: dict[int, LaneCursor] = field(default_factory=dict)
    """Data cursors by lane: of all lanes after loading, of this rank's lanes after the first step."""
    best: dict[str, float] = field(default_factory=dict)
    """The lowest training loss of a line of metrics, and its `step`; empty before the first line."""
    last: dict[str, Any] = field(default_factory=dict)
    """The last line of metrics; empty before the first line."""
    seconds: float = 0.0
    """Seconds spent in training steps, over all launches of the run."""
    began: dict[str, int] = field(default_factory=dict)
    """The parts that the stage trains, with the number of updates before each part was first trained."""
    history: History = field(default_factory=History)
    evaluated: int = 0
    """Number of training samples seen at the last evaluation."""
    best_evaluation: dict[str, Any] = field(default_factory=dict)
    """The evaluation with the best result: `step`, `figure` and `value`; empty without one."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Starts of stages, skipped updates, rollbacks, slow ranks, failed evaluations and failed saves. `step` is the step
    after which a stage began or an evaluation or save failed, whose update was skipped, to which a rollback returned,
    or at which a rank was found to be slow."""

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields except the cursors, which each rank saves separately."""
        return {
            "progress": self.progress.to_dict(),
            "window": asdict(self.window),
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
            "began": self.began,
            "history": self.history.to_dict(),
            "events": self.events,
            "evaluated": self.evaluated,
            "best_evaluation": self.best_evaluation,
        }

    @classmethod
    def from_checkpoint(cls, saved: Saved) -> State:
        """Converts the content of a checkpoint."""
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
            content.get("evaluated", 0),  # absent in checkpoints of earlier versions
            content.get("best_evaluation", {}),
            content["events"],
        )

    @property
    def rollbacks(self) -> int:
        """The number of rollbacks of the run."""
        return sum(event["event"] == "rollback" for event in self.events)

    @property
    def skipped(self) -> int:
        """The number of skipped updates of the run, also of those that a rollback undid."""
        return sum(event["event"] == "skipped" for event in self.events)

    @property
    def guarded(self) -> dict[str, int]:
        """The numbers of rollbacks and, if there are any, of skipped updates, by their names in a line of metrics."""
        return {"rollbacks": self.rollbacks, **({"skipped_updates": self.skipped} if self.skipped else {})}
