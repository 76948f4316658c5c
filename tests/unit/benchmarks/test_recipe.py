"""The benchmark of the recipe: its arms differ in what they compare, and its table has the stated statistics."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.recipe import naflex, runs
from benchmarks.recipe.arms import ARMS, MARGIN, PHOTO_ARMS, TEACHER, Data, mean_tokens, native_like, plan, run_file
from benchmarks.recipe.naflex import NAFLEX_ARMS
from benchmarks.recipe.table import QUESTIONS, final_rows, interval, tables
from univitar_ds.config.run_folder import TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.demo.scenes import image_scene, video_scene
from univitar_ds.tokenization import train_tokenizer

SAMPLES = 7000


def drawn_sizes(images: int, videos: int) -> Data:
    """The sizes of some of the demo's scenes, without drawing them."""
    scenes = [image_scene(0, "train", index) for index in range(images)]
    scenes += [video_scene(0, "train", index) for index in range(videos)]
    sizes = [(scene.height, scene.width) for scene in scenes]
    return Data("scenes", Path("scenes-shards"), tuple(sizes[:images]), tuple(sizes[images:]))


@pytest.fixture(scope="module")
def scenes():
    return drawn_sizes(images=150, videos=60)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_run_file(scenes, arm):
    config = RunConfig.model_validate(run_file(arm, ARMS[arm], scenes, SAMPLES, seed=3, teacher=Path("teacher")))
    assert config.seed == 3
    assert config.data.lanes == (4 if arm.endswith("-4") else 1)
    assert config.objective.kind == ("sigmoid" if arm.startswith("sigmoid") else "softmax")
    assert config.model.logit_bias_init == (-3.0 if arm == "sigmoid-bias" else -10.0)
    assert (config.objective.teacher is not None) == any(stage.distill.ever for stage in config.stages)
    samples = sum(stage.samples for stage in config.stages)
    assert (samples == SAMPLES) == (ARMS[arm].tokens_of is None)
    videos = sum(stage.samples * stage.video_ratio for stage in config.stages) / samples
    assert videos == pytest.approx(ARMS[arm].video_ratio, abs=1e-3)


@pytest.mark.parametrize("arm", PHOTO_ARMS)
def test_arms_on_photos_have_no_videos(scenes, arm):
    photos = Data("photos-x", Path("photos"), scenes.images, (), "photos")
    config = RunConfig.model_validate(run_file(arm, ARMS[arm], photos, SAMPLES, seed=0))
    assert all(stage.video_ratio == 0 for stage in config.stages)
    assert config.model.text.vocab_size == 2048


def test_arms_of_equal_tokens_are_planned_with_equal_tokens(scenes):
    for question in QUESTIONS:
        for arm in question.equal_tokens:
            wanted = plan(ARMS[question.baseline], scenes, SAMPLES).tokens
            assert plan(ARMS[arm], scenes, SAMPLES).tokens == pytest.approx(wanted, rel=MARGIN / 2)
    # At equal samples the fixed size takes more, or the pair would show nothing.
    assert plan(ARMS["curriculum"], scenes, SAMPLES).tokens < 0.8 * plan(ARMS["fixed"], scenes, SAMPLES).tokens


def test_native_items_have_the_tokens_of_squares(scenes):
    for modality, sizes, px, frames in (("image", scenes.images, 112, 1), ("video", scenes.videos, 70, 8)):
        square = mean_tokens({"size_px": px}, sizes, frames)
        assert square == {"image": 64, "video": 100}[modality]
        rule = native_like(int(square), sizes, modality)
        assert mean_tokens(rule, sizes, frames) == pytest.approx(square, rel=MARGIN / 2)


def test_the_teacher_trains_longer_than_its_students(scenes):
    student = plan(ARMS["distilled"], scenes, SAMPLES)
    assert plan(TEACHER, scenes, 4 * SAMPLES).tokens > 3 * student.tokens


def test_runs_have_counted_the_tokens_that_were_planned():
    """The committed results on scenes: so the tokens of arms that are planned as equal are equal."""
    whole = drawn_sizes(images=1400, videos=1400)
    found = [
        row for row in runs.read_rows() if (row["design"], row["data"], row["arm"] in ARMS) == ("2", "scenes", True)
    ]
    assert found, "no results of this version of the arms"
    for samples in {int(row["run_samples"]) for row in found}:
        ends = final_rows([row for row in found if int(row["run_samples"]) == samples])
        for arm, rows in ends.items():
            wanted = plan(ARMS[arm], whole, samples).tokens
            counted = {row["seed"]: int(row["tokens_seen"]) for row in rows}
            assert counted == {seed: pytest.approx(wanted, rel=MARGIN / 2) for seed in counted}, arm


def row(arm: str, seed: int, value: float, task: str = "zero-shot", **changes: object) -> dict[str, str]:
    kind = "top-1" if task == "zero-shot" else "R@5"
    fields = {"arm": arm, "seed": seed, "samples_seen": 7010, "tokens_seen": 500_000, "task": task, "modality": "image"}
    fields |= {"measure": kind, "value": value, "chance": 0.0625, "n": 118, "design": 2, "data": "scenes"}
    fields |= {"run_samples": 7000, "cpu_s": 300} | changes
    return {name: str(field) for name, field in fields.items()}


def test_the_table_of_a_worked_example():
    """Means 50 and 56 %; gains 4, 6, 8 points: mean 6, deviation 2, half width 4.303 * 2 / sqrt(3) = 4.97."""
    rows = [row("native", seed, value) for seed, value in enumerate((0.48, 0.50, 0.52))]
    rows += [row("square", seed, value) for seed, value in enumerate((0.52, 0.56, 0.60))]
    rows += [row("square", 0, 0.11, samples_seen=3500)]  # half way: not a result
    rows += [row("square", 5, 0.99)]  # a seed that the baseline lacks is in the mean but in no difference
    rows += [row("square", seed, 0.99, design=1) for seed in range(3)]  # other arms of the same name
    text = tables(rows, "scenes", 7000)
    assert text.startswith("Data: scenes, which anyone can render again.")
    assert "### Native sizes against squares" in text
    assert text.count("###") == 1  # no other question has two arms
    lines = text.splitlines()
    assert "| native | 3 | 7,010 | 500,000 | 300 | 50.0 % ± 5.0 |" in lines
    assert "| chance (test items) | | | | | 6.2 % (118) |" in lines
    assert "- `square` minus `native`, points: class of an image, top-1 +6.0 ± 5.0 (better)." in lines


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.1, 0.11), "+10.5 ± 6.4 (better)"),
        ((-0.1, -0.11), "-10.5 ± 6.4 (worse)"),
        ((0.1, 0.0), "no difference shown"),
    ],
)
def test_a_difference_is_named_only_outside_of_its_interval(gains, verdict):
    rows = [row("native", seed, 0.5) for seed in range(2)]
    rows += [row("square", seed, 0.5 + gain) for seed, gain in enumerate(gains)]
    assert verdict in tables(rows, "scenes", 7000)


def test_one_seed_shows_nothing():
    text = tables([row("native", 0, 0.5), row("square", 0, 0.6)], "scenes", 7000)
    assert "| square | 1 | 7,010 | 500,000 | 300 | 60.0 % |" in text
    assert "top-1 +10.0. One seed: a difference without an interval shows nothing." in text


def test_tasks_that_the_baseline_cannot_do_are_compared_with_chance():
    videos = {"modality": "video", "chance": 0.25}
    rows = [row("video-0", 0, 0.5), row("video-0.1", 0, 0.4), row("video-0.1", 0, 0.9, **videos)]
    assert "direction of motion, top-1 (against chance) +65.0" in tables(rows, "scenes", 7000)


def test_unequal_tokens_are_reported():
    rows = [row("native", 0, 0.5), row("square", 0, 0.6, tokens_seen=530_000)]
    assert "Tokens of `square` are 1.060 of those of `native`: not equal within 5%." in tables(rows, "scenes", 7000)


def test_photos_are_marked_as_not_remakeable():
    rows = [row(arm, 0, 0.5, data="photos-x") for arm in ("native", "square")]
    text = tables(rows, "photos-x", 7000)
    assert text.startswith("Data: x, a folder that is not part of the repository: no one else can remake this table")
    assert "###" not in tables(rows, "scenes", 7000)


def test_a_table_describes_only_the_arms_that_it_has():
    rows = [row(arm, 0, 0.5) for arm in ("native", "sigmoid")]
    assert "sigmoid-bias" not in tables(rows, "scenes", 7000)
    assert "`sigmoid-bias` starts with -3" in tables([*rows, row("sigmoid-bias", 0, 0.5)], "scenes", 7000)


def test_the_interval_is_that_of_student():
    """97.5 % quantiles for 1 and 4 degrees of freedom: 12.706 and 2.776 (NIST/SEMATECH e-Handbook, 1.3.6.7.2)."""
    assert interval([0.4, 0.6]) == pytest.approx((0.5, 12.706 * 0.1), rel=2e-4)
    assert interval([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx((0.3, 2.776 * (0.025 / 5) ** 0.5), rel=2e-4)
    assert interval([0.5]) is None


def test_classes_are_those_of_the_largest_data_set():
    rows = [
        row(arm, seed, value, n=n, set=name, data="photos-x")
        for arm in ("native", "square")
        for seed in range(2)
        for n, name, value in ((26, "few", 0.1), (456, "many", 0.5), (25, "fewer", 0.2))
    ]
    text = tables(rows, "photos-x", 7000)
    assert "| native | 2 | 7,010 | 500,000 | 300 | 50.0 % ± 0.0 |" in text
    assert "6.2 % (456)" in text


def test_every_arm_answers_a_question():
    asked = {arm for question in QUESTIONS for arm in (question.baseline, *question.arms)}
    assert asked == {*ARMS, *NAFLEX_ARMS, "teacher"}


def test_runs_with_rows_are_not_repeated(tmp_path, monkeypatch, scenes):
    trained = []
    monkeypatch.setattr(runs, "CSV", tmp_path / "results.csv")
    monkeypatch.setattr(runs, "_train_and_score", lambda bench, arm, seed, config: trained.append((arm, seed)))
    bench = runs.Bench(tmp_path, scenes, SAMPLES)
    progress = {"samples": 7010, "tokens": 500_000, "seconds": 200.0, "cpu_s": None}
    score = {"task": "zero-shot", "modality": "image", "measure": "top-1", "value": 0.5, "chance": 0.0625, "n": 118}
    runs.append_rows([runs.result_row(bench, "fixed", 0, progress, score)])
    for arm, seed in (("fixed", 0), ("fixed", 1), ("square", 0)):
        runs.provide_run(bench, arm, seed)
    runs.provide_run(runs.Bench(tmp_path, scenes, 3000), "fixed", 0)
    assert trained == [("fixed", 1), ("square", 0), ("fixed", 0)]


def test_new_rows_have_the_columns_of_the_results(tmp_path, scenes):
    progress = {"samples": 1, "tokens": 1, "seconds": 1.0, "cpu_s": 1.0}
    score = {"task": "zero-shot", "measure": "top-1", "value": 0.5, "chance": 0.5, "n": 1}
    made = runs.result_row(runs.Bench(tmp_path, scenes, SAMPLES), "fixed", 0, progress, score)
    with runs.CSV.open(newline="", encoding="utf-8") as file:
        assert list(made) == next(csv.reader(file))


def test_cpu_seconds_are_added_over_parts_and_unknown_after_an_interruption(tmp_path):
    record = tmp_path / "fixed-0.cpu"
    assert runs.cpu_seconds(record) is None
    runs.run_process(["true"], record, fresh=True)
    record.write_text(str(runs.cpu_seconds(record) + 100), encoding="utf-8")
    runs.run_process(["true"], record, fresh=False)
    assert runs.cpu_seconds(record) > 100
    with pytest.raises(SystemExit, match="exit code 1 of: false"):
        runs.run_process(["false"], record, fresh=False)
    record.write_text("nan", encoding="utf-8")  # as it is while a part runs
    runs.run_process(["true"], record, fresh=False)
    assert runs.cpu_seconds(record) is None


def test_sizes_are_read_from_shards(tmp_path):
    def write(name: str, rows: list[dict[str, object]]) -> None:
        with tarfile.open(tmp_path / name, "w") as tar:
            for number, content in enumerate(rows):
                data = json.dumps(content).encode()
                info = tarfile.TarInfo(f"{number}.json")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    write("train-image-000000.tar", [{"kind": "image", "width": 30, "height": 20}])
    write("train-video-000000.tar", [{"kind": "video", "width": 50, "height": 40}])
    with pytest.raises(SystemExit, match="no images in its splits train and test"):
        runs.packed("scenes", tmp_path)
    write("test-image-000000.tar", [{"kind": "image", "width": 9, "height": 9}])
    found = runs.packed("scenes", tmp_path)
    assert (found.images, found.videos) == (((20, 30),), ((40, 50),))
    assert runs.packed("photos-x", tmp_path, with_videos=False).videos == ()


def test_embeddings_of_the_other_encoder_are_scored_as_ours(tmp_path, monkeypatch, scenes):
    """Embeddings that are one axis for each composition score 100 %; the request has all that the loop reads."""
    drawn = [image_scene(0, split, index) for split in ("train", "test") for index in range(6)]
    (tmp_path / "scenes").mkdir()
    lines = "".join(json.dumps(scene.row()) + "\n" for scene in [*drawn, video_scene(0, "test", 0)])
    (tmp_path / "scenes/metadata.jsonl").write_text(lines, encoding="utf-8")
    bench = runs.Bench(tmp_path, scenes, SAMPLES)
    peer = bench.run("video-0", 0)
    (peer / "export").mkdir(parents=True)
    (peer / "export/config.json").write_text("{}", encoding="utf-8")
    captions = [caption for scene in drawn for caption in scene.captions]
    train_tokenizer(captions, 512).save(str(peer / TOKENIZER))
    tests = [scene for scene in drawn if scene.split == "test"]

    def loop(command: list[str], record: Path, *, fresh: bool) -> None:
        request = json.loads(Path(command[2]).read_text(encoding="utf-8"))
        assert (request["samples"], request["batch"], request["width"], request["depth"]) == (SAMPLES, 24, 192, 7)
        assert [len(request[split]) for split in ("train", "test")] == [6, 6]
        assert all(len(row["captions"]) == 3 for row in request["train"])
        sentences = naflex._sentences([scene.row() for scene in drawn], ["a {}", "a small {}", "a large {}"])
        assert len(sentences) == len(request["sentences"])
        axes = np.eye(len(tests), dtype=np.float32)
        text = np.zeros((len(sentences), len(tests)), np.float32)
        for number, scene in enumerate(tests):
            for row, sentence in enumerate(sentences):
                if sentence in scene.captions or (scene.label is not None and sentence.endswith(scene.label)):
                    text[row] = axes[number]
        np.savez(command[3], vision=axes, text=text, samples=7008, tokens=400_000, seconds=9.0)

    monkeypatch.setattr(naflex, "run_process", loop)
    monkeypatch.setattr(runs, "CSV", tmp_path / "results.csv")
    naflex.provide_naflex(bench, "timm-samples", 0, "python")
    found = {(row["task"], row["measure"]): row for row in runs.read_rows(tmp_path / "results.csv")}
    assert float(found["zero-shot", "top-1"]["value"]) == float(found["image to text", "R@1"]["value"]) == 1
    assert found["zero-shot", "top-1"]["tokens_seen"] == "400000"
    with pytest.raises(SystemExit, match=r"CPU seconds of .* are not known"):
        naflex.provide_naflex(bench, "timm-cpu", 0, "python")
    with pytest.raises(SystemExit, match="not trained with seed 1"):
        naflex.provide_naflex(bench, "timm-cpu", 1, "python")
