"""The program of one simulated step, started by `process.simulate`: prints only its result, in JSON.

python -P -m univitar_ds.simulation.program STUBS SETTING.json
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from univitar_ds.errors import UserError, first_line
from univitar_ds.processes import die_with_parent
from univitar_ds.simulation.process import load_stubs


def main(stubs: Path, file: Path) -> int:
    """Args: stubs: folder of the stubs; file: the setting in JSON. Returns the exit status."""
    die_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as result:
        os.dup2(2, 1)  # what plugins and libraries print is not part of the result
        try:
            found = _simulated(stubs, file)
        except Exception as error:
            traceback.print_exc()
            text = first_line(error)[:300]
            found = {"error": text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"}
        result.write(json.dumps(found))
    return 1 if "error" in found else 0


def _simulated(stubs: Path, file: Path) -> dict[str, Any]:
    load_stubs(stubs)
    from univitar_ds.simulation.step import Setting, simulated  # imports torch, which needs the stubs

    return simulated(Setting(**json.loads(file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
