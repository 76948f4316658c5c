"""Training from Python: `univitar_ds.train`, for scripts and notebooks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.load import check_config, dumped, load_config
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import ConfigError, RunError
from univitar_ds.import_path import safe_environment


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    nproc: int = 1,
    report: Callable[[str], None] = print,
) -> Path:
    """Trains a run, as `univitar-ds train --config` does. Returns the run's folder.

    The ranks are processes of their own, so this process neither imports DeepSpeed nor uses CUDA. After an interrupt,
    as in a notebook, the run saves, and `resume` continues it. If this process is killed, the run continues.

    Args:
        config: a `RunConfig`, a run file's content, the path of a run file, or the name of a shipped recipe.
        overrides: `KEY=VALUE`, as on the command line.
        nproc: number of processes on this machine.
        report: called with each line that the run prints. If it raises, the run saves and ends.
    Raises: ConfigError if the configuration is wrong, before anything starts; RunError if the run ends early.
    """
    if isinstance(overrides, str) or not all(isinstance(one, str) for one in overrides):
        raise ConfigError(f"overrides must be a list of texts such as 'seed=3', got {overrides!r:.80}")
    if isinstance(config, (str, Path)):
        checked = load_config(str(config), overrides)
        return _train(["--config", str(config), *overrides], checked, nproc, report)
    if not isinstance(config, (RunConfig, Mapping)):
        raise ConfigError(f"config must be a RunConfig, a mapping or a run file, got {type(config).__name__}")
    if not isinstance(config, RunConfig):
        config = check_config(dict(config), "config")
    with tempfile.TemporaryDirectory(prefix="univitar-ds-") as folder:
        path = Path(folder) / "run.yaml"
        replace_text(path, dumped(config.model_dump(mode="json", exclude_unset=True)))
        checked = load_config(str(path), overrides)
        return _train(["--config", str(path), *overrides], checked, nproc, report)


def resume(
    run: str | Path, *, overrides: Sequence[str] = (), nproc: int = 1, report: Callable[[str], None] = print
) -> Path:
    """Continues the run in the folder `run` from its last checkpoint. Returns the folder.

    Args, Raises: as `train`.
    """
    _run(["--resume", str(run), *overrides], nproc, report)
    return Path(run)


def _train(words: list[str], config: RunConfig, nproc: int, report: Callable[[str], None]) -> Path:
    _run(words, nproc, report)
    return Path(config.output, config.name)


def _run(words: Sequence[str], nproc: int, report: Callable[[str], None]) -> None:
    """Runs `univitar-ds train` with the arguments `words`. Raises: RunError if its exit status is not 0."""
    command = [sys.executable, "-P", "-m", "univitar_ds", "train", *words, "--nproc", str(nproc)]
    process = subprocess.Popen(
        command,
        env=safe_environment({**os.environ, "PYTHONUNBUFFERED": "1"}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C on a terminal reaches it once, through this process
    )
    assert process.stdout is not None
    # It is stopped by SIGTERM, since a process ignores SIGINT if a shell started this one in the background.
    last = ""
    failed: BaseException | None = None
    while True:
        try:
            for line in process.stdout:
                last = line.rstrip("\n")
                if failed is None:
                    report(last)
            break
        except KeyboardInterrupt:  # the run saves and ends; what it prints meanwhile is still reported
            process.terminate()
        except BaseException as error:  # raised by `report`: the run saves and ends, so that no process is left running
            failed = error
            process.terminate()
    code = process.wait()
    if failed is not None:
        raise failed
    if code:
        raise RunError(f"the run ended with exit code {code}: {last}", code)
