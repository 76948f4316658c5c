"""The commands `univitar-ds data`: pack, verify, probe, inspect and scenes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univitar_ds.cli.common import (
    add_command,
    add_overrides,
    add_storage,
    add_table,
    expand,
    expand_place,
    positive,
    shown,
)
from univitar_ds.errors import ConfigError
from univitar_ds.owned import check_result, drawn_by, write_result
from univitar_ds.screen import show

if TYPE_CHECKING:
    from univitar_ds.config.data import DataConfig, SourceConfig
    from univitar_ds.data.storage.base import StorageSettings


_MAX_NAMED = 10
"""Maximum number of file extensions that `data verify` prints; the report lists all."""


def add_data(commands) -> None:
    """Adds the command `data` and its subcommands to `commands`."""
    data = commands.add_parser("data", help="pack, verify, inspect and render data").add_subparsers(
        metavar="WHAT", required=True
    )
    _add_pack(data)
    _add_verify(data)
    _add_probe(data)
    inspect = add_command(
        data,
        "inspect",
        _inspect,
        "print and draw the packs that a run would read",
        "Read packs as the run would, print statistics, and draw a plot (PNG): the sizes of the items,\n"
        "the fill of the packs, and the items of one pack.",
        leaves_files=False,
    )
    inspect.add_argument("--config", required=True, help="a run file or the name of a shipped recipe")
    inspect.add_argument("--packs", type=positive, default=50, help="packs to read of each modality (default 50)")
    inspect.add_argument(
        "--png", type=expand, default=Path("inspect.png"), help="file of the plot (default inspect.png)"
    )
    inspect.add_argument("--json", action="store_true", help="print the statistics as JSON")
    add_overrides(inspect)
    scenes = add_command(data, "scenes", _scenes, "render the demo's scenes and moving shapes")
    scenes.add_argument("out", type=expand, help="folder to write")
    scenes.add_argument("--images", type=positive, default=4000, help="number of images (default 4000)")
    scenes.add_argument("--videos", "--clips", type=positive, default=1500, help="number of videos (default 1500)")
    scenes.add_argument("--seed", type=int, default=0, help="seed of the scenes (default 0)")


_PACK = """\
Turn images and videos with captions or labels into WebDataset shards and a manifest.

The format of SRC is detected, or set by --format:
  folder       files with captions in a .txt of the same name (a/b.jpg, a/b.txt), or with a metadata.jsonl:
                 {"file": "a/b.jpg", "kind": "image", "caption": "...", "label": "cat", "split": "train"}
               (`captions` takes a list of captions; only file and either a caption or a label are required)
  classes      class folders, train/cat/a.jpg, or cat/a.jpg without splits
  imagefolder  as in Hugging Face datasets: metadata.jsonl, .csv or .parquet with file_name, beside the files or in
               each split
  table        .csv, .tsv, .jsonl, .json (a list of objects) or .parquet; `--format csv` reads any file as CSV
               (a column of .parquet may hold the files themselves, as Hugging Face's datasets writes them)
  tables       a folder of .parquet tables, with splits in their names (train-00000-of-00002.parquet)
  coco         a JSON with images and annotations, or a folder with annotations/captions_*.json
  webdataset   a tar, a folder of tars, or a brace range of tars in quotes
  img2dataset  its output folder, of tars or of files

  univitar-ds data pack photos/ data/photos
  univitar-ds data pack imagenet/ data/imagenet --class-names LOC_synset_mapping.txt
  univitar-ds data pack pairs.csv data/pairs --image-key filepath --caption-key title
  univitar-ds data pack videos.parquet data/videos --image-key video --caption-key short --caption-key long
  univitar-ds data pack coco/annotations/captions_val2017.json data/coco-val --images coco/val2017
  univitar-ds data pack 'cc3m/{00000..00331}.tar' data/cc3m --split train
  univitar-ds data pack s3://bucket/photos data/photos

Paths in a table are relative to its folder, or to the folder of --images. All paths, also absolute ones, must be inside
that folder; `--images /` allows all. Rows with the same file become one sample. Tables and .txt are UTF-8, or UTF-16
with a byte order mark. Of a .json in a tar, caption, label and set are kept. Links to folders are followed, and each
folder is packed once.

Files, samples and lines of tables that cannot be read are left out and listed in the manifest with the reason; an error
in the metadata.jsonl of a `folder` ends the command. After an interruption the same command continues where it stopped.
Objects of s3://bucket/prefix are copied into OUT first and removed at the end (with OUT at s3://, into
~/.local/state/univitar_ds/pack). Of a table there, the files that it names below its folder are copied.
`train` reads tars as they are and packs the other formats itself: data.sources.N.path may be any of them."""


def _add_pack(data) -> None:
    pack = add_command(data, "pack", _pack, "turn images and videos in a common format into shards", _PACK)
    pack.add_argument(
        "source", type=expand_place, metavar="SRC", help="a folder, table, JSON of COCO, or tars; also s3://"
    )
    pack.add_argument(
        "out",
        type=expand_place,
        metavar="OUT",
        help="a folder, or s3://bucket/prefix; shards are uploaded one by one and verified",
    )
    pack.add_argument("--format", metavar="NAME", help="format of SRC (default: detected)")
    pack.add_argument(
        "--plugin",
        metavar="FILE.py",
        action="append",
        default=[],
        help="a Python file or module that registers a reader of SRC; may be repeated (docs/plugins.md)",
    )
    pack.add_argument("--split", metavar="NAME", help="split of files for which SRC gives none (default train)")
    pack.add_argument(
        "--hold-out",
        type=float,
        metavar="SHARE",
        help="share of the samples, such as 0.05, that get the split test, if SRC has no splits; a hash of each file "
        "decides, so more files do not change the split of others (default: none)",
    )
    pack.add_argument(
        "--captions",
        choices=("one", "lines"),
        default="one",
        help="content of a .txt: one caption (default), or one per line",
    )
    add_table(pack)
    pack.add_argument(
        "--class-names", type=expand, metavar="FILE", help="names of class folders: lines of a folder, a tab and a name"
    )
    pack.add_argument("--shard-mb", type=float, default=64.0, help="size of a shard in MB (default 64)")
    pack.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes that check the files")
    pack.add_argument("--no-verify", action="store_true", help="read headers only; do not decode every file once")
    add_storage(pack)


def _add_verify(data) -> None:
    verify = add_command(
        data,
        "verify",
        _verify,
        "check whole sources: every shard, every sample",
        "Read every byte of every shard, compare it with its manifest and decode every sample. All errors are\n"
        "listed in a report (JSON) with shard, key, byte and a sentence. Exit status 1 if there are any.\n\n"
        "With --config, the limits and data.s3 of the run file apply. A SOURCE that is a source of the run file,\n"
        "or inside the folder of one, is read with the class names, templates and captions of that source.\n"
        "Without a SOURCE, the data.sources of the run file are checked, each with its own split. If all sources\n"
        "of the run file are checked, a modality that the stages read and the sources lack (no videos although\n"
        "video_ratio is above 0) is an error too.",
    )
    verify.add_argument(
        "sources",
        nargs="*",
        type=expand_place,
        metavar="SOURCE",
        help="packed folder, tar, or brace range; also s3://",
    )
    verify.add_argument(
        "--config", help="a run file or the name of a shipped recipe, for its sources, limits and data.s3"
    )
    verify.add_argument("--split", help="split of packed folders (default: all splits, or the split of the run file)")
    verify.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes that check shards")
    verify.add_argument("--no-decode", action="store_true", help="check headers and checksums only; do not decode")
    verify.add_argument(
        "--report", type=expand, default=Path("verify.json"), help="file of the report (default verify.json)"
    )
    add_storage(verify)


def _add_probe(data) -> None:
    probe = add_command(
        data,
        "probe",
        _probe,
        "report how a run would read individual files",
        "Read each file as the loader would read a sample, and print the result.\n\n"
        "With --json one line per file: file, ok, kind (image, video), width, height, frames, grid (time, height and\n"
        "width in tokens), tokens, downscaled; and error and message for files that would be left out.\n"
        "The exit status is 1 if a file does not exist, and 0 for any content.",
        leaves_files=False,
    )
    probe.add_argument("files", nargs="+", type=expand, metavar="FILE")
    probe.add_argument("--config", help="a run file or the name of a shipped recipe, for its limits and sizes")
    probe.add_argument("--stage", help="name of the stage whose size rules are used (default: the first stage)")
    probe.add_argument("--json", action="store_true", help="print one line of JSON per file")


def _pack(arguments: argparse.Namespace) -> None:
    from univitar_ds.data.importing.rows import ReadOptions
    from univitar_ds.data.writing.writer import PackOptions, pack_folder
    from univitar_ds.plugins import is_file, load_plugins

    load_plugins([expand_place(entry) if is_file(entry) else entry for entry in arguments.plugin])
    manifest = pack_folder(
        arguments.source,
        arguments.out,
        PackOptions(
            shard_mb=arguments.shard_mb,
            workers=arguments.workers,
            verify=not arguments.no_verify,
            hold_out=arguments.hold_out,
            reading=ReadOptions(
                format=arguments.format,
                captions=arguments.captions,
                split=arguments.split,
                image_key=arguments.image_key,
                caption_keys=tuple(arguments.caption_key),
                label_key=arguments.label_key,
                split_key=arguments.split_key,
                images=arguments.images,
                class_names=arguments.class_names,
            ),
        ),
        settings=_storage_settings(arguments),
    )
    for split, kinds in manifest["counts"].items():
        _say(f"{split}: " + ", ".join(f"{count} {kind}s" for kind, count in kinds.items()))
    _say(f"{len(manifest['shards'])} shards in {arguments.out}, {len(manifest['skipped'])} left out")
    for skipped in manifest["skipped"][:5]:
        _say(f"  left out: {skipped['file']}: {skipped['reason']}")


def _verify(arguments: argparse.Namespace) -> int:
    from univitar_ds.config.load import load_config
    from univitar_ds.data.contents import faults_of_run
    from univitar_ds.data.tools.verify import verify
    from univitar_ds.data.writing.packed_sources import with_packed_sources
    from univitar_ds.plugins import load_plugins

    check_result(arguments.report, _is_report)
    config = None
    if arguments.config:
        config = load_config(arguments.config, [])
        load_plugins(config.plugins)
        config = with_packed_sources(config)
    data = None if config is None else config.loaded_data
    sources = _sources_to_verify(arguments, data)
    settings = _storage_settings(arguments, data)
    report = verify(sources, settings, workers=arguments.workers, decode=not arguments.no_decode, limits=data)
    checked = set(map(_place, sources))
    whole = config is not None and checked.issuperset(map(_place, config.data.sources))
    report["run"] = faults_of_run(config, settings) if whole else []
    report["sound"] = report["sound"] and not report["run"]
    write_result(arguments.report, json.dumps(report, indent=1))
    for source in report["sources"]:
        for sentence in filter(None, (source["error"], source["warning"])):
            _say(sentence)
    for fault in report["run"]:
        _say(fault)
    shards = report["shards"]
    _say_first([(shard["shard"], fault) for shard in shards for fault in shard["faults"]], _fault_sentence)
    _say_first([(shard["shard"], text) for shard in shards for text in shard["ignored"]], _ignored_sentence)
    _say_first([sentence for shard in shards for sentence in _shard_sentences(shard)], str)
    verdict = "sound" if report["sound"] else "NOT sound"
    counts = [f"{report['samples']} samples in {len(report['shards'])} shards: {verdict}"]
    for name, what in (("faults", "left out:"), ("ignored", "texts ignored:")):
        if kinds := Counter(one["kind"] for shard in shards for one in shard[name]):
            counts.append(" ".join((what, ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))))
    if report["unread"]:
        unread = Counter(report["unread"]).most_common()
        named = ", ".join(f"{count} {extension}" for extension, count in unread[:_MAX_NAMED])
        more = f" and {len(unread) - _MAX_NAMED} more kinds" if len(unread) > _MAX_NAMED else ""
        counts.append(f"members that are not read: {named}{more}")
    _say("; ".join([*counts, f"report in {arguments.report}"]))
    return 0 if report["sound"] else 1


def _say_first(entries: Sequence[Any], sentence: Callable[[Any], str], limit: int = 20) -> None:
    """Prints the sentences of the first `limit` entries; the report lists all entries."""
    for entry in entries[:limit]:
        _say(sentence(entry))
    if len(entries) > limit:
        _say(f"... and {len(entries) - limit} more")


def _ignored_sentence(entry: tuple[str, dict[str, Any]]) -> str:
    return f"used anyway, {_fault_sentence(entry)}"


def _fault_sentence(entry: tuple[str, dict[str, Any]]) -> str:
    shard, fault = entry
    name = f"{shard}/{fault['key']}" if fault["key"] else shard
    return f"{fault['kind']}: {name} at byte {fault['byte']}: {fault['message']}"


def _shard_sentences(shard: dict[str, Any]) -> Iterator[str]:
    name = f"shard {shard['shard']}"
    if shard["error"]:
        yield f"{name}: {shard['error']}"
    if shard["sha256"] == "differs":
        yield f"{name}: its SHA-256 differs from the manifest"
    if shard["scattered"]:
        from univitar_ds.data.shards.tar_index import SORT_HINT

        yield f"{name}: more of {shard['scattered']['key']} at byte {shard['scattered']['offset']}; {SORT_HINT}"
    if shard["samples_in_manifest"] not in (None, shard["samples"]):
        yield f"{name}: {shard['samples']} samples, {shard['samples_in_manifest']} in its manifest"


def _sources_to_verify(arguments: argparse.Namespace, data: DataConfig | None) -> list[SourceConfig]:
    """Returns the sources to check. Raises: ConfigError if neither the command line nor a run file names a source."""
    from univitar_ds.config.data import SourceConfig
    from univitar_ds.config.paths import written

    if not arguments.sources:
        if data is None:
            raise ConfigError("nothing to verify: give a SOURCE, or --config with a run file that has sources")
        own = {} if arguments.split is None else {"split": arguments.split}
        return [source.model_copy(update=own) for source in data.sources]
    known = [] if data is None else data.sources
    named = [SourceConfig(path=written(path), split=arguments.split) for path in arguments.sources]
    return [source.model_copy(update=_about(source, known)) for source in named]


def _about(named: SourceConfig, sources: Sequence[SourceConfig]) -> dict[str, Any]:
    """Returns templates, class names and captions of the first source whose path is that of `named` or a folder above
    it; {} if there is none.
    """
    place = _place(named)
    for known, source in ((_place(source), source) for source in sources):
        if place == known or place.startswith(f"{known}/"):
            return {"templates": source.templates, "class_names": source.class_names, "captions": source.captions}
    return {}


def _place(source: SourceConfig) -> str:
    """Returns the path of a source in a form that can be compared: absolute, without a slash at the end."""
    from univitar_ds.data.shards.listing import place_of

    place = place_of(source)
    return place.rstrip("/") if "://" in place else os.path.abspath(place)


def _probe(arguments: argparse.Namespace) -> int:
    from univitar_ds.config.data import DataConfig, SourceConfig
    from univitar_ds.config.load import load_config
    from univitar_ds.config.stage import StageConfig
    from univitar_ds.data.tools.media_report import report

    if arguments.config:
        config = load_config(arguments.config, [])
        data, stages = config.data, {stage.name: stage for stage in config.stages}
    else:
        data = DataConfig(sources=[SourceConfig(path="none")])
        stages = {"default": StageConfig(name="default", samples=1, lr=1.0)}
    stage = stages.get(arguments.stage or next(iter(stages)))
    if stage is None:
        raise ConfigError(f"there is no stage {arguments.stage!r}; the stages are {', '.join(stages)}")
    for result in report(arguments.files, data, stage):
        _say(json.dumps(result.to_json()) if arguments.json else result.sentence())
    return 0 if all(map(os.path.isfile, arguments.files)) else 1


def _inspect(arguments: argparse.Namespace) -> None:
    from univitar_ds.config.load import load_config
    from univitar_ds.data.tools.inspect import inspect, render
    from univitar_ds.data.writing.packed_sources import with_packed_sources
    from univitar_ds.extras import extra

    with extra("train"):
        from univitar_ds.data.tools.inspect_plot import SOFTWARE, draw
    from univitar_ds.model.config import encoder_config
    from univitar_ds.model.flops import cost_coefficients
    from univitar_ds.plugins import load_plugins

    check_result(arguments.png, drawn_by(SOFTWARE))
    config = load_config(arguments.config, arguments.overrides)
    load_plugins(config.plugins)
    config = with_packed_sources(config)
    found = inspect(config, packs=arguments.packs, cost=cost_coefficients(encoder_config(config.model)))
    for line in (json.dumps(found.to_json(), indent=2) if arguments.json else render(found)).split("\n"):
        _say(line)
    draw(found, arguments.png)
    with suppress(OSError):
        print(f"image in {shown(str(arguments.png))}", file=sys.stderr, flush=True)


def _is_report(path: Path) -> bool:
    """Whether a file is a report of `data verify`. Raises: OSError if it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and content.keys() >= {"sound", "samples", "sources", "shards"}


def _say(line: str) -> None:
    """Prints a line that may contain names of files and keys."""
    show(shown(line))


def _storage_settings(arguments: argparse.Namespace, data: DataConfig | None = None) -> StorageSettings:
    """Returns the storage settings of the run file, if one is given, overridden by the options --s3-*.

    The shard cache of the run file is not used: `data verify` must read the store itself, and reading all data would
    evict the shards of a run.
    """
    from univitar_ds.config.data import CacheConfig
    from univitar_ds.data.storage.base import StorageSettings

    settings = StorageSettings()
    if data is not None:
        settings = StorageSettings.of(data.model_copy(update={"cache": CacheConfig()}))
    return replace(
        settings,
        endpoint_url=arguments.s3_endpoint or settings.endpoint_url,
        profile=arguments.s3_profile or settings.profile,
        region=arguments.s3_region or settings.region,
    )


def _scenes(arguments: argparse.Namespace) -> None:
    from univitar_ds.demo.synthetic import write_scenes

    write_scenes(arguments.out, images=arguments.images, videos=arguments.videos, seed=arguments.seed, progress=True)
    _say(f"{arguments.images} images and {arguments.videos} videos in {arguments.out}")
