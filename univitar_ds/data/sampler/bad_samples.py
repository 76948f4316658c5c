"""Counts and logs unreadable samples, and ends the run if there are too many.

The decision depends only on the samples in the order in which a lane reads them. The state is three integers in the
cursor, so a resumed run ends at the same sample as an uninterrupted run.
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
"""All kinds of unreadable samples: the kinds of `tar_index.Damage`, then the kinds of SampleError."""

WINDOW = 1000
"""Number of samples after which the count for `max_per_thousand` restarts from 0."""
INITIAL_STATE = (0, 0, 0)
"""The state of a `BadSampleMonitor` that has counted nothing yet."""
REMEDY = "univitar-ds data verify SOURCE lists what is bad"


@dataclass(frozen=True)
class BadPolicy:
    """`data.on_bad`, `data.max_bad_per_thousand` and `data.max_bad_in_a_row`.

    All monitors with this policy share `logged`, the number of messages by kind, so that many lanes log as little as
    one lane. `warns`: whether they log at all; not on a rank whose lanes another rank reads too, and logs.
    """

    on_bad: Literal["skip", "fail"] = "skip"
    max_per_thousand: int = 100
    max_in_a_row: int = 64
    warns: bool = True
    logged: Counter[str] = field(default_factory=Counter, compare=False, repr=False)


class BadSampleMonitor:
    """Counter of the samples of one lane and modality in one phase: reading headers, or decoding.

    Contiguous damage in a shard counts as one bad sample, so that one lost shard among many does not end the run.
    """

    def __init__(self, policy: BadPolicy, name: str, state: Iterable[int] = INITIAL_STATE) -> None:
        """Args: name: identifies the samples in messages, e.g. "lane 3, image"; state: a saved result of `to_json`."""
        self._policy, self._name = policy, name
        self._seen, self._bad, self._in_a_row = state

    def good(self, samples: int = 1) -> None:
        """Counts readable samples."""
        if samples:
            self._in_a_row = 0
            self._step(samples)

    def bad(self, where: str, error: SampleError, samples: int = 1) -> None:
        """Counts and logs a sample that is left out.

        Args: where: shard, key and byte; samples: estimated number of samples in damage, for the log.
        Raises: DataError if the policy ends the run.
        """
        assert error.kind in KINDS, error.kind
        self._bad += 1
        self._in_a_row += 1
        self._report(where, error, samples)
        reason = self._reason_to_end()
        if reason is not None:
            raise DataError(f"{self._name}: {reason}; the last one: {where}: {error} ({error.kind}); {REMEDY}")
        self._step(1)

    def ignored(self, where: str, texts: Iterable[Ignored]) -> None:
        """Logs the ignored content of a readable sample, which never ends the run."""
        for kind, message in texts:
            assert kind in IGNORED, kind
            number = self._log_now(f"ignored {kind}")
            if number:
                _log.warning("%s ignored (number %d; %s): %s: %s", kind, number, self._name, where, message)

    def to_json(self) -> list[int]:
        """Returns [samples of the present window, bad samples in the window, bad samples in a row]."""
        return [self._seen, self._bad, self._in_a_row]

    def _step(self, samples: int) -> None:
        self._seen += samples
        if self._seen >= WINDOW:
            self._seen %= WINDOW
            self._bad = 0

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
        """Counts one message of a kind. Returns its number, or 0 if it must not be logged.

        The first ten of each kind are logged, then every tenth, from a hundred on every hundredth, and so on.
        """
        if not self._policy.warns:
            return 0
        logged = self._policy.logged
        logged[what] += 1
        number = logged[what]
        return 0 if number % 10 ** (len(str(number)) - 1) else number
