"""The command `univitar-ds`. Each command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from univitar_ds.errors import UserError

DESCRIPTION = "Train, evaluate and export UniViTAR, a native-resolution vision transformer for images and video."
EXAMPLES = """examples:
  univitar-ds data pack PHOTOS data/photos             shards and a manifest from a folder of files
  univitar-ds data inspect --config photos             what the run would feed: fill, tokens, bad samples
  univitar-ds train --config photos --nproc 2          train, evaluate and export on two local processes
  univitar-ds train --config run.yaml seed=3 stages.0.lr=5e-4
  univitar-ds train --resume runs/photos --nproc 1     continue, here on another number of processes
  univitar-ds report runs/photos                       results and figures of a run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 a fault of the user's, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    parsed = build_parser().parse_args(arguments)
    try:
        return parsed.run(parsed) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="univitar-ds",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # DeepSpeed's launcher puts it before everything else; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    _add_data(commands)
    _add_after_training(commands)
    _add_demo(commands)
    return parser


def _command(commands, name: str, run, help_text: str, description: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_text,
        description=description or help_text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="dotted keys of the run file, such as stages.0.lr=5e-4"
    )


def _add_train(commands) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "train a run, then evaluate and export it",
        "Train a run, then evaluate it on held-out data and export the encoder.\n\n"
        "Starts --nproc processes on this machine through DeepSpeed's launcher. Started by a launcher itself\n"
        "(deepspeed --module univitar_ds train ..., torchrun -m univitar_ds train ...) it is one of the ranks.\n"
        "The run's folder holds everything: config.yaml, deepspeed.json, tokenizer.json, metrics.jsonl, tb/,\n"
        "checkpoints/, evaluation.json, export/ and summary.json.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="a run file, or the name of a shipped recipe: demo, photos")
    which.add_argument("--resume", metavar="RUN", help="folder of a run to continue from its last checkpoint")
    parser.add_argument("--nproc", type=_positive, default=1, help="processes to start on this machine (default 1)")
    _add_overrides(parser)


def _add_data(commands) -> None:
    data = commands.add_parser("data", help="pack, inspect and make data").add_subparsers(metavar="WHAT", required=True)
    pack = _command(
        data,
        "pack",
        _pack,
        "turn a folder of pictures and clips into shards",
        "Turn a folder of pictures and clips into WebDataset shards and a manifest.\n\n"
        "FOLDER holds either metadata.jsonl, a line a file:\n"
        '  {"file": "a/b.jpg", "kind": "image", "caption": "...", "label": "cat", "split": "train"}\n'
        "(`captions` takes a list; `label` and `split` may be absent), or files with their caption beside them\n"
        "(a/b.jpg and a/b.txt). Unreadable files are left out and listed in the manifest. Interrupted, it goes\n"
        "on where it was when started again.",
    )
    pack.add_argument("folder", type=Path)
    pack.add_argument("out", type=Path)
    pack.add_argument("--shard-mb", type=float, default=64.0, help="size of a shard (default 64)")
    pack.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes that check the files")
    pack.add_argument("--no-verify", action="store_true", help="read headers only; do not decode every file once")
    inspect = _command(data, "inspect", _inspect, "print what a run would feed to the model")
    inspect.add_argument("--config", required=True, help="a run file or the name of a shipped recipe")
    inspect.add_argument("--packs", type=_positive, default=50, help="packs of each modality to draw (default 50)")
    inspect.add_argument("--json", action="store_true", help="print the figures as JSON")
    _add_overrides(inspect)
    scenes = _command(data, "scenes", _scenes, "render the demo's scenes and moving shapes")
    scenes.add_argument("out", type=Path)
    scenes.add_argument("--images", type=_positive, default=4000)
    scenes.add_argument("--clips", type=_positive, default=1500)
    scenes.add_argument("--seed", type=int, default=0)


def _add_after_training(commands) -> None:
    evaluate = _command(commands, "eval", _evaluate, "retrieval and zero-shot of a run on its held-out data")
    evaluate.add_argument("folder", type=Path, metavar="RUN")
    report = _command(commands, "report", _report, "print the results of a run")
    report.add_argument("folder", type=Path, metavar="RUN")
    convert = commands.add_parser("convert", help="carry weights elsewhere").add_subparsers(metavar="TO", required=True)
    export = _command(
        convert, "export", _export, "write a run's encoder in the release's layout (config.json, model.safetensors)"
    )
    export.add_argument("folder", type=Path, metavar="RUN")
    export.add_argument("out", type=Path)


def _add_demo(commands) -> None:
    demo = _command(commands, "demo", _demo, "the whole way on rendered scenes: data, training, evaluation, export")
    demo.add_argument("--folder", type=Path, default=Path("demo"))
    demo.add_argument("--nproc", type=_positive, default=2)
    demo.add_argument("--install-seconds", type=float, help="how long the installation took, for the table of times")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _train(arguments: argparse.Namespace) -> int:
    from univitar_ds import launch

    if arguments.resume:
        return launch.resume(Path(arguments.resume), arguments.nproc, arguments.overrides)
    return launch.train(arguments.config, arguments.nproc, arguments.overrides)


def _pack(arguments: argparse.Namespace) -> None:
    from univitar_ds.data.writer import pack_folder

    manifest = pack_folder(
        arguments.folder,
        arguments.out,
        shard_mb=arguments.shard_mb,
        workers=arguments.workers,
        verify=not arguments.no_verify,
    )
    for split, kinds in manifest["counts"].items():
        print(f"{split}: " + ", ".join(f"{count} {kind}s" for kind, count in kinds.items()))
    print(f"{len(manifest['shards'])} shards in {arguments.out}, {len(manifest['skipped'])} files left out")
    for skipped in manifest["skipped"][:5]:
        print(f"  left out: {skipped['file']}: {skipped['reason']}")


def _inspect(arguments: argparse.Namespace) -> None:
    from univitar_ds.config.load import load_config
    from univitar_ds.data.inspect import inspect, render
    from univitar_ds.model.config import PRESETS
    from univitar_ds.model.flops import cost_coefficients

    config = load_config(arguments.config, arguments.overrides)
    result = inspect(config, packs=arguments.packs, cost=cost_coefficients(PRESETS[config.model.encoder]))
    print(json.dumps(result, indent=2) if arguments.json else render(result))


def _scenes(arguments: argparse.Namespace) -> None:
    from univitar_ds.data.synthetic import write_scenes

    write_scenes(arguments.out, images=arguments.images, clips=arguments.clips, seed=arguments.seed, progress=True)
    print(f"{arguments.images} pictures and {arguments.clips} clips in {arguments.out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from univitar_ds.evaluation.run import evaluate_run

    print(evaluate_run(arguments.folder))


def _report(arguments: argparse.Namespace) -> None:
    from univitar_ds.evaluation.report import render_run

    print(render_run(arguments.folder))


def _export(arguments: argparse.Namespace) -> None:
    from univitar_ds.convert.official import export_encoder

    export_encoder(arguments.folder, arguments.out)
    print(f"encoder in {arguments.out}")


def _demo(arguments: argparse.Namespace) -> int:
    from univitar_ds.demo import run_demo

    return run_demo(arguments.folder, arguments.nproc, arguments.install_seconds)
