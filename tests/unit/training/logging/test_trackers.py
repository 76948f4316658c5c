"""Experiment trackers: fake packages record their arguments."""

import json
import logging
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from tests.support.runs import small_config
from univitar_ds.config.load import check_config, dump_config, load_config
from univitar_ds.errors import ConfigError, InstallationError
from univitar_ds.planning.checks import check_libraries
from univitar_ds.training.logging import trackers
from univitar_ds.training.logging.trackers import Tracker, open_trackers, without_credentials


class StandIn:
    """The package of a tracker, which records calls and the threads that made them."""

    def __init__(self, *, logged_in=True, fails=()):
        self.calls, self.threads, self.fails, self.logged_in = [], set(), fails, logged_in

    def _note(self, call, *given, **named):
        self.threads.add(threading.current_thread())
        self.calls.append((call, *given, named) if named else (call, *given))
        if call in self.fails:
            raise RuntimeError(f"{call} failed at https://me:secret@api.example/x")

    def login(self, **named):
        return self.logged_in

    def Settings(self, **named):
        return named

    def init(self, **named):
        self._note("init", **named)
        return SimpleNamespace(
            log=lambda values, **more: self._note("log", values, **more),
            define_metric=lambda *given, **named: None,
            finish=lambda: self._note("finish"),
        )

    def of(self, call):
        return [entry[1:] for entry in self.calls if entry[0] == call]


@pytest.fixture
def packages(monkeypatch):
    made = SimpleNamespace(wandb=StandIn(), trackio=StandIn())
    for name, package in vars(made).items():
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    return made


WANDB = {"project": "p", "entity": "team", "group": "seeds", "tags": ["a", "b"], "notes": "n"}


def config_of(folder, **sections):
    return small_config(folder / "shards", folder / "runs", logging={"tensorboard": False, **sections})


def sent(config, run, *points):
    opened = open_trackers(config, run)
    for tracker in opened:
        for values, step in points:
            tracker.log(values, step)
    for tracker in opened:
        tracker.close()
        tracker.close()
    return opened


def test_wandb_is_given_the_settings_the_configuration_and_all_points_in_order(tmp_path, packages):
    config = config_of(tmp_path, wandb=WANDB)
    s3 = config.data.s3.model_copy(update={"endpoint_url": "http://me:secret@127.0.0.1:9000"})
    config = config.model_copy(update={"data": config.data.model_copy(update={"s3": s3})})
    sent(config, tmp_path, ({"loss/loss": 2.0}, 1), ({"loss/loss": 1.0}, 2), ({"loss/loss": 1.5}, 2))
    ((given,),) = packages.wandb.of("init")
    expected = {**WANDB, "name": "small", "mode": "online", "resume": "allow", "dir": str(tmp_path / "runs")}
    assert {name: given[name] for name in expected} == expected
    assert (given["config"]["name"], given["config"]["optimizer"]["clip_norm"]) == ("small", 1.0)
    assert "secret" not in json.dumps(given)
    assert (given["settings"]["console"], given["settings"]["x_disable_meta"]) == ("off", True)
    assert [values for (values,) in packages.wandb.of("log")] == [
        {"loss/loss": 2.0, "step": 1},
        {"loss/loss": 1.0, "step": 2},
        {"loss/loss": 1.5, "step": 2},
    ]
    assert packages.wandb.calls[-1] == ("finish",)
    assert threading.current_thread() not in packages.wandb.threads, "training would wait for the network"
    assert packages.trackio.calls == []


def test_trackio_is_given_the_same(tmp_path, packages):
    sent(config_of(tmp_path, trackio={"project": "p", "name": "n"}), tmp_path, ({"loss/loss": 2.0}, 7))
    ((given,),) = packages.trackio.of("init")
    assert (given["project"], given["resume"], given["config"]["name"]) == ("p", "allow", "small")
    assert given["name"].startswith("n-"), "another run of this name would be continued"
    assert packages.trackio.of("log") == [({"loss/loss": 2.0}, {"step": 7})]
    assert packages.trackio.calls[-1] == ("finish",)


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_keeps_its_identifier_and_another_run_has_another(tmp_path, packages, name, key):
    config = config_of(tmp_path, **{name: {}})
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in (*runs, runs[0]):
        run.mkdir(exist_ok=True)
        sent(config, run)
    first, second, third = (given[key] for (given,) in getattr(packages, name).of("init"))
    assert first == third != second
    assert json.loads((runs[0] / "trackers.json").read_text()) == {name: first}


@pytest.mark.parametrize("content", ["", "[1]", '{"wandb": 3}', '{"wandb": ""}', "\udcff{"])
def test_a_damaged_file_of_identifiers_is_written_again(tmp_path, packages, content):
    (tmp_path / "trackers.json").write_bytes(content.encode(errors="surrogateescape"))
    sent(config_of(tmp_path, wandb={}), tmp_path)
    ((given,),) = packages.wandb.of("init")
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": given["id"]}
    assert given["id"]


def test_without_a_tracker_no_file_is_written(tmp_path, packages):
    assert open_trackers(config_of(tmp_path), tmp_path) == []
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tracker_that_fails_warns_once_without_secrets_and_the_other_continues(tmp_path, packages, caplog, call):
    packages.wandb.fails = (call,)
    with caplog.at_level(logging.WARNING):
        sent(config_of(tmp_path, wandb={}, trackio={}), tmp_path, ({"a": 1.0}, 1), ({"a": 2.0}, 2))
    (message,) = caplog.messages
    assert "no more metrics to wandb" in message
    assert f"{call} failed at https://***@api.example/x" in message
    assert len(packages.trackio.of("log")) == 2


def test_without_a_key_wandb_does_not_prompt_and_the_warning_has_a_remedy(tmp_path, packages, caplog):
    packages.wandb.logged_in = False
    sent(config_of(tmp_path, wandb={}), tmp_path, ({"a": 1.0}, 1))
    assert packages.wandb.calls == []
    (message,) = caplog.messages
    assert "WANDB_API_KEY" in message
    assert "logging.wandb.mode=offline" in message
    sent(config_of(tmp_path, wandb={"mode": "offline"}), tmp_path)
    assert packages.wandb.of("init"), "offline needs no key"


def test_a_tracker_that_hangs_delays_neither_training_nor_the_end(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "WAITING", 3)
    release = threading.Event()
    tracker = Tracker("slow", lambda: release.wait() and None, closing_s=0.01)
    try:
        for step in range(10):
            tracker.log({"a": 1.0}, step)
        tracker.close()
    finally:
        release.set()
    assert ["from step 3 on it lacks some of them" in text for text in caplog.messages] == [True, False]
    assert "has not taken the last points within 0 s" in caplog.messages[1]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_an_absent_package_is_reported_with_its_installation_before_anything_starts(tmp_path, monkeypatch, name):
    monkeypatch.setattr("univitar_ds.planning.checks.find_spec", lambda package: None if package == name else True)
    check_libraries(config_of(tmp_path))
    with pytest.raises(InstallationError, match=rf"pip install 'univitar_ds\[{name}\]'.*logging.{name}=null"):
        check_libraries(config_of(tmp_path, **{name: {}}))


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"wandb": {"mode": "shared"}}, "logging.wandb.mode"),
        ({"wandb": {"project": "a/b"}}, "logging.wandb.project"),
        ({"wandb": {"api_key": "x"}}, "logging.wandb.api_key"),
        ({"trackio": {"entity": "me"}}, "logging.trackio.entity"),
        ({"trackio": {"project": ""}}, "logging.trackio.project"),
    ],
)
def test_wrong_settings_are_named(tmp_path, section, fault):
    with pytest.raises(ConfigError, match=fault):
        config_of(tmp_path, **section)


def test_settings_survive_the_file_of_the_run_and_can_be_overridden(tmp_path):
    dump_config(config_of(tmp_path, wandb=WANDB), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").logging.wandb.tags == ["a", "b"]
    changed = load_config(tmp_path / "config.yaml", ["logging.wandb.mode=offline", "logging.trackio={}"])
    assert (changed.logging.wandb.mode, changed.logging.trackio.project) == ("offline", "univitar")
    assert load_config(tmp_path / "config.yaml", ["logging.wandb=null"]).logging.wandb is None
    assert check_config(changed.model_dump(mode="json"), "the test") == changed


def test_credentials_in_addresses_are_hidden():
    assert (
        without_credentials('a "https://u:p@h/x" s3://b/k@2 http://t@h')
        == 'a "https://***@h/x" s3://b/k@2 http://***@h'
    )


OFFLINE = """
import sys
from pathlib import Path
from univitar_ds.config.load import load_config
from univitar_ds.training.logging.trackers import open_trackers
folder = Path(sys.argv[1])
for step in (1, 2):  # the second time as a resumed run
    trackers = open_trackers(load_config(folder / "config.yaml"), folder)
    for tracker in trackers:
        tracker.log({"loss/loss": 1.0 / step}, step)
        tracker.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_package_itself_takes_the_metrics_of_a_run_offline(tmp_path, name, request):
    packages = tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", packages, name]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip(f"{name} cannot be installed here")
    settings = {"wandb": {"mode": "offline"}, "trackio": {}}[name]
    dump_config(config_of(tmp_path, **{name: settings}), tmp_path / "config.yaml")
    (tmp_path / "runs").mkdir()
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(packages)}
    environment |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", OFFLINE, tmp_path], env=environment, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "no more metrics" not in ended.stderr
    identifier = json.loads((tmp_path / "trackers.json").read_text())[name]
    if name == "wandb":
        files = list((tmp_path / "runs" / "wandb").glob(f"offline-run-*/run-{identifier}.wandb"))
        assert len(files) == 2
        assert all(b"loss/loss" in file.read_bytes() for file in files)
    else:
        import sqlite3

        (database,) = (tmp_path / "trackio").glob("univitar.db")
        rows = sqlite3.connect(database).execute("SELECT run_name, step FROM metrics ORDER BY step").fetchall()
        assert rows == [(identifier, 1), (identifier, 2)]
