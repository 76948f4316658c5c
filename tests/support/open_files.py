"""Which files of a place this process has open.

A count of all its files would also count those of the threads that other tests have started.
"""

import os
from contextlib import suppress
from pathlib import Path


def open_below(place: str | Path) -> list[str]:
    """What this process has open of this file or below this folder, deleted files too."""
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed since: the listing's own, or one of another thread
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    whole = str(place)
    return [target for target in targets if target.split(" (deleted)")[0] == whole or target.startswith(f"{whole}/")]
