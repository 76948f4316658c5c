"""The policy for bad samples: an interrupted and an uninterrupted run end at the same sample."""

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


def feed(monitor, outcomes) -> int | None:
    """The number of the sample at which the run ends; None if it does not."""
    for number, good in enumerate(outcomes):
        try:
            if good:
                monitor.good()
            else:
                monitor.bad(f"s/{number} at byte {512 * number}", CORRUPT)
        except DataError:
            return number
    return None


def test_with_on_bad_fail_the_first_bad_sample_ends_the_run_and_is_named():
    monitor = BadSampleMonitor(BadPolicy(on_bad="fail"), "lane 3, image")
    monitor.good()
    with pytest.raises(DataError, match=r"lane 3, image: .*data.on_bad is fail.* s/7 at byte 1024: half of it is gone"):
        monitor.bad("s/7 at byte 1024", CORRUPT)


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_more_bad_samples_in_a_row_than_allowed_end_the_run(limit):
    outcomes = [True, *[False] * limit, True, *[False] * (limit + 1)]
    assert feed(BadSampleMonitor(BadPolicy(max_in_a_row=limit), "l"), outcomes) == 2 * limit + 2
    assert feed(BadSampleMonitor(BadPolicy(max_in_a_row=limit), "l"), outcomes[:-1]) is None


def test_more_bad_samples_per_thousand_than_allowed_end_the_run():
    monitor = BadSampleMonitor(BadPolicy(max_per_thousand=2), "lane 0, video")
    assert feed(monitor, [False, True, False, True, True]) is None
    with pytest.raises(DataError, match=r"3 of the last 6 samples .*data.max_bad_per_thousand is 2"):
        monitor.bad("s/5 at byte 0", CORRUPT)


def test_counting_restarts_after_every_thousand():
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


def test_the_first_bad_samples_of_a_kind_are_logged_and_later_ones_less_often(caplog):
    monitor = BadSampleMonitor(BadPolicy(max_per_thousand=WINDOW, max_in_a_row=WINDOW), "lane 1, image")
    with caplog.at_level(logging.WARNING):
        feed(monitor, [False] * 250)
        monitor.bad("t/x at byte 9", SampleError("timeout", "too slow"))
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "sample left out (corrupt, number 1; lane 1, image): s/0 at byte 0: half of it is gone"
    assert len(messages) == 10 + 9 + 1 + 1
    assert messages[-1] == "sample left out (timeout, number 1; lane 1, image): t/x at byte 9: too slow"


def test_all_lanes_together_log_no_more_than_one(caplog):
    policy = BadPolicy(max_per_thousand=WINDOW, max_in_a_row=WINDOW)
    with caplog.at_level(logging.WARNING):
        for lane in range(25):
            feed(BadSampleMonitor(policy, f"lane {lane}, image"), [False] * 10)
    assert len(caplog.records) == 10 + 9 + 1
    assert "number 200; lane 19, image" in caplog.text


def kinds_raised() -> dict[str, str]:
    """Maps every literal kind of a SampleError in the package to the name of a file that raises it."""
    raised = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "SampleError":
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    raised[first.value] = path.name
    return raised


def test_every_kind_of_sample_error_is_in_kinds():
    raised = kinds_raised()
    assert {"corrupt", "no_caption", "timeout"} <= set(raised)
    assert {kind: name for kind, name in raised.items() if kind not in KINDS} == {}
    assert len(set(KINDS)) == len(KINDS)
