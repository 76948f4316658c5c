"""How files are handed over to the processes that examine them."""

from concurrent.futures import Future
from pathlib import Path

from univitar_ds.data.writing import examine
from univitar_ds.data.writing.examine import Job, MediaInfo, examine_all


class Pool:
    """Does what it is told at once; knows how many batches were handed over and never taken."""

    def __init__(self):
        self.submitted = self.taken = self.most = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, batch):
        self.submitted += 1
        self.most = max(self.most, self.submitted - self.taken)
        future = Future()
        future.set_result(work(batch))
        return future


def test_of_millions_of_files_few_are_handed_over_at_a_time(monkeypatch):
    pool = Pool()
    monkeypatch.setattr(examine.children, "pool", lambda workers, preload: pool)
    monkeypatch.setattr(examine, "examine", lambda job: MediaInfo(job.path.name))
    monkeypatch.setattr(examine, "_AHEAD", 3)
    names = [str(number) for number in range(101)]
    found = []
    for finding in examine_all([Job(Path(name), None, True) for name in names], workers=2):
        found.append(finding.fault)
        pool.taken = len(found) // examine._BATCH
    assert found == names
    assert pool.submitted == 26
    assert pool.most <= 3 * 2 + 1
