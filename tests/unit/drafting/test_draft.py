"""A drafted run file: it is valid, and its numbers fit the data and the machine."""

from dataclasses import replace

import pytest

from tests.unit.drafting import made
from tests.unit.drafting.made import CPU, NODE, loaded, survey
from univitar_ds.config.deepspeed import AUTO
from univitar_ds.config.keys.unused import unused_parts
from univitar_ds.config.load import load_config
from univitar_ds.data.shards.manifest import read_manifest
from univitar_ds.data.tools import survey as survey_module
from univitar_ds.data.tools.inspect import inspect
from univitar_ds.data.writing.packed_sources import with_packed_sources
from univitar_ds.drafting.draft import draft, processes, run_name
from univitar_ds.drafting.facts import facts_of
from univitar_ds.drafting.lengths import Length, checkpoint_steps, samples_per_second
from univitar_ds.drafting.machine import ASSUMED_GPU_BYTES, Machine, measured_core_flops
from univitar_ds.drafting.sizes import basis_of, largest_item, mean_of
from univitar_ds.errors import ConfigError, DataError
from univitar_ds.model.config import encoder_config
from univitar_ds.planning.counts.batch import pairs_per_step

CASES = [
    ([survey(5)], CPU),
    ([survey(300)], CPU),
    ([survey(300, 40)], CPU),
    ([survey(0, 60)], CPU),
    ([survey(300, label="class")], CPU),
    ([survey(50_000, 4_000)], CPU),
    ([survey(300)], NODE),
    ([survey(20, side=32)], NODE),
    ([survey(5_000_000, 300_000, side=700)], NODE),
    ([survey(3_000_000, label="class")], NODE),
    ([survey(200_000_000, side=1000)], NODE),
    ([survey(300), survey(900, path="data/there", label="class")], CPU),
]


@pytest.mark.parametrize(("surveys", "machine"), CASES)
def test_the_numbers_fit_data_and_machine(surveys, machine):
    text = draft(surveys, machine)
    config = loaded(text)
    total = sum(sum(one.counts["train"].values()) for one in surveys)
    ranks = processes(text)
    assert config.data.lanes % ranks == 0
    assert ranks <= max(machine.gpus, machine.cores)
    assert config.data.lanes <= total
    assert unused_parts(config) == []
    assert config.deepspeed == AUTO
    for stage in config.stages:
        assert 0 <= stage.warmup_samples < stage.samples
        least, most, _ = pairs_per_step(stage, config.data.lanes, encoder_config(config.model))
        assert least <= max(total // 5, config.data.lanes), "a step has more of the data than a fifth"
        assert most >= 1
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "; 1 processes" not in text


@pytest.mark.parametrize(("surveys", "machine"), CASES)
def test_packs_of_each_modality_are_small_parts_of_an_epoch_of_a_lane(surveys, machine):
    """Otherwise they are not full, and the run warns of it."""
    basis = basis_of(facts_of(surveys), machine, None)
    assert basis.modalities
    for modality in basis.modalities:
        epoch = basis.facts.count(modality) * mean_of(basis, modality) / basis.budget.lanes
        assert epoch >= 5 * (basis.budget.tokens - 10) or basis.budget.tokens <= largest_item(basis) + 10
        pool = loaded(draft(surveys, machine)).data.pool_samples
        assert pool <= max(1, basis.facts.count(modality) / basis.budget.lanes / 4)


@pytest.mark.parametrize("form", ["tars", "table"])
def test_the_packs_of_a_drafted_run_are_full(form, tmp_path, capsys, monkeypatch, caplog):
    from univitar_ds.cli.main import main

    made.SOURCES[form](tmp_path, 48)
    monkeypatch.setattr(survey_module, "MEDIA_S", 3600.0)  # the budget follows from the sizes, on a busy machine too
    monkeypatch.chdir(tmp_path)
    assert main(["init", "t.csv" if form == "table" else ".", "--gpus", "0"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    config = with_packed_sources(load_config("run.yaml", ["data.workers=0"]))
    assert inspect(config, packs=60)
    assert not [record.getMessage() for record in caplog.records if "% full" in record.getMessage()]


def test_the_last_checkpoint_within_a_run_is_well_before_its_end():
    found = survey(300, counts={"train": {"image": 300}, "test": {"image": 9}})
    basis = basis_of(facts_of([found]), CPU, None)
    for epochs in (1, 3, 30, 300):
        samples = epochs * 300
        every = checkpoint_steps(basis, Length(samples, epochs, ""))
        rest = samples / basis.budget.pairs % every / every
        assert 0.3 < rest < 0.7 or every > samples / basis.budget.pairs


@pytest.mark.parametrize(("count", "samples"), [(5, 1), (300, 37), (1534, 191), (1536, 192), (50_000, 192)])
def test_the_shuffle_buffer_is_at_most_a_quarter_of_an_epoch_of_a_lane(count, samples):
    """Two lanes, one for 5 samples; up to the default."""
    found = survey(count, counts={"train": {"image": count}, "test": {"image": 9}})
    assert loaded(draft([found], CPU)).data.pool_samples == samples


def test_the_file_has_the_reasons_in_comments_and_names_the_schema():
    lines = draft([survey(300, 40)], CPU).splitlines()
    assert lines[0].startswith("# yaml-language-server: $schema=")
    with open(lines[0].partition("=")[2], encoding="utf-8") as schema:
        assert '"properties"' in schema.read(10_000)
    for number, line in enumerate(lines):
        key = line.strip(" -").partition(":")[0]
        if key in ("samples", "token_budget", "lr", "warmup_samples", "lanes", "workers", "every_steps", "video_ratio"):
            assert "  # " in line or lines[number - 1].strip().startswith("#"), line


@pytest.mark.parametrize(("count", "names"), [(300, ["native"]), (50_000, ["fixed", "native"])])
def test_large_data_get_a_curriculum(count, names):
    config = loaded(draft([survey(count)], CPU, hours=1000))
    assert [stage.name for stage in config.stages] == names
    assert [stage.image.kind for stage in config.stages] == ["fixed", "native"][-len(names) :]


def test_videos_come_last_in_a_curriculum_and_in_the_only_stage_of_small_data():
    stages = loaded(draft([survey(900_000, 90_000)], NODE)).stages
    assert [stage.video_ratio > 0 for stage in stages] == [False, False, True]
    (stage,) = loaded(draft([survey(300, 40)], CPU)).stages
    assert 0 < stage.video_ratio < 1
    assert loaded(draft([survey(300)], CPU)).stages[0].video_ratio == 0
    assert loaded(draft([survey(0, 40)], CPU)).stages[0].video_ratio == 1


def test_few_videos_are_left_out_with_a_comment():
    text = draft([survey(300, 3)], CPU)
    assert loaded(text).stages[0].video_ratio == 0
    assert "Videos are left out: 3" in text


def test_labels_alone_are_classified_and_labels_beside_captions_get_a_template():
    alone = loaded(draft([survey(300, label="class")], CPU))
    assert alone.objective.kind == "classification"
    mixed = loaded(draft([survey(300), survey(300, path="b", label="class")], CPU))
    assert mixed.objective.kind == "softmax"
    assert [source.templates for source in mixed.data.sources] == [[], ["a photo of a {}"]]


def test_the_encoder_grows_with_data_and_machine_or_is_that_asked_for():
    assert loaded(draft([survey(300)], NODE)).model.encoder == "tiny"
    assert loaded(draft([survey(5_000_000)], CPU)).model.encoder == "tiny"
    assert loaded(draft([survey(5_000_000)], NODE)).model.encoder == "0.3b"
    assert loaded(draft([survey(300)], NODE, size="0.6b")).model.encoder == "0.6b"


def test_an_encoder_that_does_not_fit_is_refused_with_the_memory():
    with pytest.raises(ConfigError, match=r"encoder 1b: .* 16 GB .*smaller --size"):
        draft([survey(300)], CPU, size="1b")


def test_large_states_are_shared_and_then_offloaded():
    small = Machine(cores=64, memory=512e9, gpus=8, gpu_memory=12e9)
    one = Machine(cores=8, memory=128e9, gpus=1, gpu_memory=24e9)
    for machine, size, said in (
        (NODE, "tiny", "here bf16, optimizer and gradients shared"),
        (small, "1b", "here bf16, weights, gradients and optimizer shared"),
        (one, "1b", "the optimizer in host memory"),
    ):
        (line,) = (
            line for line in draft([survey(300)], machine, size=size).split("\n") if line.startswith("deepspeed")
        )
        assert line.startswith("deepspeed: auto  # ")
        assert said in line


def test_large_encoders_on_gpus_recompute_what_they_must_in_packs_of_equal_time():
    config = loaded(draft([survey(5_000_000, side=700)], NODE))
    assert config.model.checkpoint_every == "auto"
    assert [stage.cost_budget_tflops for stage in config.stages] == [None, "auto"]
    small = loaded(draft([survey(300)], NODE))
    assert (small.model.checkpoint_every, small.stages[0].cost_budget_tflops) == (0, "auto")


def test_activations_that_do_not_fit_are_recomputed_on_a_cpu():
    """One item takes what the machine has beside the states: 40 MB a token without recomputation."""
    assert loaded(draft([survey(300)], CPU)).model.checkpoint_every == 0
    low = Machine(cores=2, memory=6.8e9)
    assert loaded(draft([survey(300)], low)).model.checkpoint_every == 1


def test_hours_limit_the_samples():
    short, long = (loaded(draft([survey(50_000)], CPU, hours=hours)) for hours in (0.5, 5.0))
    totals = [sum(stage.samples for stage in config.stages) for config in (short, long)]
    assert totals[1] == pytest.approx(10 * totals[0], rel=0.01)
    assert "0.5 h (--hours)" in draft([survey(50_000)], CPU, hours=0.5)


def test_the_time_follows_from_the_speed_of_the_cores():
    """As measured: 0.0512 s of CPU time for an image of 132 tokens, on a core with 97 GFLOP/s; these have 144."""
    found = survey(270, side=400, counts={"train": {"image": 270}, "test": {"image": 30}})
    basis = basis_of(facts_of([found]), replace(CPU, core_flops=9.7e10), None)
    assert 2 / samples_per_second(basis) == pytest.approx(0.0512 * 144 / 132, rel=0.1)
    slow = basis_of(facts_of([found]), replace(CPU, core_flops=2e10), None)
    assert samples_per_second(slow) == pytest.approx(samples_per_second(basis) * 2 / 9.7)


def test_the_speed_of_a_core_is_measured():
    assert 1e8 < measured_core_flops() < 1e13


def test_small_images_are_not_enlarged_to_the_published_minimum():
    (stage,) = loaded(draft([survey(3_000, side=224)], NODE, size="0.3b")).stages
    assert stage.image.max_tokens == 256
    assert loaded(draft([survey(3_000, side=1400)], NODE, size="0.3b")).stages[0].image.max_tokens == 5832


@pytest.mark.parametrize(
    ("splits", "train", "evaluated"),
    [
        (["test", "train", "val"], "train", "test"),
        (["train", "val"], "train", "val"),
        (["training", "testing"], "training", "testing"),
        (["fold1", "val"], "fold1", "val"),
    ],
)
def test_a_held_out_split_is_evaluated(splits, train, evaluated):
    found = survey(counts={name: {"image": 300} for name in splits}, training=train, images=300)
    config = loaded(draft([found], CPU))
    assert [source.split for source in config.data.sources] == [train]
    assert [source.split for source in config.evaluation.sources] == [evaluated]


@pytest.mark.parametrize(
    ("found", "share", "counts"),
    [
        (survey(20), 0.2, (16, 4)),
        (survey(300, 40), 0.1, (306, 34)),
        (survey(3_000), 0.05, (2_850, 150)),
        (survey(4_000_000), 0.0003, (3_998_800, 1_200)),
        (survey(300, counts={None: {"image": 300}}, training=None), 0.1, (270, 30)),
    ],
)
def test_of_data_without_splits_some_are_held_out_with_a_comment(found, share, counts):
    text = draft([found], NODE)
    config = loaded(text)
    (train,), (test,) = config.data.sources, config.evaluation.sources
    assert (train.split, test.split) == ("train", "test")
    assert (train.path, train.hold_out) == (test.path, test.hold_out) == ("data/here", share)
    assert f"about {counts[1]:,} of {sum(counts):,} samples are held out" in text
    assert "change hold_out here" in text
    assert sum(stage.samples for stage in config.stages) % counts[0] == 0, "epochs are of the samples trained on"


def test_a_share_of_tars_that_were_seen_whole_holds_out_at_least_one():
    numbers = {"image": [0.31, *(0.5 + n / 100 for n in range(19))]}
    found = survey(20, counts={None: {"image": 20}}, training=None, numbers=numbers)
    text = draft([found], CPU)
    assert loaded(text).evaluation.sources[0].hold_out == 0.35
    assert "so 1 of 20 samples are held out" in text


@pytest.mark.parametrize(
    "found", [survey(4), survey(counts={name: {"image": 300} for name in ("fold1", "fold2")}, training="fold1")]
)
def test_data_that_cannot_be_divided_have_no_evaluation_and_a_comment_explains_how_to_get_one(found):
    text = draft([found], CPU)
    assert loaded(text).evaluation.sources == []
    assert "# evaluation: {sources: [{path: HELD_OUT" in text


def test_a_source_of_held_out_data_is_evaluated_beside_one_to_train_on():
    val = survey(path="captions_val.json", counts={"val": {"image": 40}}, training="val", images=40)
    config = loaded(draft([survey(300), val], CPU))
    assert [source.path for source in config.data.sources] == ["data/here"]
    assert [(source.path, source.split) for source in config.evaluation.sources] == [("captions_val.json", "val")]
    assert loaded(draft([val], CPU)).data.sources[0].split == "val"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (survey(3), "3 samples to train on, at least 4"),
        (survey(300, texts=()), "has a caption or a label"),
        (survey(300, label="x", labels=frozenset([(None, "x")])), "labels of at least two classes"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(found, message):
    with pytest.raises(DataError, match=f"data/here: .*{message}"):
        draft([found], CPU)


@pytest.mark.parametrize("path", ["a b: c", "x # y", "$HOME", "né", "a\nb", "{0..3}.tar", "é'\"", "yes", "123"])
def test_any_path_survives(path, monkeypatch):
    monkeypatch.setenv("HOME", "/elsewhere")
    config = loaded(draft([survey(300, path=path)], CPU))
    assert config.data.sources[0].path == path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/photos", "photos"),
        ("s3://bucket/some/{000..127}.tar", "some"),
        ("x/captions_train2017.json", "captions_train2017"),
        ("/", "run"),
        ("../a b/", "a-b"),
    ],
)
def test_a_run_has_the_name_of_its_source(path, name):
    assert run_name(path) == name


def test_settings_of_a_store_are_kept():
    url = "http://127.0.0.1:9000"
    config = loaded(draft([survey(300, path="s3://b/x")], CPU, s3={"endpoint_url": url}))
    assert config.data.s3.endpoint_url == url


def test_data_of_which_a_step_has_one_pair_are_reported(tmp_path, capsys, monkeypatch, caplog):
    from univitar_ds.cli.main import main

    monkeypatch.chdir(tmp_path)
    for count, few in ((8, True), (48, False)):
        made.SOURCES["table"](tmp_path / str(count), count)
        assert main(["init", f"{count}/t.csv", "--gpus", "0"]) == 0
        assert ("# TOO FEW SAMPLES" in capsys.readouterr().out) is few
        assert any("one pair" in record.getMessage() for record in caplog.records) is few
        caplog.clear()


def test_columns_and_the_folder_of_the_files_are_given_and_kept(tmp_path, capsys, monkeypatch):
    from univitar_ds.cli.main import main

    made.table(tmp_path)
    monkeypatch.chdir(tmp_path)
    table = (tmp_path / "t.csv").read_text().replace("file,caption", "where,Title: 長 😀").replace("media/", "")
    (tmp_path / "pairs.csv").write_text(table, encoding="utf-8")
    options = ["--image-key", "where", "--caption-key", "Title: 長 😀", "--images", "media", "--gpus", "0"]
    assert main(["init", "pairs.csv", *options]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    config = load_config("run.yaml")
    assert [source.split for source in (*config.data.sources, *config.evaluation.sources)] == ["train", "test"]
    for source in (*config.data.sources, *config.evaluation.sources):
        assert (source.table.image_key, source.table.caption_keys) == ("where", ["Title: 長 😀"])
        assert source.table.images == "media"
    packed = with_packed_sources(config).data.sources[0]
    assert sum(shard["samples"] for shard in read_manifest(packed.path)["shards"]) == 24


def test_columns_of_a_source_that_is_no_table_are_refused(tmp_path, capsys):
    from univitar_ds.cli.main import main

    for made_here, message in ((made.tars, "is not a table"), (made.sidecars, "does not use --image-key")):
        assert main(["init", str(made_here(tmp_path / made_here.__name__)), "--image-key", "where"]) == 2
        assert message in capsys.readouterr().err


def test_gpus_that_are_asked_for_are_assumed():
    assert CPU.with_gpus(4) == Machine(2, 16e9, 4, ASSUMED_GPU_BYTES, assumed=True)
    assert NODE.with_gpus(2) == Machine(64, 512e9, 2, 80e9)
    assert NODE.with_gpus(None) == NODE
    assert processes(draft([survey(300)], NODE.with_gpus(0))) == 8


@pytest.mark.parametrize("name", made.SOURCES)
def test_a_source_of_each_form_gets_a_file_that_loads(name, tmp_path, capsys, monkeypatch):
    from univitar_ds.cli.main import main

    source = made.SOURCES[name](tmp_path / name, 36)
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(source), "--gpus", "0"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    config = load_config("run.yaml")
    (stage,) = config.stages
    assert config.data.sources[0].path == str(source)
    assert (stage.video_ratio > 0) == (name == "tars")
    assert (config.objective.kind == "classification") == (name == "classes")
    assert len(config.evaluation.sources) == 1
    assert (config.evaluation.sources[0].hold_out is None) == (name in ("classes", "table"))
    assert config.data.lanes in (1, 2)
    assert stage.samples >= 15
