"""Keys that are set without effect are reported with the reason, and no other keys are."""

import json
import logging

import pytest

from tests.support.finished import run_config
from univitar_ds import run as run_module
from univitar_ds.config.keys.unused import unused_parts
from univitar_ds.config.load import check_config, dump_config, load_config
from univitar_ds.planning import checks
from univitar_ds.run import create_run, reopen_run

TEACHER = "objective.teacher={path: dino}"
DISTILL = "stages.0.distill={start: 1.0}"
AUGMENT = "stages.0.augment={flip: 0.5}"
NO_VIDEO = "stages.0.video_ratio=0"
CLASSIFIES = ["objective.kind=classification", "model.embed_dim=256", "model.text={}"]
S3 = "data.sources.0.path=s3://b/a"

UNUSED = [
    # what is set, the key that is reported, and a part of the reason
    ([TEACHER], "objective.teacher", "no stage distills from it"),
    ([TEACHER, "objective.teacher.pooled_loss=smooth_l1"], "objective.teacher", "no stage distills"),
    (
        [TEACHER, DISTILL, "objective.teacher.pooled_weight=0", "objective.teacher.pooled_loss=smooth_l1"],
        "objective.teacher.pooled_loss",
        "pooled_weight is 0",
    ),
    (
        [TEACHER, DISTILL, "objective.teacher.patch_weight=0", "objective.teacher.patch_loss=smooth_l1"],
        "objective.teacher.patch_loss",
        "patch_weight is 0",
    ),
    (
        [TEACHER, DISTILL, "stages.0.contrastive={start: 0}", "objective.same_caption_positive=true"],
        "objective.same_caption_positive",
        "contrastive is 0",
    ),
    ([TEACHER, DISTILL, AUGMENT, "objective.teacher.cache=c"], "objective.teacher.cache", "other pixels in each epoch"),
    (["stages.0.augment={crop_ratio: [0.5, 2]}"], "stages.0.augment.crop_ratio", "keeps the whole image"),
    (["stages.0.augment={jitter_probability: 0.5}"], "stages.0.augment.jitter_probability", "hue are 0"),
    (["model.init_from=enc", "model.layer_scale_init=0.5"], "model.layer_scale_init", "model.init_from"),
    (["model.checkpoint_every=1", "stages.0.checkpoint_every=2"], "model.checkpoint_every", "every stage"),
    (["objective.kind=softmax", "model.logit_bias_init=-3"], "model.logit_bias_init", "softmax"),
    (["objective.classification.mixup=1"], "objective.classification.mixup", "kind is sigmoid"),
    ([*CLASSIFIES, "objective.chunk=8"], "objective.chunk", "contrastive losses"),
    ([*CLASSIFIES, "objective.grad_cache_keep=2"], "objective.grad_cache_keep", "contrastive losses"),
    ([*CLASSIFIES, "model.embed_dim=8"], "model.embed_dim", "no text tower"),
    (
        [*CLASSIFIES, "evaluation.image_templates=['my {}']"],
        "evaluation.image_templates",
        "a classifier is not evaluated zero-shot",
    ),
    (["model.text.path=t", "model.text.hidden_size=64"], "model.text.hidden_size", "model.text.path"),
    (["model.text.path=t", "model.text.vocab_size=500"], "model.text.vocab_size", "model.text.path"),
    (["model.text.tokenizer=t", "model.text.vocab_size=500"], "model.text.vocab_size", "model.text.tokenizer"),
    (["data.s3.endpoint_url=http://x"], "data.s3.endpoint_url", "no source is at s3://"),
    (["data.s3.prefetch_shards=3"], "data.s3.prefetch_shards", "no source is at s3://"),
    (["data.cache.folder=/c"], "data.cache.folder", "no source is at s3://"),
    (["data.sources.0.path=a.tar", "data.sources.0.split=test"], "data.sources.0.split", "not a tar"),
    (["evaluation.sources.0.path=a.tar"], "evaluation.sources.0.split", "not a tar"),
    (["data.workers=0", "data.prefetch_packs=9"], "data.prefetch_packs", "data.workers 0"),
    (["data.workers=0", "data.worker_restarts=9"], "data.worker_restarts", "data.workers 0"),
    (["data.on_bad=fail", "data.max_bad_in_a_row=9"], "data.max_bad_in_a_row", "data.on_bad fail"),
    ([NO_VIDEO, "data.max_video_s=9"], "data.max_video_s", "video_ratio is 0 in every stage"),
    ([NO_VIDEO, "stages.0.video_frames=6"], "stages.0.video_frames", "video_ratio is 0"),
    ([NO_VIDEO, "stages.0.video={max_tokens: 700}"], "stages.0.video", "video_ratio is 0"),
    ([NO_VIDEO, "stages.0.video_sampling={kind: fps}"], "stages.0.video_sampling", "video_ratio is 0"),
    (["stages.0.video_sampling={fps: 9}"], "stages.0.video_sampling.fps", "kind is uniform"),
    (["stages.0.video_ratio=1"], "stages.0.image", "video_ratio is 1"),
    (["stages.0.image={kind: fixed, size_px: 28, max_tokens: 900}"], "stages.0.image.max_tokens", "kind fixed"),
    (["stages.0.lr_schedule=constant", "stages.0.final_lr_ratio=0.1"], "stages.0.final_lr_ratio", "constant stays"),
    ([TEACHER, DISTILL, "stages.0.frozen=[vision]"], "stages.0.distill", "the encoder is frozen"),
    (["stages.0.frozen=[vision, patch_embedding]"], "stages.0.frozen patch_embedding", "vision is frozen too"),
    (["stages.0.frozen=[vision]", "optimizer.layer_decay=0.7"], "optimizer.layer_decay", "frozen in every stage"),
    (["optimizer.muon.momentum=0.9"], "optimizer.muon.momentum", "optimizer.kind is adamw"),
    (["optimizer.kind=muon", "optimizer.options={a: 1}"], "optimizer.options", "not from a plugin"),
    (
        ["plugins=[a.py]", "optimizer.kind=lion", "optimizer.eps=1e-6"],
        "optimizer.eps",
        "arguments are optimizer.options",
    ),
    (["guard.spike_deviations=null", "guard.window_steps=99"], "guard.window_steps", "spike_deviations is null"),
    (["evaluation.sources=[]", "evaluation.image_templates=['a {}']"], "evaluation.image_templates", "is empty"),
    (["evaluation.sources=[]", "evaluation.token_budget=9"], "evaluation.token_budget", "is empty"),
    ([NO_VIDEO, "evaluation.video_templates=['a {}']"], "evaluation.video_templates", "no stage reads videos"),
    (
        ["stages.0.video_ratio=1", "stages.0.image={}", "evaluation.image_templates=['a {}']"],
        "evaluation.image_templates",
        "no stage reads images",
    ),
    (["evaluation.sources.0.templates=['a {}']"], "evaluation.sources.0.templates", "captions for training"),
    (["logging.tensorboard=false", "logging.images_every_steps=7"], "logging.images_every_steps", "TensorBoard"),
]

USED = [
    [TEACHER, DISTILL, "objective.teacher.pooled_loss=smooth_l1"],
    [S3, "data.s3.endpoint_url=http://x", "data.cache.folder=/c"],
    ["evaluation.sources.0.path=s3://b/e", "data.s3.region=x"],
    ["checkpoint.folder=s3://b/c", "data.s3.region=x"],
    ["data.sources.0.class_names=s3://b/names.txt", "data.s3.region=x"],
    ["objective.kind=sigmoid", "model.logit_bias_init=-3"],
    ["stages.0.video_sampling={kind: fps, fps: 9}", "data.max_video_s=9"],
    ["stages.0.lr_schedule=wsd", "stages.0.decay_samples=3", "stages.0.final_lr_ratio=0.1"],
    ["stages.0.image={kind: fixed, size_px: 28}"],
    ["stages.0.frozen=[text]", "model.text.frozen=true", "optimizer.layer_decay=0.7"],
    ["model.checkpoint_every=1"],
    ["model.text.tokenizer=t", "model.text.hidden_size=64"],
    ["evaluation.video_templates=['a {}']", "optimizer.ema_decay=0.9"],
    ["data.sources.0.name=photos", "data.sources.0.templates=['a {}']"],
    # at their defaults, or of no account
    [NO_VIDEO, "stages.0.video_frames=8", "stages.0.video={}"],
    ["data.s3={}", "data.workers=0"],
]


@pytest.fixture
def run_file(tmp_path):
    """A run file that sets nothing in vain."""
    content = run_config().model_dump(mode="json", exclude_unset=True)
    del content["data"]["workers"], content["model"]["text"], content["evaluation"]["token_budget"]
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(content))
    return path


def reported(run_file, overrides):
    video = "stages.0.video={}" if NO_VIDEO in overrides else None
    videos = "stages.0.video_frames=8" if NO_VIDEO in overrides else None
    return unused_parts(load_config(run_file, [*filter(None, (video, videos)), *overrides]))


@pytest.mark.parametrize(("overrides", "key", "why"), UNUSED)
def test_keys_without_effect_are_reported(run_file, overrides, key, why):
    (said,) = reported(run_file, overrides)
    assert said.startswith(f"{key} is set but not used: ")
    assert why in said


@pytest.mark.parametrize("overrides", USED)
def test_keys_with_effect_or_unset_keys_are_not_reported(run_file, overrides):
    assert reported(run_file, overrides) == []


@pytest.mark.parametrize("name", ["demo", "photos", "univitar_0p3b", "univitar_0p6b", "univitar_1b"])
def test_the_shipped_recipes_set_no_key_without_effect(name, tmp_path):
    config = load_config(name)
    assert unused_parts(config) == []
    dump_config(config, tmp_path / "config.yaml")  # every key is set there
    assert unused_parts(load_config(tmp_path / "config.yaml")) == []


def test_each_start_of_a_run_logs_it_and_continues(monkeypatch, tmp_path, caplog):
    content = run_config().model_dump(mode="json", exclude_unset=True)
    content["objective"] = {"teacher": {"path": "dino"}}
    content["output"] = str(tmp_path)
    config = check_config(content, "the test")
    for check in ("check_sources", "check_teacher"):
        monkeypatch.setattr(checks, check, lambda *given: None)
    for step in ("_provide_tokenizer", "_write_description"):
        monkeypatch.setattr(run_module, step, lambda *given: None)
    with caplog.at_level(logging.WARNING):
        run = create_run(config, "the test", 1)
        assert [record.getMessage() for record in caplog.records] == unused_parts(config)
        caplog.clear()
        reopen_run(run, ["logging.every_steps=3"], 1)
        (record,) = caplog.records
    assert record.getMessage().startswith("objective.teacher is set but not used: no stage distills from it")
