"""Run files and overrides with invalid values: each is an error message, never a traceback."""

from contextlib import suppress

import pytest

from univitar_ds.config.keys.tree import all_keys
from univitar_ds.config.load import check_config, load_config
from univitar_ds.errors import ConfigError
from univitar_ds.strict_yaml import parse_yaml

ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 12)
)
DOCUMENTS = {
    "aliases of aliases": (ALIASES, "more than 100,000 values; use fewer aliases"),
    "itself": ("a: &a [*a]", "contains itself"),
    "a list as key": ("? [1, 2]\n: 3", "a list or section, not text"),
    "a number as key": ("1: 2", "key in line 1 is 1, not text; write it in quotes"),
    "a date as key": ("2001-01-01: 2", "2001-01-01, not text"),
    "a key twice": ("a: 1\nb: 2\na: 3", r"'a' is written twice in one section \(line 3\)"),
    "a long number": ("seed: " + "9" * 5000, "not valid YAML"),
}
ODD = [
    "{a: 1}",
    "{'1': 2}",
    "[]",
    "[[1]]",
    "[{}]",
    "null",
    "''",
    "text",
    "-1",
    "1.5",
    "true",
    ".nan",
    "2001-01-01",
    "!!binary aGk=",
]
KEYS = [key.replace(".N", ".0") for key in all_keys()]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_that_yaml_allows_and_no_run_file_is(tmp_path, name):
    text, said = DOCUMENTS[name]
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "run.yaml")
    if "\n" not in text:
        with pytest.raises(ConfigError, match=f"override 'name=.*{'' if 'valid' in said else said}"):
            load_config("demo", [f"name={{{text}}}"])


def test_anchors_and_merged_sections_are_allowed():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]"
    assert parse_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2}
    assert parse_yaml("") is None


@pytest.mark.parametrize("value", ODD)
def test_an_invalid_value_of_a_key_is_an_error_message(value):
    for key in KEYS:
        with suppress(ConfigError):  # any other error fails the test
            load_config("demo", [f"{key}={value}"])


@pytest.mark.parametrize("section", ["model", "stages", "logging", "data", "objective"])
def test_keys_that_are_not_strings_are_an_error_message(section):
    with pytest.raises(ConfigError, match=section):
        check_config({"name": "a", section: {1: 2}, 3: 4}, "config")
