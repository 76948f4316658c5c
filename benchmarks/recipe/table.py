"""The Markdown tables of bench_recipe.py: for each question the arms that answer it, and what their difference shows.

A value is the mean over seeds at the end of the runs. Intervals are 95 % t intervals over seeds, so they cover the
initial weights and the order of samples, not the choice of the test items, whose number is in the table. Differences
between arms are paired by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from scipy import stats

from benchmarks.recipe.arms import DESIGN, MARGIN

MEASURES = {
    "class of an image, top-1": ("zero-shot", "image", "top-1"),
    "image to caption, R@5": ("image to text", "image", "R@5"),
    "caption to image, R@5": ("text to image", "image", "R@5"),
    "direction of motion, top-1": ("zero-shot", "video", "top-1"),
}
REMAKEABLE = "Data: {}, which anyone can render again. Its scenes decide."
NOT_REMAKEABLE = (
    "Data: {}, a folder that is not part of the repository: no one else can remake this table. Images only. Classes "
    "are those of the data set with the most test items."
)

Rows = Sequence[Mapping[str, str]]
Values = dict[int, float]
"""A result by seed."""


@dataclass(frozen=True)
class Question:
    """Arms that are compared with a baseline."""

    title: str
    about: str
    baseline: str
    arms: tuple[str, ...]
    equal_tokens: tuple[str, ...] = ()
    """Arms that are configured to take the tokens of the baseline."""
    of_arms: Mapping[str, str] = field(default_factory=dict)
    """Sentences about arms that only some data have."""


QUESTIONS = (
    Question(
        "Curriculum against one fixed size",
        "`fixed` resizes every item to one square. `curriculum` trains on small squares, then on native images, then "
        "on native images and, if the data has them, videos, with the same number of samples; `curriculum-tokens` "
        "trains longer, until it has taken the tokens of `fixed`.",
        "fixed",
        ("curriculum", "curriculum-tokens"),
        ("curriculum-tokens",),
    ),
    Question(
        "Distillation from a stronger teacher",
        "`distilled` is `curriculum` with a distillation loss of decreasing weight. `teacher` is an encoder of the "
        "same size, trained four times as long on other scenes of the same kind; its row is its own accuracy on the "
        "test items of the students.",
        "curriculum",
        ("distilled", "teacher"),
    ),
    Question(
        "Native sizes against squares",
        "One stage each. `native` keeps the aspect ratio, `square` does not; their items have the same mean number of "
        "tokens, images and videos alike, so samples and tokens are equal.",
        "native",
        ("square",),
        ("square",),
    ),
    Question(
        "Share of steps with videos",
        "One native stage each, with equal samples: videos take the place of images. `native` has a share of 0.3.",
        "video-0",
        ("video-0.1", "native", "video-0.6"),
    ),
    Question(
        "Sigmoid against softmax, one pack a step",
        "The loss alone differs. A step has about 21 pairs of scenes, or 24 of photos. `sigmoid` starts with a bias of "
        "the logits of -10, as SigLIP does for batches of 32,768.",
        "native",
        ("sigmoid", "sigmoid-bias"),
        ("sigmoid", "sigmoid-bias"),
        {
            "sigmoid-bias": "`sigmoid-bias` starts with -3: then the predicted probability of a pair is about the "
            "share of the true pairs among all, 1 in 21."
        },
    ),
    Question(
        "Sigmoid against softmax, four packs a step",
        "A step has about 84 pairs of scenes, or 96 of photos, and a run a quarter of the steps.",
        "softmax-4",
        ("sigmoid-4",),
        ("sigmoid-4",),
    ),
    Question(
        "timm's NaFlexViT",
        "Images only. `timm-samples` and `timm-cpu` are timm's NaFlexViT of the same width, depth and patch size, with "
        "a text tower of the same shape, trained with timm's NaFlex loader by a plain loop in fp32: with as many "
        "samples as `video-0`, and with as many CPU seconds.",
        "video-0",
        ("timm-samples", "timm-cpu"),
    ),
)


def tables(rows: Rows, data: str, samples: int) -> str:
    """Returns the Markdown of all questions that have a result.

    Args: rows: of the CSV; data, samples: rows of other data, of runs of another length and of other versions of the
        arms are left out.
    """
    mine = [
        row for row in rows if (row["design"], row["data"], row["run_samples"]) == (str(DESIGN), data, str(samples))
    ]
    parts = [(REMAKEABLE if data == "scenes" else NOT_REMAKEABLE).format(data.removeprefix("photos-"))]
    found = [text for question in QUESTIONS if (text := _table(question, final_rows(mine)))]
    return "\n\n".join([*parts, *(found or [f"No two arms of {samples:,} samples can be compared yet."])])


def final_rows(rows: Rows) -> dict[str, Rows]:
    """Returns the rows at the end of each run, by arm."""
    ends: dict[tuple[str, str], int] = {}
    for row in rows:
        run = row["arm"], row["seed"]
        ends[run] = max(ends.get(run, 0), int(row["samples_seen"]))
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        if int(row["samples_seen"]) == ends[row["arm"], row["seed"]]:
            found.setdefault(row["arm"], []).append(row)
    return dict(found)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns mean and half width of the 95 % t interval; None for fewer than two values."""
    if len(values) < 2:
        return None
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def _values(rows: Rows, measure: str) -> Values:
    return {int(row["seed"]): float(row["value"]) for row in _of_measure(rows, measure)}


def _of_measure(rows: Rows, measure: str) -> Rows:
    """Returns the rows of a measure: of several data sets those of the one with the most items, the first of equal
    ones."""
    mine = [row for row in rows if (row["task"], row["modality"], row["measure"]) == MEASURES[measure]]
    chosen = max(mine, key=lambda row: int(row["n"]), default={}).get("set")
    return [row for row in mine if row.get("set") == chosen]


def _table(question: Question, of_arm: Mapping[str, Rows]) -> str | None:
    """Returns the table of a question; None unless there are two arms to compare."""
    arms = [arm for arm in (question.baseline, *question.arms) if arm in of_arm]
    if question.baseline not in arms or len(arms) < 2:
        return None
    measures = [measure for measure in MEASURES if any(_of_measure(of_arm[arm], measure) for arm in arms)]
    about = [question.about, *(text for arm, text in question.of_arms.items() if arm in arms)]
    lines = [f"### {question.title}", "", " ".join(about), ""]
    lines += [
        "| arm | seeds | samples | tokens | CPU s | " + " | ".join(measures) + " |",
        "|---" * (5 + len(measures)) + "|",
    ]
    for arm in arms:
        cells = [_percent(list(_values(of_arm[arm], measure).values())) for measure in measures]
        lines.append(f"| {arm} | {' | '.join([*_effort(of_arm[arm]), *cells])} |")
    lines.append(f"| chance (test items) | | | | | {' | '.join(_chance(of_arm, arms, name) for name in measures)} |")
    lines.append("")
    lines += [f"- {line}" for line in _conclusions(question, of_arm, arms)]
    return "\n".join(lines)


def _effort(rows: Rows) -> list[str]:
    """Returns the numbers of seeds, and the means over seeds of samples, tokens and CPU seconds."""
    by_seed = {row["seed"]: row for row in rows}.values()
    cells = [str(len(by_seed))]
    for column in ("samples_seen", "tokens_seen", "cpu_s"):
        known = [float(row[column]) for row in by_seed if row[column]]
        cells.append(f"{statistics.mean(known):,.0f}" if known else "–")
    return cells


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "–"
    found = interval(values)
    return f"{100 * statistics.mean(values):.1f} %" + (f" ± {100 * found[1]:.1f}" if found else "")


def _chance(of_arm: Mapping[str, Rows], arms: Sequence[str], measure: str) -> str:
    row = next(row for arm in arms for row in _of_measure(of_arm[arm], measure))
    return f"{100 * float(row['chance']):.1f} % ({row['n']})"


def _conclusions(question: Question, of_arm: Mapping[str, Rows], arms: Sequence[str]) -> Iterator[str]:
    """Yields a sentence for each arm: its difference to the baseline, and what it shows."""
    for arm in arms[1:]:
        if arm == "teacher":  # has one seed of its own: nothing is paired
            continue
        if arm in question.equal_tokens:
            yield from _tokens_differ(arm, question.baseline, of_arm)
        found, single = [], 1
        for measure in MEASURES:
            ours, other = _values(of_arm[arm], measure), _values(of_arm[question.baseline], measure)
            against = "" if other else " (against chance)"
            if ours and not other:
                level = float(_of_measure(of_arm[arm], measure)[0]["chance"])
                other = dict.fromkeys(ours, level)
            gains = [100 * (ours[seed] - other[seed]) for seed in sorted(ours.keys() & other.keys())]
            if gains:
                single = max(single, len(gains))
                found.append(f"{measure}{against} {_difference(gains)}")
        if found:
            note = "" if single > 1 else " One seed: a difference without an interval shows nothing."
            yield f"`{arm}` minus `{question.baseline}`, points: {'; '.join(found)}.{note}"


def _difference(gains: Sequence[float]) -> str:
    found = interval(gains)
    if found is None:
        return f"{statistics.mean(gains):+.1f}"
    mean, half = found
    verdict = "better" if mean > half else "worse" if mean < -half else "no difference shown"
    return f"{mean:+.1f} ± {half:.1f} ({verdict})"


def _tokens_differ(arm: str, baseline: str, of_arm: Mapping[str, Rows]) -> Iterator[str]:
    """Yields a warning if arms that should have equal tokens do not."""
    means = [statistics.mean(float(row["tokens_seen"]) for row in of_arm[name]) for name in (arm, baseline)]
    ratio = means[0] / means[1]
    if abs(ratio - 1) > MARGIN:
        yield f"Tokens of `{arm}` are {ratio:.3f} of those of `{baseline}`: not equal within {MARGIN:.0%}."
