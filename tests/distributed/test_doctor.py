"""The doctor on several ranks, each on a node of its own: its rows, and missing ranks."""

import os
import threading
import time

import pytest

from tests.support.distributed import run_distributed
from tests.support.runs import small_config
from tests.support.shards import write_demo_shards
from univitar_ds import processes
from univitar_ds.config.load import dump_config
from univitar_ds.doctor import ranks, run, speed, versions
from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, Found, Row
from univitar_ds.errors import UserError

pytestmark = pytest.mark.distributed
DISK, EXCHANGE = Row("disk", OK, "there"), Row("exchange", OK, "good")


def on_node(slow: int | None = None) -> None:
    """Makes this rank the only one on its node. Its timed products take 5 ms, or 200 ms on rank `slow`."""
    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"node-{rank}"
    speed.work = lambda _: time.sleep(0.2 if rank == slow else 0.005)
    versions.broken_imports = lambda _: []  # takes ten seconds


def examined(run_file: str, slow: int | None) -> list[tuple[str, str, str]]:
    on_node(slow)
    report = run.examine(run_file)
    assert report.main == (os.environ["RANK"] == "0")
    return [(row.check, row.state, row.found) for row in report.rows]


def test_two_nodes_are_examined_and_the_slow_one_is_named(tmp_path):
    write_demo_shards(tmp_path / "shards", images=16, videos=8, shards=2)
    dump_config(small_config(tmp_path / "shards", tmp_path / "runs"), tmp_path / "run.yaml")
    before = sorted(tmp_path.iterdir())
    first, second = run_distributed(examined, 2, str(tmp_path / "run.yaml"), 1)
    assert second == []
    failed = [(check, found) for check, state, found in first if state == FAILED]
    assert [check for check, _ in failed] == ["speed"]
    assert "the slowest node is node-1" in failed[0][1]
    done = {check for check, state, _ in first if state == OK}
    assert {"versions", "lanes", "sources", "storage", "checkpoint folder", "shared folder", "clocks", "ranks"} <= done
    exchanges = [found for check, _, found in first if check == "all-reduce"]
    assert [text.partition(":")[0] for text in exchanges] == [
        "all 2 ranks",
        "between 2 nodes, one rank of each",
        "pairs of nodes",
    ]
    assert sorted(tmp_path.iterdir()) == before


def _shorter(context: Context) -> Found:
    context.ranks.limit_s = 1.0
    return Found()


def rows_without(place: str) -> list[str]:
    """The rows of rank 0, while rank 1 hangs in a check (`place` "check"), or does not answer at all ("rank").

    Limits are short only after both ranks have connected, and only for these waits.
    """
    on_node()
    lost = os.environ["RANK"] == "1" and place == "rank"
    hangs = os.environ["RANK"] == "1" and place == "check"
    ranks.SLACK_S = 1.0 if place == "rank" and not lost else 300.0
    context = Context(run._join(300.0))
    if lost:
        context.ranks.exchange_nodes("node-1")
        context.ranks.end()
        return []
    processes.TICKS_S = 5.0  # other threads of the tests compute
    checks = [
        Check("limit", _shorter, "", everywhere=True),
        Check("disk", lambda _: (threading.Event().wait() if hangs else 0) or Found([DISK]), "see it", everywhere=True),
        Check("exchange", lambda _: Found([EXCHANGE]), "", everywhere=True, together=True),
    ]
    rows = run.check_all(context, checks)
    return [f"{','.join(row.nodes)}|{row.check} {row.state}: {row.found}; {row.remedy}" for row in rows]


def test_a_check_that_hangs_on_one_rank_fails_there_and_later_checks_run():
    rows, _ = run_distributed(rows_without, 2, "check")
    assert rows == [
        "node-0|disk ok: there; ",
        "node-1|disk failed: no answer and no progress for 1 s (limit); see it",
        "|exchange ok: good; ",
    ]


def test_a_lost_rank_is_named_and_checks_that_need_all_ranks_are_skipped():
    rows, _ = run_distributed(rows_without, 2, "rank")
    assert rows[:2] == [
        "|disk ok: there; ",
        "|exchange skipped: needs all ranks: rank 1 on node-1 does not answer; ",
    ]
    assert rows[2].startswith("|ranks failed: rank 1 on node-1 did not answer within")
    assert rows[2].endswith("see that rank's log and its node; leave it out with sbatch --exclude=node-1")
    assert len(rows) == 3


def gone(run_file: None) -> str:
    """The error of rank 1 if rank 0 ends."""
    on_node()
    context = Context(run._join(300.0))
    if context.ranks.is_main:
        return ""
    context.ranks.limit_s, ranks.SLACK_S = 0.1, 0.1
    with pytest.raises(UserError) as error:
        context.ranks.at_main(lambda: None, "never")
    return str(error.value)


def test_a_rank_that_waits_for_rank_0_beyond_the_limit_fails_with_a_message():
    _, said = run_distributed(gone, 2, None)
    assert said == "rank 0 has ended, or does not answer within 0.8 s; its log says why"
