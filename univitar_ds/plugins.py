"""Plugins: objectives, optimizers, readers of sources and callbacks in Python files or modules that a run file names.

Only the key `plugins` of a run file and `data pack --plugin` import plugins; a checkpoint or a model never does. A
plugin registers its classes and functions while it is imported:

    from univitar_ds.plugins import Callback, register_callback

    @register_callback
    class Loss(Callback):
        def on_step(self, info):
            print(info.step, info.loss)

This module imports neither torch nor other packages of `univitar_ds`, so that a plugin may import any of them.
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
"""Names under which checkpoints and optimizer states store other values of a parameter."""
MOMENT_TYPES = ("float32", "bfloat16", "float16")
_Registered = TypeVar("_Registered")


@dataclass(frozen=True)
class RunInfo:
    """The run that is passed to `Callback.on_start`.

    `folder`: folder of the run; `step`: number of finished steps, above 0 if the run is resumed; `ranks`: number of
    processes; `config`: a copy of the run file with all keys.
    """

    name: str
    folder: Path
    step: int
    ranks: int
    config: dict[str, Any]


@dataclass(frozen=True)
class StepInfo:
    """The step that is passed to `Callback.on_step`. The numbers are those of all ranks.

    `step`: number of finished steps; `samples`, `tokens`: of the run so far; `items`: of the step; `loss`: weighted sum
    of `losses`, with the weights of the stage; `losses`: the unweighted losses by name; `logit_scale`, `logit_bias`:
    None for a classifier; `seconds`: of the slowest rank.
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
    """Base class of callbacks. Methods are called on rank 0 only; the other ranks wait for it at the next step.

    An error in a method ends the run on all ranks before the next step.
    """

    def on_start(self, run: RunInfo) -> None:
        """Called after each start of the run, before the first step."""

    def on_step(self, info: StepInfo) -> None:
        """Called after each step that was neither skipped nor rolled back.

        After a rollback, `info.step` continues from the last checkpoint.
        """

    def on_checkpoint(self, folder: Path | str) -> None:
        """Called after each checkpoint. `folder` has the complete checkpoint: a path or an s3:// address."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Called last: after export and evaluation, or after the checkpoint of a run that was asked to stop.

        `summary` is the content of the run's summary.json; `summary["completed"]` is whether all stages are done.
        """


class Objective(Protocol):
    """A loss that is a sum over pairs of an image and a text. The sum is divided by the items of the step."""

    def loss_of_chunk(self, images: Any, texts: Any, scale: Any, bias: Any, positives: Any) -> Any:
        """Returns the sum of the losses of n * m pairs, a scalar tensor with a gradient.

        Called for one block of the step's pairs at a time. Each pair is in one block, so the loss of a pair must not
        depend on the other pairs of the block: no mean, no softmax over a block.

        Args: images: (n, E), texts: (m, E): float32 unit vectors of images or videos and of texts; scale, bias: (),
            parameters of the model, with a positive scale; positives: (n, m) bool, whether image i and text j belong
            together. n and m are at least 1.
        """


@dataclass(frozen=True)
class Moment:
    """A number that an optimizer keeps for each weight. `dtype`: one of MOMENT_TYPES; `initial`: value at first."""

    dtype: str = "float32"
    initial: float = 0.0


class Optimizer(Protocol):
    """An optimizer that updates each weight on its own. `moments`: what it keeps for each weight, by name."""

    moments: Mapping[str, Moment]

    def step(
        self, weights: Any, gradient: Any, moments: Mapping[str, Any], *, lr: float, weight_decay: float, step: int
    ) -> None:
        """Updates weights and moments in place.

        Called for each slice of the flattened weights that a rank has. A slice may begin and end within a parameter, so
        each element may depend only on the same element of the other tensors: no norm, no mean, no communication
        between ranks. The gradient is that of all ranks, after clipping. If a gradient is not finite, the update is
        skipped and this method is not called.

        Args: weights, gradient: (n,) float32; moments: (n,) tensors by name, of the declared types; lr: learning rate
            of the stage times the factor of the layer; weight_decay: 0 for vectors such as norms and biases; step:
            number of this update of these weights, from 1.
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
        """Whether this reader reads the source with this name."""
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
        """Returns what a checkpoint stores about the plugin, as JSON."""
        return {"name": self.name, "version": self.version, "objectives": sorted(self.objectives)} | (
            {"optimizers": sorted(self.optimizers)} if self.optimizers else {}
        )

    @property
    def place(self) -> str:
        """The name for messages; for a plugin that is a file, with its path."""
        return f"{self.name} ({self.entry})" if is_file(self.entry) else self.name


_loaded: dict[str, Plugin] = {}
"""The plugins of this process by entry."""
_active: list[Plugin] = []
"""The plugins of the last `load_plugins`, in its order."""
_importing: list[Plugin] = []
"""The plugins that are being imported, the innermost last."""


def register_callback(callback: _Registered) -> _Registered:
    """Registers a callback: an object with methods of `Callback`, or its class, which is called without arguments.

    Raises: PluginError if it has none of the methods of `Callback`, or another method whose name begins with on_.
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

    The class is called without arguments.

    Raises: PluginError if the name is invalid or taken, or the class has no method `loss_of_chunk`.
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

    The class is called with `optimizer.options` as keyword arguments.

    Raises: PluginError if the name is invalid or taken, or the class has no method `step`.
    """
    plugin = _registering(f"optimizer {name!r}")
    _check_name(name, "optimizer", OPTIMIZERS, plugin)

    def register(optimizer: _Registered) -> _Registered:
        if not isinstance(optimizer, type) or not callable(getattr(optimizer, "step", None)):
            method = "step(weights, gradient, moments, *, lr, weight_decay, step)"
            raise PluginError(f"optimizer {name} is not a class with a method {method}")
        plugin.optimizers[name] = optimizer
        return optimizer

    return register


def register_reader(
    name: str, *, suffix: str | Sequence[str] = (), scheme: str | Sequence[str] = (), uses: Collection[str] = ()
) -> Callable[[_Registered], _Registered]:
    """Returns a decorator that registers a function `rows(source, options)` for sources of this form.

    The function yields a mapping for each image or video. `file` is a path relative to `options.images` or else to the
    folder of the source, or an absolute path in that folder. `caption` (a text, or a list) or `label` (a text) or both
    describe it; `split` and `set` are optional. A row with a fault is left out. Rows of the same file are joined.

    Args: name: of the form, for `data pack --format`; suffix: ends of names, such as ".lst"; scheme: scheme of sources,
        such as "catalog" for catalog://pets; uses: further options (`data.importing.rows.ReadOptions`) that the
        function reads.
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
            fault = "taken" if one in _TAKEN_SCHEMES else "not a scheme"
            raise PluginError(f"reader {name}: scheme {one!r} is {fault}")

    def register(rows: _Registered) -> _Registered:
        if not callable(rows):
            raise PluginError(f"reader {name} is not a function rows(source, options)")
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
        raise PluginError(f"{what} {name!r} is not a name of 1 to 64 letters, digits, dots, - and _ (not first)")
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

    Only objectives, optimizers and readers of these plugins are found afterwards.

    Raises: PluginError if one cannot be imported, or if two have the same name or register the same name.
    """
    _active.clear()
    found = [_load_file(entry) if is_file(entry) else _load_module(entry) for entry in entries]
    for number, plugin in enumerate(found):
        for other in found[:number]:
            if other.name == plugin.name:
                raise PluginError(
                    f"plugins {other.entry} and {plugin.entry} are both called {plugin.name}; rename one of them, "
                    "since checkpoints identify plugins by their names"
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
    """Returns the plugin and the objective `name`. Raises: PluginError if it is unknown."""
    for plugin in _active:
        if name in plugin.objectives:
            return plugin, plugin.objectives[name]
    known = [*OBJECTIVES, *(known for plugin in _active for known in plugin.objectives)]
    raise PluginError(
        f"objective.kind {name}: no plugin registers it; choose one of {', '.join(known)}, or name in plugins the file "
        "or module that has it"
    )


def optimizer_of(name: str, options: Mapping[str, Any]) -> tuple[Plugin, Optimizer]:
    """Returns the plugin of the registered optimizer `name`, and a new optimizer.

    Args: options: keyword arguments of its class.
    Raises: PluginError if the name is unknown, if the class rejects the options, or if a checkpoint cannot store the
        moments.
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
        raise PluginError("moments is not a dict that maps names to Moment(); without moments it is {}")
    for name, moment in moments.items():
        if not isinstance(name, str) or not _MOMENT.fullmatch(name):
            raise PluginError(f"moment {name!r} is not a name of 1 to 64 small letters, digits and _, a letter first")
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
    """Returns sentences about plugins that have changed or were removed since a checkpoint, for warnings.

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
    """Wraps a call of a plugin's code. Logs the traceback of an error in it.

    Raises: PluginError, which names the plugin, for any error in it.
    """
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
    """Returns the first line of an error, for messages.

    Adds the type of an error that is not a UserError, and the line number if the plugin is a file.
    """
    text = first_line(error)[:300].rstrip()
    if not isinstance(error, UserError) and not text.startswith(type(error).__name__):
        text = f"{type(error).__name__}: {text}"
    own = os.path.abspath(plugin.entry)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    return f"{text} (line {lines[-1]})" if lines else text
