"""The program of one simulated step, started by `process.simulate`: prints the result as the last line, in JSON.

python -m univitar_ds.simulation.program STUBS SETTING.json
"""

import json
import sys
from pathlib import Path

from univitar_ds.simulation.process import load_stubs


def main() -> None:
    load_stubs(Path(sys.argv[1]))
    from univitar_ds.simulation.step import Setting, simulated  # imports torch, which needs the stubs

    setting = Setting(**json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    print(json.dumps(simulated(setting)), flush=True)


if __name__ == "__main__":
    main()
