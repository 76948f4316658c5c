"""Limits the rate of requests to a remote store and retries failed requests."""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import NamedTuple

from univitar_ds.errors import DataError

_log = logging.getLogger(__name__)

FIRST_GAP_S, LONGEST_GAP_S = 0.02, 1.0
"""Initial and maximum gap between two requests of a throttled process, in seconds."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
"""Initial and maximum pause before a retry, in seconds."""
UNREACHED_S = 30.0
"""Seconds after which a request fails if the store has never answered this process: its address is probably wrong."""
SLOW_BYTES_PER_S = 64 << 10
"""A connection that is slower for `idle_timeout_s` is replaced by a new connection, which is usually faster."""
LEAST_BYTES_PER_S = 4096
"""Minimum bytes per second of a download, over all its connections. After `give_up_s` with less (1.2 MB in 300 s), a
failed request is not retried."""
_LEAST_WINDOW_S = 1.0
_LOG_EVERY_S = 10.0


class Failure(NamedTuple):
    """The reason why a request must be repeated. `retry_after_s`: the pause that the store asked for."""

    reason: str
    throttled: bool = False
    retry_after_s: float = 0.0


class RateLimiter:
    """Limits the request rate of a process that the store throttles. All threads share one object.

    A throttled request doubles the gap between the starts of two requests, a successful one shortens it by a tenth.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = self._slowed = self._logged = 0.0
        self.gap_s = 0.0
        self.reached = False

    def wait(self) -> None:
        """Blocks until the next request may start."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self.gap_s * random.uniform(0.5, 1.5)
        if start > now:
            time.sleep(start - now)

    def answered(self) -> None:
        """Shortens the gap after a successful request."""
        self.reached = True
        if self.gap_s:
            with self._lock:
                self.gap_s = self.gap_s * 0.9 if self.gap_s > FIRST_GAP_S / 2 else 0.0

    def throttled(self) -> None:
        """Doubles the gap. Concurrent requests that are throttled together count once."""
        with self._lock:
            now = time.monotonic()
            if now - self._slowed >= self.gap_s:
                self._slowed = now
                self.gap_s = min(max(2 * self.gap_s, FIRST_GAP_S), LONGEST_GAP_S)

    def warn(self, message: str, *values: object) -> None:
        """Logs a warning, at most one every `_LOG_EVERY_S`."""
        with self._lock:
            now = time.monotonic()
            if self._logged and now - self._logged < _LOG_EVERY_S:
                return
            self._logged = now
        _log.warning(message, *values)


class RetryPolicy:
    """Retries of one request or download: pauses grow with each failure, and the waiting time is limited.

    `idle_timeout_s`: maximum silence of a connection. If more than this and twice `LONGEST_PAUSE_S` pass between two
    calls of `progress` or `failed`, the process was suspended, and the excess is not counted.
    """

    def __init__(self, url: str, give_up_s: float, limiter: RateLimiter, idle_timeout_s: float) -> None:
        self._url, self._give_up_s, self._limiter = url, give_up_s, limiter
        self._window_s = max(idle_timeout_s, _LEAST_WINDOW_S)
        self._last = self._opened = time.monotonic()
        self._waited = 0.0
        self._failures = self._came = self._window = 0

    def connected(self) -> None:
        """Records that a connection has begun to answer."""
        self._opened = time.monotonic()
        self._window = 0

    def progress(self, count: int) -> None:
        """Records `count` received bytes. After enough bytes, `give_up_s` starts again.

        Raises: OSError if the connection is too slow and should be replaced.
        """
        now = self._tick()
        self._failures = 0
        self._came += count
        self._window += count
        if self._came >= LEAST_BYTES_PER_S * self._give_up_s:
            self._waited, self._came = 0.0, 0
        if now - self._opened >= self._window_s:
            came, seconds = self._window, now - self._opened
            self.connected()
            if came < SLOW_BYTES_PER_S * self._window_s:
                raise OSError(f"the connection gave {came} bytes in {seconds:.0f} s")

    def _tick(self) -> float:
        """Adds the time since the last call, up to a bound, to the waiting time. Returns the current time."""
        now = time.monotonic()
        self._waited += min(now - self._last, self._window_s + 2 * LONGEST_PAUSE_S)
        self._last = now
        return now

    def failed(self, failure: Failure) -> None:
        """Sleeps before the next attempt.

        Raises: DataError if too little was received for `give_up_s` seconds;
            `transient` if the store has answered before.
        """
        self._failures += 1
        if failure.throttled:
            self._limiter.throttled()
        limit = self._give_up_s if self._limiter.reached else min(self._give_up_s, UNREACHED_S)
        self._tick()
        waited = self._waited
        if waited >= limit:
            came = f"only {self._came} bytes" if self._came else "nothing"
            never = "; the store has never answered: check data.s3.endpoint_url or --s3-endpoint"
            reached = "" if self._limiter.reached else never
            error = DataError(
                f"{self._url}: {came} received in {waited:.0f} s and {self._failures} attempts, the last one: "
                f"{failure.reason} (data.s3.give_up_s is {self._give_up_s:g}){reached}"
                + ("; wait until the store recovers and resume, or raise data.s3.give_up_s" if not reached else "")
            )
            error.transient = self._limiter.reached
            raise error
        self._limiter.warn("%s: %s; trying again (attempt %d)", self._url, failure.reason, self._failures + 1)
        pause = random.uniform(0, min(FIRST_PAUSE_S * 2 ** min(self._failures, 20), LONGEST_PAUSE_S))
        pause = max(pause, min(failure.retry_after_s, LONGEST_PAUSE_S))
        time.sleep(min(pause, max(limit - waited, 0.0)))
