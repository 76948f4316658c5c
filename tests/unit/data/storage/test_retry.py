"""Rate limits and retries, with a fake clock and without a store."""

import itertools

import pytest

from univitar_ds.data.storage import retry
from univitar_ds.errors import DataError


def test_time_in_which_the_process_was_suspended_is_not_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    reached = retry.RateLimiter()
    reached.reached = True
    policy = retry.RetryPolicy("s3://b/x", 300.0, reached, 20.0)
    now[0] = 5000.0
    policy.failed(retry.Failure("the connection failed"))
    for second in range(5020, 5260, 20):
        now[0] = float(second)
        policy.failed(retry.Failure("the connection failed"))
    now[0] = 5260.0
    with pytest.raises(DataError, match="nothing received in 300 s and 14 attempts"):
        policy.failed(retry.Failure("the connection failed"))


def test_a_connection_is_an_error_only_if_it_is_too_slow_for_a_whole_window(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    policy = retry.RetryPolicy("s3://b/x", 300.0, retry.RateLimiter(), 20.0)
    policy.connected()
    for second in range(1, 100):
        now[0] = float(second)
        policy.progress(retry.SLOW_BYTES_PER_S)
    policy.connected()
    now[0] = 120.0
    with pytest.raises(OSError, match="the connection gave 1310719 bytes in 21 s"):
        policy.progress(20 * retry.SLOW_BYTES_PER_S - 1)


def test_throttling_slows_down_all_requests_of_a_process_and_answers_speed_them_up(monkeypatch):
    slept = []
    now = [100.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    monkeypatch.setattr(retry, "FIRST_GAP_S", 0.02)
    one = retry.RateLimiter()
    for _ in range(5):
        one.wait()
    assert slept == []
    for _ in range(8):  # concurrent requests, throttled together
        one.throttled()
    assert one.gap_s == 0.02
    for _ in range(20):
        now[0] += 1.1
        one.throttled()
    assert one.gap_s == retry.LONGEST_GAP_S
    for _ in range(4):
        one.wait()
    gaps = [later - earlier for earlier, later in itertools.pairwise(slept)]
    assert len(gaps) >= 2
    assert all(0.5 <= gap <= 1.5 for gap in gaps)
    assert len(set(gaps)) == len(gaps)  # jittered
    for _ in range(60):
        one.answered()
    assert one.gap_s == 0.0


def test_pauses_grow_are_jittered_and_respect_retry_after(monkeypatch):
    slept = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.1)
    reached = retry.RateLimiter()
    reached.reached = True
    for _ in range(200):
        policy = retry.RetryPolicy("s3://b/x", 300.0, reached, 20.0)
        for _ in range(10):
            policy.failed(retry.Failure("busy"))
    longest = [max(slept[number::10]) for number in range(10)]
    assert longest[:6] == sorted(longest[:6])
    assert 0.1 < longest[0] <= 0.2
    assert 9 < longest[-1] <= retry.LONGEST_PAUSE_S
    assert min(slept[9::10]) < 2
    slept.clear()
    retry.RetryPolicy("s3://b/x", 300.0, reached, 20.0).failed(retry.Failure("busy", True, 7.0))
    assert slept == [7.0]


def test_repeated_failures_are_logged_once_in_10_s(caplog):
    one = retry.RateLimiter()
    for number in range(50):
        one.warn("failure %d", number)
    assert [record.getMessage() for record in caplog.records] == ["failure 0"]
