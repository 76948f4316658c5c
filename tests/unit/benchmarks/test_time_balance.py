"""The benchmark of packs balanced by time, on a small mix."""

from benchmarks.bench_packing import ANY, log_normal, write_headers
from benchmarks.bench_time_balance import Mix, measure


def test_packs_with_a_budget_take_more_equal_time_than_without(tmp_path):
    shards = write_headers(tmp_path / "mix", log_normal(1500, 0.8, 8192), samples=800)
    mix = Mix("small", shards, ANY)
    without, balanced = (measure(mix, 2, headroom, 6, processes=1) for headroom in (None, 1.02))
    assert balanced["time_max_over_mean_attention_2"] < without["time_max_over_mean_attention_2"]
    assert 1 <= balanced["flop_max_over_mean"] < without["flop_max_over_mean"]
    assert 90 < balanced["fill_min_pct"] <= balanced["fill_mean_pct"] <= 100
    assert 1 <= balanced["time_per_token"] <= balanced["time_max_over_mean_attention_2"] + 0.01
