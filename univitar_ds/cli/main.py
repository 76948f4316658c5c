"""The entry point of `univitar-ds`. Each subcommand imports its modules when it runs, so that `--help` is fast."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from difflib import get_close_matches
from pathlib import Path

from univitar_ds import startup
from univitar_ds.cli.common import add_command, add_overrides, add_weights, expand, positive, shown_lines
from univitar_ds.cli.config import add_config
from univitar_ds.cli.convert import add_convert
from univitar_ds.cli.data import add_data
from univitar_ds.cli.doctor import add_doctor
from univitar_ds.cli.eval_table import TABLE, add_table
from univitar_ds.cli.inference import add_inference
from univitar_ds.cli.init import add_init
from univitar_ds.cli.plan import add_plan
from univitar_ds.cli.tasks import TASKS, add_tasks
from univitar_ds.errors import ConfigError, UserError, storage_error
from univitar_ds.import_path import drop_current_folder, protect_children
from univitar_ds.screen import log_to_screen, lost, prepare_screen, show

DESCRIPTION = "Train, evaluate and export UniViTAR, a native-resolution vision transformer for images and video."
EXAMPLES = """examples:
  univitar-ds init PHOTOS > run.yaml                   a run file that fits your data and this machine
  univitar-ds config stages                            the keys of a section of the run file
  univitar-ds plan --config univitar_1b --nodes 32     memory, time and cost on a cluster
  univitar-ds data pack PHOTOS data/photos             shards and a manifest from a folder of files
  univitar-ds data verify data/photos                  check every shard and sample, write a report
  univitar-ds data probe *.jpg video.mp4               how a run would read these files
  univitar-ds data inspect --config photos             the packs of a run: fill, tokens, bad samples, a plot
  univitar-ds doctor --config photos                   is this machine, or are these nodes, ready for the run?
  univitar-ds train --config photos --nproc 2          train, evaluate and export on two local processes
  univitar-ds train --config run.yaml seed=3 stages.0.lr=5e-4
  univitar-ds train --resume runs/photos --nproc 1     continue, here on another number of processes
  univitar-ds eval runs/photos evaluation.sources.0.path=data/other
  univitar-ds eval knn RUN --data data/pets            a task on other data: zero-shot, retrieval, linear
  univitar-ds report runs/photos                       results and metrics of a run
  univitar-ds convert runs/photos photos_hf --to hf    the model for transformers, or another format
  univitar-ds embed RUN DIR --out f.safetensors        the embeddings of images and videos
  univitar-ds classify RUN *.jpg --labels cat,dog      the most probable classes of files
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status.

    0: success; 1: `data verify`, `data probe` or `classify` found damaged or missing files, `embed` found no file that
    it could use, or a check of `doctor` failed; 2: an error that the user can correct; 85: a run was asked to stop and
    has saved a checkpoint; 130: interrupted.

    If a command that writes no files cannot print: 141 if the reader of a pipe has closed it, as after SIGPIPE, else 2.

    Args: arguments: of the command line, without the program's name; None: those of this process.
    """
    prepare_screen()
    drop_current_folder()  # also here, because the console script does not run `__main__`
    protect_children()
    log_to_screen()
    try:
        parsed = parse(build_parser(), arguments)
        with startup.reported("loading the program") if parsed.announced else nullcontext():
            status = parsed.run(parsed) or 0
        if lost and not parsed.leaves_files and not status:
            status = 141 if isinstance(lost[0], BrokenPipeError) else 2
        return status
    except UserError as error:
        return _failed(error)
    except OSError as error:  # storage errors that were not reported more precisely
        sentence = storage_error(error)
        if sentence is None:
            raise
        return _failed(sentence)
    except KeyboardInterrupt:
        with suppress(OSError):
            print("interrupted", file=sys.stderr, flush=True)
        return 130


def _failed(error: UserError) -> int:
    with suppress(OSError):
        print(shown_lines(f"error: {error}"), file=sys.stderr, flush=True)
    return error.exit_code


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses arguments. Overrides may stand before and after options, which argparse alone rejects."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["eval"] and words[1:2] and words[1] in (*TASKS, TABLE):  # ./NAME is a folder
        words[:2] = [" ".join(words[:2])]
    parsed, rest = parser.parse_known_args(words)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(parsed, "overrides")):
        parsed.parser.error(_unrecognized(parsed.parser, words, rest))
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def _unrecognized(command: argparse.ArgumentParser, words: Sequence[str], rest: Sequence[str]) -> str:
    """Returns the message for the arguments `rest` that a command does not have, with the most similar one it has."""
    if words[0] == "eval" and not Path(words[1]).exists() and (near := get_close_matches(words[1], TASKS, 1)):
        return f"eval has no task {words[1]!r}; did you mean {near[0]!r}?"
    text = f"unrecognized arguments: {' '.join(rest)}"
    option = next((word.partition("=")[0] for word in rest if word.startswith("-")), "")
    near = get_close_matches(option, re.findall(r"--[\w-]+", command.format_usage()), 1)
    return f"{text}; did you mean {near[0]}?" if near else text


class _Versions(argparse.Action):
    """Prints versions from the metadata of the installed packages, without importing them, and exits."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        import importlib.metadata

        from univitar_ds import __version__

        found = [f"univitar_ds {__version__}"]
        for name in ("torch", "deepspeed"):
            with suppress(importlib.metadata.PackageNotFoundError):
                found.append(f"{name} {importlib.metadata.version(name)}")
        show(", ".join(found))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Returns the argument parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="univitar-ds",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=_Versions, nargs=0, help="print the versions of univitar_ds, torch, deepspeed"
    )
    # DeepSpeed's launcher inserts --local_rank as the first argument; the environment has the same value.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_init(commands)
    add_doctor(commands)
    _add_train(commands)
    add_config(commands)
    add_plan(commands)
    add_data(commands)
    _add_after_training(commands)
    add_convert(commands)
    add_tasks(commands)
    add_table(commands)
    add_inference(commands)
    _add_demo(commands)
    return parser


def _add_train(commands) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        "train a run, then evaluate and export it",
        "Train a run, then evaluate it on held-out data and export the encoder.\n\n"
        "Starts --nproc processes on this machine through DeepSpeed's launcher. Under another launcher\n"
        "(deepspeed --module univitar_ds train ..., torchrun -m univitar_ds train ...) this process is a rank.\n"
        "The run's folder contains all results: config.yaml, deepspeed.json, tokenizer.json, metrics.jsonl, tb/,\n"
        "checkpoints/, evaluation.json, export/ and summary.json.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="a run file, or the name of a shipped recipe: demo, photos, univitar_0p3b, ...")
    which.add_argument(
        "--resume", metavar="RUN", type=expand, help="folder of a run to continue from its last checkpoint"
    )
    parser.add_argument(
        "--nproc",
        type=positive,
        help="processes to start on this machine (default 1); if given, variables of launchers (RANK, ...) are ignored",
    )
    parser.add_argument(
        "--extend",
        nargs="*",
        metavar="KEY=VALUE",
        help="with --resume, also for a finished run: adds a stage, a copy of the last stage with at least one key "
        "changed, such as samples=200000 lr=1e-5",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print what the run would do: data, packs and pairs per step, stages, parameters, "
        "memory, checkpoints; write nothing",
    )
    add_overrides(parser)


def _add_after_training(commands) -> None:
    evaluate = add_command(
        commands,
        "eval",
        _evaluate,
        "retrieval and zero-shot classification of a run on its held-out data",
        "Evaluate retrieval and zero-shot classification of a run's last checkpoint on its evaluation.sources, and\n"
        "write the results to evaluation.json in the run's folder. Keys of evaluation, data and logging that an\n"
        "evaluation reads can be overridden:\n"
        "  univitar-ds eval runs/photos evaluation.sources.0.path=data/other --out other.json\n"
        "  univitar-ds eval runs/photos 'evaluation.sources=[{path: 0.tar, class_names: names.txt}]' \\\n"
        "      'evaluation.image_templates=[\"a photo of a {}\"]'\n"
        "Results on other data or with other templates are printed, and written to --out FILE if it is given;\n"
        "evaluation.json of RUN is not changed. Other tasks, also for models that are not runs:\n"
        "  univitar-ds eval zero-shot|retrieval|knn|linear|attentive|dense|tokens MODEL --data SOURCE\n"
        "Give a folder that has the name of a task as ./NAME. An evaluation that measures nothing is an error.",
        announced=True,
    )
    evaluate.add_argument(
        "folder", type=expand, metavar="RUN", help="a run's folder, or one of its checkpoints, or RUN/checkpoints/best"
    )
    evaluate.add_argument("--out", type=expand, metavar="FILE", help="file for the results (JSON), instead of RUN")
    add_weights(evaluate)
    add_overrides(evaluate, "dotted keys of the run file, such as evaluation.sources.0.path=data/other")
    report = add_command(
        commands,
        "report",
        _report,
        "print the results of runs, and write a page of them",
        "Print the results of runs. With --out, also write one HTML file that needs no network: results with chance\n"
        "levels and intervals, examples, curves with the stages, events, and for several runs the differences of\n"
        "their configurations. A run may still be training.\n\n"
        "  univitar-ds report runs/photos\n"
        "  univitar-ds report runs/photos --out report.html\n"
        "  univitar-ds report runs/photos --out report.html --images\n"
        "  univitar-ds report runs/photos --out report.html --images cat.jpg walk.mp4 --caption 'a cat'\n"
        "  univitar-ds report runs/curriculum runs/fixed --out compared.html --png drawings",
        leaves_files=False,
        announced=True,
    )
    report.add_argument("folders", nargs="+", type=expand, metavar="RUN", help="folders of runs, at most 8 for a page")
    report.add_argument("--out", type=expand, metavar="FILE", help="write the page to this file")
    report.add_argument(
        "--images", nargs="*", type=expand, metavar="FILE",
        help="with --out: images and videos whose features are drawn, from the last checkpoint of each run; without "
        "FILE: two images and a video of the first run's evaluation.sources, with their captions",
    )  # fmt: skip
    report.add_argument(
        "--caption", metavar="TEXT", help="with --images: also draw the similarity of each patch to this text"
    )
    report.add_argument("--png", type=expand, metavar="FOLDER", help="with --out: also write the curves as PNG files")


def _add_demo(commands) -> None:
    demo = add_command(commands, "demo", _demo, "rendered scenes, training, evaluation, export and a page")
    demo.add_argument("--folder", type=expand, default=Path("demo"), help="folder to write (default demo)")
    demo.add_argument("--nproc", type=positive, default=2, help="processes of the training (default 2)")
    demo.add_argument(
        "--install-seconds", type=float, help="seconds that the installation took, for the table of times"
    )


def _train(arguments: argparse.Namespace) -> int:
    with startup.reported("loading the program"):
        return _start(arguments)


def _start(arguments: argparse.Namespace) -> int:
    from univitar_ds import launch

    if arguments.resume and arguments.dry_run:
        show(launch.describe_resuming(arguments.resume, arguments.nproc, arguments.overrides, arguments.extend))
        return 0
    if arguments.resume:
        return launch.resume(arguments.resume, arguments.nproc, arguments.overrides, arguments.extend)
    if arguments.extend is not None:
        raise ConfigError("--extend adds a stage to a run; name the run by --resume, or add the stage to the run file")
    if arguments.dry_run:
        show(launch.describe_training(arguments.config, arguments.nproc, arguments.overrides))
        return 0
    return launch.train(arguments.config, arguments.nproc, arguments.overrides)


def _evaluate(arguments: argparse.Namespace) -> None:
    from univitar_ds.evaluation.run import evaluate_run

    given = {"weights": arguments.weights, "overrides": arguments.overrides, "out": arguments.out}
    show(evaluate_run(arguments.folder, **given))


def _report(arguments: argparse.Namespace) -> None:
    from univitar_ds.evaluation.report import render_run

    if arguments.out is not None:
        return _write_page(arguments)
    if arguments.png is not None or arguments.images is not None or arguments.caption is not None:
        raise ConfigError("--png, --images and --caption are for a page; give --out FILE too")
    several = len(arguments.folders) > 1
    for folder in arguments.folders:
        show(f"{folder}\n\n{render_run(folder)}\n" if several else render_run(folder))


def _write_page(arguments: argparse.Namespace) -> None:
    from univitar_ds.reporting.page import PageOptions, check_page, write_page

    if arguments.caption is not None and arguments.images is None:
        raise ConfigError("--caption is for maps of images; give --images too")
    options = PageOptions(arguments.images, arguments.caption, arguments.png)
    check_page(arguments.out, options)
    for line in write_page(arguments.folders, arguments.out, options):
        show(line)


def _demo(arguments: argparse.Namespace) -> int:
    from univitar_ds.demo.end_to_end import run_demo

    return run_demo(arguments.folder, arguments.nproc, arguments.install_seconds)
