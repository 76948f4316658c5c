"""Pairs of a step follow from token budgets, sizes of items, lanes and processes."""

import pytest

from tests.support.finished import run_config
from univitar_ds.config.load import load_config
from univitar_ds.errors import ConfigError
from univitar_ds.model.config import encoder_config
from univitar_ds.planning.counts.batch import batch_lines, pack_sizes, pairs_per_step, tokens_of_item


def lines_of(config, world_size, means=None):
    return batch_lines(config, world_size, encoder_config(config.model), means)


def test_the_published_recipe_has_the_published_numbers_of_pairs():
    """univitar_0p6b.yaml: 128 images of 256 tokens a pack, 32,768 pairs a step of 256 lanes."""
    head, fixed, *_ = lines_of(load_config("univitar_0p6b"), 64)
    assert head == "a step: 256 lanes = 64 processes x 4 packs (accumulated by GradCache, one loss over all pairs)"
    assert fixed.startswith("stage fixed224, images: 32,768 tokens a pack / 256 an item = 128 pairs a pack")
    assert fixed.endswith("x 256 lanes = 32,768 pairs a step")


@pytest.mark.parametrize(
    ("world_size", "said"),
    [(1, "1 process x 4 packs (accumulated by GradCache"), (4, "4 processes x 1 pack (no accumulation)")],
)
def test_lanes_above_the_processes_are_accumulated(world_size, said):
    config = run_config()
    head, *stages = lines_of(config, world_size)
    assert said in head
    assert stages == lines_of(config, 2)[1:], "a step has the same pairs on any number of processes"


def test_processes_that_do_not_divide_the_lanes_are_refused():
    with pytest.raises(ConfigError, match="run 1, 2, 4 ranks"):
        lines_of(run_config(), 3)


def test_items_of_several_sizes_have_a_range_and_an_expected_value():
    config = run_config()  # 200 tokens; images of 4 to 36, videos of 8 to 64
    _, images, videos = lines_of(config, 1, {("both", "image"): 20.0})
    assert "200 tokens a pack / 4-36 (about 20) an item = 5-50 (about 10) pairs a pack" in images
    assert "x 4 lanes = 20-200 (about 40) pairs a step" in images
    assert "200 tokens a pack / 8-64 an item = 3-25 pairs a pack, x 4 lanes = 12-100 pairs a step" in videos


def test_no_more_items_are_expected_than_a_pack_holds():
    config = run_config()
    (images, _) = pack_sizes(config.stages[0], encoder_config(config.model), {("both", "image"): 3.9})
    assert images.mean_items == images.items[1] == 50


def test_a_budget_of_cost_limits_the_items_too():
    stage = run_config().stages[0]
    shape = encoder_config(run_config().model)
    (free, _), (bound, _) = (
        pack_sizes(each, shape) for each in (stage, stage.model_copy(update={"cost_budget_tflops": 1e-3}))
    )
    assert bound.items[1] < free.items[1]
    assert bound.items[0] >= 1


def test_pairs_of_a_step_are_a_mean_over_both_modalities():
    config = run_config()
    stage, shape = config.stages[0], encoder_config(config.model)
    assert pairs_per_step(stage, 4, shape) == (4 * (5 + 3) / 2, 4 * (50 + 25) / 2, None)
    expected = pairs_per_step(stage, 4, shape, {("both", "image"): 20.0, ("both", "video"): 40.0})[2]
    assert expected == 4 * (10 + 5) / 2


@pytest.mark.parametrize(("frame", "image", "video"), [(1, 4, 8), (16, 16, 32), (900, 36, 64)])
def test_the_size_of_an_item_follows_from_the_native_size_of_a_frame(frame, image, video):
    stage = run_config().stages[0]  # videos of 4 frames: 2 steps along time
    assert tokens_of_item(stage, "image", frame) == image
    assert tokens_of_item(stage, "video", frame) == video
