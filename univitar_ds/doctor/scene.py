"""A check, and what the checks of one rank share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from univitar_ds.doctor.findings import Answers, Found, Row
from univitar_ds.doctor.ranks import Ranks

if TYPE_CHECKING:
    from univitar_ds.config.schema import RunConfig
    from univitar_ds.data.shards.sources import SourceShard
    from univitar_ds.training.distributed.process_group import World


@dataclass
class Scene:
    """The ranks, what the user named, and what earlier checks have read.

    `recipe`: a run file or the name of a recipe, or None; `run`: folder of an existing run, then `recipe` is its
    config.yaml. `config`, `shards`, `checkpoint_bytes`: of the run file, once its check has read it. `made`: files that
    exist now; a signal handler removes them.
    """

    ranks: Ranks
    recipe: str | None = None
    overrides: Sequence[str] = ()
    run: Path | None = None
    world: World | None = None
    config: RunConfig | None = None
    shards: Sequence[SourceShard] = ()
    checkpoint_bytes: float | None = None
    checkpoints: int | None = None
    """How many checkpoints the run needs space for, once its sources are read."""
    made: list[Path] = field(default_factory=list)
    usable: bool = False
    """Whether this rank has a device that it can use."""
    hung: bool = False
    """Whether a thread of an earlier check still waits, so that the process cannot end normally."""

    @property
    def folder(self) -> Path | None:
        """The run's folder, which need not exist; None without a run file."""
        if self.run is not None or self.config is None:
            return self.run
        return Path(self.config.output, self.config.name)

    def forget_files(self) -> None:
        """Removes the named files that exist now."""
        while self.made:
            self.made.pop().unlink(missing_ok=True)


@dataclass(frozen=True)
class Check:
    """One kind of check.

    `look`: runs the check on this rank. `remedy`: shown if `look` does not answer. `everywhere`: whether each rank
    runs `look`, instead of one rank of each node. `together`: whether the ranks communicate in `look`, so that it is
    skipped if a rank is missing. `compare`: returns rows about the values of all ranks, on rank 0.
    """

    name: str
    look: Callable[[Scene], Found]
    remedy: str
    everywhere: bool = False
    together: bool = False
    compare: Callable[[Answers], list[Row]] | None = None
