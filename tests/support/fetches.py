"""Downloads of shards that go on behind a test: each has a thread that is called after what it fetches."""

import threading

from tests.support.progress import wait_until


def fetches_ended() -> None:
    """Waits until no shard is being fetched in this process; the end of one download starts the next one hinted at."""
    wait_until(
        lambda: not any(thread.name.startswith("fetch ") for thread in threading.enumerate()), "the downloads of shards"
    )
