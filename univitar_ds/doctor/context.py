"""The interface of a check, and the context that the checks of a rank share."""

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
class Context:
    """The ranks, the user's arguments, and what earlier checks have read. Checks read it and set its fields.

    `recipe`: path of a run file or name of a recipe, None without one; `overrides`: of its keys; `run`: folder of an
    existing run, whose config.yaml is `recipe` then; `world`: the process group, once the ranks are connected;
    `config`, `shards`, `checkpoint_bytes`: the run file, the shards of its sources and the size of a checkpoint, once
    they are read; `made`: temporary files that exist, which a signal handler removes.
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
    """Number of checkpoints that the disk must hold, once the sources are read."""
    made: list[Path] = field(default_factory=list)
    usable: bool = False
    """Whether this rank has a device that it can use."""
    hung: bool = False
    """Whether the thread of an earlier check is still waiting, so that the process cannot end normally."""

    @property
    def folder(self) -> Path | None:
        """The run's folder, which may not exist yet; None without a run file."""
        if self.run is not None or self.config is None:
            return self.run
        return Path(self.config.output, self.config.name)

    def remove_files(self) -> None:
        """Removes the temporary files in `made`."""
        while self.made:
            self.made.pop().unlink(missing_ok=True)


@dataclass(frozen=True)
class Check:
    """One kind of check.

    `run`: checks this rank or node, and raises UserError for a failed row; `remedy`: of the failed row if `run` does
    not return within the limit; `everywhere`: whether each rank calls `run`, instead of one rank of each node;
    `together`: whether the ranks communicate in `run`, so that it is skipped if a rank is missing; `compare`: called on
    rank 0 with the values of all ranks, returns rows about them.
    """

    name: str
    run: Callable[[Context], Found]
    remedy: str
    everywhere: bool = False
    together: bool = False
    compare: Callable[[Answers], list[Row]] | None = None
