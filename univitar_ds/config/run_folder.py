"""Names of entries in a run's folder, and trees (`owned.Names`) of all entries that a run writes."""

import re
from contextlib import suppress
from pathlib import Path

from univitar_ds.geometry import MODALITIES
from univitar_ds.owned import MARK, Names

CONFIG = "config.yaml"
DEEPSPEED = "deepspeed.json"
TOKENIZER = "tokenizer.json"
DESCRIPTION = "model.json"
"""Configurations of the run's encoder and text model, see `ContrastiveModel.description`."""
START = "start"
"""A copy of a model from S3 or the hub, from which the run starts."""
CLASSES = "classes.json"
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
EVALUATION = "evaluation.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
BOARD = "tb"
TRACKERS = "trackers.json"
"""Identifiers of the run in experiment trackers."""
EXPORT = "export"
PROFILE = "profile"
MEMORY = "memory"
"""Memory snapshots of GPUs that ran out of memory."""
STACKS = "stacks"
"""Stacks and collectives of the ranks of a run that hung."""

CHECKPOINT_FILES: Names = {
    r"rank\d{5,}\.(safetensors|json)|node\d{5,}\.safetensors|buffers\.safetensors|(state|index|manifest)\.json": None,
    r"\.tmp[0-9A-Za-z]{6}": None,  # partial files of safetensors
}
CHECKPOINT_ROOT: Names = {
    r"(latest|best)|\.tmp-(latest|best)": None,
    r"step-\d{8,}": CHECKPOINT_FILES,
    r"\.tmp-(gone-)?step-\d{8,}": CHECKPOINT_FILES,
}
MODEL = "model"
CARD = "README.md"
_MODEL_FILES: Names = {
    r"(model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)(\.index\.json)?": None,
    r"(config|preprocessor_config|processor_config|tokenizer|tokenizer\.source|tokenizer_config)\.json": None,
    r"(configuration|modeling|image_processing|processing)_univitar\.py": None,
    re.escape(CARD): None,
    r"\.tmp[0-9A-Za-z]{6}": None,  # partial files of safetensors
}
EXPORT_FILES: Names = {
    **_MODEL_FILES,
    MODEL: _MODEL_FILES,
    f"{re.escape(MARK)}(-files)?": None,
    r"(config\.json|model\.safetensors|pytorch_model\.bin)\.partial": None,  # of earlier versions
}
EXAMPLES = {
    (modality, of_texts): f"examples-{'text-to-' if of_texts else ''}{modality}.png"
    for modality in MODALITIES
    for of_texts in (False, True)
}
"""Sheets of examples by (modality, of_texts): items with the captions found for them, or captions with the items."""
LOCKS: Names = {r"\.lock-\d{8}|\.lock-probe-[0-9a-f]{32}": None}
RUN_ENTRIES: Names = {
    "|".join(map(re.escape, (MARK, CONFIG, DEEPSPEED, TOKENIZER, DESCRIPTION, CLASSES))): None,
    "|".join(map(re.escape, (SUMMARY, EVALUATION, METRICS, EVENTS, TRACKERS))): None,
    r"(samples|skipped)-rank\d+\.jsonl": None,
    "|".join(map(re.escape, EXAMPLES.values())): None,
    STACKS: {r"rank\d{5,}\.txt|collectives-rank\d{5,}\.json|nccl-rank\d+|stalls\.jsonl|again": None},
    PROFILE: {r"step\d{8,}-rank\d{5,}\.json\.gz|\.step\d{8,}-rank\d{5,}\.json\.gz\.partial": None},
    MEMORY: {r"rank\d{5,}\.pickle": None},
    BOARD: {r"events\.out\.tfevents\..+": None},
    CHECKPOINTS: CHECKPOINT_ROOT,
    START: _MODEL_FILES,
    rf"{EXPORT}|\.{EXPORT}\.(partial|earlier)": EXPORT_FILES,
}
"""All entries except the locks, which a new launch does not replace."""
REPLACED: Names = {name: below for name, below in RUN_ENTRIES.items() if name != STACKS}
"""Entries that a new launch replaces if there is no checkpoint. STACKS stays, to show why the earlier launch ended."""

MOST_NAMED = 5


def not_a_run(folder: Path) -> str:
    """Returns why a folder is not that of a run, and runs that are near: in it, beside it, or in `runs`."""
    what = "is not the folder of a run (it has no config.yaml)" if folder.exists() else "does not exist"
    for place in (folder, folder.parent, Path("runs")):
        runs: list[str] = []
        with suppress(OSError):
            runs = sorted(path.name for path in place.iterdir() if (path / CONFIG).is_file())
        if runs:
            more = f" and {len(runs) - MOST_NAMED} more" if len(runs) > MOST_NAMED else ""
            return f"{folder} {what}; the runs in {place} are {', '.join(runs[:MOST_NAMED])}{more}"
    return f"{folder} {what}; name a folder that `univitar-ds train` wrote, runs/NAME"
