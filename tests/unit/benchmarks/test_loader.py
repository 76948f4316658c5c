"""The contenders of the loader benchmark that need only this project still run."""

from itertools import islice

import pytest

from benchmarks.loader.contenders import CONTENDERS, Task
from tests.support.shards import write_demo_shards


@pytest.mark.parametrize("name", ["ours", "bare"])
def test_a_contender_returns_the_number_of_samples_of_each_batch(tmp_path, name):
    shards = write_demo_shards(tmp_path / "shards", images=24, videos=0, shards=4)
    batches = CONTENDERS[name](Task(str(shards), None, 1, 4, 40, 14, 200, 20))
    assert all(count > 0 for count in islice(batches, 6))
    batches.close()
