"""Evaluation during training: its figures are those of the checkpoint, and it does not change the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.closeness import assert_sums_close, encoder_terms
from tests.support.distributed import run_distributed
from tests.support.runs import metrics, samples, small_config
from tests.support.shards import write_demo_shards
from univitar_ds.config.deepspeed import SHARDING
from univitar_ds.config.load import check_config, load_config
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.data.loader import eval_packs
from univitar_ds.evaluation.during_training import DuringTraining
from univitar_ds.evaluation.embed import embed
from univitar_ds.evaluation.retrieval import retrieval
from univitar_ds.evaluation.run import evaluate
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.run import find_checkpoint
from univitar_ds.run import create_run
from univitar_ds.training.checkpoint.offline import open_trained
from univitar_ds.training.logging.board import results

pytestmark = pytest.mark.distributed
TIMED = ("_s", "_pct", "tflops_per_rank", "memory_gb", "mfu_note")
SHAPE = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "qkv_bias": True}
EVERY, SAMPLES = 30, 60
"""Samples between evaluations, and of the run; a step has about 12."""


def zero(folder: Path, stage: int, sharing: int | None) -> str:
    """A DeepSpeed JSON with parameters that cross the borders of shards. Args: sharing: ranks that share a training
    state."""
    path = folder / f"zero{stage}-{sharing}.json"
    content = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 50_000}
    if stage == 3:
        content |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 50_000}
    path.write_text(json.dumps({"zero_optimization": content, **({SHARDING: sharing} if sharing else {})}))
    return str(path)


def config(folder: Path, name: str, stage: int, sharing: int | None = None, model: dict | None = None, **evaluation):
    """One stage of images and videos with dropping and an average of the weights."""
    base = small_config(folder / "shards", folder, deepspeed=zero(folder, stage, sharing), name=name)
    content = base.model_dump(mode="json")
    content["stages"] = [{**content["stages"][1], "samples": SAMPLES, "patch_dropout": 0.3, "stochastic_depth": 0.2}]
    content["model"] |= {"encoder": SHAPE, **(model or {})}
    content["optimizer"]["ema_decay"] = 0.6
    content["evaluation"] = {"sources": [{"path": str(folder / "shards"), "split": "test"}], **evaluation}
    content["checkpoint"] = {"every_steps": 100, "keep": 1}
    return check_config(content, "the test")


def train_all(runs: list[tuple[Path, str]]) -> list[tuple[bool, torch.Tensor]]:
    """Trains runs as one rank, each with an entry of WAYS. Returns, for each, whether it was completed, and the next
    number of the rank's generator."""
    from univitar_ds.evaluation import shares
    from univitar_ds.training.checkpoint import whole_weights
    from univitar_ds.training.distributed.preemption import Stop
    from univitar_ds.training.distributed.process_group import start_world
    from univitar_ds.training.loop import train

    shares.AT_ONCE, whole_weights.AT_ONCE = 150, 5000  # several messages, and parameters that cross them
    world, answers = start_world(), []
    for run, way in runs:
        cfg, stop = load_config(run / "config.yaml"), Stop()
        torch.manual_seed(world.rank)
        evaluation = WAYS[way](cfg, run, world)
        evaluation.stop = stop
        completed = train(cfg, run, world, stop, evaluation)
        answers.append((completed, torch.rand(4)))
    return answers


class Recorded(DuringTraining):
    """Writes the embeddings of the last evaluation beside the run."""

    def _gathered(self, own):
        found = super()._gathered(own)
        if found is not None:
            torch.save(found, kept_of(self._run, found[0].modality))
        return found


def kept_of(run: Path, modality: str) -> Path:
    return run.parent / f"{run.name}-{modality}.pt"


class OutOfMemoryOnRank1(DuringTraining):
    """Rank 1 is out of memory in the first evaluation."""

    failed = False

    def _model(self, *given):
        if self._world.rank == 1 and not self.failed:
            self.failed = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super()._model(*given)


class SourceIsGone(DuringTraining):
    """The sources are missing in the first evaluation, and exist again in the second."""

    calls = 0

    def __call__(self, *given):
        self.calls += 1
        shards = Path(self._cfg.evaluation.sources[0].path)
        if self.calls == 1 and self._world.is_main:
            shards.rename(shards.with_name("away"))
        if self.calls == 2 and self._world.is_main:
            shards.with_name("away").rename(shards)
        return super().__call__(*given)


class StoppedInIt(DuringTraining):
    """Rank 1 is asked to stop while it embeds."""

    def _found(self, *given):
        self.stop.requested |= self._world.rank == 1
        return super()._found(*given)


WAYS = {"as it is": Recorded, "memory": OutOfMemoryOnRank1, "source": SourceIsGone, "stop": StoppedInIt}


def created(folder: Path, name: str, stage: int, every: int, **evaluation) -> Path:
    return create_run(config(folder, name, stage, every_samples=every, **evaluation), "test", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """On 2 ranks, with ZeRO 1 and 3: a run without evaluation during training, and one with it."""
    folder = tmp_path_factory.mktemp("mid")
    write_demo_shards(folder / "shards", images=48, videos=16, shards=2)
    keys = [(stage, every) for stage in (1, 3) for every in (0, EVERY)]
    runs = {(stage, every): created(folder, f"zero{stage}-{every}", stage, every) for stage, every in keys}
    answers = run_distributed(train_all, 2, [(run, "as it is") for run in runs.values()])
    assert all(completed for of_rank in answers for completed, _ in of_rank)
    generators = {key: [of_rank[number][1] for of_rank in answers] for number, key in enumerate(keys)}
    return SimpleNamespace(folder=folder, runs=runs, generators=generators)


@pytest.fixture(scope="module")
def troubled(trained):
    """The same run with failures in its evaluations, by the names of WAYS."""
    folder = trained.folder
    shutil.copytree(folder / "shards", folder / "gone" / "shards")
    gone = [{"path": str(folder / "gone" / "shards"), "split": "test"}]
    runs = {way: created(folder, way, 1, EVERY) for way in ("memory", "stop")}
    runs["source"] = created(folder, "source", 1, EVERY, sources=gone)
    ways = [*((run, way) for way, run in runs.items()), (runs["stop"], "as it is")]
    for answers in run_distributed(train_all, 2, ways):
        assert [completed for completed, _ in answers] == [True, False, True, True], "one was stopped, and then resumed"
    return runs


def steps_of(run: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if not name.endswith(TIMED)}
        for line in metrics(run)
        if "loss" in line
    ]


def evaluations_of(run: Path) -> list[dict]:
    return [line for line in metrics(run) if "loss" not in line]


def assert_same_training(run: Path, plain: Path) -> None:
    assert steps_of(run) == steps_of(plain)
    assert samples(run) == samples(plain)
    last, other = (checkpoint_dir.latest(one / CHECKPOINTS) for one in (plain, run))
    assert last.name == other.name
    ours, theirs = (checkpoint_dir.read_manifest(folder) for folder in (other, last))
    assert ours.keys() == theirs.keys()
    same = {name for name in ours if ours[name] == theirs[name]}
    assert ours.keys() - same == {"state.json"}, "weights, average, moments, buffers and cursors are equal"


@pytest.mark.parametrize("stage", [1, 3])
def test_the_training_equals_the_one_without_it_bit_for_bit(trained, stage):
    plain, evaluated = trained.runs[stage, 0], trained.runs[stage, EVERY]
    assert not evaluations_of(plain)
    assert [line["samples_seen"] // EVERY for line in evaluations_of(evaluated)] == [1, 2]
    assert_same_training(evaluated, plain)
    for before, after in zip(trained.generators[stage, 0], trained.generators[stage, EVERY], strict=True):
        assert torch.equal(before, after)


def assert_evaluates_its_checkpoint(run: Path) -> None:
    """The last evaluation has each item once, with the vectors of the checkpoint's weights, and figures from them."""
    last, checkpoint = evaluations_of(run)[-1], checkpoint_dir.latest(run / CHECKPOINTS)
    assert last["step"] == checkpoint_dir.step_of(checkpoint.name), "the run ends with an evaluation"
    for number, (weights, group) in enumerate((("averaged", "eval"), ("trained", "eval/trained"))):
        trained = open_trained(checkpoint, weights)
        wanted = evaluate(trained)["figures"]
        assert results(wanted, group).keys() == {name for name in last if name.rpartition("/")[0] == group}
        terms = 2 * encoder_terms(trained.model.vision.config, 48)  # heads and text have fewer terms than the encoder
        for modality in ("image", "video"):
            found = torch.load(kept_of(run, modality), weights_only=False)[number]
            other = embed(trained.model, packs_of(trained, modality), modality, progress=False)
            order = [found.keys.index(key) for key in other.keys]
            assert sorted(order) == list(range(len(found)))
            for name in ("captions", "labels", "sets"):
                assert [getattr(found, name)[row] for row in order] == getattr(other, name)
            for name in ("vision", "text"):
                assert_sums_close(getattr(found, name)[order], getattr(other, name), terms, f"{weights} {name}")
            own = results([figure.to_dict() for figure in retrieval(found)], group)
            assert len(own) >= 2
            for name, value in own.items():
                assert_sums_close(last[name], value, len(found), name)


def packs_of(trained, modality):
    stage = trained.config.stages[-1]
    return eval_packs(
        trained.config.evaluation.sources,
        modality=modality,
        resolution=stage.resolution(modality),
        video_frames=stage.video_frames,
        token_budget=trained.config.evaluation.token_budget,
        tokenizer=trained.run / "tokenizer.json",
        context_length=trained.config.model.text.context_length,
        data=trained.config.data,
    )


@pytest.mark.numeric
@pytest.mark.parametrize("stage", [1, 3])
def test_its_figures_are_those_of_the_checkpoint(trained, stage):
    assert_evaluates_its_checkpoint(trained.runs[stage, EVERY])


@pytest.fixture(scope="module")
def on_four_ranks(trained):
    """Runs whose ranks share the weights of blocks, a training state within groups, or packs."""
    split = {"tensor_parallel": 2, "sequence_parallel": 2}
    settings = {
        "zero 2": {"stage": 2},
        "groups of 2": {"stage": 3, "sharing": 2},
        "tensor and sequence, zero 1": {"stage": 1, "model": split},
        "tensor and sequence, zero 3": {"stage": 3, "model": split},
    }
    runs = {}
    for number, (name, given) in enumerate(settings.items()):
        cfg = config(trained.folder, f"four{number}", every_samples=EVERY, **given)
        runs[name] = create_run(cfg, "test", 4)
    answers = run_distributed(train_all, 4, [(run, "as it is") for run in runs.values()])
    assert all(completed for of_rank in answers for completed, _ in of_rank)
    return runs


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize(
    "name", ["zero 2", "groups of 2", "tensor and sequence, zero 1", "tensor and sequence, zero 3"]
)
def test_ranks_with_parts_of_weights_or_packs_evaluate_the_whole_model(on_four_ranks, name):
    assert_evaluates_its_checkpoint(on_four_ranks[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "rank", "reason"),
    [("memory", 1, "OutOfMemoryError: CUDA out of memory"), ("source", 0, "DataError: ")],
)
def test_an_evaluation_that_fails_is_an_event_and_all_ranks_continue_to_train(trained, troubled, way, rank, reason):
    run = troubled[way]
    assert_same_training(run, trained.runs[1, 0])
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (failed,) = [event for event in events if event["event"] == "evaluation_failed"]
    assert failed["rank"] == rank
    assert failed["reason"].startswith(reason)
    (line,) = evaluations_of(run)
    assert line["step"] > failed["step"], "the next one succeeds"
    assert {name: line[name] for name in line if name.startswith("eval/")} == {
        name: value for name, value in evaluations_of(trained.runs[1, EVERY])[1].items() if name.startswith("eval/")
    }


@pytest.mark.slow
def test_an_evaluation_that_a_stop_request_interrupts_is_repeated_once_after_the_resume(trained, troubled):
    run, straight = troubled["stop"], trained.runs[1, EVERY]
    assert_same_training(run, trained.runs[1, 0])
    found, wanted = ([{**line, "evaluation_s": 0} for line in evaluations_of(one)] for one in (run, straight))
    assert found == wanted
    steps = [line["step"] for line in metrics(run)]
    assert steps == sorted(steps)


def test_the_best_checkpoint_is_kept_and_named(trained):
    run = trained.runs[1, EVERY]
    scores = {}
    for line in evaluations_of(run):
        top1 = [value for name, value in line.items() if name.startswith("eval/zero-shot_top-1_")]
        scores[line["step"]] = sum(top1) / len(top1)
    best = max(scores, key=scores.get)
    (named, checkpoint) = find_checkpoint(run / CHECKPOINTS / "best")
    assert named == run
    assert checkpoint.name == f"step-{best:08d}"
    checkpoint_dir.verify(checkpoint, checkpoint_dir.read_manifest(checkpoint))
    assert open_trained(run / CHECKPOINTS / "best").checkpoint == checkpoint
