"""Packs stay the same if a run is stopped and resumed many times with other numbers of ranks and workers."""

import json
import random
import zlib
from collections import Counter
from types import SimpleNamespace

import pytest

from tests.support.shards import image, write_demo_shards, write_tar
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.loader import LaneSet, PackLoader
from univitar_ds.data.sampler.cursor import parse

LANES, STEPS, LEGS = 4, 64, 24
SIZES = {
    "image": {"min_tokens": 4, "max_tokens": 40, "divisor_px": 14},
    "video": {"min_tokens": 8, "max_tokens": 60, "divisor_px": 14},
    "video_frames": 4,
    "token_budget": 160,
    "samples": 100,
    "lr": 1e-3,
}
AUGMENT = {"crop_scale": [0.3, 1], "crop_ratio": [0.75, 1.3], "flip": 0.5, "brightness": 0.4, "hue": 0.1, "grey": 0.2}
STAGES = [
    StageConfig(name="all", **SIZES),
    StageConfig(name="mixed", weights={"demo": 1, "broken": 3}, **SIZES),
    StageConfig(
        name="clips",
        weights={"demo": 2, "broken": 1},
        video_ratio=0.25,
        augment=AUGMENT,
        cost_budget_tflops="auto",
        **SIZES,
    ),
]
ENDS = [20, 44, STEPS]
"""The step after the last one of each stage."""


def stage_at(step):
    number = next(number for number, end in enumerate(ENDS) if step < end)
    return STAGES[number], ENDS[number]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """An intact source with videos; one with truncated images, missing captions, a damaged and a truncated shard."""
    folder = tmp_path_factory.mktemp("elastic")
    write_demo_shards(folder / "demo", images=90, videos=16, shards=3)
    for shard in range(3):
        samples = []
        for n in range(24):
            content = image(40 + 3 * n, 70 - 2 * n, n)
            content = content[:-150] if n % 7 == 3 else content
            samples.append((f"{shard}-{n:02d}", {"jpg": content, **({} if n % 11 == 5 else {"txt": b"an image"})}))
        write_tar(folder / "broken" / f"{shard}.tar", samples)
    damaged, cut = folder / "broken" / "1.tar", folder / "broken" / "2.tar"
    content = damaged.read_bytes()
    middle = content.index(b"1-12.jpg")
    damaged.write_bytes(content[:middle] + bytes(512) + content[middle + 512 :])
    cut.write_bytes(cut.read_bytes()[:-20_000])
    return [SourceConfig(path=str(folder / name)) for name in ("demo", "broken")]


def leg(sources, *, ranks, workers, first, steps, cursors):
    """Run `steps` steps from `first` on, the ranks one after another in this process; returns packs by (step, lane)."""
    stage, end = stage_at(first)
    assert first + steps <= end
    data = DataConfig(
        sources=sources, lanes=LANES, workers=workers, pool_samples=20, max_bad_per_thousand=1000, prefetch_packs=3
    )
    given = {}
    for rank in range(ranks):
        lanes = range(rank * LANES // ranks, (rank + 1) * LANES // ranks)
        loader = PackLoader(
            data,
            stage,
            LaneSet(lanes, LANES, 5, cursors and {lane: cursors[lane] for lane in lanes}, first),
            modality_of=lambda step: "video" if stage.video_ratio and step % 4 == 3 else "image",
            tokenizer=None,
            context_length=8,
            cost=(1e9, 1e8),
        )
        with loader:
            for step in range(first, first + steps):
                given.update({(step, pack.lane): content_of(pack) for pack in next(loader)})
    return given


def content_of(pack):
    return SimpleNamespace(
        modality=pack.modality,
        keys=pack.keys,
        captions=pack.captions,
        bad=pack.bad,
        downscaled=pack.downscaled,
        grids=pack.grid_thw.tolist(),
        pixels=zlib.crc32(pack.pixels.numpy()),
        cursor=parse(json.loads(json.dumps(pack.cursor.to_json()))),
    )


def cursors_after(packs, step):
    return {lane: packs[step, lane].cursor for lane in range(LANES)} if step >= 0 else None


@pytest.fixture(scope="module")
def whole(sources):
    """The run without interruption."""
    packs = {}
    for first, end in zip([0, *ENDS[:-1]], ENDS, strict=True):
        packs |= leg(
            sources, ranks=1, workers=0, first=first, steps=end - first, cursors=cursors_after(packs, first - 1)
        )
    return packs


def test_the_run_contains_the_intended_damage_modalities_and_sources(whole):
    """Otherwise the next test would prove little."""
    kinds = {kind for pack in whole.values() for kind in pack.bad}
    assert {"corrupt", "no_caption", "cut", "damaged"} <= kinds
    assert {pack.modality for pack in whole.values()} == {"image", "video"}
    assert {key[0] for pack in whole.values() for key in pack.keys} == {"0", "1"}
    mixed = Counter(key[0] for (step, _), pack in whole.items() if 24 <= step < 44 for key in pack.keys)
    assert mixed["0"] / mixed.total() == pytest.approx(1 / (1 + 3 * 6 / 7), abs=0.05)  # of 7 broken ones 1 is cut
    assert whole[STEPS - 1, 0].cursor.streams["image"].places[""].epoch >= 1


@pytest.mark.parametrize("seed", [0])
def test_packs_are_the_same_after_resumes_at_random_steps_with_other_ranks_and_workers(sources, whole, seed):
    chance = random.Random(seed)
    step, cursors, visited = 0, None, set()
    for number in range(LEGS):
        ranks, workers = chance.choice([(1, 0), (2, 0), (4, 0), (1, 0), (2, 0), (4, 0), (1, 1), (1, 2), (2, 1)])
        if number < 3:
            ranks, workers = [(1, 2), (2, 1), (4, 0)][number]
        visited.add((ranks, workers))
        steps = min(chance.randint(1, 6), stage_at(step)[1] - step)
        packs = leg(sources, ranks=ranks, workers=workers, first=step, steps=steps, cursors=cursors)
        for place, pack in packs.items():
            assert pack == whole[place], f"step and lane {place}, {ranks} ranks, {workers} workers, leg {number}"
        saved = step + chance.randint(1, steps) - 1  # steps after the last checkpoint are repeated
        cursors, step = cursors_after(packs, saved), saved + 1
        if step >= STEPS:
            step, cursors = 0, None
    assert {ranks for ranks, _ in visited} == {1, 2, 4}
    assert {workers for _, workers in visited} == {0, 1, 2}
