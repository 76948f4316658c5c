"""The command line: help texts, and errors of users, which are reported in a sentence before anything starts."""

import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path

import pytest

import univitar_ds
from tests.support.finished import run_config, write_run
from tests.support.paths import ROOT
from tests.support.progress import run_watched
from tests.support.shards import image, write_demo_shards, write_tar
from univitar_ds.cli.main import build_parser, main, parse
from univitar_ds.config.load import dump_config
from univitar_ds.run import create_run, reopen_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("shards"), images=16, videos=8, shards=2)


@pytest.fixture
def run_file(shards, tmp_path) -> Path:
    dump_config(run_config(shards, output=str(tmp_path / "runs")), tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


def fails(capsys, *arguments: str) -> str:
    """Runs a command that must end with status 2 and one error, and returns its message."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["data"], ["data", "pack"], ["data", "inspect"], ["data", "verify"],
     ["data", "probe"], ["data", "scenes"], ["eval"], ["report"],
     ["convert", "export"], ["embed"], ["classify"], ["demo"], ["config"]],
)  # fmt: skip
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: univitar-ds" in capsys.readouterr().out


def test_examples_are_aligned_and_the_export_has_its_usage(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    _, _, examples = capsys.readouterr().out.partition("examples:\n")
    found = [re.match(r"  univitar-ds .*?\S(  +)(?=\S)", line) for line in examples.splitlines()]
    assert len({match.end() for match in found if match}) == 1
    with pytest.raises(SystemExit):
        main(["convert", "export", "--help"])
    assert "univitar-ds convert export RUN OUT" in capsys.readouterr().out.partition("\n\n")[0]


def test_all_errors_of_a_run_file_are_listed(capsys, run_file):
    message = fails(capsys, "train", "--config", run_file, "data.lnes=4", "seed=-1")
    assert "2 errors" in message
    assert "did you mean 'lanes'" in message


def test_the_keys_of_the_run_file_are_described(capsys):
    assert main(["config", "stages.0.lr"]) == 0
    assert "stages.N.lr: a number, above 0; must be given" in capsys.readouterr().out
    assert main(["config"]) == 0
    assert "optimizer" in capsys.readouterr().out
    assert "similar: data.lanes" in fails(capsys, "config", "data.lane")
    assert "leave data out" in fails(capsys, "config", "data", "--schema")


def test_the_schema_is_printed_as_json(capsys):
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"].keys() >= {"name", "data", "stages"}


def test_the_version_is_printed_with_those_of_torch_and_deepspeed(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    found = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    expected = f"univitar_ds {univitar_ds.__version__}, torch {found['torch']}, deepspeed {found['deepspeed']}\n"
    assert capsys.readouterr().out == expected

    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == expected.partition(", deepspeed")[0] + "\n"


def test_control_characters_of_a_name_in_an_error_are_escaped(capsys, tmp_path):
    message = fails(capsys, "data", "pack", tmp_path / "\x1b[2Jx\udcff", tmp_path / "out")
    assert r"\x1b[2Jx\udcff is not a folder" in message


def test_ranks_that_do_not_divide_the_lanes_are_refused(capsys, run_file):
    assert "run 1, 2, 4 ranks" in fails(capsys, "train", "--config", run_file, "--nproc", "3")


def test_a_missing_source_is_named(capsys, run_file):
    message = fails(capsys, "train", "--config", run_file, "data.sources.0.path=nowhere")
    assert "source nowhere: there is no such file or folder" in message


def test_a_missing_source_of_the_evaluation_is_named_before_training(capsys, run_file, tmp_path):
    message = fails(capsys, "train", "--config", run_file, "evaluation.sources=[{path: elsewhere}]")
    assert "evaluation.sources: source elsewhere: there is no such file or folder" in message
    assert not (tmp_path / "runs").exists()


def test_the_error_for_a_missing_split_names_the_existing_ones(capsys, run_file):
    message = fails(capsys, "train", "--config", run_file, "data.sources.0.split=validation")
    assert "no split 'validation'; it has test, train" in message


def test_a_truncated_shard_is_found_before_anything_starts(capsys, run_file, tmp_path):
    folder = write_demo_shards(tmp_path / "cut", images=16, videos=8, shards=1)
    shard = next(folder.glob("train-image-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])
    message = fails(capsys, "train", "--config", run_file, f"data.sources.0.path={folder}")
    assert shard.name in message
    assert "its manifest says" in message
    assert not (tmp_path / "runs").exists()


def test_a_missing_shard_is_named(capsys, run_file, tmp_path):
    folder = write_demo_shards(tmp_path / "gone", images=16, videos=8, shards=1)
    shard = next(folder.glob("train-image-*.tar"))
    shard.unlink()
    assert shard.name in fails(capsys, "data", "inspect", "--config", run_file, f"data.sources.0.path={folder}")


def test_an_empty_folder_cannot_be_packed(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has nothing to pack" in fails(capsys, "data", "pack", tmp_path / "empty", tmp_path / "out")


def test_a_folder_that_is_no_run_cannot_be_resumed_evaluated_or_exported(capsys, tmp_path):
    assert "is not the folder of a run (it has no config.yaml)" in fails(capsys, "train", "--resume", tmp_path)
    assert "neither a run's folder" in fails(capsys, "eval", tmp_path)
    assert "neither a run's folder" in fails(capsys, "convert", "export", tmp_path, tmp_path / "out")


def test_a_run_with_checkpoints_is_not_started_over(capsys, run_file, tmp_path):
    write_run(tmp_path / "runs" / "tried", run_config())
    assert "univitar-ds train --resume" in fails(capsys, "train", "--config", run_file)


def test_a_resumed_run_refuses_what_would_change_its_result(capsys, run_file, tmp_path):
    run = create_run(run_config(output=str(tmp_path / "runs"), **_sources(run_file)), "test", 1)
    message = fails(capsys, "train", "--resume", run, "stages.0.lr=5", "seed=3")
    assert "seed, stages.0.lr would change the result" in message
    assert reopen_run(run, ["data.workers=3", "logging.every_steps=1"], 2) == run
    assert "workers: 3" in (run / "config.yaml").read_text()


def test_a_key_in_both_files_is_an_error_that_names_both(capsys, run_file, tmp_path):
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 7}')
    message = fails(capsys, "train", "--config", run_file, f"deepspeed={tmp_path / 'own.json'}")
    assert "own.json" in message
    assert "run.yaml" in message


def test_inspect_prints_fill_and_tokens_and_draws_them(capsys, run_file, tmp_path):
    drawn = tmp_path / "seen.png"
    assert main(["data", "inspect", "--config", str(run_file), "--packs", "3", "--png", str(drawn)]) == 0
    printed = capsys.readouterr()
    for word in ("stage both, image", "stage both, video", "fill", "tokens an item", "left out"):
        assert word in printed.out
    assert str(drawn) in printed.err
    assert drawn.read_bytes().startswith(b"\x89PNG")
    arguments = ["data", "inspect", "--config", str(run_file), "--packs", "1", "--png", str(drawn)]
    assert main(arguments) == 0, "an image that it wrote itself is replaced"
    assert [path.name for path in tmp_path.iterdir() if "seen" in path.name] == ["seen.png"]


@pytest.mark.parametrize("content", [image(32, 32), b'{"samples": 3}', b"years of work", b"[]"])
def test_a_file_that_the_command_did_not_write_is_not_replaced(capsys, run_file, tmp_path, content):
    mine = tmp_path / "mine"
    mine.write_bytes(content)
    for command in (["inspect", "--config", run_file, "--png", mine], ["verify", tmp_path, "--report", mine]):
        message = fails(capsys, "data", *command)
        assert f"{mine} is a file that this command has not written; give another name, or remove it" in message
    assert mine.read_bytes() == content


def test_inspect_with_json_prints_only_json(capsys, run_file, tmp_path):
    arguments = ["--config", str(run_file), "--packs", "2", "--png", str(tmp_path / "a.png"), "--json"]
    assert main(["data", "inspect", *arguments]) == 0
    assert [stream["packs"] for stream in json.loads(capsys.readouterr().out)["streams"]] == [2, 2]


def test_a_result_that_cannot_be_written_is_reported_before_the_work(capsys, run_file, tmp_path):
    nowhere = tmp_path / "gone" / "a"
    assert "make it first" in fails(capsys, "data", "inspect", "--config", run_file, "--png", nowhere)
    assert "make it first" in fails(capsys, "data", "verify", tmp_path, "--report", nowhere)


def test_verify_prints_sound_or_the_errors_and_writes_a_report(capsys, tmp_path):
    folder = write_demo_shards(tmp_path / "shards", images=16, videos=4, shards=1)
    report = tmp_path / "report.json"
    assert main(["data", "verify", str(folder), "--report", str(report), "--workers", "1"]) == 0
    assert ": sound" in capsys.readouterr().out
    assert json.loads(report.read_text())["samples"] == 25

    shard = folder / "train-image-000000.tar"
    content = bytearray(shard.read_bytes())
    at = content.index(b"\xff\xd8\xff")
    content[at : at + 3] = b"???"
    shard.write_bytes(content)
    assert main(["data", "verify", str(folder), "--report", str(report), "--workers", "1", "--split", "train"]) == 1
    printed = capsys.readouterr().out
    assert "unreadable: train-image-000000/i0000" in printed
    assert "its SHA-256 differs from the manifest" in printed
    assert "20 samples in 2 shards: NOT sound" in printed
    assert json.loads(report.read_text())["bad"] == {"unreadable": 1}


def test_verify_prints_only_the_first_of_many_bad_shards(capsys, tmp_path):
    sample = [("k", {"jpg": image(32, 32), "txt": b"a thing"})]
    for number in range(30):
        path = write_tar(tmp_path / "shards" / f"{number:02d}.tar", sample)
    rows = [
        {"file": f"{n:02d}.tar", "split": "train", "kind": "image", "samples": 2, "sha256": "0" * 64}
        | {"bytes": path.stat().st_size}
        for n in range(30)
    ]
    (path.parent / "manifest.json").write_text(json.dumps({"version": 1, "shards": rows}))
    report = tmp_path / "report.json"
    assert main(["data", "verify", str(path.parent), "--report", str(report), "--workers", "1", "--no-decode"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert sum("its SHA-256 differs" in line for line in printed) == 10
    assert len(printed) == 20 + 1 + 1
    assert "... and 40 more" in printed


def test_a_missing_source_to_verify_is_reported(capsys, tmp_path):
    report = tmp_path / "report.json"
    assert main(["data", "verify", str(tmp_path / "nowhere"), "--report", str(report)]) == 1
    assert "there is no such file or folder" in capsys.readouterr().out


@pytest.fixture
def labelled(tmp_path):
    """A folder with a shard of samples with a label and no caption, and a run file with templates for them."""
    folder = tmp_path / "labelled"
    write_tar(folder / "a.tar", [(f"k{i}", {"jpg": image(60, 80), "cls": b"cat"}) for i in range(3)])
    data = {"sources": [{"path": str(folder), "templates": ["a photo of a {}"]}], "s3": {"region": "here"}}
    stages = [{**run_config().stages[0].model_dump(), "video_ratio": 0.0}]
    dump_config(run_config(output=str(tmp_path / "runs"), data=data, stages=stages), tmp_path / "labelled.yaml")
    return folder, tmp_path / "labelled.yaml"


@pytest.mark.parametrize("named", ["nothing", "folder", "tar", "relative"])
def test_labels_without_captions_are_sound_with_the_templates_of_the_run_file(
    capsys, labelled, tmp_path, monkeypatch, named
):
    folder, run_file = labelled
    monkeypatch.chdir(tmp_path)
    sources = {"nothing": [], "folder": [f"{folder}/"], "tar": [f"{folder}/a.tar"], "relative": ["labelled"]}[named]
    arguments = ["--report", str(tmp_path / "report.json"), "--workers", "1"]
    assert main(["data", "verify", "--config", str(run_file), *sources, *arguments]) == 0
    assert "3 samples in 1 shards: sound" in capsys.readouterr().out


def test_a_source_without_what_the_stages_of_the_run_file_read_is_not_sound_and_cannot_be_inspected(
    capsys, labelled, tmp_path
):
    folder, run_file = labelled
    arguments = ["--report", str(tmp_path / "report.json"), "--workers", "1", "--no-decode"]
    run_file.write_text(run_file.read_text().replace("video_ratio: 0.0", "video_ratio: 0.5"))
    said = "stage both needs video samples, but its sources hold none (3 images in 1 shard, all of them scanned)"
    for source in ([], [str(folder)]):
        assert main(["data", "verify", "--config", str(run_file), *source, *arguments]) == 1
        assert said in capsys.readouterr().out
    (fault,) = json.loads((tmp_path / "report.json").read_text())["run"]
    assert fault.startswith(said)
    assert said in fails(capsys, "data", "inspect", "--config", str(run_file), "--png", str(tmp_path / "x.png"))
    assert said in fails(capsys, "train", "--config", str(run_file), "evaluation.sources=[]")
    assert not (tmp_path / "runs").exists()


def test_labels_without_captions_are_not_sound_without_templates(capsys, labelled, tmp_path):
    folder, run_file = labelled
    arguments = ["--report", str(tmp_path / "report.json"), "--workers", "1"]
    assert main(["data", "verify", str(folder), *arguments]) == 1
    assert "no_caption: a/k0" in capsys.readouterr().out
    other = folder.rename(tmp_path / "labelled2")
    assert main(["data", "verify", str(other), "--config", str(run_file), *arguments]) == 1
    assert "no_caption: a/k0" in capsys.readouterr().out


def test_verify_applies_the_limits_of_the_run_file(capsys, labelled, tmp_path):
    folder, run_file = labelled
    run_file.write_text(run_file.read_text().replace("max_image_px: 100000000", "max_image_px: 4799"))
    arguments = ["--config", str(run_file), "--report", str(tmp_path / "report.json"), "--workers", "1"]
    assert main(["data", "verify", str(folder), *arguments]) == 1
    assert capsys.readouterr().out.count("too_large: a/k") == 3


def test_verify_checks_the_split_that_the_run_reads_or_that_of_the_option(capsys, run_file, tmp_path):
    arguments = ["--config", str(run_file), "--report", str(tmp_path / "report.json"), "--workers", "1", "--no-decode"]
    assert main(["data", "verify", *arguments]) == 0
    assert "24 samples" in capsys.readouterr().out
    assert main(["data", "verify", *arguments, "--split", "test"]) == 0
    assert "24 samples" not in capsys.readouterr().out


def test_verify_reads_s3_with_the_settings_of_the_run_file_and_options_override_them(monkeypatch, labelled, tmp_path):
    seen = []
    sound = {"sound": True, "samples": 0, "unread": {}, "sources": [], "shards": []}
    monkeypatch.setattr(
        "univitar_ds.data.tools.verify.verify", lambda sources, settings, **rest: seen.append(settings) or sound
    )
    arguments = ["data", "verify", "--report", str(tmp_path / "report.json"), "--config", str(labelled[1])]
    assert main([*arguments]) == 0
    assert main([*arguments, "--s3-region", "there"]) == 0
    assert [settings.region for settings in seen] == ["here", "there"]


def test_nothing_to_verify_is_an_error(capsys):
    assert "give a SOURCE, or --config" in fails(capsys, "data", "verify")


def test_control_characters_in_names_of_files_are_printed_as_escapes(tmp_path):
    keys = [b"caf\xe9", b"new\nline", b"\x1b[31mred", "日本".encode()]
    write_tar(tmp_path / "a.tar", [(os.fsdecode(key), {"jpg": image(60, 80)}) for key in keys])
    (tmp_path / os.fsdecode(b"\xe9.jpg")).write_bytes(b"junk")
    for arguments in (["verify", "a.tar"], ["probe", os.fsdecode(b"\xe9.jpg")]):
        ended = run_watched(
            [sys.executable, "-m", "univitar_ds", "data", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(ROOT)},
            text=False,
        )
        printed = ended.stdout.decode()
        assert b"Traceback" not in ended.stderr
        if arguments[0] == "verify":
            for name in (r"a/caf\udce9 at", r"a/new\nline at", r"a/\x1b[31mred at", "a/日本 at"):
                assert f"no_caption: {name}" in printed
        else:
            assert r"\udce9.jpg: " in printed


def test_probe_reports_how_a_run_would_read_each_file(capsys, run_file, tmp_path):
    (tmp_path / "a.jpg").write_bytes(image(60, 120))
    (tmp_path / "b.jpg").write_bytes(b"junk")
    files = [str(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    assert main(["data", "probe", *files, "--json"]) == 0
    good, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert [good[key] for key in ("file", "ok", "kind", "width", "height", "frames")] == [
        files[0], True, "image", 120, 60, 1,
    ]  # fmt: skip
    assert good["tokens"] >= 576
    assert [bad[key] for key in ("file", "ok", "error")] == [files[1], False, "unreadable"]

    assert main(["data", "probe", *files, "--config", str(run_file), "--stage", "both"]) == 0
    good, bad = capsys.readouterr().out.splitlines()
    assert "120 x 60 px" in good
    assert "576" not in good, "the sizes are the run's"
    assert bad.startswith("left out (unreadable): ")


def test_probe_reports_the_other_files_if_one_is_missing(capsys, tmp_path):
    (tmp_path / "a.jpg").write_bytes(image(60, 120))
    files = [str(tmp_path / name) for name in ("missing.jpg", "a.jpg", ".")]
    assert main(["data", "probe", *files]) == 1
    missing, good, folder = capsys.readouterr().out.splitlines()
    assert missing.endswith("missing.jpg: the file cannot be read: No such file or directory")
    assert folder.endswith("the file cannot be read: Is a directory")
    assert good.startswith("image: ")


def test_the_error_for_a_missing_stage_names_the_existing_ones(capsys, run_file):
    assert "no stage 'last'; the stages are both" in fails(
        capsys, "data", "probe", "x.jpg", "--config", run_file, "--stage", "last"
    )


def _sources(run_file: Path) -> dict:
    from univitar_ds.config.load import load_config

    config = load_config(run_file)
    return {"data": config.data.model_dump(), "evaluation": config.evaluation.model_dump()}


def test_overrides_may_stand_on_both_sides_of_options_and_other_words_may_not():
    parser = build_parser()
    parsed = parse(parser, ["train", "seed=3", "--config", "demo", "--nproc", "2", "stages.0.lr=5e-4"])
    assert (parsed.overrides, parsed.nproc) == (["seed=3", "stages.0.lr=5e-4"], 2)
    for wrong in (["train", "--config", "demo", "--ncpu", "2"], ["demo", "seed=3"]):
        with pytest.raises(SystemExit):
            parse(parser, wrong)
