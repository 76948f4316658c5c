"""Values of ranks that are compared on rank 0: speed, network, clocks, rates."""

import pytest

from univitar_ds.doctor import checkpoints, clocks, connection, network, speed, storage
from univitar_ds.doctor.findings import FAILED, OK, REMEDIES, SKIPPED, Answers, Row, from_error, merged
from univitar_ds.errors import ConfigError, SeveralFaults

NODES = ["a", "a", "b", "b", "c", "c"]


def answers(nodes=NODES, **columns) -> Answers:
    """Each column has a value for each rank, None for a rank without one."""
    values = {
        rank: {name: column[rank] for name, column in columns.items() if column[rank] is not None}
        for rank in range(len(nodes))
    }
    return Answers(values, nodes)


def of_speed(*seconds: float, device: str = "cpu") -> Row:
    ranks = len(seconds)
    (row,) = speed.compare(answers(NODES[:ranks], seconds=seconds, flops=[1e12] * ranks, device=[device] * ranks))
    return row


def test_the_slowest_node_is_named_with_its_slowest_rank():
    row = of_speed(1.0, 1.1, 1.0, 9.0, 1.0, 1.2)
    assert row.state == FAILED
    assert "the slowest node is b with 0.111 TFLOP/s (rank 3 on b), which takes 7.5 times as long" in row.found
    assert "--exclude=b" in row.remedy


def test_a_node_that_is_a_little_slower_is_named_and_does_not_fail():
    row = of_speed(1.0, 1.1, 1.0, 1.15, 1.0, 1.0)
    assert (row.state, row.remedy) == (OK, "")
    assert "the slowest node is b" in row.found


def test_two_nodes_are_enough_to_find_the_slow_one_and_gpus_are_compared_more_strictly():
    assert of_speed(1.0, 1.0, 1.5, 1.5).state == OK
    assert of_speed(1.0, 1.0, 1.5, 1.5, device="cuda").state == FAILED
    assert of_speed(1.0, 1.0, 2.5, 1.0).state == FAILED


def test_one_node_is_not_compared():
    row = of_speed(1.0, 5.0)
    assert row.state == OK
    assert "slowest" not in row.found


def rates(*values: float | None) -> list[dict | None]:
    return [None if value is None else {"gb_s": value, "latency_us": 10.0} for value in values]


def test_a_node_whose_ranks_exchange_slowly_is_named():
    whole, between = rates(*[5.0] * 6), rates(4.0, None, 4.0, None, 4.0, None)
    pairs = [[4.0], None, [4.0], None, [4.0], None]
    good = network.compare(answers(all=whole, within=rates(*[9.0] * 6), between=between, pairs=pairs))
    assert [row.state for row in good] == [OK] * 4
    bad = network.compare(answers(all=whole, within=rates(9, 9, 9, 9, 2, 2), between=between, pairs=pairs))
    assert [row.state for row in bad] == [OK, FAILED, OK, OK]
    assert "slowest c: 2 GB/s (bus), 10 us" in bad[1].found
    assert "--exclude=c" in bad[1].remedy


def test_a_node_is_slow_only_if_its_best_exchange_is_slow():
    pairs = [[1.0, 8.0], None, [1.0, 1.1], None, [8.0, 1.1], None]
    row = network.compare(answers(all=rates(*[5.0] * 6), between=rates(*[4.0] * 6), pairs=pairs))[-1]
    assert row.state == FAILED
    assert "slowest b with 1.1 GB/s" in row.found
    assert "--exclude=b)" in row.remedy


def test_one_rank_has_no_network():
    (row,) = network.compare(Answers({0: {}}, ["a"]))
    assert row.state == SKIPPED
    assert "srun or torchrun" in row.found
    (row,) = network.compare(Answers({0: {}, 1: {}}, ["a", "b"]))
    assert (row.state, row.found) == (SKIPPED, "not measured: the ranks are not connected, or did not answer")


@pytest.mark.parametrize("nodes", [2, 3, 4, 7, 8])
def test_every_round_pairs_a_node_once_and_with_another_one(nodes):
    rounds = network.pairings(nodes, most=99)
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met)) == nodes * (nodes - 1) // 2
    for pairs in rounds:
        flat = [node for pair in pairs for node in pair]
        assert len(flat) == len(set(flat))
    assert len(network.pairings(nodes)) == min(3, nodes - 1 + nodes % 2)


def of_clocks(*ahead: float) -> Row:
    (row,) = clocks.compare(answers(["a", "b", "c"][: len(ahead)], ahead_s=ahead))
    return row


def test_a_clock_that_is_wrong_is_named_in_both_directions():
    assert of_clocks(0.0, 0.2, 0.4).state == OK
    row = of_clocks(0.0, 3.0, -70.0)
    assert (row.state, row.found) == (FAILED, "differ from the clock of a: c by -70.0 s, b by +3.0 s (limit 1 s)")
    assert "chronyd" in row.remedy
    assert of_clocks(0.0).state == SKIPPED


def test_the_slowest_disk_is_named():
    (row,) = storage.compare(answers(["a", "b", "c"], mb_s=[100.0, 30.0, 90.0], mb=[64.0, 64.0, 64.0]))
    assert row.state == OK
    assert "reads 90 MB/s (64 MB on each of 3 nodes at once, median); slowest b with 30 MB/s" in row.found
    (row,) = checkpoints.compare(answers(["a"], mb_s=[100.0], mb=[64.0]))
    assert row.found == "writes 100 MB/s (64 MB)"
    assert storage.compare(Answers({0: {}}, ["a"])) == []


def test_a_node_that_does_not_share_the_folder_is_named():
    (row,) = checkpoints.compare_shared(answers(["a", "b"], seen=[True, True], place=["/runs"] * 2))
    assert row.state == OK
    (row,) = checkpoints.compare_shared(answers(["a", "b"], seen=[True, False], place=["/runs"] * 2))
    assert (row.state, row.found) == (FAILED, "rank 1 on b does not see the file that rank 0 made in /runs")


SAME = {"device": ["CPU"] * 4, "package": ["/p"] * 4, "threads": [1] * 4}


def of_ranks(**changes) -> list[Row]:
    return connection.CHECK.compare(answers(NODES[:4], **{**SAME, **changes}))


def test_ranks_are_counted_by_node():
    (row,) = of_ranks()
    assert (row.state, row.found) == (OK, "4 ranks on 2 nodes (2 on each), all connected; CPU")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"device": ["A100", "A100", "H100", "H100"]},
            "device differs: A100 on ranks 0, 1 on a; H100 on ranks 2, 3 on b",
        ),
        ({"package": ["/p", "/p", "/q", "/p"]}, "package differs: /p on ranks 0, 1, 3 on a, b; /q on rank 2 on b"),
        ({"threads": [1, 1, 1, 8]}, "threads differs: 1 on ranks 0, 1, 2 on a, b; 8 on rank 3 on b"),
        ({"gpu": ["x", "x", "y", "z"]}, "ranks 0, 1 on a share one GPU, x"),
    ],
)
def test_ranks_that_differ_are_named(changes, said):
    _, row = of_ranks(**changes)
    assert (row.state, row.found) == (FAILED, said)
    assert row.remedy


def test_the_same_row_of_all_nodes_is_one_row_and_that_of_one_node_names_it():
    same, other = Row("disk", OK, "there"), Row("disk", FAILED, "gone", "mount it")
    assert [row.nodes for row in merged({0: [same], 2: [same]}, NODES)] == [()]
    rows = merged({0: [same], 2: [other], 4: [same]}, NODES)
    assert [(row.found, row.nodes) for row in rows] == [("there", ("a", "c")), ("gone", ("b",))]
    assert [row.nodes for row in merged({0: [], 2: [other], 4: []}, NODES)] == [("b",)], "others answer without a row"


def test_an_error_is_split_into_what_was_found_and_the_remedy():
    one, two = ConfigError("lanes is 3; run 1, 3 ranks"), ConfigError("a is b")
    (row,) = from_error("lanes", one)
    assert (row.check, row.state, row.found, row.remedy) == ("lanes", FAILED, "lanes is 3", "run 1, 3 ranks")
    assert [row.found for row in from_error("x", SeveralFaults([one, two]))] == ["lanes is 3", "a is b"]
    assert all(row.remedy for row in from_error("x", SeveralFaults([one, two])))


def test_each_fault_of_a_list_is_a_row_with_its_own_remedy():
    rows = from_error(
        "run file", ConfigError("a.yaml has 2 errors:\n  - seed is 1, got x\n  - no key foo; leave it out")
    )
    assert [(row.found, row.remedy) for row in rows] == [
        ("a.yaml: seed is 1, got x", REMEDIES["run file"]),
        ("a.yaml: no key foo", "leave it out"),
    ]
