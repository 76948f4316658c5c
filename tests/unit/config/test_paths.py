"""`~` and `$VARIABLES` are expanded in the same way in every path."""

import os
from pathlib import Path

import pytest

from tests.support.finished import run_config
from univitar_ds.cli.main import build_parser, main
from univitar_ds.config.keys.places import PATHS
from univitar_ds.config.load import check_config, dump_config, load_config
from univitar_ds.config.paths import expanded, written


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA_1", str(tmp_path / "data"))
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("~", "HOME"), ("~/runs", "HOME/runs"), ("$DATA_1/x", "DATA/x"), ("${DATA_1}x/$DATA_1", "DATAx/DATA"),
        ("a~/~b", "a~/~b"), ("./~", "./~"), ("a$$b", "a$b"), ("$$UNSET", "$UNSET"), ("5$/$5", "5$/$5"), ("a$", "a$"),
        ("s3://bucket$DATA_1/~", "s3://bucketDATA/~"), ("s3://bucket/a$$b", "s3://bucket/a$b"),
    ],
)  # fmt: skip
def test_paths_are_expanded(path, meant, tmp_path):
    meant = meant.replace("HOME", str(tmp_path / "home")).replace("DATA", str(tmp_path / "data"))
    assert expanded(path) == meant
    assert expanded(written(meant)) == meant or meant.startswith("./")


@pytest.mark.parametrize(
    ("path", "said"),
    [("$UNSET/x", "the variable UNSET is not set"), ("s3://${UNSET}/x", "the variable UNSET is not set"),
     ("~nobody-of-this-name/x", "there is no user 'nobody-of-this-name'")],
)  # fmt: skip
def test_an_unset_variable_is_named(path, said):
    with pytest.raises(ValueError, match=said):
        expanded(path)


def test_a_file_of_the_very_name_is_meant_itself():
    Path("a$UNSET").touch()
    Path("b$DATA_1").touch()
    assert (expanded("a$UNSET"), expanded("b$DATA_1")) == ("a$UNSET", "b$DATA_1")


def test_every_path_of_a_run_file_is_expanded_or_refused():
    def content(path: str) -> dict:
        base = run_config().model_dump(mode="json")
        source = {"path": path, "class_names": path, "table": {"images": path}}
        base |= {"output": path, "deepspeed": path, "evaluation": {"sources": [source]}}
        base["data"] |= {"sources": [source], "cache": {"folder": path}}
        base["model"] |= {"init_from": path}
        base["model"]["text"] |= {"tokenizer": path, "path": path}
        base["objective"]["teacher"] = {"path": path, "cache": path}
        return base

    with pytest.raises(Exception, match="has 14 errors") as refused:
        check_config(content("$UNSET/x"), "the run")
    for dotted in PATHS:
        assert f"- {dotted.replace('*', '0')}: $UNSET/x: the variable UNSET is not set" in str(refused.value)
    dump_config(check_config(content("~/x"), "the run"), Path("run.yaml"))
    assert Path("run.yaml").read_text().count(f"{os.environ['HOME']}/x") == len(PATHS)
    assert load_config("run.yaml").output == f"{os.environ['HOME']}/x"


COMMANDS = [
    ["train", "--config", "@"], ["train", "--resume", "@"], ["data", "pack", "@", "out"], ["data", "pack", "in", "@"],
    ["data", "verify", "@"], ["data", "verify", "x", "--report", "@"], ["data", "verify", "x", "--config", "@"],
    ["data", "probe", "@"], ["data", "inspect", "--config", "@"],
    ["data", "inspect", "--config", "demo", "--png", "@"], ["data", "scenes", "@"], ["eval", "@"], ["report", "@"],
    ["convert", "export", "@", "x"], ["convert", "export", "x", "@"], ["demo", "--folder", "@"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_path_of_a_command_is_expanded_or_refused(capsys, command):
    assert main([word.replace("@", "$UNSET/x") for word in command]) == 2
    assert capsys.readouterr().err == (
        "error: $UNSET/x: the variable UNSET is not set; set it, or write $$ for a dollar sign\n"
    )
    assert os.listdir() == []
    if "--config" in command and command[command.index("--config") + 1] == "@":
        assert main([word.replace("@", "~/x") for word in command]) == 2
        assert f"no run file '{os.environ['HOME']}/x'" in capsys.readouterr().err
        return
    parsed = build_parser().parse_args([word.replace("@", "~/x") for word in command])
    values = [value for given in vars(parsed).values() for value in (given if isinstance(given, list) else [given])]
    assert f"{os.environ['HOME']}/x" in map(str, values)
