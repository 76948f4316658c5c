"""Keys that had another name in an earlier version."""

import json

import pytest

from tests.support.finished import run_config
from univitar_ds.config.keys import renamed
from univitar_ds.config.keys.renamed import KEYS, present_key, present_sums
from univitar_ds.config.load import apply_overrides, check_config, load_config
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import ConfigError


def earlier(content):
    """A run file's content as an earlier version wrote it."""
    text = json.dumps(content)
    for old, new in KEYS.items():
        text = text.replace(f'"{new.rpartition(".")[2]}"', f'"{old.rpartition(".")[2]}"')
    return json.loads(text)


def test_a_run_file_with_earlier_names_is_the_same_run_and_causes_one_log_line(caplog):
    whole = run_config(logging={"images_every_steps": 7}).model_dump(mode="json")
    old = earlier(whole)
    assert old != whole
    with caplog.at_level("INFO", renamed.__name__):
        assert check_config(old, "run.yaml") == check_config(whole, "run.yaml")
    (line,) = caplog.messages
    assert "run.yaml has keys under earlier names: data.max_clip_s is now max_video_s, stages.0.clip_frames" in line


def test_overrides_take_earlier_names_also_below_a_renamed_section(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(earlier(run_config().model_dump(mode="json"))), encoding="utf-8")
    for overrides in (
        ["data.max_clip_s=9", "stages.0.clip_frames=6", "stages.0.clip_sampling.kind=fps"],
        ["data.max_video_s=9", "stages.0.video_frames=6", "stages.0.video_sampling.kind=fps"],
    ):
        config = load_config(path, overrides)
        assert (config.data.max_video_s, config.stages[0].video_frames) == (9, 6)
        assert config.stages[0].video_sampling.kind == "fps"


def test_a_key_under_both_names_is_refused():
    content = apply_overrides(run_config().model_dump(mode="json"), [])
    content["data"]["max_clip_s"] = 5
    with pytest.raises(ConfigError, match=r"data\.max_clip_s is now called data\.max_video_s.*keep max_video_s"):
        check_config(content, "run.yaml")


def test_every_present_name_is_a_key():
    for new in KEYS.values():
        node = run_config().model_dump(mode="json")
        for part in new.split("."):
            node = node[0] if part == "*" else node[part]
    assert "stages" in RunConfig.model_fields


@pytest.mark.parametrize("other", ["data.workers", "stages.0.video_frames", "data", "stages.0.contrastive.start", ""])
def test_other_keys_stay(other):
    assert present_key(other) == other


def test_sums_of_a_checkpoint_get_their_present_names():
    assert present_sums({"shrunk": 3.0, "tokens": 9.0}) == {"downscaled": 3.0, "tokens": 9.0}
