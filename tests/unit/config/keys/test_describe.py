"""The text of `univitar-ds config`."""

import pytest

from univitar_ds.config.keys.describe import WIDTH, describe, find_key
from univitar_ds.config.keys.tree import all_keys
from univitar_ds.config.load import FIXED, RESULT_FREE
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import ConfigError


def test_without_a_name_every_section_has_an_entry():
    text = describe(None)
    for name in RunConfig.model_fields:
        assert f"\n{name} " in f"\n{text}"
    assert "AdamW" in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_a_section_lists_all_keys_below_it_with_type_default_and_meaning():
    text = describe("data")
    assert [key for key in all_keys() if key.startswith("data") and f"{key}: " not in text] == []
    assert "data.lanes: a whole number, at least 1; default 4" in text
    assert "data.sources.N.path: text; must be given" in text
    assert "stages" not in [line.split(":")[0].strip().split(".")[0] for line in text.splitlines() if ": a" in line]
    assert all(len(line) <= WIDTH for line in text.splitlines())


def test_keys_are_indented_below_their_section():
    lines = describe("stages").splitlines()
    depth = {line.strip().split(":")[0]: len(line) - len(line.lstrip()) for line in lines}
    assert (depth["stages"], depth["stages.N.lr"], depth["stages.N.image"], depth["stages.N.image.kind"]) == (
        0,
        4,
        4,
        8,
    )


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("stages", "stages"),
        ("stages.0", "stages"),
        ("stages.N", "stages"),
        ("stages.0.lr", "stages.N.lr"),
        ("stages.N.lr", "stages.N.lr"),
        ("stages.*.lr", "stages.N.lr"),
        ("stages.lr", "stages.N.lr"),
        ("data.sources.1.path", "data.sources.N.path"),
        ("stages.2.weights.photos", "stages.N.weights"),
        ("stages.0.clip_frames", "stages.N.video_frames"),
        ("model.encoder.hidden_size", "model.encoder.hidden_size"),
        ("objective.teacher.path", "objective.teacher.path"),
    ],
)
def test_a_key_is_found_as_run_files_and_overrides_write_it(name, found):
    assert find_key(name).name == found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("data.lane", "similar: data.lanes"),
        ("stages.0.warmup_sample", r"similar: stages\.N\.warmup_samples"),
        ("text.heads", r"similar: model\.text\.heads"),
        ("learning_rate", r"learning_rate is stages\.N\.lr here"),
        ("qqqqqqq", "`univitar-ds config` lists the sections"),
        ("", "lists the sections"),
    ],
)
def test_an_unknown_key_is_an_error_with_similar_ones(name, said):
    with pytest.raises(ConfigError, match=f"there is no key .*{said}"):
        describe(name)


def test_a_default_that_differs_from_that_of_its_section_is_shown():
    assert 'stages.N.contrastive: a section; default {"start": 1.0}' in describe("stages.contrastive")


def test_keys_that_a_resumed_run_may_change_are_marked():
    assert "a resumed run may change it" in describe("checkpoint.keep", RESULT_FREE).replace("\n  ", " ")
    assert "a resumed run may change it" not in describe("stages.lr", RESULT_FREE)
    assert "a resumed run may change it" not in describe("checkpoint.folder", RESULT_FREE, FIXED)
