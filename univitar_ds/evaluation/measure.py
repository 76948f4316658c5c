"""Computes the scores of one modality's embeddings, and sentences that explain missing scores."""

from __future__ import annotations

from collections.abc import Sequence

from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.retrieval import retrieval
from univitar_ds.evaluation.scores import Figure
from univitar_ds.evaluation.zero_shot import Texts, zero_shot
from univitar_ds.geometry import Modality

DAMAGE = frozenset({"cut", "damaged"})
"""Kinds of bad samples that are damaged bytes of a shard, whose modality is unknown."""
VERIFY_HINT = "univitar-ds data verify SOURCE lists them"
"""Hint in sentences about bad samples."""


def measure(
    embeddings: Embeddings, templates: Sequence[str], texts: Texts, *, expected: bool, named: bool
) -> tuple[list[Figure], list[str]]:
    """Returns the scores of one modality, and notes: sentences about missing scores and about samples left out.

    Zero-shot classification needs labels, retrieval needs captions.

    Args: templates: sentences with {} for the label; texts: embeds sentences; expected: whether the sources are known
        to contain the modality; named: whether a source has class names.
    """
    kind = embeddings.modality
    missing = left_out(embeddings) if embeddings.bad else ""
    if not len(embeddings):
        if expected or set(embeddings.bad) - DAMAGE:
            return [], [f"No {kind} that can be read in the evaluation data ({missing or 'it holds none'})."]
        return [], []
    figures, notes = zero_shot(embeddings, templates, texts)
    labels = {label for label in embeddings.labels if label is not None}
    if labels and not named and all(label.isdecimal() for label in labels):
        notes.append(
            f"Zero-shot of {kind}s: labels are numbers, such as {min(labels)!r}; if they are not the names themselves, "
            "name them with class_names of the source."
        )
    ranked = retrieval(embeddings, texts)
    if not embeddings.captioned:
        notes.append(f"Retrieval of {kind}s: no item has a caption.")
    elif not ranked:
        notes.append(f"Retrieval of {kind}s: all {kind}s with a caption have the same one, so there is no choice.")
    if missing:
        notes.append(f"Some {kind}s were {missing}.")
    return [*figures, *ranked], notes


def nothing_measured(found: Sequence[Embeddings], unmet: Sequence[tuple[Modality, int]]) -> str:
    """Returns the error message of an evaluation without scores: the scores it needs items for, and the items found.

    Args: found: embeddings of the evaluated modalities; unmet: numbers of samples of other modalities.
    """
    asked = " and ".join(f"{one.modality}s" for one in found)
    parts = [f"the evaluation measured nothing: it is for retrieval and zero-shot classification of {asked}"]
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


def left_out(found: Embeddings) -> str:
    """Returns the end of a sentence: the numbers of samples left out, and how to list them."""
    return f"left out: {_counted(found)}; {VERIFY_HINT}"


def _counted(found: Embeddings) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.bad.items()))
