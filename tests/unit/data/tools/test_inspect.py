"""`data inspect` reports the packs that a run would train on."""

import pytest

from tests.support.shards import image, write_demo_shards, write_tar
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.tools.inspect import inspect, render
from univitar_ds.errors import DataError


def run(path, **stage):
    rule = {"min_tokens": 4, "max_tokens": 40, "divisor_px": 14}
    fields = {"name": "native", "samples": 10, "lr": 1e-3, "image": rule, "token_budget": 120, **stage}
    return RunConfig(name="r", data={"sources": [{"path": str(path)}], "lanes": 2, "workers": 0}, stages=[fields])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_demo_shards(tmp_path_factory.mktemp("demo"), images=60, videos=8, shards=2)


def test_the_figures_are_consistent(folder):
    result = inspect(
        run(folder, video_ratio=0.5, video={"min_tokens": 8, "max_tokens": 60, "divisor_px": 14}), packs=12
    ).to_json()
    assert [(stream["stage"], stream["modality"], stream["packs"]) for stream in result["streams"]] == [
        ("native", "image", 12),
        ("native", "video", 12),
    ]
    assert result["shards"] == 4
    for stream in result["streams"]:
        items = sum(row["items"] for row in stream["token_histogram"])
        assert items == round(stream["items_per_pack"]["mean"] * 12)
        tokens = stream["fill_pct"]["mean"] / 100 * 120 * 12
        assert tokens == pytest.approx(stream["tokens_per_item"]["mean"] * items, rel=1e-2)
        assert 0 < stream["fill_pct"]["min"] <= stream["fill_pct"]["mean"] <= 100
        assert stream["bad"] == {}
        low, high = stream["token_histogram"][0]["from"], stream["token_histogram"][-1]["to"]
        assert low == stream["tokens_per_item"]["min"] <= stream["tokens_per_item"]["max"] <= high
    assert result["streams"][0]["fill_pct"]["mean"] > 95


def test_the_text_has_every_figure(folder):
    text = render(inspect(run(folder), packs=5))
    for word in ("4 shards", "stage native, image: 5 packs of 120 tokens", "fill ", "####", "left out       none"):
        assert word in text
    assert "samples/s read and decoded by this process" in text


def test_bad_samples_found_in_headers_and_pixels_are_counted_by_kind(tmp_path):
    samples = [(f"k{n}", {"jpg": image(60, 40, n), "txt": b"t"}) for n in range(12)]
    samples[4] = ("k4", {"jpg": b"junk", "txt": b"t"})
    samples[7] = ("k7", {"jpg": image(60, 40)[:-200], "txt": b"t"})
    samples[9] = ("k9", {"jpg": image(60, 40)})
    write_tar(tmp_path / "a.tar", samples)
    result = inspect(run(tmp_path), packs=6)
    (stream,) = result.to_json()["streams"]
    assert set(stream["bad"]) == {"unreadable", "corrupt", "no_caption"}
    assert min(stream["bad"].values()) >= 1
    assert "left out       " + ", ".join(f"{n} {kind}" for kind, n in sorted(stream["bad"].items())) in render(result)


def test_the_imbalance_of_a_step_compares_its_most_expensive_pack_with_the_mean(folder):
    (stream,) = inspect(run(folder), packs=6, cost=(0.0, 1.0)).streams
    costs = [sum(tokens**2 for tokens in pack) for pack in stream.packs]
    steps = [costs[start : start + 2] for start in (0, 2, 4)]  # two lanes
    assert stream.imbalances == pytest.approx([max(step) / (sum(step) / 2) - 1 for step in steps])
    assert inspect(run(folder), packs=2).streams[0].imbalances == []


def test_a_cost_budget_counts_tokens_after_patch_dropout(folder):
    def packs(budget, **stage):
        return inspect(run(folder, cost_budget_tflops=budget, **stage), packs=6, cost=(0.0, 1.0)).streams[0].packs

    budget = 2.0**-30  # about 900 tokens squared
    assert packs(budget, patch_dropout=0.5) == packs(4 * budget) != packs(budget)


def test_the_requested_number_of_packs_is_drawn_for_any_number_of_lanes(folder):
    assert [len(inspect(run(folder), packs=packs).streams[0].packs) for packs in (1, 3)] == [1, 3]


def test_downscaled_items_are_counted(folder):
    wide = {"min_tokens": 1, "max_tokens": 4, "divisor_px": 14}
    (stream,) = inspect(run(folder, image=wide), packs=2).streams
    assert stream.downscaled == len(stream.tokens) > 0


def test_the_longest_wait_is_read_from_the_cursors(folder):
    (stream,) = inspect(run(folder), packs=20).streams
    assert 5 <= stream.longest_wait <= 20


def test_a_source_without_shards_is_an_error_as_in_training(tmp_path):
    with pytest.raises(DataError, match="no shard found"):
        inspect(run(tmp_path))
