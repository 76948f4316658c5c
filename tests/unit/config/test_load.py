"""The run file: overrides, and all errors reported at once."""

from pathlib import Path

import pytest
import yaml

from tests.support.finished import run_config
from univitar_ds.config.keys.unused import unused_parts
from univitar_ds.config.load import (
    apply_overrides,
    changed_result,
    config_fingerprint,
    dump_config,
    extended,
    load_config,
    recipe_path,
)
from univitar_ds.config.model import ModelConfig
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


def test_the_error_for_a_deepspeed_key_in_the_run_file_names_its_owner(run_file):
    with pytest.raises(ConfigError, match=r"zero_optimization belongs to the DeepSpeed JSON"):
        load_config(run_file, ["zero_optimization={stage: 3}"])


def test_all_errors_are_reported_at_once(run_file):
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
        (["evaluation.image_templates=[a photo]"], "a template must contain {} once"),
        (["stages.0.weights={x: .inf}"], r"stages\.0\.weights\.x must be a finite number, got Infinity"),
        (["stages.0.weights={x: .nan}"], r"stages\.0\.weights\.x must be a finite number, got NaN"),
        (["stages.0.lr=.inf"], r"stages\.0\.lr must be a finite number"),
        (["stages.0.contrastive={start: .inf}"], r"contrastive\.start must be a finite number"),
        (["stages.0.video_sampling={kind: fps, fps: .inf}"], r"fps must be a finite number"),
        (["stages.0.patch_dropout=1"], r"stages\.0\.patch_dropout must be below 1, got 1"),
        (["stages.0.stochastic_depth=-0.1"], r"stages\.0\.stochastic_depth must be at least 0, got -0\.1"),
        (["stages.0.augment={crop_scale: [0.9, 0.5]}"], r"crop_scale \[0.9, 0.5\] has its larger end first"),
        (["stages.0.augment={crop_scale: [0, 1]}"], r"augment\.crop_scale\.0 must be above 0, got 0"),
        (["stages.0.augment={crop_ratio: [1.2, 1.5]}"], r"crop_ratio \[1.2, 1.5\] does not contain 1"),
        (["stages.0.augment={flip: 2}"], r"augment\.flip must be at most 1, got 2"),
        (["stages.0.augment={hue: 0.6}"], r"augment\.hue must be at most 0.5, got 0.6"),
        (["stages.0.augment={gray: 0.6}"], r"stages\.0\.augment\.gray.*grey"),
        (
            ["data.sources.0.where=json.similarity > 0.3 and widht > 2"],
            r"data\.sources\.0\.where: 'widht' at character 27 of .* is not allowed; allowed are width, height",
        ),
        (["data.sources.0.where=width"], r"sources\.0\.where: 'width' at character 1 .* compare it"),
    ],
)
def test_contradictions_are_named_with_their_values(run_file, overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(run_file, overrides)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.lanes", "not of the form"),
        ("stages.3.lr=1", "not an index of a list of 1"),
        ("name.x=1", "is a value, not a section"),
        ("data.lanes=[1", "not valid YAML"),
    ],
)
def test_a_malformed_override_is_an_error_message(override, expected):
    with pytest.raises(ConfigError, match=expected):
        apply_overrides(MINIMAL, [override])


def test_a_key_written_twice_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match=r"key 'name' is written twice in one section \(line 2\)"):
        load_config(path)


@pytest.mark.parametrize("content", ["- 1\n", "a: [", "\x00"])
def test_a_file_that_is_no_run_file_is_an_error_message(tmp_path, content):
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


def test_the_stored_config_is_read_as_the_same_run(run_file, tmp_path):
    config = load_config(run_file, ["seed=3"])
    dump_config(config, tmp_path / "stored.yaml")
    assert load_config(tmp_path / "stored.yaml") == config


def test_the_fingerprint_depends_only_on_keys_that_change_the_result(run_file):
    base = config_fingerprint(load_config(run_file))
    assert config_fingerprint(load_config(run_file, ["data.workers=5", "logging.every_steps=1"])) == base
    assert config_fingerprint(load_config(run_file, ["data.sources.0.path=elsewhere"])) == base
    for override in ("seed=1", "stages.0.lr=1e-4", "data.lanes=8", "model.embed_dim=128", "data.decode_timeout_s=1"):
        assert config_fingerprint(load_config(run_file, [override])) != base


def test_a_changed_key_that_changes_the_result_is_named(run_file):
    before, after = load_config(run_file), load_config(run_file, ["seed=1", "stages.0.lr=1e-4", "data.workers=3"])
    assert changed_result(before, after) == ["seed", "stages.0.lr"]


def test_other_sources_are_another_result_unless_they_are_accepted(run_file):
    before = load_config(run_file)
    other = ["data.sources=[{path: a}, {path: b}]"]
    assert changed_result(before, load_config(run_file, other)) == ["data.sources"]
    assert changed_result(before, load_config(run_file, [*other, "data.accept_changed_sources=true"])) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=a", 'seed=a: seed must be a whole number, at least 0, below 9223372036854775808, got "a"'),
        ("deterministic=maybe", 'deterministic must be true or false, got "maybe"'),
        ("name=a/b", "name must begin with a letter or a digit and have only letters, digits, dots"),
        ("name=3", "name must be text; write it in quotes, got 3"),
        ("data=null", "data must be a section with keys sources, lanes"),
        ("stages=null", "stages must be a list of sections, not empty, got null"),
        ("data.sources=[]", "data.sources must have at least 1 entry, got []"),
        ("data.cache.folder=''", "data.cache.folder must not be empty"),
        ("optimizer.betas=[1]", "optimizer.betas must be a list of 2 (each a number, at least 0, below 1); entry 1"),
        ("objective.grad_cache_keep=-1", "grad_cache_keep must be a whole number, at least 0, or auto, got -1"),
        ("stages.0.checkpoint_every=some", "stages.0.checkpoint_every must be a whole number, at least 0, or one of "),
        (
            "stages.0.cost_budget_tflops=fast",
            'stages.0.cost_budget_tflops must be a number, above 0, or auto, or null, got "fast"',
        ),
        ("stages.0.cost_budget_tflops=0", "must be a number, above 0, or auto, or null, got 0"),
        ("model.encoder=2b", "model.encoder must be one of tiny, 0.3b, 0.6b, 1b, or a section with keys hidden_size"),
        ("model.encoder={hidden_size: 8}", "model.encoder.num_hidden_layers is missing"),
        ("model.encoder={huge: true}", "unknown key model.encoder.huge; known here: hidden_size"),
        (
            "checkpoint.folder=/tmp/x",
            "checkpoint: folder is /tmp/x, expected s3://BUCKET/PREFIX; checkpoints on a disk",
        ),
        ("checkpoint.keep_every_steps=300", "keep_every_steps 300 is not a multiple of every_steps 200, so most"),
        ("learning_rate=1", "learning_rate is stages.N.lr here"),
        ("wandb.project=x", "unknown key wandb; metrics go to"),
        ("stages.0.token_budget=100", "stages.0.token_budget=100: stages.0: image: an item may have 5832 tokens"),
        ("stages.0.distill.start=1", "stages.0.distill.start=1: stages ['s'] distill without a teacher"),
        ("seed=9223372036854775808", "seed must be below 9223372036854775808, got 9223372036854775808"),
        ("seed=2026-11-29", 'seed must be a whole number, at least 0, below 9223372036854775808, got "2026-11-29"'),
    ],
)
def test_an_error_in_an_override_names_the_override_in_plain_words(run_file, override, said):
    with pytest.raises(ConfigError) as error:
        load_config(run_file, ["data.lanes=2", override])
    message = str(error.value)
    assert said in message
    assert message.startswith("the command line has")
    assert "run.yaml" not in message
    assert "data.lanes=2" not in message, "this override is right"
    for word in ("NoneType", "Config", "valid_", "[A-Z", "literal", "function-", "dictionary", "validation"):
        assert word not in message


def test_errors_of_the_file_and_of_overrides_are_kept_apart(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "seed": -1, "lanes": 3}))
    with pytest.raises(ConfigError) as error:
        load_config(path, ["guard.min_steps=1", "checkpoint.keep=1"])
    head, *lines = str(error.value).split("\n  - ")
    assert head == f"the command line or {path} has 3 errors:"
    assert sorted(lines) == [
        "guard.min_steps=1: guard.min_steps must be at least 4, got 1",
        "seed must be at least 0, got -1",
        "unknown key lanes; lanes is a key of another section: data.lanes",
    ]
    with pytest.raises(ConfigError, match=r"run\.yaml has 2 errors"):
        load_config(path, ["checkpoint.keep=1"])


def test_overrides_that_contradict_only_each_other_are_both_named(run_file):
    contradiction = ["stages.0.warmup_samples=6", "stages.0.samples=5", "seed=2"]
    with pytest.raises(ConfigError) as error:
        load_config(run_file, contradiction)
    assert "stages.0.warmup_samples=6 and stages.0.samples=5: stages.0: warmup_samples 6" in str(error.value)
    assert "seed=2" not in str(error.value)


def test_overrides_that_are_wrong_each_alone_are_named(run_file):
    with pytest.raises(ConfigError) as error:
        load_config(run_file, ["stages.0.video_frames=7", "stages.0.video_frames=7", "seed=2"])
    assert "stages.0.video_frames=7 and stages.0.video_frames=7: stages.0: video_frames 7" in str(error.value)


def test_an_override_that_gives_a_key_under_two_names_is_refused(run_file):
    with pytest.raises(ConfigError, match=r"is now called data\.max_video_s, and both are given"):
        load_config(run_file, ["data={sources: [{path: x}], max_clip_s: 3, max_video_s: 3}"])


def test_a_name_that_is_too_long_is_not_echoed_whole(run_file):
    with pytest.raises(ConfigError, match=r"name must be at most 255 characters long") as error:
        load_config(run_file, [f"name={'x' * 5000}"])
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(("content", "found"), [("", "nothing"), ("- 1", "a list"), ("3", "a single value")])
def test_a_file_without_keys_is_described_in_words(tmp_path, content, found):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError, match=f"holds {found}, expected keys such as name"):
        load_config(tmp_path / "run.yaml")


def test_each_extension_has_the_next_number_of_its_stage():
    config = run_config()
    for name in ("both-2", "both-3", "both-4"):
        config = extended(config, ["samples=4"], "the test")
        assert config.stages[-1].name == name
    config = extended(config, ["samples=4", "name=v-1"], "the test")
    assert extended(config, ["samples=4"], "the test").stages[-1].name == "v-1-2", "there is no stage v"


def test_an_extension_without_keys_is_refused():
    with pytest.raises(ConfigError, match=r"the test has no keys.*--extend samples=10"):
        extended(run_config(), [], "the test")


def test_an_override_of_init_from_replaces_the_recipes_keys_of_a_new_model():
    started = load_config("labels", ["model.init_from=runs/photos"])
    assert (started.model.encoder, started.model.layer_scale_init) == (None, ModelConfig().layer_scale_init)
    assert unused_parts(started) == []
    assert load_config("labels", ["model.init_from=m", "model.encoder=0.3b"]).model.encoder == "0.3b"
    for kept in ([], ["model.init_from=null"]):
        assert (load_config("labels", kept).model.encoder, load_config("labels", kept).model.layer_scale_init) == (
            "tiny",
            1,
        )


def test_a_file_that_starts_from_a_model_keeps_its_encoder(run_file):
    content = MINIMAL | {"model": {"init_from": None, "encoder": "0.3b"}}
    run_file.write_text(yaml.safe_dump(content))
    assert load_config(run_file, ["model.init_from=m"]).model.encoder == "0.3b"
