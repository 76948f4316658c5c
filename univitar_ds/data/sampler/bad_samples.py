"""What an unreadable sample does to a run: counted, logged with its address, and a reason to end where there are many.

A decision depends on the samples alone, in the order in which a lane reads them. Its state is three small numbers
that travel in the cursor, so a resumed run ends at the same sample as one that was never interrupted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from univitar_ds.data.shards.captions import IGNORED, Ignored
from univitar_ds.errors import DataError, SampleError

_log = logging.getLogger(__name__)

KINDS = (
    "cut",
    "damaged",
    "no_media",
    "link",
    "duplicate",
    "wrong_kind",
    "no_caption",
    "bad_caption",
    "bad_label",
    "bad_json",
    "too_large",
    "unreadable",
    "corrupt",
    "no_video",
    "wrong_size",
    "checksum",
    "timeout",
    "crash",
)
"""Every word that something unreadable is counted under: those of `tar.Damage`, then those of SampleError."""

WINDOW = 1000
"""Samples over which `max_per_thousand` counts; then counting begins again."""
INITIAL_STATE = (0, 0, 0)
"""The state of a `BadSampleMonitor` that has counted nothing yet."""
REMEDY = "univitar-ds data verify SOURCE lists what is bad"


@dataclass(frozen=True)
class BadPolicy:
    """`data.on_bad`, `data.max_bad_per_thousand` and `data.max_bad_in_a_row`.

    `logged` counts by kind what all who follow this policy have left out, so that a hundred lanes log no more than one.
    """

    on_bad: Literal["skip", "fail"] = "skip"
    max_per_thousand: int = 100
    max_in_a_row: int = 64
    logged: Counter[str] = field(default_factory=Counter, compare=False, repr=False)


class BadSampleMonitor:
    """The samples of one lane and modality as one phase meets them: reading of headers, or decoding.

    A stretch of damage in a shard counts as one bad sample, so that one lost shard among many ends no run.
    """

    def __init__(self, policy: BadPolicy, name: str, state: Iterable[int] = INITIAL_STATE) -> None:
        """`name` says whose samples these are, such as "lane 3, image"; `state` is what `to_json` gave."""
        self._policy, self._name = policy, name
        self._seen, self._bad, self._in_a_row = state

    def good(self) -> None:
        """Count a readable sample."""
        self._in_a_row = 0
        self._step()

    def bad(self, where: str, error: SampleError, samples: int = 1) -> None:
        """Count and log one that is left out; `where` is its shard, key and byte.

        The log says how many `samples` a stretch of damage has likely held.
        Raises: DataError if the policy has the run end here.
        """
        assert error.kind in KINDS, error.kind
        self._bad += 1
        self._in_a_row += 1
        self._report(where, error, samples)
        reason = self._reason_to_end()
        if reason is not None:
            raise DataError(f"{self._name}: {reason}; the last one: {where}: {error} ({error.kind}); {REMEDY}")
        self._step()

    def ignored(self, where: str, texts: Iterable[Ignored]) -> None:
        """Log what was ignored in a readable sample: no reason to end, whatever it is."""
        for kind, message in texts:
            assert kind in IGNORED, kind
            number = self._log_now(f"ignored {kind}")
            if number:
                _log.warning("%s ignored (number %d; %s): %s: %s", kind, number, self._name, where, message)

    def to_json(self) -> list[int]:
        """Samples and bad ones of the present thousand, and bad ones in a row."""
        return [self._seen, self._bad, self._in_a_row]

    def _step(self) -> None:
        self._seen += 1
        if self._seen >= WINDOW:
            self._seen = self._bad = 0

    def _reason_to_end(self) -> str | None:
        policy = self._policy
        if policy.on_bad == "fail":
            return "a sample cannot be used and data.on_bad is fail; repair the data or set it to skip"
        if self._in_a_row > policy.max_in_a_row:
            return (
                f"{self._in_a_row} samples in a row cannot be used (data.max_bad_in_a_row is {policy.max_in_a_row}); "
                "repair the data or raise the limit"
            )
        if self._bad > policy.max_per_thousand:
            return (
                f"{self._bad} of the last {self._seen + 1} samples cannot be used (data.max_bad_per_thousand is "
                f"{policy.max_per_thousand}); repair the data or raise the limit"
            )
        return None

    def _report(self, where: str, error: SampleError, samples: int) -> None:
        number = self._log_now(error.kind)
        if number:
            what = "sample" if samples == 1 else f"about {samples} samples"
            _log.warning("%s left out (%s, number %d; %s): %s: %s", what, error.kind, number, self._name, where, error)

    def _log_now(self, what: str) -> int:
        """The number of this one, or 0 for one that is not logged.

        Of each kind: the first ten, then every tenth, from a hundred on every hundredth, and so on.
        """
        logged = self._policy.logged
        logged[what] += 1
        number = logged[what]
        return 0 if number % 10 ** (len(str(number)) - 1) else number
