"""The policy for bad samples: the same decision at the same sample, interrupted or not."""

import ast
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.paths import ROOT
from univitar_ds.data.sampler.bad_samples import KINDS, WINDOW, BadPolicy, BadSampleMonitor
from univitar_ds.errors import DataError, SampleError

PACKAGE = ROOT / "univitar_ds"
CORRUPT = SampleError("corrupt", "half of it is gone")


def feed(health, outcomes) -> int | None:
    """Number of the sample at which the run ends; None if it does not."""
    for number, good in enumerate(outcomes):
        try:
            if good:
                health.good()
            else:
                health.bad(f"s/{number} at byte {512 * number}", CORRUPT)
        except DataError:
            return number
    return None


def test_with_fail_the_first_bad_sample_ends_the_run_and_is_named():
    health = BadSampleMonitor(BadPolicy(on_bad="fail"), "lane 3, image")
    health.good()
    with pytest.raises(DataError, match=r"lane 3, image: .*data.on_bad is fail.* s/7 at byte 1024: half of it is gone"):
        health.bad("s/7 at byte 1024", CORRUPT)


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_one_more_in_a_row_than_allowed_ends_the_run(limit):
    outcomes = [True, *[False] * limit, True, *[False] * (limit + 1)]
    assert feed(BadSampleMonitor(BadPolicy(max_in_a_row=limit), "l"), outcomes) == 2 * limit + 2
    assert feed(BadSampleMonitor(BadPolicy(max_in_a_row=limit), "l"), outcomes[:-1]) is None


def test_one_more_of_a_thousand_than_allowed_ends_the_run_and_says_of_how_many():
    health = BadSampleMonitor(BadPolicy(max_per_thousand=2), "lane 0, video")
    assert feed(health, [False, True, False, True, True]) is None
    with pytest.raises(DataError, match=r"3 of the last 6 samples .*data.max_bad_per_thousand is 2"):
        health.bad("s/5 at byte 0", CORRUPT)


def test_every_thousand_is_counted_anew():
    thousand = [True] * (WINDOW - 2) + [False] * 2
    assert feed(BadSampleMonitor(BadPolicy(max_per_thousand=2), "l"), thousand * 5) is None
    assert feed(BadSampleMonitor(BadPolicy(max_per_thousand=1), "l"), thousand * 5) == WINDOW - 1


@settings(max_examples=100, deadline=None)
@given(
    outcomes=st.lists(st.booleans(), min_size=20, max_size=40),
    cut=st.integers(0, 40),
    seen=st.integers(WINDOW - 20, WINDOW - 1),
    policy=st.builds(BadPolicy, max_per_thousand=st.integers(4, 16), max_in_a_row=st.integers(2, 6)),
)
def test_a_run_resumed_anywhere_ends_at_the_same_sample(outcomes, cut, seen, policy):
    cut %= len(outcomes)
    whole = feed(BadSampleMonitor(policy, "l", (seen, 0, 0)), outcomes)
    first = BadSampleMonitor(policy, "l", (seen, 0, 0))
    ended = feed(first, outcomes[:cut])
    if ended is None:
        rest = BadSampleMonitor(policy, "l", json.loads(json.dumps(first.to_json())))
        ended = feed(rest, outcomes[cut:])
        ended = None if ended is None else ended + cut
    assert ended == whole


def test_the_log_names_the_first_of_a_kind_and_then_ever_fewer(caplog):
    health = BadSampleMonitor(BadPolicy(max_per_thousand=WINDOW, max_in_a_row=WINDOW), "lane 1, image")
    with caplog.at_level(logging.WARNING):
        feed(health, [False] * 250)
        health.bad("t/x at byte 9", SampleError("timeout", "too slow"))
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "sample left out (corrupt, number 1; lane 1, image): s/0 at byte 0: half of it is gone"
    assert len(told) == 10 + 9 + 1 + 1
    assert told[-1] == "sample left out (timeout, number 1; lane 1, image): t/x at byte 9: too slow"


def test_lanes_that_follow_one_policy_log_as_much_as_one(caplog):
    policy = BadPolicy(max_per_thousand=WINDOW, max_in_a_row=WINDOW)
    with caplog.at_level(logging.WARNING):
        for lane in range(25):
            feed(BadSampleMonitor(policy, f"lane {lane}, image"), [False] * 10)
    assert len(caplog.records) == 10 + 9 + 1
    assert "number 200; lane 19, image" in caplog.text


def kinds_raised() -> dict[str, str]:
    """Every literal kind that the package gives to a SampleError, with the file that does."""
    raised = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "SampleError":
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    raised[first.value] = path.name
    return raised


def test_every_kind_that_can_be_raised_has_a_place_in_the_metrics():
    raised = kinds_raised()
    assert {"corrupt", "no_caption", "timeout"} <= set(raised)
    assert {kind: name for kind, name in raised.items() if kind not in KINDS} == {}
    assert len(set(KINDS)) == len(KINDS)
