"""Exports a run: the encoder in the release's layout."""

from __future__ import annotations

from pathlib import Path

from univitar_ds.convert.comparison import compare
from univitar_ds.convert.conversion import write
from univitar_ds.convert.destination import check_space, new_folder
from univitar_ds.formats import run as run_format
from univitar_ds.formats.recognise import open_stored
from univitar_ds.formats.run import Weights


def export_run(source: str | Path, out: str | Path, weights: Weights | None = None) -> Path:
    """Writes the encoder of a run (or of one of its checkpoints) to the folder `out`, reads it back and compares.

    `config.json` has the size rule of the run's last stage, so that `Preprocessor` prepares images as in that stage. An
    earlier export in `out` is replaced atomically: an export that fails leaves the previous content.

    Args: weights: see `formats.run.read`.
    Returns: `out`.
    Raises: CheckpointError if the source is not a run or is damaged, if `out` contains other files, or if the release
        cannot express the size rule; StorageError if `out` cannot be written.
    """
    out = Path(out)
    with new_folder(out, replace=True) as folder:
        encoder = run_format.read(Path(source), weights).encoder_only()
        check_space(folder, encoder.tensors.nbytes)
        write(encoder, folder, "release")
        compare(encoder, open_stored(folder))
    return out
