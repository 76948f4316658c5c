"""Functions are short and take few arguments, or their docstring gives the reason why they cannot."""

import ast
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

MOST_LINES, MOST_ARGUMENTS = 60, 8
LONG, MANY = "Long because", "Many arguments because"
"""A sentence of the docstring that begins so gives the reason."""
FILES = [
    path
    for pattern in ("univitar_ds/**/*.py", "kernels/*.py", "benchmarks/**/*.py", "examples/*.py")
    for path in ROOT.glob(pattern)
]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(node: ast.AST, name: str = "", of_autograd: bool = False) -> Iterator[tuple[str, Function]]:
    """Qualified names and functions, without Triton's kernels and the methods of autograd functions.

    The signatures of those are not ours to choose: a kernel takes a number each, and autograd what `apply` is given.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            autograd = any(ast.unparse(base).endswith("autograd.Function") for base in child.bases)
            yield from functions(child, f"{name}{child.name}.", autograd)
        elif isinstance(child, Function):
            if not of_autograd and not any("triton.jit" in ast.unparse(one) for one in child.decorator_list):
                yield f"{name}{child.name}", child
            yield from functions(child, f"{name}{child.name}.")
        else:
            yield from functions(child, name, of_autograd)


def lines_of(function: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def arguments_of(function: Function) -> int:
    """Arguments without `self` or `cls`; *args and **kwargs count as one each."""
    found = function.args
    names = [one.arg for one in (*found.posonlyargs, *found.args)]
    extra = len(found.kwonlyargs) + (found.vararg is not None) + (found.kwarg is not None)
    return len(names) - (names[:1] in (["self"], ["cls"])) + extra


def faults(text: str) -> list[tuple[str, str]]:
    """(qualified name, what has no reason) of each function that is too long or takes too many arguments."""
    found = []
    for name, function in functions(ast.parse(text)):
        reasons = ast.get_docstring(function) or ""
        if (lines := lines_of(function)) > MOST_LINES and LONG not in reasons:
            found.append((name, f"{lines} lines, at most {MOST_LINES}; split it, or say '{LONG} ...'"))
        if (arguments := arguments_of(function)) > MOST_ARGUMENTS and MANY not in reasons:
            found.append((name, f"{arguments} arguments, at most {MOST_ARGUMENTS}; bundle them, or say '{MANY} ...'"))
    return found


def test_functions_are_short_and_take_few_arguments_or_give_a_reason():
    found = {}
    for path in FILES:
        for name, fault in faults(path.read_text(encoding="utf-8")):
            found[f"{path.resolve().relative_to(ROOT.resolve())}:{name}"] = fault
    assert found == {}


ARGUMENTS = ", ".join(f"a{number}" for number in range(MOST_ARGUMENTS))
BODY = "".join(f"    x{number} = {number}\n" for number in range(MOST_LINES - 1))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"def f({ARGUMENTS}): pass", []),
        (f"def f({ARGUMENTS}, b): pass", ["f"]),
        (f"def f({ARGUMENTS}, *b): pass", ["f"]),
        (f"def f({ARGUMENTS}, b):\n    '''Does it. {MANY} a cluster has so many.'''", []),
        (f"class A:\n    def f(self, {ARGUMENTS}): pass", []),
        (f"class A:\n    def f(self, {ARGUMENTS}, *, b): pass", ["A.f"]),
        (f"class A(torch.autograd.Function):\n    def f(ctx, {ARGUMENTS}, b): pass", []),
        (f"@triton.jit\ndef f({ARGUMENTS}, b): pass", []),
        (f"def f():\n{BODY}", []),
        (f"def f():\n    '''Two\n\n    paragraphs.'''\n{BODY}", []),
        (f"def f():\n{BODY}    y = 0\n", ["f"]),
        (f"def f():\n    '''{LONG} a table is written out.'''\n{BODY}    y = 0\n", []),
        (f"def f():\n{BODY}    if x0:\n        def g({ARGUMENTS}, b): pass\n", ["f", "f.g"]),
    ],
)
def test_a_function_that_is_too_long_or_takes_too_many_arguments_is_found(text, names):
    assert [name for name, _ in faults(text)] == names
