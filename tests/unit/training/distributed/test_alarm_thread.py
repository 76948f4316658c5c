"""The thread that listens for the errors of other ranks."""

import threading
import time
from contextlib import nullcontext

import pytest
import torch

from tests.support.progress import wait_until
from univitar_ds.errors import DataError
from univitar_ds.training.distributed import alarm
from univitar_ds.training.distributed.process_group import PeerFailure, World


class Store:
    """A store whose requests take a moment."""

    def __init__(self):
        self.asked = 0

    def clone(self):
        return self

    def check(self, keys):
        self.asked += 1
        time.sleep(0.05)
        return False

    def add(self, key, count):
        return 2

    def compare_set(self, key, expected, value):
        pass


@pytest.mark.parametrize("error", [None, DataError, PeerFailure])
def test_it_has_ended_with_the_body_since_it_must_not_be_in_a_request_when_the_interpreter_ends(monkeypatch, error):
    store = Store()
    monkeypatch.setattr(alarm, "LOOK_S", 0.0)
    monkeypatch.setattr(alarm, "GRACE_S", 0.0)
    monkeypatch.setattr(alarm.dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(alarm.dist, "PrefixStore", lambda prefix, store: store)
    expected = nullcontext() if error is None else pytest.raises(error, match="of this rank")
    with expected, alarm.ending_together(World(0, 2, 0, torch.device("cpu"))):
        wait_until(lambda: store.asked > 0, "the first request")
        if error is not None:
            raise error("of this rank")
    assert "alarm" not in [thread.name for thread in threading.enumerate()]


def test_an_error_is_sent_before_the_only_wait_for_a_store_that_does_not_answer(monkeypatch):
    done: list[object] = []
    monkeypatch.setattr(alarm, "GRACE_S", 0.0)
    monkeypatch.setattr(alarm.dist.distributed_c10d, "_get_default_store", Store)
    monkeypatch.setattr(alarm.dist, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(Store, "compare_set", lambda store, *_: done.append("sent"))
    monkeypatch.setattr(threading.Thread, "join", lambda thread, timeout: done.append(timeout))
    with pytest.raises(DataError, match="of this rank"), alarm.ending_together(World(0, 2, 0, torch.device("cpu"))):
        raise DataError("of this rank")
    assert done == ["sent", alarm.ANSWER_S]
