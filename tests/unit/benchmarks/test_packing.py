"""The benchmark of packing on a small mix: its figures are those of the packs."""

from benchmarks.bench_packing import RELEASE, Mix, log_normal, measure, write_headers


def test_a_small_mix_gives_every_figure(tmp_path):
    shards = write_headers(tmp_path / "mix", log_normal(1500, 0.8, 8192), samples=400)
    row = measure(Mix("small", shards, RELEASE, 16384), 8, None)
    assert (row["steps"], row["lanes"]) == (8, 4)
    assert 98.5 < row["fill_mean_pct"] <= row["fill_bound_pct"] == 100
    assert 0 < row["longest_wait_packs"] < 8
    assert 0 < row["flop_imbalance_mean_pct"] <= row["flop_imbalance_max_pct"]
    equal = measure(Mix("small", shards, RELEASE, 16384), 8, row["mean_full_pack_cost"] * 0.9)
    assert equal["flop_imbalance_mean_pct"] < row["flop_imbalance_mean_pct"]
    assert equal["fill_mean_pct"] < row["fill_mean_pct"] - 2
    assert 95 < equal["cost_fill_mean_pct"] <= 100
