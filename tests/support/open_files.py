"""Lists the open files of this process below a folder.

A count of all open files would include those of threads that other tests have started.
"""

import os
from contextlib import suppress
from pathlib import Path


def open_below(place: str | Path) -> list[str]:
    """Paths of open files that are `place` or below it, including deleted files."""
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed since the listing, as its own descriptor is
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    whole = str(place)
    return [target for target in targets if target.split(" (deleted)")[0] == whole or target.startswith(f"{whole}/")]
