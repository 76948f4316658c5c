"""A run that is killed at random points, also while a thread writes a checkpoint, and resumed with other numbers of
ranks and decoding processes.

It takes minutes: `make test-all` runs it. tests/unit/data/test_elastic.py does the same with the loader and no
model, in every run of the tests.
"""

import json
import os
import random
import signal
import threading
from types import SimpleNamespace

import pytest

from tests.support.distributed import RankFailed, run_distributed
from tests.support.runs import metrics, samples, small_config, train_rank
from tests.support.shards import image, write_demo_shards, write_tar
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import INDEX
from univitar_ds.run import create_run, reopen_run

KILLS = 20
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # for twenty starts; each has the limits of every start
]
WORLDS = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (4, 0), (4, 1)]
"""(number of ranks, decoding processes of each rank)."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on 2 ranks over a sound source and one with bad samples, with weights that change."""
    folder = tmp_path_factory.mktemp("chaos")
    write_demo_shards(folder / "demo", images=64, videos=16, shards=4)
    bad = [(f"b{n:02d}", {"jpg": image(60, 50, n)[: -150 if n % 5 == 0 else None], "txt": b"one"}) for n in range(40)]
    cut = write_tar(folder / "broken" / "0.tar", bad)
    cut.write_bytes(cut.read_bytes()[:-15_000])
    config = config_of(folder, folder / "whole")
    run = create_run(config, "test", 2)
    assert run_distributed(train_rank, 2, run) == [True, True]
    return SimpleNamespace(folder=folder, run=run, steps=len(metrics(run)))


def config_of(folder, output):
    config = small_config(folder / "demo", output)
    content = config.model_dump(mode="json")
    content["data"]["sources"].append({"path": str(folder / "broken")})
    content["data"]["max_bad_per_thousand"] = 1000
    first, second = content["stages"]
    first |= {"samples": 260, "weights": {"demo": 2, "broken": 1}}
    second |= {"samples": 260, "video_ratio": 0.25}
    return small_config(folder / "demo", output, data=content["data"], stages=content["stages"])


def cursors(run):
    """The cursors of all lanes in the last checkpoint."""
    return json.loads((checkpoint_dir.complete(run / CHECKPOINTS)[-1] / INDEX).read_text())["cursors"]


def train_until_killed(run, victims, steps, delay_s):
    """Trains one rank. If it is in `victims`, it kills itself `delay_s` seconds after `steps` steps; 0: after its
    start."""
    from univitar_ds.training.logging import run_logs

    def kill_later():
        threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

    class Counted(run_logs.SampleLog):
        written = 0

        def write(self, step, batches):
            super().write(step, batches)
            self.written += 1
            if self.written == steps:
                kill_later()

    if int(os.environ["RANK"]) in victims:
        run_logs.SampleLog = Counted
        if steps == 0:
            kill_later()
    return train_rank(run)


def killed(run, ranks, *doom):
    """Whether the run was killed as planned; False: it was completed before."""
    try:
        run_distributed(train_until_killed, ranks, run, *doom)
    except RankFailed as failed:
        if "exit code -9" not in str(failed):
            raise
        return True
    return False


def assert_same(run, whole):
    assert samples(run) == samples(whole.run)
    assert cursors(run) == cursors(whole.run)
    for name in ("samples_seen", "bad_samples"):
        assert [line[name] for line in metrics(run)] == [line[name] for line in metrics(whole.run)]


def test_killed_at_random_points_and_resumed_on_other_ranks_it_is_the_uninterrupted_run(whole, tmp_path):
    chance = random.Random(7)
    run = create_run(config_of(whole.folder, tmp_path / "0"), "test", 2)
    visited, stands = set(), []
    while len(stands) < KILLS:
        ranks, workers = chance.choice(WORLDS)
        reopen_run(run, [f"data.workers={workers}"], ranks)
        victims = chance.choice([[chance.randrange(ranks)], list(range(ranks))])
        steps = chance.choice([0, 1, 2, 3, 4, 5, 6])
        delay_s = chance.uniform(0, 0.4) if steps else chance.uniform(0.5, 3)
        if killed(run, ranks, victims, steps, delay_s):
            visited.add((ranks, workers))
            latest = checkpoint_dir.latest(run / CHECKPOINTS)
            stands.append(0 if latest is None else int(latest.name.removeprefix("step-")))
        else:  # on a fast machine; the remaining kills are for another run
            assert_same(run, whole)
            run = create_run(config_of(whole.folder, tmp_path / str(len(stands))), "test", 2)
    print(f"{KILLS} kills, last checkpoints {stands} of {whole.steps} steps")
    assert {ranks for ranks, _ in visited} == {1, 2, 4}
    assert {workers for _, workers in visited} == {0, 1, 2}
    reopen_run(run, ["data.workers=0"], 2)
    assert run_distributed(train_rank, 2, run) == [True, True]
    assert_same(run, whole)
