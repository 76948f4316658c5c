"""Plugins: objectives, optimizers, readers of sources and callbacks in Python files or modules that a run file names.

A plugin is imported from the run file's `plugins` or `data pack --plugin` only, never from a checkpoint or a model. It
registers what it has while it is imported:

    from univitar_ds.plugins import Callback, register_callback

    @register_callback
    class Loss(Callback):
        def on_step(self, info):
            print(info.step, info.loss)

This module imports neither torch nor the rest of the package, so that a plugin is free to import anything.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import math
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from univitar_ds.errors import PluginError, UserError, first_line
from univitar_ds.regular_files import read_bytes

logger = logging.getLogger(__name__)

OBJECTIVES = ("sigmoid", "softmax", "classification")
"""Objectives that need no plugin."""
OPTIMIZERS = ("adamw", "muon")
"""Optimizers that need no plugin."""
HOOKS = ("on_start", "on_step", "on_checkpoint", "on_end")
"""Methods of a callback."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX = re.compile(r"\.[A-Za-z0-9][A-Za-z0-9._-]*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_TAKEN_SCHEMES = ("s3", "file")
_MOMENT = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TAKEN_MOMENTS = ("fp32", "ema", "frozen", "step")
"""What else a checkpoint, or the state of an optimizer, has of a parameter."""
MOMENT_TYPES = ("float32", "bfloat16", "float16")
_Registered = TypeVar("_Registered")


@dataclass(frozen=True)
class RunInfo:
    """A run as `Callback.on_start` gets it.

    `folder`: of the run; `step`: steps that are done, above 0 if the run is resumed; `ranks`: number of processes;
    `config`: a copy of the run file with all keys.
    """

    name: str
    folder: Path
    step: int
    ranks: int
    config: dict[str, Any]


@dataclass(frozen=True)
class StepInfo:
    """A step as `Callback.on_step` gets it. The numbers are those of all ranks.

    `step`: steps that are done; `samples`, `tokens`: of the run so far; `items`: of the step; `loss`: with the weights
    of the stage; `losses`: its parts without weights; `logit_scale`, `logit_bias`: None for a classifier; `seconds`: of
    the slowest rank.
    """

    step: int
    stage: str
    modality: str
    samples: int
    tokens: int
    items: int
    loss: float
    losses: dict[str, float]
    grad_norm: float
    lr: float
    logit_scale: float | None
    logit_bias: float | None
    seconds: float


class Callback:
    """Base class of callbacks. Methods are called on rank 0 only, while the other ranks wait for its next step.

    An error in a method ends the run on all ranks before the next step.
    """

    def on_start(self, run: RunInfo) -> None:
        """Is called once in each start, before the first step."""

    def on_step(self, info: StepInfo) -> None:
        """Is called after each good step. After a rollback the numbers of steps continue from the last checkpoint."""

    def on_checkpoint(self, folder: Path | str) -> None:
        """Is called after each checkpoint, which is complete in `folder`, a path or an s3:// address."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Is called last, after export and evaluation, or after a run that was asked to stop has saved.

        `summary` is the content of the run's summary.json; its `completed` is whether all stages are done.
        """


class Objective(Protocol):
    """A loss that is a sum over pairs of an image and a text. The sum is divided by the items of the step."""

    def loss_of_chunk(self, images: Any, texts: Any, scale: Any, bias: Any, positives: Any) -> Any:
        """Returns the sum of the losses of n * m pairs, a scalar tensor with a gradient.

        It is called for one block of the step's pairs at a time, each pair in one block, so it must not depend on how
        many others a block has: no mean, no softmax over a block.

        Args: images: (n, E), texts: (m, E), float32 unit vectors, image or video i and text j; scale, bias: (), of
            the model, positive scale; positives: (n, m) bool, whether image i and text j belong together.
            n and m are at least 1.
        """


@dataclass(frozen=True)
class Moment:
    """A number that an optimizer keeps for each weight. `dtype`: one of MOMENT_TYPES; `initial`: before an update."""

    dtype: str = "float32"
    initial: float = 0.0


class Optimizer(Protocol):
    """An optimizer that updates each weight on its own. `moments`: what it keeps for each weight, by name."""

    moments: Mapping[str, Moment]

    def step(
        self, weights: Any, gradient: Any, moments: Mapping[str, Any], *, lr: float, weight_decay: float, step: int
    ) -> None:
        """Updates weights and moments in place.

        It is called for each part of the weights that a rank has, without regard to where a parameter begins, so an
        element may depend on the same element of the other tensors only: no norm, no mean, no message to other ranks.
        The gradient is that of all ranks, after clipping. An update that is skipped, since a gradient is not finite,
        does not call it.

        Args: weights, gradient: (n,) float32; moments: (n,) tensors by name, of the declared types; lr: of the stage,
            times that of the layer; weight_decay: 0 for vectors such as norms and biases; step: number of this update
            of these weights, 1 for the first.
        """


@dataclass(frozen=True)
class Reader:
    """A registered reader of sources; see `register_reader`."""

    plugin: Plugin
    name: str
    rows: Callable[[str, Any], Iterable[Mapping[str, Any]]]
    suffixes: tuple[str, ...]
    schemes: tuple[str, ...]
    uses: frozenset[str]

    def reads(self, source: str) -> bool:
        """Whether the name of a source is one for this reader."""
        scheme, separator, _ = source.partition("://")
        if separator:
            return scheme in self.schemes
        return source.lower().endswith(self.suffixes) and not os.path.isdir(source)


@dataclass
class Plugin:
    """An imported plugin and what it has registered.

    `entry`: as in the run file; `name`: of the module, or of the file without .py; `version`: the module's
    `__version__`, or else a hash of the text of its file.
    """

    entry: str
    name: str
    version: str = ""
    text_hash: str = ""
    objectives: dict[str, Objective] = field(default_factory=dict)
    optimizers: dict[str, Callable[..., Optimizer]] = field(default_factory=dict)
    readers: dict[str, Reader] = field(default_factory=dict)
    callbacks: list[Any] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        """Returns what a checkpoint stores of the plugin, as JSON."""
        return {"name": self.name, "version": self.version, "objectives": sorted(self.objectives)} | (
            {"optimizers": sorted(self.optimizers)} if self.optimizers else {}
        )

    @property
    def place(self) -> str:
        """The name for messages, with the file of a plugin that is one."""
        return f"{self.name} ({self.entry})" if is_file(self.entry) else self.name


_loaded: dict[str, Plugin] = {}
"""The plugins of this process by entry."""
_active: list[Plugin] = []
"""Those of the present run, in the order of its run file."""
_importing: list[Plugin] = []
"""The plugins that are being imported, the innermost last."""


def register_callback(callback: _Registered) -> _Registered:
    """Registers a callback: a class like `Callback`, which is made without arguments, or an object of one.

    Raises: PluginError if it has none of the methods, or a method that begins with on_ and is never called.
    """
    plugin = _registering("a callback")
    made = _made(callback)
    unknown = [name for name in dir(made) if name.startswith("on_") and name not in HOOKS]
    if unknown or not any(callable(getattr(made, name, None)) for name in HOOKS):
        found = f"the method {unknown[0]}, which is never called" if unknown else "none of the methods of a callback"
        raise PluginError(f"a callback has {found}; the methods are {', '.join(HOOKS)}")
    plugin.callbacks.append(made)
    return callback


def register_objective(name: str) -> Callable[[_Registered], _Registered]:
    """Returns a decorator that registers a class like `Objective` for `objective.kind: NAME`.

    The class is made without arguments. Raises: PluginError if the name is taken or no name, or without the method.
    """
    plugin = _registering(f"objective {name!r}")
    _check_name(name, "objective", OBJECTIVES, plugin)

    def register(objective: _Registered) -> _Registered:
        made = _made(objective)
        if not callable(getattr(made, "loss_of_chunk", None)):
            raise PluginError(f"objective {name} has no method loss_of_chunk(images, texts, scale, bias, positives)")
        plugin.objectives[name] = made
        return objective

    return register


def register_optimizer(name: str) -> Callable[[_Registered], _Registered]:
    """Returns a decorator that registers a class like `Optimizer` for `optimizer.kind: NAME`.

    The class is made with `optimizer.options` as keyword arguments. Raises: PluginError if the name is taken or no
    name, or without the method.
    """
    plugin = _registering(f"optimizer {name!r}")
    _check_name(name, "optimizer", OPTIMIZERS, plugin)

    def register(optimizer: _Registered) -> _Registered:
        if not isinstance(optimizer, type) or not callable(getattr(optimizer, "step", None)):
            method = "step(weights, gradient, moments, *, lr, weight_decay, step)"
            raise PluginError(f"optimizer {name} is no class with a method {method}")
        plugin.optimizers[name] = optimizer
        return optimizer

    return register


def register_reader(
    name: str, *, suffix: str | Sequence[str] = (), scheme: str | Sequence[str] = (), uses: Collection[str] = ()
) -> Callable[[_Registered], _Registered]:
    """Returns a decorator that registers a function `rows(source, options)` for sources of this form.

    The function yields a mapping for each image or video: `file`, a path that is relative to the folder of the source
    or of `options.images`, or an absolute path in it; `caption` (a text, or a list) or `label` (a text), or both; and
    optionally `split` and `set`. What is wrong with one row leaves that row out. Rows of one file are joined.

    Args: name: of the form, for `data pack --format`; suffix: ends of names, such as ".lst"; scheme: of sources such as
        "catalog" for catalog://pets; uses: further options (`data.importing.rows.ReadOptions`) that the function reads.
    Raises: PluginError if a name, suffix or scheme cannot be used.
    """
    plugin = _registering(f"reader {name!r}")
    _check_name(name, "reader", (), plugin)
    suffixes, schemes = ((given,) if isinstance(given, str) else tuple(given) for given in (suffix, scheme))
    for one in suffixes:
        if not _SUFFIX.fullmatch(one):
            raise PluginError(f"reader {name}: suffix {one!r} is not a dot and letters, digits, dots, - and _")
    for one in schemes:
        if not _SCHEME.fullmatch(one) or one in _TAKEN_SCHEMES:
            raise PluginError(f"reader {name}: scheme {one!r} is {'taken' if one in _TAKEN_SCHEMES else 'no scheme'}")

    def register(rows: _Registered) -> _Registered:
        if not callable(rows):
            raise PluginError(f"reader {name} is no function rows(source, options)")
        lower = tuple(one.lower() for one in suffixes)
        plugin.readers[name] = Reader(plugin, name, rows, lower, schemes, frozenset(uses))
        return rows

    return register


def _registering(what: str) -> Plugin:
    if not _importing:
        raise PluginError(f"{what} is registered outside of the import of a plugin; name its file or module in plugins")
    return _importing[-1]


def _made(registered: Any) -> Any:
    return registered() if isinstance(registered, type) else registered


def _check_name(name: str, what: str, taken: Collection[str], plugin: Plugin) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PluginError(f"{what} {name!r} is no name of letters, digits, dots, - and _ (not first), at most 64")
    if name in taken:
        raise PluginError(f"{what} {name} is one of {', '.join(taken)}, which need no plugin; choose another name")
    registered = {"objective": plugin.objectives, "optimizer": plugin.optimizers, "reader": plugin.readers}
    if name in registered[what]:
        raise PluginError(f"{what} {name} is registered twice; choose another name")


def is_file(entry: str) -> bool:
    """Whether an entry of `plugins` is the path of a file, not the name of a module."""
    return entry.endswith(".py") or os.sep in entry


def load_plugins(entries: Sequence[str]) -> list[Plugin]:
    """Imports plugins, each once in a process; a file that has changed is imported again. Returns them in this order.

    Objectives, optimizers and readers of these plugins are then found, and those of others no longer.

    Raises: PluginError if one cannot be imported, or if two have one name, or register something under one name.
    """
    _active.clear()
    found = [_load_file(entry) if is_file(entry) else _load_module(entry) for entry in entries]
    for number, plugin in enumerate(found):
        for other in found[:number]:
            if other.name == plugin.name:
                raise PluginError(
                    f"plugins {other.entry} and {plugin.entry} are both called {plugin.name}; rename one of them, "
                    "since checkpoints name plugins so"
                )
            for what, theirs, ours in (
                ("objective", other.objectives, plugin.objectives),
                ("optimizer", other.optimizers, plugin.optimizers),
                ("reader", other.readers, plugin.readers),
            ):
                if both := sorted(theirs.keys() & ours.keys()):
                    raise PluginError(
                        f"plugins {other.place} and {plugin.place} both register the {what} {both[0]}; rename one of "
                        "them"
                    )
    _active.extend(found)
    return found


def active() -> list[Plugin]:
    """Returns the plugins of the last `load_plugins`."""
    return list(_active)


def objective_named(name: str) -> tuple[Plugin, Objective]:
    """Returns a registered objective with its plugin. Raises: PluginError, with those there are, if there is none."""
    for plugin in _active:
        if name in plugin.objectives:
            return plugin, plugin.objectives[name]
    known = [*OBJECTIVES, *(known for plugin in _active for known in plugin.objectives)]
    raise PluginError(
        f"objective.kind {name}: no plugin registers it; choose one of {', '.join(known)}, or name in plugins the file "
        "or module that has it"
    )


def optimizer_of(name: str, options: Mapping[str, Any]) -> tuple[Plugin, Optimizer]:
    """Makes a registered optimizer. Returns it with its plugin. Args: options: arguments of its class.

    Raises: PluginError, with those there are, if there is none; if its class refuses the options; or if its moments
        are none that a checkpoint can have.
    """
    for plugin in _active:
        if name in plugin.optimizers:
            with calling(plugin, f"the optimizer {name} with options {dict(options)}"):
                made = plugin.optimizers[name](**options)
                _check_moments(getattr(made, "moments", None))
            return plugin, made
    known = [*OPTIMIZERS, *(known for plugin in _active for known in plugin.optimizers)]
    raise PluginError(
        f"optimizer.kind {name}: no plugin registers it; choose one of {', '.join(known)}, or name in plugins the file "
        "or module that has it"
    )


def _check_moments(moments: Any) -> None:
    if not isinstance(moments, Mapping) or not all(isinstance(moment, Moment) for moment in moments.values()):
        raise PluginError("moments is no dict of names and Moment(); without moments it is {}")
    for name, moment in moments.items():
        if not isinstance(name, str) or not _MOMENT.fullmatch(name):
            raise PluginError(f"moment {name!r} is no name of small letters, digits and _, at most 64")
        if name in _TAKEN_MOMENTS:
            raise PluginError(f"moment {name} has a name that checkpoints use; choose another")
        if moment.dtype not in MOMENT_TYPES:
            raise PluginError(f"moment {name} has dtype {moment.dtype!r}; choose one of {', '.join(MOMENT_TYPES)}")
        if not isinstance(moment.initial, int | float) or not math.isfinite(moment.initial):
            raise PluginError(f"moment {name} begins at {moment.initial!r}; give a finite number")


def readers() -> list[Reader]:
    """Returns the registered readers of sources."""
    return [reader for plugin in _active for reader in plugin.readers.values()]


def compare_with_saved(saved: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns sentences about plugins that have changed since a checkpoint or are left out, for warnings.

    Args: saved: `Plugin.described` of the plugins in the checkpoint.
    """
    now = {plugin.name: plugin for plugin in _active}
    found = []
    for before in saved:
        name, version = before["name"], before["version"]
        if name not in now:
            found.append(f"the plugin {name}, with which the checkpoint was written, is left out of plugins now")
        elif now[name].version != version:
            found.append(
                f"the plugin {now[name].place} has version {now[name].version}, and {version} when the checkpoint was "
                "written; the run continues with the present one"
            )
    return found


@contextmanager
def calling(plugin: Plugin, what: str) -> Iterator[None]:
    """Wraps a call of a plugin's code. Raises: PluginError that names the plugin for any error; its traceback is
    logged."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not isinstance(error, PluginError):
            logger.error("traceback of the plugin %s:\n%s", plugin.name, "".join(traceback.format_exception(error)))
        raise PluginError(
            f"the plugin {plugin.place} failed in {what}: {_shown(error, plugin)}; correct it, or leave it out of "
            "plugins"
        ) from error


def _load_module(entry: str) -> Plugin:
    if entry in _loaded:
        return _loaded[entry]
    plugin = Plugin(entry, entry)
    with _import_of(plugin):
        if not all(part.isidentifier() for part in entry.split(".")):
            raise PluginError("this is neither the name of a module (my_package.losses) nor the path of a .py file")
        module = importlib.import_module(entry)
    file = getattr(module, "__file__", None)
    if file is not None and os.path.isfile(file):
        plugin.text_hash = hashlib.sha256(read_bytes(Path(file))).hexdigest()[:16]
    return _kept(plugin, module)


def _load_file(entry: str) -> Plugin:
    plugin = Plugin(entry, os.path.basename(entry).removesuffix(".py"))
    with _import_of(plugin):
        text = read_bytes(Path(entry))
        plugin.text_hash = hashlib.sha256(text).hexdigest()[:16]
        known = _loaded.get(entry)
        if known is not None and known.text_hash == plugin.text_hash:
            return known
        # Compiled here, not by an importer: the hash is that of the text that runs, and no __pycache__ is written.
        name = "univitar_ds_plugin_" + re.sub(r"\W", "_", plugin.name)
        module = types.ModuleType(name)
        module.__file__ = os.path.abspath(entry)
        before, sys.modules[name] = sys.modules.get(name), module
        try:
            exec(compile(text, module.__file__, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            if before is not None:
                sys.modules[name] = before
            raise
    return _kept(plugin, module)


def _kept(plugin: Plugin, module: types.ModuleType) -> Plugin:
    version = getattr(module, "__version__", None)
    plugin.version = str(version)[:64] if version is not None else plugin.text_hash or "unknown"
    if not (plugin.objectives or plugin.optimizers or plugin.readers or plugin.callbacks):
        logger.warning("the plugin %s registers nothing; see docs/plugins.md", plugin.place)
    _loaded[plugin.entry] = plugin
    return plugin


@contextmanager
def _import_of(plugin: Plugin) -> Iterator[None]:
    _importing.append(plugin)
    try:
        yield
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if not is_file(plugin.entry) and missing is not None and (plugin.entry + ".").startswith(missing + "."):
            remedy = (
                "install it in this environment, or give the path of a .py file; the current folder is not searched"
            )
        elif missing is not None:
            remedy = f"install {missing} in this environment, or leave the plugin out"
        elif isinstance(error, FileNotFoundError) and error.filename in (plugin.entry, Path(plugin.entry)):
            remedy = (
                "check the path, which starts in the folder in which the run was started; to resume a run, put the "
                "file back, or give its new path with plugins=[PATH]"
            )
        else:
            remedy = "correct it, or leave it out of plugins"
        raise PluginError(f"the plugin {plugin.place} cannot be imported: {_shown(error, plugin)}; {remedy}") from error
    finally:
        _importing.pop()


def _shown(error: BaseException, plugin: Plugin) -> str:
    """Returns the first line of an error, with its type if it is no sentence, and its line in a plugin that is a
    file."""
    text = first_line(error)[:300].rstrip()
    if not isinstance(error, UserError) and not text.startswith(type(error).__name__):
        text = f"{type(error).__name__}: {text}"
    own = os.path.abspath(plugin.entry)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    return f"{text} (line {lines[-1]})" if lines else text
