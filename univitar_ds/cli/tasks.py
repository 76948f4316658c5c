"""The commands `univitar-ds eval TASK MODEL --data SOURCE`."""

from __future__ import annotations

import argparse
import json

from univitar_ds.cli.common import add_command, add_storage, expand, expand_place, positive, shown
from univitar_ds.cli.inference import add_reading, model_options
from univitar_ds.screen import show

TASKS = ("zero-shot", "retrieval", "knn", "linear")
_COMMON = """
MODEL: a run's folder, an export, a folder in any format of convert, s3://..., or owner/name on the Hugging Face hub.
Or a CLIP, SigLIP, SigLIP 2, DINOv2 or DINOv3 model of transformers, as a folder or hub name: its own image processor
and forward pass are used, and a video is the mean of its frames.
SOURCE: what `data pack` reads: a packed folder, tars, class folders, a table, an imagefolder, COCO's captions ...;
folders and tables are packed once into --cache. Or a folder of CLIP_benchmark (classnames.txt, test/*.tar).

Features are computed by --nproc processes, with the same result for any number, and are kept in --cache: after an
interruption the same command continues, and another task on the same model, data and split computes none again. At
most 20 GB are kept; remove the folder `features` in --cache to free them.

Images and videos are measured apart. Each result has its 95 % bootstrap interval over the items, and the chance level.
"""
_ABOUT = {
    "zero-shot": (
        "zero-shot classification with class names as texts",
        """Classify images and videos by the nearest class. A class is the mean of its sentences, as in CLIP.

Items need labels that are names, or --class-names. Images take CLIP's 80 sentences for ImageNet unless --templates or
CLIP_benchmark's templates say otherwise; videos take "a video of a {}.".
""",
        """
  univitar-ds eval zero-shot runs/photos --data imagenet/val --class-names imagenet_names.txt
  univitar-ds eval zero-shot runs/photos --data wds_cifar10 --json > cifar10.json
  univitar-ds eval zero-shot google/siglip-base-patch16-224 --data wds_cifar10 --nproc 2""",
    ),
    "retrieval": (
        "image-text and video-text retrieval",
        """Find the captions of an item among all captions, and the items of a caption: recall at 1, 5 and 10.

With --captions lines, each line of a text is a caption of its own.
""",
        """
  univitar-ds eval retrieval runs/photos --data data/flickr30k --captions lines""",
    ),
    "knn": (
        "k nearest neighbours on the encoder's features",
        """Give each test item the class that its nearest training items vote for, as in DINO: cosine, votes
exp(cosine / 0.07).
""",
        """
  univitar-ds eval knn runs/photos --data data/pets --train-split train --split test""",
    ),
    "linear": (
        "linear probe on the encoder's features",
        """Train a logistic regression on the features of the training split, and score it on the test split.

The strength of its penalty is chosen on a fifth of the training items (pip install 'univitar_ds[eval]').
""",
        """
  univitar-ds eval linear runs/photos --data data/pets --train-split train --split test""",
    ),
}


def add_tasks(commands) -> None:
    """Adds a command for each task to `commands`; `main.parse` takes its two words together."""
    for task in TASKS:
        help_text, about, examples = _ABOUT[task]
        parser = add_command(
            commands, f"eval {task}", _run, help_text, f"{about}{_COMMON}{examples}", leaves_files=False
        )
        parser.set_defaults(task=task)
        parser.add_argument("model", type=expand_place, metavar="MODEL", help="see above")
        parser.add_argument("--data", type=expand_place, required=True, metavar="SOURCE", help="see above")
        parser.add_argument("--split", default="test", help="split that is scored (default test)")
        if task in ("knn", "linear"):
            parser.add_argument("--train-split", default="train", help="split to learn from (default train)")
            parser.add_argument("--train-data", type=expand_place, metavar="SOURCE", help="its source (default SOURCE)")
        if task == "zero-shot":
            parser.add_argument(
                "--templates",
                type=expand_place,
                metavar="TEXTFILE",
                help="a sentence per line, with {} for the class; imagenet: CLIP's 80 (default for images)",
            )
        if task == "retrieval":
            parser.add_argument("--captions", choices=("one", "lines"), default="one", help="captions of a text")
        else:
            parser.add_argument("--class-names", type=expand_place, metavar="TEXTFILE", help="names of numbered labels")
        if task == "knn":
            parser.add_argument("--neighbours", type=_counts, metavar="K,K", help="numbers of neighbours (10,20)")
        parser.add_argument(
            "--cache", type=expand, metavar="DIR", help="for packed data and features (~/.cache/univitar_ds/data)"
        )
        parser.add_argument("--nproc", type=positive, help="processes; default: one per GPU, one on the CPU")
        parser.add_argument("--json", action="store_true", help="print the results as JSON")
        add_reading(parser)
        add_storage(parser)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _run(arguments: argparse.Namespace) -> None:
    from univitar_ds.evaluation.report import render_figures
    from univitar_ds.tasks.reading import DataOptions
    from univitar_ds.tasks.run import TaskOptions, run_task

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    names = ("data", "split", "train_data", "train_split", "class_names", "captions", "cache")
    data = DataOptions(**{name: given[name] for name in names if name in given})
    options = TaskOptions(**{name: given[name] for name in ("templates", "neighbours") if name in given})
    result = run_task(arguments.task, arguments.model, data, options, model_options(arguments))
    if arguments.json:
        show(json.dumps(result))
        return
    show(shown_lines(render_figures(f"{arguments.task} of {arguments.model} on {arguments.data}", result)))


def shown_lines(text: str) -> str:
    """Returns a text of several lines as `shown` does."""
    return "\n".join(map(shown, text.split("\n")))
