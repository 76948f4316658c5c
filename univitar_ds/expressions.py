"""Conditions on the fields of a sample, such as `json.similarity > 0.3 and width >= 256`.

The syntax is a subset of Python's and is parsed by `ast`. Nothing is executed as Python: the only values are constants
and the sample's fields, and an expression costs time and memory in proportion to its length.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

NAMES = ("width", "height", "frames", "duration_s", "caption_length", "label")
"""Fields of every sample. Fields of its .json are `json.NAME` or `json["ANY NAME"]`, nested ones `json.a.b`."""
MAX_LENGTH = 1000
_MAX_DEPTH = 40
_MAX_BITS = 1024
"""Maximum size of an integer in arithmetic. Larger ones cannot be converted to floats either."""
_ALLOWED = (
    f"allowed are {', '.join(NAMES)}, json.NAME, numbers, texts, lists, True, False, comparisons, in, and, or, not, "
    "+ - * / // %, len()"
)

Evaluate = Callable[[Mapping[str, Any]], Any]

_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, held: _contains(held, value),
    ast.NotIn: lambda value, held: not _contains(held, value),
}


class Undecided(Exception):
    """A condition that has no result for a sample.

    The message does not contain values of the sample, so that samples can be counted by message.
    """


class LacksField(Undecided):
    """A field that the condition needs is absent or null. The message is its name."""


@dataclass(frozen=True)
class Condition:
    """A condition on the fields of a sample. `source` is the name of its source, for messages.

    Raises: ValueError if `text` is not a condition, with the position.
    """

    text: str
    source: str = ""

    def __post_init__(self) -> None:
        _parsed(self.text)

    @property
    def json_names(self) -> frozenset[str]:
        """Names of the fields of .json that the condition reads; for `json.a.b` the name is `a`."""
        return _parsed(self.text)[1]

    def holds(self, fields: Mapping[str, Any]) -> bool:
        """Returns whether the condition is true. As in Python, `and` and `or` skip parts that cannot change the result.

        Args: fields: the values of `NAMES`, None for absent ones, and "json", a mapping.
        Raises: LacksField; Undecided if a value has the wrong type or size, or a number is divided by 0.
        """
        try:
            return _truth(_parsed(self.text)[0](fields))
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise Undecided("a value of another type, or no number") from error


@lru_cache(1 << 10)
def _parsed(text: str) -> tuple[Evaluate, frozenset[str]]:
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the condition has {len(text)} characters; at most {MAX_LENGTH} are allowed")
    line = " ".join(text.splitlines())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about escapes in texts
            node = ast.parse(line.lstrip(), mode="eval").body
    except SyntaxError as error:
        place = (error.offset or len(line.lstrip()) + 1) + len(line) - len(line.lstrip())  # 0: at the end
        raise ValueError(f"{text!r} is not a condition: {error.msg} at character {place}; {_ALLOWED}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is not a condition: {error or 'it is nested too deeply'}; {_ALLOWED}") from None
    return _Compiler(line).condition(node)


class _Compiler:
    """Turns the nodes of one condition into functions of the fields."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._json_names: set[str] = set()

    def condition(self, node: ast.expr) -> tuple[Evaluate, frozenset[str]]:
        decides = isinstance(node, ast.Compare | ast.BoolOp | ast.Attribute | ast.Subscript)
        if not decides and not (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
            self._fail(node, "is neither true nor false; compare it, as in width > 256")
        return self._compiled(node, 0), frozenset(self._json_names)

    def _fail(self, node: ast.expr, message: str) -> NoReturn:
        stripped = self._line.lstrip()
        before = len(stripped.encode()[: node.col_offset].decode()) + len(self._line) - len(stripped)
        part = ast.get_source_segment(stripped, node) or ""
        raise ValueError(f"{part[:60]!r} at character {before + 1} of {self._line!r} {message}")

    def _compiled(self, node: ast.expr, depth: int) -> Evaluate:
        if depth > _MAX_DEPTH:
            self._fail(node, f"is nested in more than {_MAX_DEPTH} others; write it flatter")
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return lambda fields: value
            case ast.Name(id=name) if name in NAMES:
                return lambda fields: _field(fields, name)
            case ast.Attribute() | ast.Subscript():
                return self._json(node)
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                made = [self._compiled(part, depth + 1) for part in parts]
                return lambda fields: [part(fields) for part in made]
            case ast.BoolOp(op=op, values=parts):
                return _junction(isinstance(op, ast.Or), [self._compiled(part, depth + 1) for part in parts])
            case ast.UnaryOp(op=ast.Not(), operand=part):
                negated = self._compiled(part, depth + 1)
                return lambda fields: not _truth(negated(fields))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=part):
                number, sign = self._compiled(part, depth + 1), -1 if isinstance(op, ast.USub) else 1
                return lambda fields: sign * _number(number(fields))
            case ast.BinOp(left=left, op=op, right=right) if (compute := _ARITHMETIC.get(type(op))) is not None:
                one, other = self._compiled(left, depth + 1), self._compiled(right, depth + 1)
                return lambda fields: compute(_number(one(fields)), _number(other(fields)))
            case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _COMPARISONS for op in ops):
                parts = [self._compiled(part, depth + 1) for part in (left, *rest)]
                return _chain(parts, [_COMPARISONS[type(op)] for op in ops])
            case ast.Call(func=ast.Name(id="len"), args=[part], keywords=[]) if not isinstance(part, ast.Starred):
                measured = self._compiled(part, depth + 1)
                return lambda fields: len(measured(fields))
        self._fail(node, f"is not allowed; {_ALLOWED}")

    def _json(self, node: ast.expr) -> Evaluate:
        """Compiles json.a, json["a"], json.a.b and so on."""
        path: list[str] = []
        inner = node
        while not isinstance(inner, ast.Name):
            match inner:
                case ast.Attribute(value=before, attr=name):
                    inner = before
                case ast.Subscript(value=before, slice=ast.Constant(value=str() as name)):
                    inner = before
                case _:
                    self._fail(node, f"is not allowed; {_ALLOWED}")
            path.insert(0, name)
        if inner.id != "json":
            self._fail(node, f"is not allowed, since only json has fields; {_ALLOWED}")
        self._json_names.add(path[0])
        shown = ".".join(["json", *path])

        def value(fields: Mapping[str, Any]) -> Any:
            found: Any = fields["json"]
            for name in path:
                found = found.get(name) if isinstance(found, Mapping) else None
            if found is None:
                raise LacksField(shown)
            return found

        return value


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if (value := fields.get(name)) is None:
        raise LacksField(name)
    return value


def _junction(either: bool, parts: list[Evaluate]) -> Evaluate:
    """Returns `or` of the parts if `either`, else `and`."""
    return lambda fields: next((either for part in parts if _truth(part(fields)) is either), not either)


def _chain(parts: list[Evaluate], comparisons: list[Callable[[Any, Any], bool]]) -> Evaluate:
    def holds(fields: Mapping[str, Any]) -> bool:
        left = parts[0](fields)
        for part, compare in zip(parts[1:], comparisons, strict=True):
            right = part(fields)
            if not compare(left, right):
                return False
            left = right
        return True

    return holds


def _contains(held: Any, value: Any) -> bool:
    if not isinstance(held, str | list | dict):
        raise TypeError
    return value in held


def _number(value: Any) -> float:
    """Returns `value` if it is a number. Texts and lists would make `*` and `%` costly."""
    if type(value) not in (int, float) or (isinstance(value, int) and value.bit_length() > _MAX_BITS):
        raise TypeError
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value
