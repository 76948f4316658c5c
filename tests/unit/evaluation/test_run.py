"""From a run's folder to its table of results, on real shards and a real checkpoint."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from tests.support.closeness import assert_sums_close, encoder_terms
from tests.support.finished import run_config, write_run
from tests.support.shards import image, write_demo_shards, write_tar
from univitar_ds.config.schema import RunConfig
from univitar_ds.convert.export import export_run
from univitar_ds.data.loader import eval_packs
from univitar_ds.errors import CheckpointError, ConfigError
from univitar_ds.evaluation import embed as embedding
from univitar_ds.evaluation import run as evaluation
from univitar_ds.evaluation.embed import embed, embed_texts
from univitar_ds.evaluation.report import render_run
from univitar_ds.evaluation.run import evaluate, evaluate_run
from univitar_ds.model.config import encoder_config
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.training.checkpoint.offline import open_trained


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("shards"), images=32, videos=16, shards=1)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tried"
    write_run(folder, run_config(shards))
    return folder


@pytest.mark.numeric
def test_every_item_is_embedded_once_with_what_belongs_to_it(run: Path):
    trained = open_trained(run)
    config, stage = trained.config, trained.config.stages[-1]

    def packs(token_budget: int):
        return eval_packs(
            config.evaluation.sources,
            modality="image",
            resolution=stage.resolution("image"),
            video_frames=stage.video_frames,
            token_budget=token_budget,
            tokenizer=run / "tokenizer.json",
            context_length=config.model.text.context_length,
            data=config.data,
        )

    found = embed(trained.model, packs(200), "image", progress=False)
    assert len(found) == 8 == len(set(found.keys))
    assert found.labels == ["red", "green", "blue", "grey"] * 2
    assert all(label in caption for label, caption in zip(found.labels, found.captions, strict=True))
    for vectors in (found.vision, found.text):
        assert vectors.shape == (8, 16)
        assert_sums_close(vectors.norm(dim=1), torch.ones(8), 2 * 16)
    terms = 2 * encoder_terms(encoder_config(config.model), 64)  # and less than as much again for heads and text
    alone = embed(trained.model, packs(1), "image", progress=False)
    assert alone.keys == found.keys
    assert_sums_close(alone.vision, found.vision, terms, "an item's vector depends on what it is packed with")
    texts = embed_texts(trained.model, trained.tokenizer, found.captions, config.model.text.context_length)
    assert_sums_close(texts, found.text, terms)


def test_a_run_is_evaluated_into_a_file_a_table_and_sheets(run: Path, drawn: list[str]):
    table = evaluate_run(run, progress=False)
    titles = [
        text for text in drawn if text.startswith(f"Run {run.name}, checkpoint step-00000007 (trained weights): ")
    ]
    assert [title.rsplit(maxsplit=1)[1] for title in titles] == ["images", "captions", "videos", "captions"]
    assert "of shards" in " ".join(drawn), "the name of the source"
    result = json.loads((run / "evaluation.json").read_text())
    assert result["checkpoint"] == "step-00000007"
    measured = {(figure["task"], figure["measure"], figure["modality"]) for figure in result["figures"]}
    assert {("zero-shot", "top-1", "image"), ("zero-shot", "top-1", "video")} <= measured
    assert {("image to text", "R@1", "image"), ("text to video", "R@1", "video")} <= measured
    for figure in result["figures"]:
        assert 0 <= figure["value"] <= 1
        assert 0 < figure["chance"] < 1
    motion = next(f for f in result["figures"] if f["measure"] == "top-1" and f["modality"] == "video")
    assert (motion["chance"], motion["n"], motion["candidates"]) == (0.5, 4, 2)
    assert "text to video" in table
    assert table in render_run(run)
    for kind in ("image", "video", "text-to-image", "text-to-video"):
        assert (run / f"examples-{kind}.png").is_file()


def test_figures_are_written_where_no_sheet_can_be_drawn(shards: Path, tmp_path: Path, monkeypatch, caplog):
    def broken(*_: object, **__: object) -> None:
        raise OSError("cannot open resource")  # the error of Pillow for a missing font

    write_run(tmp_path / "run", run_config(shards))
    (tmp_path / "run" / "examples-image.png").write_bytes(b"of an earlier evaluation")
    monkeypatch.setattr(evaluation, "draw_sheet", broken)
    table = evaluate_run(tmp_path / "run", progress=False)
    assert "text to video" in table
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["figures"]
    assert caplog.text.count("could not be drawn: OSError: cannot open resource") == 2
    assert {path.name for path in (tmp_path / "run").glob("examples-*")} == {
        "examples-text-to-image.png", "examples-text-to-video.png",
    }  # fmt: skip


def test_two_evaluations_of_a_checkpoint_agree(run: Path):
    one, other = (evaluate(open_trained(run)) for _ in range(2))
    assert one["figures"] == other["figures"]
    by_path = evaluate(open_trained(run / "checkpoints" / "step-00000007"))
    assert by_path["figures"] == one["figures"]


def test_a_run_is_evaluated_on_the_gpu_in_bfloat16_or_on_the_host_if_the_gpu_is_full(run: Path, monkeypatch, caplog):
    def copied(model: ContrastiveModel, device: torch.device, dtype: torch.dtype) -> ContrastiveModel:
        copies.append(copy.deepcopy(model))
        places.append((device.type, dtype))
        return copies[-1]

    def full(model: ContrastiveModel, *others, **named):
        if any(model is one for one in copies):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(model, *others, **named)

    copies: list[ContrastiveModel] = []
    places: list[tuple[str, torch.dtype]] = []
    monkeypatch.setattr(evaluation, "placed", copied)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(evaluation, "uses_cuda", lambda: False)
    plain = figures_of(run)
    assert places == []
    monkeypatch.setattr(evaluation, "uses_cuda", lambda: True)
    assert figures_of(run) == plain
    assert places == [("cuda", torch.bfloat16)]
    assert caplog.text == ""
    monkeypatch.setattr(evaluation, "embed", full)
    assert figures_of(run) == plain
    assert len(places) == 2
    assert "the evaluation runs on the CPU instead: CUDA out of memory" in caplog.text


def figures_of(run: Path) -> list[dict]:
    evaluate_run(run, progress=False)
    return json.loads((run / "evaluation.json").read_text())["figures"]


def test_a_run_that_names_attention_for_half_precision_is_evaluated_and_exported(shards: Path, tmp_path: Path):
    config = run_config(shards)
    model = {**config.model.model_dump(), "attention": "flash"}
    write_run(tmp_path / "run", run_config(shards, model=model))
    assert figures_of(tmp_path / "run")
    assert (export_run(tmp_path / "run", tmp_path / "out") / "model.safetensors").is_file()


def test_a_modality_that_the_run_never_met_is_not_measured(shards: Path, tmp_path: Path):
    config = run_config(shards)
    stages = [{**config.stages[0].model_dump(), "video_ratio": 0.0}]
    write_run(tmp_path / "run", RunConfig.model_validate({**config.model_dump(), "stages": stages}))
    result = evaluate(open_trained(tmp_path / "run"))
    assert {figure["modality"] for figure in result["figures"]} == {"image"}


def test_missing_data_is_an_error_message(run: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="neither a run's folder"):
        open_trained(tmp_path)
    config = run_config("nowhere", evaluation={"sources": []})
    write_run(tmp_path / "run", config)
    with pytest.raises(ConfigError, match=r"evaluation\.sources is empty"):
        evaluate_run(tmp_path / "run", progress=False)
    weights = tmp_path / "run" / "checkpoints" / "step-00000007" / "rank00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"rank00000\.safetensors has"):
        open_trained(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_trained(tmp_path / "run")


def test_a_checkpoint_of_another_model_is_refused(run: Path, tmp_path: Path):
    other = run_config("nowhere", model={**run_config().model.model_dump(), "embed_dim": 24})
    write_run(tmp_path / "run", other)
    (tmp_path / "run" / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="configuration: misshapen: vision_proj"):
        open_trained(tmp_path / "run")


def test_all_lines_of_a_txt_are_texts_of_the_retrieval_if_the_source_sets_captions_lines(tmp_path: Path):
    text = "a {} image\na image that is {}\n{}"
    samples = [
        (word, {"png": image(28 + 14 * n, 42, n, "PNG"), "txt": text.replace("{}", word).encode()})
        for n, word in enumerate(("red", "green", "blue", "grey", "pink", "white"))
    ]
    path = str(write_tar(tmp_path / "lines.tar", samples))
    write_run(tmp_path / "run", run_config(path, evaluation={"sources": [{"path": path, "captions": "lines"}]}))
    figures = {(one["task"], one["measure"]): one for one in evaluate(open_trained(tmp_path / "run"))["figures"]}
    to_text, to_image = figures["image to text", "R@1"], figures["text to image", "R@1"]
    assert (to_text["n"], to_text["candidates"]) == (6, 18)
    assert (to_image["n"], to_image["candidates"]) == (18, 6)
    assert to_text["chance"] == pytest.approx(3 / 18)
    assert to_image["chance"] == pytest.approx(1 / 6)


def test_texts_of_a_pack_are_embedded_in_parts_of_bounded_size(run: Path, monkeypatch):
    """The figures stay; a part has no more texts than `embed.TEXTS_AT_ONCE`."""
    trained = open_trained(run)
    plain = evaluate(trained)["figures"]
    sizes: list[int] = []
    trained.model.text.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(embedding, "TEXTS_AT_ONCE", 3)
    assert evaluate(trained)["figures"] == plain
    assert max(sizes) == 3
