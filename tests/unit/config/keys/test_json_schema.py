"""The JSON Schema that editors use for run files."""

import json
from typing import Any

import pytest
import yaml

from univitar_ds.config.keys.json_schema import FILE, run_schema, schema_text
from univitar_ds.config.keys.tree import all_keys
from univitar_ds.config.load import dump_config, load_config, recipe_path

RECIPES = sorted(recipe_path("demo").parent.glob("*.yaml"))
SCHEMA = run_schema()


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """The schema of a section: behind its reference, and of a choice the one that has keys."""
    if "$ref" in node:
        return resolved(SCHEMA["$defs"][node["$ref"].rpartition("/")[2]])
    choices = [resolved(choice) for choice in node.get("anyOf", ())]
    return next((choice for choice in choices if "properties" in choice), node)


def faults(content: Any, node: dict[str, Any], place: str = "") -> list[str]:
    """Keys that are not in the schema, and keys that it requires and the content lacks."""
    node = resolved(node)
    if isinstance(content, list) and "items" in node:
        return [fault for i, entry in enumerate(content) for fault in faults(entry, node["items"], f"{place}{i}.")]
    if not isinstance(content, dict) or "properties" not in node:
        return []
    lacking = [f"{place}{name}" for name in node.get("required", ()) if name not in content]
    unknown = [f"{place}{name}" for name in content if name not in node["properties"]]
    known = [name for name in content if name in node["properties"]]
    below = [fault for name in known for fault in faults(content[name], node["properties"][name], f"{place}{name}.")]
    return lacking + unknown + below


def test_the_file_beside_the_recipes_is_the_schema_of_the_code():
    written = recipe_path("demo").with_name(FILE).read_text(encoding="utf-8")
    assert written == schema_text(), f"univitar-ds config --schema > univitar_ds/recipes/{FILE}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_names_the_schema_and_conforms_to_it(recipe):
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# yaml-language-server: $schema={FILE}"
    assert (recipe.parent / FILE).is_file(), "the address is relative to the recipe"
    assert faults(yaml.safe_load(recipe.read_text(encoding="utf-8")), SCHEMA) == []


def test_a_nonconforming_file_is_found():
    content = {"name": "x", "data": {"sources": [{"pth": 1}]}, "stages": [{"name": "s", "samples": 1, "lr": 1}], "q": 1}
    assert faults(content, SCHEMA) == ["q", "data.sources.0.path", "data.sources.0.pth"]


def test_every_key_has_its_description_in_the_schema():
    text = json.dumps(SCHEMA)
    assert [name for name, key in all_keys().items() if json.dumps(key.description) not in text] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_validator_accepts_recipes_stored_run_files_and_both_ways_to_write_numbers(recipe, tmp_path):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    validator.check_schema(SCHEMA)
    dump_config(load_config(recipe), tmp_path / "config.yaml")
    plain = yaml.load(recipe.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    first = plain["stages"][0]
    for content in (recipe, tmp_path / "config.yaml"):
        content = yaml.safe_load(content.read_text(encoding="utf-8"))
        assert [error.message for error in validator(SCHEMA).iter_errors(content)] == []
        content["stages"][0] |= {"samples": first["samples"], "lr": first["lr"]}  # as texts, such as 12_000_000
        assert [error.message for error in validator(SCHEMA).iter_errors(content)] == []
        content["stages"][0]["samples"] = "many"
        assert not validator(SCHEMA).is_valid(content)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("lanes", 0), ("lanes", "x"), ("workers", -1), ("on_bad", "ask"), ("lane", 2), ("log_samples", 3)],
)
def test_a_validator_refuses_what_the_program_refuses(key, wrong):
    validator = pytest.importorskip("jsonschema").Draft202012Validator(SCHEMA)
    content = yaml.safe_load(recipe_path("photos").read_text(encoding="utf-8"))
    assert validator.is_valid(content)
    content["data"][key] = wrong
    assert not validator.is_valid(content)
