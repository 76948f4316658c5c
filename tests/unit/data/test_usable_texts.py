"""A run whose objective cannot use the texts of a source is refused before its first step."""

import pytest

from tests.support.datasets import image, write_tar
from tests.support.finished import run_config
from univitar_ds.data.shards.sources import find_shards
from univitar_ds.data.usable_texts import check_texts
from univitar_ds.errors import ConfigError, DataError
from univitar_ds.planning.checks import check_run

CAPTION, LABEL = ("txt", "a caption"), ("cls", "cat")


def tar_of(path, *texts):
    members = [(f"{n}.{end}", content) for n, text in enumerate(texts) for end, content in (("jpg", image()), text)]
    return {"path": str(write_tar(path, members))}


def check(kind, *sources, **data):
    config = run_config(data={"sources": list(sources), **data}, objective={"kind": kind})
    check_texts(config, find_shards(config.data.sources))


def test_a_contrastive_run_needs_captions(tmp_path):
    with pytest.raises(DataError, match=r"a\.tar: .*needs captions.* 2 samples; .*templates.*univitar-ds init"):
        check("softmax", tar_of(tmp_path / "a.tar", LABEL, LABEL))
    check("softmax", tar_of(tmp_path / "b.tar", CAPTION))
    check("softmax", tar_of(tmp_path / "c.tar", LABEL) | {"templates": ["a {}"]})


def test_a_classifier_needs_labels(tmp_path):
    with pytest.raises(DataError, match=r"a\.tar: .*classification needs labels.* 1 sample; leave the source out"):
        check("classification", tar_of(tmp_path / "a.tar", CAPTION))
    check("classification", tar_of(tmp_path / "b.tar", LABEL))


def test_a_text_in_the_last_sample_of_the_last_shard_is_enough(tmp_path):
    tar_of(tmp_path / "a.tar", *[LABEL] * 80)
    tar_of(tmp_path / "b.tar", *[LABEL] * 20, CAPTION)
    check("softmax", {"path": str(tmp_path)})


def test_each_source_without_texts_is_named(tmp_path):
    sources = [tar_of(tmp_path / f"{name}.tar", text) for name, text in (("a", LABEL), ("b", CAPTION), ("c", LABEL))]
    with pytest.raises(DataError, match=r"source a\.tar: .*source c\.tar: ") as error:
        check("sigmoid", *sources)
    assert "source b.tar" not in str(error.value)


def test_a_run_that_may_skip_every_sample_is_not_checked(tmp_path):
    check("softmax", tar_of(tmp_path / "a.tar", LABEL), max_bad_per_thousand=1000)


def test_videos_and_captions_that_are_missing_are_reported_together(tmp_path):
    config = run_config(data={"sources": [tar_of(tmp_path / "a.tar", LABEL)], "lanes": 2}, evaluation={"sources": []})
    stages = [stage.model_copy(update={"video_ratio": 0.5}) for stage in config.stages]
    with pytest.raises(ConfigError, match=r"2 errors:\s+- .*needs video samples.*\s+- .*needs captions"):
        check_run(config.model_copy(update={"stages": stages}), "test", 1)
