"""The run file: overrides, and all errors reported at once."""

from pathlib import Path

import pytest
import yaml

from univitar_ds.config.load import (
    apply_overrides,
    changed_result,
    config_fingerprint,
    dump_config,
    load_config,
    recipe_path,
)
from univitar_ds.errors import ConfigError

MINIMAL = {"name": "r", "data": {"sources": [{"path": "x"}]}, "stages": [{"name": "s", "samples": 10, "lr": 1e-3}]}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_overrides_reach_sections_and_list_items(run_file):
    config = load_config(run_file, ["model.text.layers=7", "stages.0.lr=2e-4", "data.log_samples=true"])
    assert config.model.text.layers == 7
    assert config.stages[0].lr == 2e-4
    assert config.data.log_samples is True


def test_every_shipped_recipe_is_valid():
    recipes = sorted(recipe_path("demo").parent.glob("*.yaml"))
    assert len(recipes) >= 2
    for recipe in recipes:
        assert load_config(recipe).name == recipe.stem


@pytest.mark.parametrize("size", ["0p3b", "0p6b", "1b"])
def test_the_full_recipes_hold_what_is_published(size):
    """arXiv 2504.01792: 14.6 billion samples, 224 px first, then 576 to 5,832 tokens, videos in the last stage only."""
    config = load_config(f"univitar_{size}")
    fixed, *native = config.stages
    assert config.model.encoder == size.replace("p", ".")
    assert sum(stage.samples for stage in config.stages) == 14_600_000_000
    assert (fixed.image.kind, fixed.image.size_px) == ("fixed", 224)
    assert all((s.image.min_tokens, s.image.max_tokens, s.image.divisor_px) == (576, 5832, 112) for s in native)
    assert [stage.video_ratio > 0 for stage in config.stages] == [False, False, True]
    assert (native[-1].video.min_tokens, native[-1].video.max_tokens) == (576, 5832)
    weights = [w for stage in config.stages for w in (stage.distill.start, stage.distill.end) if w is not None]
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] == 0
    assert config.objective.kind == "sigmoid"


def test_an_unknown_key_names_the_nearest_one(run_file):
    with pytest.raises(ConfigError, match=r"unknown key data\.lanse; did you mean 'lanes'\?"):
        load_config(run_file, ["data.lanse=4"])


def test_an_unknown_key_inside_a_list_names_the_nearest_one(run_file):
    with pytest.raises(ConfigError, match=r"unknown key stages\.0\.sample; did you mean 'samples'\?"):
        load_config(run_file, ["stages.0.sample=4"])


def test_a_deepspeed_key_in_the_run_file_is_sent_to_its_owner(run_file):
    with pytest.raises(ConfigError, match=r"zero_optimization belongs to the DeepSpeed JSON"):
        load_config(run_file, ["zero_optimization={stage: 3}"])


def test_all_faults_are_reported_at_once(run_file):
    with pytest.raises(ConfigError) as error:
        load_config(run_file, ["data.lanes=0", "modell={}", "stages.0.lr=-1", "optimizer.betas=[2, 0.9]"])
    message = str(error.value)
    assert "has 4 errors" in message
    for place in ("data.lanes", "modell", "stages.0.lr", "optimizer.betas.0"):
        assert place in message
    assert "got -1" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages.0.token_budget=100"], "an item may have 5832 tokens but token_budget is 100"),
        (["stages.0.warmup_samples=10"], "warmup_samples 10 must be below samples 10"),
        (["stages.0.video_frames=7"], "video_frames 7 is not a multiple of 2"),
        (["stages.0.image={min_tokens: 9, max_tokens: 8, divisor_px: 14}"], "min_tokens 9 exceeds max_tokens 8"),
        (["stages.0.image={kind: fixed, size_px: 225}"], "size_px divisible by 14, got 225"),
        (["stages.0.image={min_tokens: 1, max_tokens: 60}"], "at least 64 tokens an item, above max_tokens 60"),
        (["model.text.heads=3"], "hidden_size 256 is not divisible by heads 3"),
        (["evaluation.image_templates=[a photo]"], "a template holds the label once"),
        (["stages.0.weights={x: .inf}"], r"stages\.0\.weights\.x: input should be a finite number, got Infinity"),
        (["stages.0.weights={x: .nan}"], r"stages\.0\.weights\.x: input should be a finite number, got NaN"),
        (["stages.0.lr=.inf"], r"stages\.0\.lr: input should be a finite number"),
        (["stages.0.contrastive={start: .inf}"], r"contrastive\.start: input should be a finite number"),
        (["stages.0.video_sampling={kind: fps, fps: .inf}"], r"fps: input should be a finite number"),
        (["stages.0.patch_dropout=1"], r"stages\.0\.patch_dropout: input should be less than 1, got 1"),
        (["stages.0.stochastic_depth=-0.1"], r"stages\.0\.stochastic_depth: input should be greater .*, got -0\.1"),
    ],
)
def test_contradictions_are_named_with_their_values(run_file, overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(run_file, overrides)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.lanes", "not of the form"),
        ("stages.3.lr=1", "no index of a list of 1"),
        ("name.x=1", "is a value, not a section"),
        ("data.lanes=[1", "not valid YAML"),
    ],
)
def test_a_malformed_override_is_a_sentence(override, expected):
    with pytest.raises(ConfigError, match=expected):
        apply_overrides(MINIMAL, [override])


def test_a_key_written_twice_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match=r"key 'name' is written twice in one section \(line 2\)"):
        load_config(path)


@pytest.mark.parametrize("content", ["- 1\n", "a: [", "\x00"])
def test_a_file_that_is_no_run_file_is_a_sentence(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)


def test_a_missing_run_file_names_the_shipped_recipes():
    with pytest.raises(ConfigError, match="demo, finetune, labels, photos"):
        load_config("nowhere.yaml")


def test_a_folder_named_like_a_recipe_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load_config("demo").name == "demo"


def test_the_stored_config_reads_back_to_the_same_run(run_file, tmp_path):
    config = load_config(run_file, ["seed=3"])
    dump_config(config, tmp_path / "stored.yaml")
    assert load_config(tmp_path / "stored.yaml") == config


def test_the_fingerprint_follows_what_decides_the_result_and_nothing_else(run_file):
    base = config_fingerprint(load_config(run_file))
    assert config_fingerprint(load_config(run_file, ["data.workers=5", "logging.every_steps=1"])) == base
    assert config_fingerprint(load_config(run_file, ["data.sources.0.path=elsewhere"])) == base
    for override in ("seed=1", "stages.0.lr=1e-4", "data.lanes=8", "model.embed_dim=128", "data.decode_timeout_s=1"):
        assert config_fingerprint(load_config(run_file, [override])) != base


def test_what_changes_the_result_is_named_by_its_place(run_file):
    before, after = load_config(run_file), load_config(run_file, ["seed=1", "stages.0.lr=1e-4", "data.workers=3"])
    assert changed_result(before, after) == ["seed", "stages.0.lr"]


def test_other_sources_are_another_result_unless_they_are_accepted(run_file):
    before = load_config(run_file)
    other = ["data.sources=[{path: a}, {path: b}]"]
    assert changed_result(before, load_config(run_file, other)) == ["data.sources"]
    assert changed_result(before, load_config(run_file, [*other, "data.accept_changed_sources=true"])) == []
