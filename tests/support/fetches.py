"""Waits for the downloads of shards in this process, whose threads are named "fetch {url}"."""

import threading

from tests.support.progress import wait_until


def fetches_ended() -> None:
    """Block until no download is running; the end of one starts the next hinted one."""
    wait_until(
        lambda: not any(thread.name.startswith("fetch ") for thread in threading.enumerate()), "the downloads of shards"
    )
