"""Plugins are imported from files and modules, register their objects, and fail with one message."""

import hashlib
import re
import sys

import pytest

from univitar_ds import plugins
from univitar_ds.config.keys.places import anchored
from univitar_ds.config.load import check_config
from univitar_ds.errors import ConfigError, PluginError
from univitar_ds.plugins import compare_with_saved, load_plugins, objective_named, optimizer_of, readers

CALLBACK = """
from univitar_ds.plugins import Callback, register_callback
@register_callback
class Seen(Callback):
    pass
"""
OBJECTIVE = """
from univitar_ds.plugins import register_objective
@register_objective("{name}")
class Loss:
    def loss_of_chunk(self, images, texts, scale, bias, positives):
        return 0
"""
RUN = {
    "name": "a",
    "data": {"sources": [{"path": "packed"}]},
    "stages": [{"name": "s", "samples": 8, "lr": 1e-3}],
}


@pytest.fixture(autouse=True)
def forgotten():
    yield
    load_plugins(())


@pytest.fixture
def written(tmp_path):
    def write(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_a_file_is_imported_once_and_again_after_a_change(written):
    path = written(CALLBACK)
    (first,) = load_plugins([path])
    assert (first.name, len(first.callbacks)) == ("mine", 1)
    assert first.version == hashlib.sha256(CALLBACK.encode()).hexdigest()[:16]
    assert load_plugins([path])[0] is first
    written(CALLBACK + "__version__ = '1.2'\n")
    (second,) = load_plugins([path])
    assert second.version == "1.2"
    assert len(second.callbacks) == 1


def test_importing_a_file_writes_nothing_beside_it_and_its_classes_find_their_module(written, tmp_path):
    text = CALLBACK + "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: 'int' = 1\n"
    load_plugins([written(text)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_a_module_of_the_environment_keeps_what_it_registers_over_several_loads(written, tmp_path, monkeypatch):
    written(CALLBACK, "some_plugin_module.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (first,) = load_plugins(["some_plugin_module"])
    load_plugins(())
    (second,) = load_plugins(["some_plugin_module"])
    assert len(first.callbacks) == len(second.callbacks) == 1
    assert first.version == hashlib.sha256(CALLBACK.encode()).hexdigest()[:16]


def test_a_module_in_the_current_folder_is_not_found(written, tmp_path, monkeypatch):
    written(CALLBACK, "only_here_plugin.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match=r"only_here_plugin cannot be imported.*path of a \.py file"):
        load_plugins(["only_here_plugin"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = 1 / 0\n", r"mine\.py\) cannot be imported: ZeroDivisionError: .*\(line 2\); correct it"),
        ("def f(:\n", r"cannot be imported: SyntaxError: .*; correct it"),
        ("import not_there_at_all\n", r"not_there_at_all.*; install not_there_at_all"),
        ("raise SystemExit(3)\n", r"cannot be imported: SystemExit: 3"),
        ("\0", r"cannot be imported: "),
        (CALLBACK.replace("pass", "def on_steps(self, info): pass"), r"on_steps, which is never called.*on_step, "),
        ("from univitar_ds.plugins import *\nregister_callback(3)\n", r"none of the methods.*on_start"),
        (OBJECTIVE.format(name="sigmoid"), r"sigmoid is one of.*choose another name"),
        (OBJECTIVE.format(name="a b"), r"'a b' is not a name"),
        (OBJECTIVE.format(name="x") * 2, r"x is registered twice"),
        (OBJECTIVE.format(name="x").replace("loss_of_chunk", "loss"), r"x has no method loss_of_chunk"),
        ("from univitar_ds.plugins import *\nregister_reader('a', suffix='lst')\n", r"suffix 'lst' is not a dot"),
        ("from univitar_ds.plugins import *\nregister_reader('a', scheme='s3')\n", r"scheme 's3' is taken"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_error_message(written, text, said):
    with pytest.raises(PluginError, match=said) as caught:
        load_plugins([written(text)])
    assert "\n" not in str(caught.value)
    assert readers() == []


@pytest.mark.parametrize("entry", ["gone.py", "folder/gone.py"])
def test_the_error_for_a_missing_file_has_its_path_and_a_remedy(entry):
    with pytest.raises(PluginError, match=r"gone\.py.*No such file.*check the path"):
        load_plugins([entry])


def test_two_plugins_of_one_name_or_with_one_objective_are_refused(written, tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(PluginError, match="both called mine; rename"):
        load_plugins([written(CALLBACK), written(CALLBACK, "sub/mine.py")])
    both = [written(OBJECTIVE.format(name="x"), name) for name in ("a.py", "b.py")]
    with pytest.raises(PluginError, match="both register the objective x; rename"):
        load_plugins(both)


def test_an_objective_is_found_while_its_plugin_is_one_of_the_run(written):
    path = written(OBJECTIVE.format(name="hinge2"))
    load_plugins([path])
    assert objective_named("hinge2")[0].name == "mine"
    load_plugins(())
    with pytest.raises(PluginError, match=r"hinge2: no plugin registers it.*sigmoid.*plugins"):
        objective_named("hinge2")


OPTIMIZER = """
from univitar_ds.plugins import Moment, register_optimizer
@register_optimizer("{name}")
class Mine:
    def __init__(self, beta=0.5):
        self.moments = {moments}
    def step(self, weights, gradient, moments, *, lr, weight_decay, step):
        pass
"""


def test_an_optimizer_is_made_with_its_options_while_its_plugin_is_one_of_the_run(written):
    load_plugins([written(OPTIMIZER.format(name="lion2", moments="{'mean': Moment(initial=beta)}"))])
    plugin, made = optimizer_of("lion2", {"beta": 0.75})
    assert plugin.described() == {
        "name": "mine",
        "version": plugin.version,
        "objectives": [],
        "optimizers": ["lion2"],
    }
    assert made.moments["mean"].initial == 0.75
    with pytest.raises(PluginError, match=r"failed in the optimizer lion2 with options {'bet': 1}: TypeError.*'bet'"):
        optimizer_of("lion2", {"bet": 1})
    with pytest.raises(PluginError, match=r"optimizer.kind lion3: no plugin registers it; choose one of .*muon, lion2"):
        optimizer_of("lion3", {})
    load_plugins(())
    with pytest.raises(PluginError, match="no plugin registers it; choose one of adamw, muon, or name in plugins"):
        optimizer_of("lion2", {})


@pytest.mark.parametrize(
    ("moments", "said"),
    [
        ("None", "moments is not a dict that maps names to Moment()"),
        ("{'a': 0.0}", "moments is not a dict"),
        ("{'a/b': Moment()}", "moment 'a/b' is not a name of 1 to 64 small letters"),
        ("{'fp32': Moment()}", "moment fp32 has a name that checkpoints use; choose another"),
        ("{'a': Moment('int8')}", "moment a has dtype 'int8'; choose one of float32, bfloat16, float16"),
        ("{'a': Moment(initial=float('nan'))}", "moment a begins at nan; give a finite number"),
    ],
)
def test_moments_that_no_checkpoint_can_have_are_refused(written, moments, said):
    load_plugins([written(OPTIMIZER.format(name="lion2", moments=moments))])
    with pytest.raises(PluginError, match=re.escape(said)):
        optimizer_of("lion2", {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OPTIMIZER.format(name="muon", moments="{}"), "optimizer muon is one of adamw, muon, which need no plugin"),
        (OPTIMIZER.format(name="a", moments="{}").replace("step(", "update("), "a is not a class with a method step("),
        (OPTIMIZER.format(name="a", moments="{}") * 2, "optimizer a is registered twice"),
    ],
)
def test_an_optimizer_that_cannot_be_registered_is_refused(written, text, said):
    with pytest.raises(PluginError, match=re.escape(said)):
        load_plugins([written(text)])


def test_registering_outside_of_a_plugin_is_refused():
    with pytest.raises(PluginError, match="name its file or module in plugins"):
        plugins.register_callback(plugins.Callback())


def test_an_error_in_a_call_names_the_plugin_the_hook_and_the_line(written):
    (plugin,) = load_plugins([written(CALLBACK.replace("pass", "def on_step(self, info):\n        info['loss']"))])
    said = r"mine .*failed in on_step: TypeError: .*\(line 6\); correct it"
    with pytest.raises(PluginError, match=said), plugins.calling(plugin, "on_step"):
        plugin.callbacks[0].on_step(None)


def test_changed_and_absent_plugins_are_named_by_their_versions(written):
    (plugin,) = load_plugins([written(CALLBACK + "__version__ = '2'\n")])
    assert compare_with_saved([plugin.described()]) == []
    (changed,) = compare_with_saved([plugin.described() | {"version": "1"}])
    assert "has version 2, and 1 when" in changed
    (absent,) = compare_with_saved([plugin.described() | {"name": "other"}])
    assert "other, with which the checkpoint was written, is left out" in absent


def test_paths_become_absolute_and_names_of_modules_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = check_config({**RUN, "plugins": ["a.py", "sub/b.py", "some.module"]}, "the test")
    assert anchored(config).plugins == [str(tmp_path / "a.py"), str(tmp_path / "sub/b.py"), "some.module"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plugins": ["a.py", "a.py"]}, "a.py twice; keep one"),
        ({"plugins": [""]}, "plugins.0 must not be empty"),
        ({"optimizer": {"kind": "lion"}}, "lion is neither adamw nor muon.*name in plugins the plugin"),
        ({"objective": {"kind": "sigmod"}}, "sigmod is none of sigmoid, softmax, classification.*plugins"),
    ],
)
def test_a_wrong_entry_of_the_run_file_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        check_config({**RUN, **changes}, "the test")
