"""Figures of one modality's embeddings, and sentences on what could not be measured and why."""

from __future__ import annotations

from collections.abc import Sequence

from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.retrieval import retrieval
from univitar_ds.evaluation.scores import Figure
from univitar_ds.evaluation.zero_shot import Texts, zero_shot
from univitar_ds.geometry import Modality

DAMAGE = frozenset({"cut", "damaged"})
"""Kinds of bad samples that are bytes of a shard: their modality is unknown."""
LOOK_CLOSER = "univitar-ds data verify SOURCE lists them"


def measure(
    found: Embeddings, templates: Sequence[str], texts: Texts, *, expected: bool, named: bool
) -> tuple[list[Figure], list[str]]:
    """Figures of one modality, and a sentence for each thing that could not be measured.

    Zero-shot needs labels and `templates`, retrieval captions. `expected`: the sources are known to hold the modality;
    `named`: a source has class names.
    """
    kind = found.modality
    left_out = f"left out: {_counted(found)}; {LOOK_CLOSER}" if found.bad else ""
    if not len(found):
        if expected or set(found.bad) - DAMAGE:
            return [], [f"No {kind} that can be read in the evaluation data ({left_out or 'it holds none'})."]
        return [], []
    figures, notes = zero_shot(found, templates, texts)
    labels = {label for label in found.labels if label is not None}
    if labels and not named and all(label.isdecimal() for label in labels):
        notes.append(
            f"Zero-shot of {kind}s: labels are numbers, such as {min(labels)!r}; if they are not the names themselves, "
            "name them by class_names of the source."
        )
    ranked = retrieval(found, texts)
    if not found.captioned:
        notes.append(f"Retrieval of {kind}s: no item has a caption.")
    elif not ranked:
        notes.append(f"Retrieval of {kind}s: all {kind}s with a caption have the same one, so there is no choice.")
    if left_out:
        notes.append(f"Some {kind}s were {left_out}.")
    return [*figures, *ranked], notes


def nothing_measured(found: Sequence[Embeddings], unmet: Sequence[tuple[Modality, int]]) -> str:
    """The sentence for an evaluation without any figure: what was requested and what was found.

    `unmet` are samples of modalities that no stage of the run reads.
    """
    asked = " and ".join(f"{one.modality}s" for one in found)
    parts = [f"the evaluation measured nothing: it asks for retrieval and zero-shot classification of {asked}"]
    for one in found:
        labels = {label for label in one.labels if label is not None}
        sentence = (
            f"found {len(one)} {one.modality}s that can be read, {len(one.captioned)} of them with a caption, "
            f"{sum(label is not None for label in one.labels)} with a label ({len(labels)} different)"
        )
        parts.append(f"{sentence}, left out: {_counted(one)}" if one.bad else sentence)
    parts += [f"found {count} {kind}s, which no stage of the run reads" for kind, count in unmet]
    return (
        f"{'; '.join(parts)}. Retrieval needs items with different captions, zero-shot two labels or more; name such a "
        "source in evaluation.sources (class_names, where labels are numbers)"
    )


def _counted(found: Embeddings) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.bad.items()))
