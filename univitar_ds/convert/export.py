"""Exports a run: the encoder in the release's layout, and the whole model for transformers beside it."""

from __future__ import annotations

from pathlib import Path

from univitar_ds.config.run_folder import CARD, MODEL
from univitar_ds.convert.card import write_card
from univitar_ds.convert.comparison import compare
from univitar_ds.convert.conversion import write
from univitar_ds.convert.destination import check_space, new_folder
from univitar_ds.formats import run as run_format
from univitar_ds.formats.recognise import open_stored
from univitar_ds.formats.run import Weights


def export_run(source: str | Path, out: str | Path, weights: Weights | None = None, *, whole: bool = True) -> Path:
    """Writes the model of a run (or of one of its checkpoints) to the folder `out`, reads it back and compares.

        out/config.json, model.safetensors, README.md      the encoder in the release's layout
        out/model/                                         the whole model, see `formats.hf`; not of a classifier

    `config.json` has the size rule of the run's last stage, so that images are prepared as in that stage. An earlier
    export in `out` is replaced atomically: an export that fails leaves the previous content.

    Args: weights: see `formats.run.read`; whole: whether to write `out/model`.
    Returns: `out`.
    Raises: CheckpointError if the source is not a run or is damaged, if `out` contains other files, or if the release
        cannot express the size rule; StorageError if `out` cannot be written.
    """
    out = Path(out)
    with new_folder(out, replace=True) as folder:
        model = run_format.read(Path(source), weights)
        parts = {folder: (model.encoder_only(), "release")}
        if whole and model.joint is not None:
            parts[folder / MODEL] = model, "hf"
        check_space(folder, sum(part.tensors.nbytes for part, _ in parts.values()))
        for place, (part, to) in parts.items():
            write(part, place, to)
            write_card(part, place, to)
            compare(part, open_stored(place))
    return out


def refresh_cards(run: Path, out: Path) -> None:
    """Writes the model cards of an export again, with the results of the run's evaluation.

    Raises: as `export_run`.
    """
    model = run_format.read(run, verify=False)
    for place, part, to in ((out, model.encoder_only(), "release"), (out / MODEL, model, "hf")):
        if (place / CARD).is_file():
            write_card(part, place, to)
