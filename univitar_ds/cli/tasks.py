"""The commands `univitar-ds eval TASK MODEL --data SOURCE`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from univitar_ds.cli.common import add_command, add_storage, expand, expand_place, positive, shown_lines
from univitar_ds.cli.inference import add_reading, model_options
from univitar_ds.screen import show

if TYPE_CHECKING:
    from univitar_ds.tasks.dense.probe import DenseOptions

TASKS = ("zero-shot", "retrieval", "knn", "linear", "attentive", "dense", "tokens")
PROBES = ("knn", "linear", "attentive", "tokens")
"""Tasks that are fitted on the items of a training split."""
BY_TOKENS = ("attentive", "dense")
"""Tasks on all tokens of an item, which --cache stores in files of a limited size."""
_MODEL = """
MODEL: a run's folder, an export, a folder in any format of convert, s3://..., or owner/name on the Hugging Face hub.
"""
_PEERS = """\
Or a CLIP, SigLIP, SigLIP 2, DINOv2 or DINOv3 model of transformers, as a folder or hub name: its own image processor
and forward pass are used, and the vector of a video is the mean over its frames.
"""
_SOURCE = """\
SOURCE: a packed folder, or anything that `data pack` reads: tars, class folders, a table, an imagefolder, COCO's
captions ...; folders and tables are packed once into --cache. Or a folder of CLIP_benchmark (classnames.txt,
test/*.tar).
"""
_FEATURES = """
Features are computed by --nproc processes, with the same result for any number, and are kept in --cache: after an
interruption the same command continues. On the same model, data and split, zero-shot and retrieval share their
features, and so do knn and linear. At most 20 GiB are kept; to free them, remove the folder `features` in --cache.
"""
_OF_TOKENS = """
All tokens of both splits are computed by --nproc processes, with the same result for any number, and are stored in
--cache: after an interruption the same command continues with the first unfinished part of 512 items. A value takes 2
bytes, and a split at most --max-gb: above it, the command ends early with the expected size. Memory holds the tokens of
one step only. Afterwards at most 20 GiB are kept for other commands, and unfinished tokens for a week.
"""
_VIEWS = """
--clips K and --crops 3 embed several views of an item, as in Kinetics' protocols, and average their unit vectors: each
of K equal parts of a video, with --frames frames each; the largest squares at both ends and in the centre of the longer
side. Each view is a pass over the data. By default the whole video and the whole image or frame are one view.
"""
_FIGURES = """
Images and videos are evaluated separately. Each result has a 95 % bootstrap interval over the items, and the chance
level.
"""
_ABOUT = {
    "zero-shot": (
        "zero-shot classification with class names as texts",
        """Assign each item to the class with the most similar text embedding. As in CLIP, the embedding of a class is
the mean of the embeddings of its sentences, one for each template.

The labels of the items must be class names; for numbers, give --class-names. By default images use CLIP's 80 templates
for ImageNet, and videos "a video of a {}."; --templates FILE replaces both. The class name replaces {} in a template;
{c}, as in CLIP_benchmark's templates, is accepted too.
""",
        """
  univitar-ds eval zero-shot runs/photos --data imagenet/val --class-names imagenet_names.txt
  univitar-ds eval zero-shot runs/photos --data wds_cifar10 --json > cifar10.json
  univitar-ds eval zero-shot google/siglip-base-patch16-224 --data wds_cifar10 --nproc 2""",
    ),
    "retrieval": (
        "image-text and video-text retrieval",
        """Retrieve the captions of each item among all captions, and the items of each caption: recall at 1, 5 and 10.

With --captions lines, each line of a .txt is a separate caption.
""",
        """
  univitar-ds eval retrieval runs/photos --data data/flickr30k --captions lines""",
    ),
    "knn": (
        "k nearest neighbours on the encoder's features",
        """Classify each test item by a vote of its k nearest training items, as in DINO: by cosine similarity, with
votes weighted by exp(cosine / 0.07).
""",
        """
  univitar-ds eval knn runs/photos --data data/pets --train-split train --split test""",
    ),
    "linear": (
        "linear probe on the encoder's features",
        """Train a linear classifier on the pooled features of the training split, and score it on the test split.

--solver lbfgs: scikit-learn's logistic regression. The strength of its penalty is chosen on a fifth of the training
items. All features are in memory in float64.
--solver sgd: as in DINOv2, heads with 13 learning rates are trained together in float32: SGD with momentum 0.9, no
weight decay, a cosine schedule, batches of 1,024, 10 epochs (at least 1,000 steps). The best rate is chosen on a fifth
of the training items; a new head is then trained with it on all of them. All features are in memory in float32: 5 GB
for ImageNet at width 1024.
""",
        """
  univitar-ds eval linear runs/photos --data data/pets --train-split train --split test
  univitar-ds eval linear runs/photos --data data/imagenet --solver sgd --json > linear.json""",
    ),
    "attentive": (
        "attentive probe on the encoder's tokens",
        """Train a learned query that attends to all tokens of an item, and a linear head on the result: AIM's probe.

The encoder is frozen and encodes each item once, at its native size. ImageNet at 256 tokens and width 1024 takes 670
GB: set --cache to a large local disk and --max-gb, and limit the tokens by --max-tokens. A peer has the tokens of all
frames of a video, without class and register tokens; DINO and SigLIP 2 NaFlex keep the aspect ratio with --max-tokens,
else their own image processor is used. Heads with 5 learning rates are trained together by AdamW, 20 epochs in batches
of 256 (at least 200 steps); the best one is chosen on a tenth of the training items and is scored without further
training.
""",
        """
  univitar-ds eval attentive runs/photos --data data/pets
  univitar-ds eval attentive runs/photos --data data/imagenet --split val --max-tokens 256 --cache /scratch/me \\
      --max-gb 700""",
    ),
    "dense": (
        "dense probe: segmentation by a linear head on the patches",
        """Train a linear head on patch features to predict the class of each pixel: mean intersection over union.

The encoder is frozen and encodes each image whole at its native size, or with --window as overlapping square windows,
whose logits are averaged. In training, all pixels of a patch share its logits; for the score, logits are upsampled
bilinearly to the size of the label map. Heads with 5 learning rates are trained together by AdamW, in batches of 16, 20
epochs (at least 500 steps); the best is chosen on a tenth of the training images. Features and labels take 2 bytes per
value and 2 per pixel: 80 GB for ADE20K at width 1024. Of peers, DINO and SigLIP 2 NaFlex read images of any size, up to
4,096 tokens; CLIP and SigLIP read windows of their own size.

SOURCE: a folder in ADE20K's layout: images/training, images/validation, annotations/training, annotations/validation;
or in Pascal VOC's: JPEGImages, SegmentationClass, ImageSets/Segmentation/train.txt and val.txt as --train-split and
--split. For other layouts, name the folder of the label maps with --masks MASKS: the label map of SOURCE/a/b.jpg is
MASKS/a/b.png; --image-suffix and --mask-suffix set other endings of the two names. If SOURCE or MASKS has a folder with
the name of the split, only its files are used. Images without a label map are left out. A label map is a grey or
palette image (PNG) whose values are class numbers; --ignore lists the values that are not classes, 0 in ADE20K.

Each result has its 95 % bootstrap interval over the images; chance is to predict the most frequent class everywhere.
""",
        """
  univitar-ds eval dense runs/photos --data ade20k --ignore 0,255
  univitar-ds eval dense runs/photos --data ade20k --ignore 0,255 --window 448
  univitar-ds eval dense runs/photos --data VOCdevkit/VOC2012 --train-split train --split val
  univitar-ds eval dense runs/photos --data city/leftImg8bit --masks city/gtFine --train-split train --split val \\
      --image-suffix _leftImg8bit.png --mask-suffix _gtFine_labelTrainIds.png""",
    ),
    "tokens": (
        "accuracy against resolution: a sweep over tokens per item",
        """Measure kNN or zero-shot top-1 at several numbers of tokens per item: native aspect ratio against squares.

Each item is encoded twice: at its native aspect ratio, with as many tokens as possible up to this number, and stretched
to a square of this number of tokens. Small items are enlarged. A note gives the difference of the two accuracies, with
its 95 % interval, and the mean number of tokens per item for each. --by knn classifies by the 20 nearest training items
at the same resolution, --by zero-shot by the text embeddings of the class names. Of peers, DINO and SigLIP 2 NaFlex can
be measured; CLIP and SigLIP have one size. A peer reads each frame of a video with its share of the tokens.
""",
        """
  univitar-ds eval tokens runs/photos --data data/pets --by knn --counts 64,144,256,576 --png tokens.png""",
    ),
}


def add_tasks(commands) -> None:
    """Adds a command for each task to `commands`. Its name is "eval TASK", with a space: see `main.parse`."""
    for task in TASKS:
        help_text, about, examples = _ABOUT[task]
        description = f"{about}{_common(task)}{examples}"
        parser = add_command(commands, f"eval {task}", _run, help_text, description, leaves_files=False, announced=True)
        parser.set_defaults(task=task)
        parser.add_argument("model", type=expand_place, metavar="MODEL", help="see above")
        parser.add_argument("--data", type=expand_place, required=True, metavar="SOURCE", help="see above")
        if task == "dense":
            _add_dense(parser)
        else:
            _add_labelled(parser, task)
        if task in ("linear", "attentive", "dense"):
            parser.add_argument("--epochs", type=positive, metavar="N", help="passes over the training items")
        parser.add_argument(
            "--cache",
            type=expand,
            metavar="DIR",
            help="folder of packed data and features (default ~/.cache/univitar_ds/data)",
        )
        if task in BY_TOKENS:
            parser.add_argument(
                "--max-gb",
                type=positive,
                metavar="N",
                help="maximum GB of the tokens of a split (default 200)",
            )
        parser.add_argument("--nproc", type=positive, help="processes; default: one per GPU, one on the CPU")
        parser.add_argument("--json", action="store_true", help="print the results as JSON")
        add_reading(parser)
        add_storage(parser)


def _common(task: str) -> str:
    """Returns the part of a description that tasks share; the dense probe describes its own data and figures."""
    features = _OF_TOKENS if task in BY_TOKENS else _FEATURES
    if task == "dense":
        return f"{_MODEL}{_PEERS}{features}"
    views = _VIEWS if task in ("zero-shot", "retrieval") else ""
    return f"{_MODEL}{_PEERS}{_SOURCE}{features}{views}{_FIGURES}"


def _add_labelled(parser: argparse.ArgumentParser, task: str) -> None:
    """Adds the options of tasks on items with labels or captions: all but the dense probe."""
    parser.add_argument("--split", default="test", help="split that is scored (default test)")
    if task in PROBES:
        parser.add_argument("--train-split", default="train", help="split to train on (default train)")
        parser.add_argument(
            "--train-data", type=expand_place, metavar="SOURCE", help="source of the training split (default --data)"
        )
    if task in ("zero-shot", "retrieval"):
        for name, what in (("clips", "equal parts of a video"), ("crops", "square crops along the longer side")):
            parser.add_argument(
                f"--{name}", type=positive, default=1, metavar="N", help=f"{what}, averaged (default 1)"
            )
    if task in ("zero-shot", "tokens"):
        parser.add_argument(
            "--templates",
            type=expand_place,
            metavar="TEXTFILE",
            help="a template per line, with {} for the class; imagenet: CLIP's 80 (default for images)",
        )
    if task == "retrieval":
        parser.add_argument(
            "--captions",
            choices=("one", "lines"),
            default="one",
            help="content of a .txt: one caption (default), or one per line",
        )
    else:
        parser.add_argument(
            "--class-names",
            type=expand_place,
            metavar="TEXTFILE",
            help="a class name per line, the first for label 0 (default: labels are class names)",
        )
    if task == "knn":
        parser.add_argument("--neighbours", type=_counts, metavar="K,K", help="numbers of neighbours (default 10,20)")
    if task == "linear":
        parser.add_argument("--solver", choices=("lbfgs", "sgd"), default="lbfgs", help="see above (default lbfgs)")
    if task == "attentive":
        parser.add_argument(
            "--max-tokens", type=positive, metavar="N", help="maximum tokens of an item (default: the model's)"
        )
    if task == "tokens":
        parser.add_argument(
            "--counts", type=_counts, metavar="N,N", help="tokens per item (default 64,144,256,576,1024)"
        )
        parser.add_argument(
            "--by", choices=("knn", "zero-shot"), help="classifier (default zero-shot; knn without a text tower)"
        )
        parser.add_argument("--png", type=expand, metavar="FILE", help="file for a plot of the curves")


def _add_dense(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="validation", help="split that is scored (default validation)")
    parser.add_argument("--train-split", default="training", help="split to train on (default training)")
    parser.add_argument(
        "--train-data", type=expand_place, metavar="SOURCE", help="source of the training split (default --data)"
    )
    parser.add_argument(
        "--masks", type=expand_place, metavar="FOLDER", help="folder of label maps (default: ADE20K's layout)"
    )
    parser.add_argument(
        "--train-masks", type=expand_place, metavar="FOLDER", help="label maps of --train-data (default --masks)"
    )
    parser.add_argument(
        "--mask-suffix", default=".png", metavar="TEXT", help="ending of a label map's name (default .png)"
    )
    parser.add_argument("--image-suffix", metavar="TEXT", help="ending of an image's name (default: the extension)")
    parser.add_argument(
        "--ignore", type=_labels, default=(255,), metavar="N,N", help="values that are not classes (default 255)"
    )
    parser.add_argument("--window", type=positive, metavar="PX", help="side of sliding windows (default: whole images)")
    parser.add_argument(
        "--stride", type=positive, metavar="PX", help="step between windows (default: two thirds of a window)"
    )


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers; give one such as 64,256") from None


def _labels(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if strange := [part for part in parts if not part.isdecimal() or int(part) >= 1 << 16]:
        raise argparse.ArgumentTypeError(f"{strange[0]} is not a value of a label map; give values from 0 to 65535")
    return tuple(map(int, parts))


def _run(arguments: argparse.Namespace) -> None:
    from univitar_ds.evaluation.report import render_figures
    from univitar_ds.tasks.cached.averaged import ItemViews
    from univitar_ds.tasks.run import TaskOptions, run_task
    from univitar_ds.tasks.sources import DataOptions

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    names = ("data", "split", "train_data", "train_split", "class_names", "captions", "cache")
    data = DataOptions(**{name: given[name] for name in names if name in given})
    names = ("templates", "neighbours", "solver", "epochs", "max_tokens", "max_gb", "counts", "by", "png")
    dense = {"dense": _dense_options(given)} if arguments.task == "dense" else {}
    views = ItemViews(given.get("clips", 1), given.get("crops", 1))
    options = TaskOptions(**{name: given[name] for name in names if name in given}, **dense, views=views)
    result = run_task(arguments.task, arguments.model, data, options, model_options(arguments))
    if arguments.json:
        show(json.dumps(result))
        return
    show(shown_lines(render_figures(f"{arguments.task} of {arguments.model} on {arguments.data}", result)))


def _dense_options(given: dict[str, Any]) -> DenseOptions:
    from univitar_ds.tasks.dense.files import MaskOptions
    from univitar_ds.tasks.dense.probe import DenseOptions

    masks = MaskOptions(given.get("masks"), given.get("train_masks"), given["mask_suffix"])
    masks = replace(masks, image_suffix=given.get("image_suffix"), ignore=given["ignore"])
    return DenseOptions(masks, given.get("window"), given.get("stride"))
