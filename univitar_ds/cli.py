"""The command `univitar-ds`. Each command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from univitar_ds.errors import ConfigError, UserError

DESCRIPTION = "Train, evaluate and export UniViTAR, a native-resolution vision transformer for images and video."
EXAMPLES = """examples:
  univitar-ds data pack PHOTOS data/photos             shards and a manifest from a folder of files
  univitar-ds data verify data/photos                  every shard and sample checked, a report written
  univitar-ds data probe *.jpg clip.mp4                what a run would make of single files
  univitar-ds data inspect --config photos             what the run would feed: fill, tokens, bad samples, a picture
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
    data = commands.add_parser("data", help="pack, verify, inspect and make data").add_subparsers(
        metavar="WHAT", required=True
    )
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
    pack.add_argument("out", help="a folder, or s3://bucket/prefix; there shards are uploaded one by one and verified")
    pack.add_argument("--shard-mb", type=float, default=64.0, help="size of a shard (default 64)")
    pack.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes that check the files")
    pack.add_argument("--no-verify", action="store_true", help="read headers only; do not decode every file once")
    _add_storage(pack)
    _add_verify(data)
    _add_probe(data)
    inspect = _command(
        data,
        "inspect",
        _inspect,
        "print and draw what a run would feed to the model",
        "Draw packs as the run would, print what is in them and draw a picture (PNG): how large the items are,\n"
        "how full the packs are, and one pack item by item.",
    )
    inspect.add_argument("--config", required=True, help="a run file or the name of a shipped recipe")
    inspect.add_argument("--packs", type=_positive, default=50, help="packs of each modality to draw (default 50)")
    inspect.add_argument("--png", type=Path, default=Path("inspect.png"), help="the picture (default inspect.png)")
    inspect.add_argument("--json", action="store_true", help="print the figures as JSON")
    _add_overrides(inspect)
    scenes = _command(data, "scenes", _scenes, "render the demo's scenes and moving shapes")
    scenes.add_argument("out", type=Path)
    scenes.add_argument("--images", type=_positive, default=4000)
    scenes.add_argument("--clips", type=_positive, default=1500)
    scenes.add_argument("--seed", type=int, default=0)


def _add_verify(data) -> None:
    verify = _command(
        data,
        "verify",
        _verify,
        "check whole sources: every shard, every sample",
        "Read every byte of every shard, compare it with its manifest and decode every sample. All that is wrong\n"
        "goes into a report (JSON) with shard, key, byte and a sentence. Exit status 1 if anything is.",
    )
    verify.add_argument("sources", nargs="+", metavar="SOURCE", help="packed folder, tar, or brace range; also s3://")
    verify.add_argument("--split", help="of packed folders (default: all of them)")
    verify.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes that check shards")
    verify.add_argument("--no-decode", action="store_true", help="trust headers and checksums for the pixels")
    verify.add_argument("--report", type=Path, default=Path("verify.json"), help="default verify.json")
    _add_storage(verify)


def _add_probe(data) -> None:
    probe = _command(
        data,
        "probe",
        _probe,
        "say what a run would make of single files",
        "Take each file through the loader as a sample of its own and print what comes of it.\n\n"
        "With --json a line a file: file, ok, kind (image, video), width, height, frames, grid (time, height and\n"
        "width in tokens), tokens, shrunk; and error and message of what would be left out.",
    )
    probe.add_argument("files", nargs="+", type=Path, metavar="FILE")
    probe.add_argument("--config", help="a run file or the name of a shipped recipe, for its limits and sizes")
    probe.add_argument("--stage", help="name of the stage whose sizes count (default: the first)")
    probe.add_argument("--json", action="store_true", help="print a line of JSON a file")


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--s3-endpoint", metavar="URL", help="of a store other than AWS, e.g. http://127.0.0.1:9000")
    parser.add_argument("--s3-profile", metavar="NAME", help="a profile of ~/.aws/config")
    parser.add_argument("--s3-region", metavar="NAME")


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
        settings=_storage_settings(arguments),
    )
    for split, kinds in manifest["counts"].items():
        print(f"{split}: " + ", ".join(f"{count} {kind}s" for kind, count in kinds.items()))
    print(f"{len(manifest['shards'])} shards in {arguments.out}, {len(manifest['skipped'])} files left out")
    for skipped in manifest["skipped"][:5]:
        print(f"  left out: {skipped['file']}: {skipped['reason']}")


def _verify(arguments: argparse.Namespace) -> int:
    from univitar_ds.config.schema import SourceConfig
    from univitar_ds.data.verify import verify

    _check_folder(arguments.report)
    sources = [SourceConfig(path=path, split=arguments.split) for path in arguments.sources]
    report = verify(sources, _storage_settings(arguments), workers=arguments.workers, decode=not arguments.no_decode)
    arguments.report.write_text(json.dumps(report, indent=1))
    for source in report["sources"]:
        if source["error"]:
            print(source["error"])
    faults = [(shard["shard"], fault) for shard in report["shards"] for fault in shard["faults"]]
    for shard, fault in faults[:20]:
        name = f"{shard}/{fault['key']}" if fault["key"] else shard
        print(f"{fault['kind']}: {name} at byte {fault['byte']}: {fault['message']}")
    if len(faults) > 20:
        print(f"... and {len(faults) - 20} more")
    for shard in report["shards"]:
        if shard["error"]:
            print(f"shard {shard['shard']}: {shard['error']}")
        if shard["sha256"] == "differs":
            print(f"shard {shard['shard']}: its SHA-256 is not the manifest's")
        if shard["samples_in_manifest"] not in (None, shard["samples"]):
            print(f"shard {shard['shard']}: {shard['samples']} samples, {shard['samples_in_manifest']} in its manifest")
    verdict = "sound" if report["sound"] else "NOT sound"
    print(f"{report['samples']} samples in {len(report['shards'])} shards: {verdict}; report in {arguments.report}")
    return 0 if report["sound"] else 1


def _probe(arguments: argparse.Namespace) -> None:
    from univitar_ds.config.load import load_config
    from univitar_ds.config.schema import DataConfig, SourceConfig, StageConfig
    from univitar_ds.data.media_report import report

    if arguments.config:
        config = load_config(arguments.config, [])
        data, stages = config.data, {stage.name: stage for stage in config.stages}
    else:
        data = DataConfig(sources=[SourceConfig(path="none")])
        stages = {"default": StageConfig(name="default", samples=1, lr=1.0)}
    stage = stages.get(arguments.stage or next(iter(stages)))
    if stage is None:
        raise ConfigError(f"there is no stage {arguments.stage!r}; there is {', '.join(stages)}")
    for found in report(arguments.files, data, stage):
        print(json.dumps(found.to_json()) if arguments.json else found.sentence(), flush=True)


def _inspect(arguments: argparse.Namespace) -> None:
    from univitar_ds.config.load import load_config
    from univitar_ds.data.drawing import draw
    from univitar_ds.data.inspect import inspect, render
    from univitar_ds.model.config import PRESETS
    from univitar_ds.model.flops import cost_coefficients

    _check_folder(arguments.png)
    config = load_config(arguments.config, arguments.overrides)
    found = inspect(config, packs=arguments.packs, cost=cost_coefficients(PRESETS[config.model.encoder]))
    print(json.dumps(found.to_json(), indent=2) if arguments.json else render(found))
    draw(found, arguments.png)
    print(f"picture in {arguments.png}", file=sys.stderr)


def _check_folder(path: Path) -> None:
    """Before the work whose result goes there. Raises: ConfigError."""
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.absolute().parent}; make it first")


def _storage_settings(arguments: argparse.Namespace):
    from univitar_ds.data.storage import StorageSettings

    return StorageSettings(arguments.s3_endpoint, arguments.s3_profile, arguments.s3_region)


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
