"""The keys of the run file as a tree."""

import pytest

from univitar_ds.config.keys.tree import all_keys, section_at
from univitar_ds.config.stage import StageConfig

KEYS = all_keys()


@pytest.mark.parametrize("name", KEYS)
def test_every_key_has_a_description_and_a_type(name):
    key = KEYS[name]
    assert len(key.description.split()) >= 2, f"{name} needs a description in univitar_ds/config"
    assert not key.description.endswith(".")
    assert key.type


@pytest.mark.parametrize(
    ("name", "type_in_words", "default"),
    [
        ("data.lanes", "a whole number, at least 1", 4),
        ("stages.N.patch_dropout", "a number, at least 0, below 1", 0.0),
        ("optimizer.clip_norm", "a number, above 0, or null", 1.0),
        ("objective.kind", "text, at most 255 long", "sigmoid"),
        ("stages.N.frozen", "a list (each one of text, vision, patch_embedding)", []),
        ("optimizer.betas", "a list of 2 (each a number, at least 0, below 1)", (0.9, 0.98)),
        ("stages.N.weights", "a mapping of names (each to a number, at least 0)", {}),
        ("model.encoder", "one of tiny, 0.3b, 0.6b, 1b, or a section, or null", None),
        ("evaluation.sources", "a list of sections", []),
    ],
)
def test_a_type_is_in_words_with_its_limits(name, type_in_words, default):
    assert (KEYS[name].type, KEYS[name].default) == (type_in_words, default)


def test_required_keys_are_known():
    required = {name for name, key in KEYS.items() if key.required and "." not in name}
    assert required == {"name", "data", "stages"}


def test_a_section_is_found_through_lists():
    assert section_at(["stages", 3]) is StageConfig
    assert section_at(["stages", 0, "lr"]) is None
    assert section_at(["nowhere"]) is None
