"""PyTorch's flight recorder: the last collectives of a rank, with sizes and states, as torch records them.

torch records them in memory for NCCL and gloo. The watchdog writes them as JSON when a run hangs. With NCCL, torch also
writes them when a collective exceeds the timeout of the process group, in a format that torch's `fr_trace` reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch

from univitar_ds.config.run_folder import STACKS

RECORDED = 2000
"""Number of collectives that are kept, enough for dozens of steps."""


def record_collectives(run: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Enables the recorder, unless the environment has settings of its own. Called before the process group starts.

    The names are those of torch 2.13: TORCH_NCCL_TRACE_BUFFER_SIZE and TORCH_NCCL_DEBUG_INFO_TEMP_FILE of earlier
    versions are read too, and take precedence."""
    environment.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED))
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    environment.setdefault("TORCH_FR_DUMP_TEMP_FILE", str((run / STACKS / "nccl-rank").absolute()))


def recorded_collectives() -> dict[str, Any]:
    """Returns the records of this process; {} if this build of torch has no recorder."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    return {} if dump is None else json.loads(dump(True, False))


def pending(recorded: dict[str, Any]) -> str:
    """Returns the name, the number and the process group of the first collective that is not complete; "" without one.

    Args: recorded: see `recorded_collectives`."""
    for entry in sorted(recorded.get("entries", ()), key=lambda entry: entry["record_id"]):
        if not entry.get("retired") and entry.get("state") != "completed":
            return f"{entry['profiling_name']} {entry['collective_seq_id']} of {entry['process_group'][1]}"
    return ""


def write_collectives(path: Path) -> str:
    """Writes the recorded collectives to `path`. Returns the result of `pending`. Raises: OSError."""
    recorded = recorded_collectives()
    if recorded:
        path.write_text(json.dumps(recorded), encoding="utf-8")
    return pending(recorded)
