"""Imports a run's plugins on all ranks, and calls their callbacks."""

from __future__ import annotations

from collections.abc import Sequence

from univitar_ds import plugins
from univitar_ds.errors import PluginError
from univitar_ds.training.distributed.process_group import World, all_ranks_or_none, gather_json


def load_on_all_ranks(entries: Sequence[str], world: World) -> None:
    """Imports a run's plugins. All ranks call it.

    Raises: PluginError on a rank that cannot import a plugin, and PeerFailure on the others; PluginError on all ranks
        if one of them has another version of a plugin than rank 0.
    """
    if not entries:
        plugins.load_plugins(())
        return
    with all_ranks_or_none(world):
        loaded = plugins.load_plugins(entries)
    versions = gather_json([[plugin.name, plugin.version, plugin.text_hash] for plugin in loaded], world)
    for rank, theirs in enumerate(versions):
        for (name, ours, text), (_, version, other) in zip(versions[0], theirs, strict=True):
            if (ours, text) != (version, other):
                raise PluginError(
                    f"rank {rank} has version {version} ({other}) of the plugin {name}, and rank 0 version {ours} "
                    f"({text}); give all machines the same file or package"
                )


class Callbacks:
    """The callbacks of the loaded plugins: all of them on rank 0, none on other ranks.

    An error in a callback is not raised immediately, since other ranks would wait for this rank. It is kept until all
    ranks call `raise_failed` in `all_ranks_or_none`. After an error, only `on_checkpoint` of the other callbacks is
    still called, since a save in flight is completed before the run ends.
    """

    def __init__(self, world: World) -> None:
        loaded = plugins.active() if world.is_main else []
        self._hooks = [(plugin, callback) for plugin in loaded for callback in plugin.callbacks]
        self._failed: PluginError | None = None
        self._broken: list[object] = []

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def call(self, hook: str, argument: object) -> None:
        """Calls a method of all callbacks that have it. Args: hook: one of `plugins.HOOKS`."""
        for plugin, callback in self._hooks:
            method = getattr(callback, hook, None)
            if method is None or callback in self._broken or (self._failed is not None and hook != "on_checkpoint"):
                continue
            try:
                with plugins.calling(plugin, hook):
                    method(argument)
            except PluginError as error:
                self._failed = self._failed or error
                self._broken.append(callback)

    def raise_failed(self) -> None:
        """Raises the first error of a callback, if any. Must be called within `all_ranks_or_none`."""
        if self._failed is not None:
            raise self._failed
