"""Callbacks are called on rank 0, keep their first error until all ranks meet, and are not called after it."""

import pytest
import torch

from univitar_ds.errors import PluginError
from univitar_ds.plugins import load_plugins
from univitar_ds.training.callbacks import Callbacks, load_on_all_ranks
from univitar_ds.training.distributed.process_group import World

PLUGIN = """
from univitar_ds.plugins import register_callback
seen = []

@register_callback
class First:
    def on_step(self, info):
        seen.append(info)
        if info == 2:
            raise ValueError("of step two")

    def on_checkpoint(self, folder):
        seen.append("not called")

@register_callback
class Second:
    def on_step(self, info):
        seen.append(-info)

    def on_checkpoint(self, folder):
        seen.append(f"saved {folder}")

    def on_end(self, summary):
        seen.append(summary)
"""


def world(rank: int) -> World:
    return World(rank, 1, 0, torch.device("cpu"))


@pytest.fixture
def plugin(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN, encoding="utf-8")
    load_on_all_ranks([str(tmp_path / "mine.py")], world(0))
    yield load_plugins([str(tmp_path / "mine.py")])[0]
    load_plugins(())


def test_an_error_is_kept_and_ends_the_calls(plugin):
    callbacks = Callbacks(world(0))
    for step in (1, 2, 3):
        callbacks.call("on_step", step)
    callbacks.call("on_end", "summary")
    seen = type(plugin.callbacks[0]).on_step.__globals__["seen"]
    assert seen == [1, -1, 2]
    with pytest.raises(PluginError, match=r"mine .* failed in on_step: ValueError: of step two \(line 10\)"):
        callbacks.raise_failed()


def test_after_an_error_a_completed_checkpoint_is_still_announced_to_other_callbacks(plugin):
    callbacks = Callbacks(world(0))
    for hook in ("on_step", "on_checkpoint", "on_step"):
        callbacks.call(hook, 2)
    seen = type(plugin.callbacks[0]).on_step.__globals__["seen"]
    assert seen == [2, "saved 2"]
    with pytest.raises(PluginError, match="failed in on_step"):
        callbacks.raise_failed()


def test_methods_that_a_callback_lacks_are_left_out(plugin):
    callbacks = Callbacks(world(0))
    callbacks.call("on_start", "run")
    callbacks.call("on_end", "summary")
    callbacks.raise_failed()
    assert type(plugin.callbacks[0]).on_step.__globals__["seen"] == ["summary"]


def test_other_ranks_call_nothing(plugin):
    callbacks = Callbacks(world(1))
    assert not callbacks
    callbacks.call("on_step", 2)
    callbacks.raise_failed()


def test_without_entries_the_plugins_of_an_earlier_run_are_not_called(plugin):
    load_on_all_ranks((), world(0))
    assert not Callbacks(world(0))
