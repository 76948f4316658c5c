"""`slurm/train.sbatch` on a real Slurm cluster of two nodes: which jobs are requeued, and that runs lose no steps."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.closeness import assert_sums_close, encoder_terms, gradient_terms, transformer_terms
from tests.support.distributed import run_distributed
from tests.support.finished import run_config, write_run
from tests.support.processes import marked
from tests.support.progress import wait_until
from tests.support.runs import metrics, samples, small_config, train_rank
from tests.support.shards import write_demo_shards
from tests.support.slurm import ROOT, Cluster, cluster, missing
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.load import check_config, dump_config, load_config
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.formats import checkpoint_dir
from univitar_ds.run import create_run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
TRAIN = ROOT / "slurm" / "train.sbatch"
PREFLIGHT = ROOT / "slurm" / "preflight.sbatch"
EVALUATIONS = ROOT / "slurm" / "eval_array.sbatch"
THIRTY_STEPS = ["data.lanes=2", "stages.0.samples=270", "stages.1.samples=30"]
"""Overrides with which the stage transition, which also saves, comes after everything that the tests do to a run."""
STEPS_OF_A_START = 2


@pytest.fixture(scope="module")
def slurm():
    with cluster() as running:
        yield running


def ended(job: dict[str, str]) -> bool:
    return job["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED")


class Job:
    """A job of an sbatch script of this project, with one task on each node and exclusive nodes."""

    def __init__(
        self,
        slurm: Cluster,
        run: Path,
        script: Path = TRAIN,
        overrides: Sequence[str] = (),
        *,
        options: Sequence[str] = (),
        log: Path | None = None,
        **variables: str,
    ) -> None:
        """Args: options: of sbatch; log: default: beside the run."""
        self.slurm, self.run, self.log = slurm, run, log or run.with_suffix(".log")
        run.parent.mkdir(parents=True, exist_ok=True)
        options = [
            "--ntasks-per-node=1",
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            "--time=10",
            "--exclusive",
            *options,
        ]
        options.append(f"--output={self.log}")
        self.number = slurm.submit(script, *options, arguments=tuple(overrides), RUN=str(run), **variables)

    def wait(self, condition) -> dict[str, str]:
        try:
            return self.slurm.wait(self.number, condition, self.log, self.run / "metrics.jsonl")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()[-3000:]}") from error

    def ends(self) -> tuple[str, int, str]:
        """Waits for the end. Returns state, number of restarts and exit code."""
        job = self.wait(ended)
        return job["JobState"], int(job["Restarts"]), job["ExitCode"]

    def warn(self) -> None:
        """Sends the signal of `--signal=B:USR1@seconds`, as Slurm does before the time limit."""
        self.slurm.run("scancel", "--signal=USR1", "--batch", self.number)

    def lose_nodes(self) -> None:
        """Submits a job of the partition with higher priority, which takes the nodes."""
        script = self.slurm.folder / "urgent.sh"
        script.write_text("#!/bin/bash\ntrue\n")
        self.slurm.submit(script, "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")


STUB = """#!/bin/bash
# Replaces Python: rank $SLURM_PROCID of a trainer whose first start ends as given by $END.
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
case $END in
# A rank ignores the signals to the others of an ended one once it ends itself.
saved | fault | hung | stuck | givenup) trap '' TERM ;;
saves) trap 'exit 85' TERM USR1 ;;
esac
echo "up $SLURM_PROCID"
touch "$RUN.up.$SLURM_PROCID"
# Only once the other rank runs: Slurm terminates one that has not started, and reports that in place of this one's end.
both() { until [ -e "$RUN.up.0" ] && [ -e "$RUN.up.1" ]; do sleep 0.1; done; }
case $END in
saved) both; mkdir -p "$RUN/checkpoints"; echo step > "$RUN/checkpoints/latest"; exit 85 ;;
hung) both; mkdir -p "$RUN/checkpoints"; echo step > "$RUN/checkpoints/latest"; exit 86 ;;
stuck) both; mkdir -p "$RUN/checkpoints" "$RUN/stacks"; echo step > "$RUN/checkpoints/latest"
    echo "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" > "$RUN/stacks/again"
    [ "$SLURM_PROCID" = 0 ] || kill -9 $$
    exit 86 ;;
givenup) both; mkdir -p "$RUN/stacks"; echo "$SLURM_JOB_ID.7" > "$RUN/stacks/again"; exit 1 ;;
fault) both; exit 2 ;;
crash) [ "$SLURM_PROCID" != 0 ] || { both; exit 1; } ;;
evaluates) mkdir -p "$RUN/export"; printf '{\n  "completed": true\n}\n' > "$RUN/summary.json" ;;
finishes) if [ "$SLURM_PROCID" = 0 ]; then sleep 8 && echo finished; fi; exit 0 ;;
esac
for i in $(seq 200); do sleep 0.1; done
exit 0
"""


@pytest.fixture
def stub(slurm, tmp_path):
    """Returns a function that starts train.sbatch with a stub of the trainer, which ends as given by `end`."""
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)

    def start(end: str) -> Job:
        return Job(slurm, tmp_path / "run", PYTHON=str(tmp_path / "stub"), CONFIG="demo", END=end)

    return start


def both_up(job: Job) -> None:
    job.wait(lambda _: job.log.exists() and job.log.read_text().count("up ") == 2)


def test_a_run_that_has_saved_is_requeued_and_resumed(stub):
    job = stub("saved")
    assert job.ends() == ("COMPLETED", 1, "0:0")
    first, second = (line for line in job.log.read_text().splitlines() if ": start " in line)
    assert f"train --config demo output={job.run.parent} name=run" in first
    assert f"train --resume {job.run}" in second


@pytest.mark.parametrize("end", ["hung", "stuck"])
def test_a_run_that_its_watchdog_has_ended_is_requeued(stub, end):
    """Also if a rank did not end by itself and was killed."""
    job = stub(end)
    assert job.ends() == ("COMPLETED", 1, "0:0")
    assert f"train --resume {job.run}" in job.log.read_text()


@pytest.mark.parametrize(("end", "code"), [("fault", "2:0"), ("crash", "143:0"), ("givenup", "1:0")])
def test_a_run_that_fails_is_not_requeued(stub, end, code):
    """If a rank fails, Slurm ends the other ranks with SIGTERM, as at pre-emption."""
    assert stub(end).ends() == ("FAILED", 0, code)


def test_the_first_rank_is_not_ended_when_the_other_ranks_have_ended(stub):
    job = stub("finishes")
    assert job.ends() == ("COMPLETED", 0, "0:0")
    assert "finished" in job.log.read_text()


def test_a_warning_before_training_requeues_the_job(stub):
    job = stub("early")
    both_up(job)
    job.warn()
    assert job.ends() == ("COMPLETED", 1, "0:0")


def test_a_warning_during_the_evaluation_after_training_does_not_requeue_the_job(stub):
    job = stub("evaluates")
    both_up(job)
    job.warn()
    assert job.ends() == ("FAILED", 0, "138:0")
    assert f"only its evaluation was interrupted: univitar-ds eval {job.run}, on one GPU" in job.log.read_text()


@pytest.mark.parametrize("end", ["early", "saves"])
def test_a_preempted_job_is_requeued(stub, end):
    job = stub(end)
    both_up(job)
    job.lose_nodes()
    assert job.ends() == ("COMPLETED", 1, "0:0")


@pytest.mark.parametrize("end", ["early", "saves"])
def test_a_cancelled_job_stays_cancelled(stub, end):
    job = stub(end)
    both_up(job)
    job.slurm.run("scancel", job.number)
    assert job.ends()[:2] == ("CANCELLED", 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on two ranks. Its run file is in the same folder."""
    folder = tmp_path_factory.mktemp("slurm")
    write_demo_shards(folder / "shards", images=256, videos=64)  # 16 images and 4 videos for each of 16 lanes
    rarely = {"every_steps": 100_000, "keep": 100}  # a checkpoint in the test was saved because of a signal
    dump_config(small_config(folder / "shards", folder, checkpoint=rarely), folder / "run.yaml")
    config = load_config(folder / "run.yaml", ["name=whole", *THIRTY_STEPS])
    run = create_run(config, "test", 2)
    assert run_distributed(train_rank, 2, run) == [True, True]
    return run


def start(slurm: Cluster, whole: Path, name: str) -> Job:
    overrides = [*THIRTY_STEPS, "data.workers=1"]  # so that signals of Slurm reach decoding processes too
    return Job(slurm, whole.parent / name, overrides=overrides, CONFIG=str(whole.parent / "run.yaml"))


def trained(job: Job) -> int:
    """Waits until this start has trained some steps. Returns the last one."""
    before = last_step(job.run)
    job.wait(lambda _: last_step(job.run) >= before + STEPS_OF_A_START)
    return last_step(job.run)


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def saved_steps(run: Path) -> list[int]:
    """Steps of the checkpoints, without that at the transition from the first stage."""
    handed_over = {json.loads(line)["step"] for line in (run / "events.jsonl").read_text().splitlines()}
    steps = {int(folder.name.removeprefix("step-")) for folder in checkpoint_dir.complete(run / CHECKPOINTS)}
    return sorted(steps - handed_over)


def test_a_run_continues_after_every_loss_of_its_nodes_and_loses_no_step(slurm, whole):
    job = start(slurm, whole, "disturbed")
    reached = [trained(job)]
    job.warn()
    job.wait(lambda state: state["Restarts"] == "1" and state["JobState"] == "RUNNING")
    reached.append(trained(job))
    slurm.run("scontrol", "requeue", job.number)
    job.wait(lambda state: state["Restarts"] == "2" and state["JobState"] == "RUNNING")
    reached.append(trained(job))
    job.lose_nodes()
    assert job.ends() == ("COMPLETED", 3, "0:0"), job.log.read_text()[-3000:]

    saved = saved_steps(job.run)
    assert len(saved) == 4
    assert all(step <= place < step + 20 for step, place in zip(reached, saved, strict=False))
    assert [(line["step"], line["loss"]) for line in metrics(job.run)] == [
        (line["step"], line["loss"]) for line in metrics(whole)
    ]
    assert samples(job.run) == samples(whole)
    summary = json.loads((job.run / "summary.json").read_text())
    assert (summary["completed"], summary["ranks"]) == (True, 2)
    assert (job.run / "export" / "model.safetensors").is_file()


def test_a_cancelled_run_saves_and_stays_cancelled(slurm, whole):
    job = start(slurm, whole, "cancelled")
    reached = trained(job)
    slurm.run("scancel", job.number)
    assert job.ends()[:2] == ("CANCELLED", 0)
    (saved,) = saved_steps(job.run)
    assert saved >= reached


SMALLEST = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
"""An encoder with which the start of the ranks takes most of the time."""
SMALLEST_TERMS = gradient_terms(
    encoder_terms(EncoderConfig(**SMALLEST), 48) + transformer_terms(width=48, inner=64, head=24, layers=2, longest=48),
    16 * 96,
)
"""As `TERMS`, for this encoder and sixteen lanes."""


@pytest.fixture(scope="module")
def of_sixteen_lanes(whole):
    """The run file of about 50 steps of sixteen lanes."""
    content = load_config(whole.parent / "run.yaml", ["data.lanes=16", "stages.0.samples=3800", "stages.1.samples=90"])
    content = content.model_dump(mode="json")
    content["model"]["encoder"] = SMALLEST
    dump_config(check_config(content, "the test"), whole.parent / "sixteen.yaml")
    return whole.parent / "sixteen.yaml"


@pytest.mark.alone
def test_a_chain_of_jobs_with_8_then_4_then_16_ranks_is_one_run(slurm, of_sixteen_lanes):
    """Each job waits for the one before it; the first two lose their nodes in the middle. The second has one node."""
    chain, folder = [], of_sixteen_lanes.parent
    for nodes, tasks in [(2, 4), (1, 4), (2, 8)]:
        options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--time=30"]
        options += [f"--dependency=afterany:{chain[-1].number}"] if chain else []
        log = folder / f"chain-{len(chain)}.log"
        chain.append(Job(slurm, folder / "chain", options=options, log=log, CONFIG=str(of_sixteen_lanes)))
    for job in chain[:2]:
        trained(job)
        slurm.run("scancel", job.number)
        assert job.ends()[:2] == ("CANCELLED", 0)
    assert chain[2].ends() == ("COMPLETED", 0, "0:0"), chain[2].log.read_text()[-3000:]

    undisturbed, run = create_run(load_config(of_sixteen_lanes, ["name=undisturbed"]), "test", 2), chain[0].run
    assert run_distributed(train_rank, 2, undisturbed) == [True, True]
    saved = saved_steps(run)
    assert len(saved) == 3
    ranks = [
        json.loads((folder / "state.json").read_text())["world_size"]
        for folder in checkpoint_dir.complete(run / CHECKPOINTS)
    ]
    assert sorted(set(ranks)) == [4, 8, 16]
    assert samples(run) == samples(undisturbed)
    ours, theirs = metrics(run), metrics(undisturbed)
    assert [line["step"] for line in ours] == list(range(1, len(theirs) + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert_sums_close(one["loss"], other["loss"], one["step"] * SMALLEST_TERMS, f"loss of step {one['step']}")
        assert one["samples_seen"] == other["samples_seen"]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["completed"], summary["ranks"]) == (True, 16)


def test_a_second_job_on_the_folder_of_a_run_is_refused_and_the_first_continues(slurm, whole):
    given = {"CONFIG": str(whole.parent / "run.yaml")}
    overrides = ["data.lanes=2", "data.workers=0", "stages.0.samples=1000000"]  # trains until it is ended
    first = Job(slurm, whole.parent / "held", overrides=overrides, options=["--nodes=1"], **given)
    trained(first)
    log = whole.parent / "second.log"
    second = Job(slurm, first.run, overrides=overrides, options=["--nodes=1"], log=log, **given)
    assert second.ends() == ("FAILED", 0, "2:0")
    sentence = next(line for line in log.read_text().splitlines() if line.startswith("error: "))
    assert f"{first.run} is in use" in sentence
    assert f"job {first.number}" in sentence
    trained(first)
    assert first.slurm.job(first.number)["JobState"] == "RUNNING"
    slurm.run("scancel", first.number)
    assert first.ends()[:2] == ("CANCELLED", 0)
    last = checkpoint_dir.latest(first.run / CHECKPOINTS)
    checkpoint_dir.verify(last, checkpoint_dir.read_manifest(last))
    steps = [line["step"] for line in metrics(first.run)]
    assert steps == list(range(1, len(steps) + 1))
    assert int(last.name.removeprefix("step-")) == steps[-1]


def test_an_error_of_the_user_ends_the_job_with_its_message(slurm, tmp_path):
    job = Job(slurm, tmp_path / "faulty", CONFIG=str(tmp_path / "absent.yaml"))
    assert job.ends()[:2] == ("FAILED", 0)
    assert "error: " in job.log.read_text()
    assert "absent.yaml" in job.log.read_text()


SLOW_NODE = """#!/bin/bash
# In the place of Python: the doctor, whose products of matrices take no time, and long on the second node.
shift 2 # -m univitar_ds
exec {python} -c '
import os, sys, time
from univitar_ds.cli.main import main
from univitar_ds.doctor import speed
speed.work = lambda _: time.sleep(0.5 if os.environ["SLURM_NODEID"] == "1" else 0.005)
sys.exit(main())' "$@"
"""


def test_the_preflight_names_the_slow_node_and_errors_of_the_run_file(slurm, tmp_path):
    write_demo_shards(tmp_path / "shards")
    dump_config(small_config(tmp_path / "shards", tmp_path), tmp_path / "run.yaml")
    python = tmp_path / "python"
    python.write_text(SLOW_NODE.format(python=sys.executable))
    python.chmod(0o755)
    before = {*tmp_path.iterdir(), tmp_path / "checked.log"}
    given = {"PYTHON": str(python), "CONFIG": str(tmp_path / "run.yaml")}
    job = Job(slurm, tmp_path / "checked", PREFLIGHT, ["data.lanes=3"], **given)
    assert job.ends() == ("FAILED", 0, "1:0"), job.log.read_text()
    said = job.log.read_text()
    failed = [line for line in said.splitlines() if line.startswith("FAILED ")]
    assert len(failed) == 3, said
    assert "data.lanes is 3 and cannot be shared evenly by 2 ranks" in failed[0]
    assert "the slowest node is univitar-b" in failed[1]
    assert "(rank 1 on univitar-b), which takes" in failed[1]
    assert "2 of " in failed[2]
    assert "2 ranks on 2 nodes (1 on each), all connected" in said
    assert "all-reduce" in said
    assert set(tmp_path.iterdir()) == before


def test_an_array_of_two_jobs_measures_two_checkpoints_and_collects_a_table(slurm, tmp_path):
    shards = write_demo_shards(tmp_path / "shards", images=16, videos=8, shards=1)
    models = [tmp_path / name for name in ("one", "two")]
    for model in models:
        write_run(model, run_config(shards))
    (tmp_path / "models.txt").write_text("".join(f"{model}\n" for model in models))
    (tmp_path / "tasks.txt").write_text(f"zero-shot --data '{shards}' --split test\n")
    options = ("--array=0-1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10", f"--output={tmp_path}/%a.log")
    files = {name: str(tmp_path / f"{name.lower()}.txt") for name in ("MODELS", "TASKS")}
    number = slurm.submit(EVALUATIONS, *options, OUT=str(tmp_path / "out"), PYTHON=sys.executable, **files)

    def states() -> list[str]:
        return re.findall(r"JobState=(\S+)", slurm.run("scontrol", "show", "job", "-o", number))

    def heartbeat() -> tuple:
        return *states(), *(path.stat().st_size for path in tmp_path.glob("*.log"))

    wait_until(
        lambda: all(ended({"JobState": state}) for state in states()),
        f"array {number}",
        of=lambda: marked(f"SLURM_ARRAY_JOB_ID={number}"),
        heartbeat=heartbeat,
    )
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert states() == ["COMPLETED"] * 2, logs
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
    table = (tmp_path / "out" / "table.md").read_text()
    heads = next(line for line in table.splitlines() if line.startswith("| data"))
    assert [cell.strip() for cell in heads.strip("|").split("|")][-2:] == ["one", "two"]
    rows = [line for line in table.splitlines() if "zero-shot of images" in line]
    assert len(rows) == 2
    assert not any("| - |" in " ".join(row.split()) for row in rows)
