"""Conditions on samples: their results, and errors with positions."""

import pickle

import pytest

from univitar_ds.expressions import MAX_LENGTH, Condition, LacksField, Undecided

FIELDS = {
    "width": 640,
    "height": 480,
    "frames": 1,
    "duration_s": 0.0,
    "caption_length": 12,
    "label": "cat",
    "json": {
        "similarity": 0.31,
        "tags": ["indoor", "pet"],
        "url": "https://a.org/x.jpg",
        "nsfw": False,
        "meta": {"score": 5, "none": None},
        "aesthetic-score": 6.5,
        "huge": 10**4000,
        "text": "7",
    },
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("json.similarity > 0.3", True),
        ("json.similarity > 0.3 and width >= 1000", False),
        ("json.similarity < 0.3 or width * height >= 640 * 480", True),
        ("0.3 < json.similarity <= 0.31", True),
        ("0.3 < json.similarity < 0.31", False),
        ("not json.nsfw", True),
        ("json.nsfw", False),
        ("not (width > 1 and height > 1000)", True),
        ("label in ['cat', 'dog']", True),
        ("label not in ('cat', 'dog')", False),
        ("'pet' in json.tags and 'outdoor' not in json.tags", True),
        ("'a.org' in json.url", True),
        ("'score' in json.meta", True),
        ("len(json.tags) == 2 and len(label) == 3", True),
        ("json.meta.score == 5", True),
        ('json["aesthetic-score"] > 6', True),
        ('json["meta"]["score"] > 6', False),
        ("width / height > 4 / 3 - 0.01 and width // 100 == 6 and width % 100 == 40", True),
        ("-width < +height - 1", True),
        ("frames == 1 and duration_s == 0 and caption_length > 10", True),
        ("json.nsfw == False and label != 'dog'", True),
        ("width > 1\n  and height > 1", True),
        ("  width > 1000", False),
        ("json.absent > 1 and width > 1000 or width > 1", None),
        ("width > 1 or json.absent > 1", True),
        ("width > 1000 and json.absent > 1", False),
    ],
)
def test_a_condition_has_the_result_of_python(text, expected):
    if expected is None:
        with pytest.raises(LacksField, match=r"json\.absent"):
            Condition(text).holds(FIELDS)
    else:
        assert Condition(text).holds(FIELDS) is expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("json.absent > 1", "json.absent"),
        ("json.meta.none == 1", "json.meta.none"),
        ("json.meta.score.deeper == 1", "json.meta.score.deeper"),
        ("json.meta.absent in [1]", "json.meta.absent"),
    ],
)
def test_a_field_that_is_absent_or_null_is_named(text, name):
    with pytest.raises(LacksField, match=f"^{name}$"):
        Condition(text).holds(FIELDS)


def test_fields_of_every_sample_may_be_absent_too():
    with pytest.raises(LacksField, match=r"^label$"):
        Condition("label == 'a'").holds({**FIELDS, "label": None})
    with pytest.raises(LacksField, match=r"^json\.a$"):
        Condition("json.a == 1").holds({**FIELDS, "json": None})


@pytest.mark.parametrize(
    "text",
    [
        "json.text > 1",
        "json.text * 1000000000 == label",
        "label % 1000000 == '1'",
        "json.tags * 1000000000 == json.tags",
        "json.huge * json.huge > 1",
        "width / frames / duration_s > 1",
        "json.nsfw + 1 == 1",
        "len(width) == 1",
        "1 in width",
        "width in label",
        "not json.similarity",
        "json.similarity",
        "json.similarity and width > 1",
        "-label == 1",
        "(json.huge % 7) / 2.5 > 1",
    ],
)
def test_values_of_another_type_make_a_condition_undecided(text):
    with pytest.raises(Undecided, match="of another type"):
        Condition(text).holds(FIELDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jsn.similarity > 0.3", r"'jsn\.similarity' at character 1 of .* only json has fields; allowed are width"),
        ("similarity > 0.3", r"'similarity' at character 1 .* is not allowed; allowed are width, height"),
        ("width > 1 and widht > 2", "'widht' at character 15 "),
        ("  width > 1 and widht > 2", "'widht' at character 17 "),
        ("label == 'é' and widht > 2", "'widht' at character 18 "),
        ("json > 1", "'json' at character 1 "),
        ("width ** 9 > 1", r"'width \*\* 9' at character 1 .* is not allowed"),
        ("9**9**9 > 1", "is not allowed"),
        ("1 << 9999999 > width", "is not allowed"),
        ("width.real > 1", "only json has fields"),
        ("json.__class__ .x() == 1", "is not allowed"),
        ("__import__('os').system('true') == 0", "is not allowed"),
        ("open('a') == 0", r"\"open\('a'\)\" at character 1 .* is not allowed"),
        ("len(*label) == 0", "is not allowed"),
        ("len(label, 1) == 0", "is not allowed"),
        ("len(x=label) == 0", "is not allowed"),
        ("[x for x in json.tags] == []", "is not allowed"),
        ("(lambda: 1)() == 1", "is not allowed"),
        ("f'{label}' == 'cat'", "is not allowed"),
        ("(width := 3) == 3", "is not allowed"),
        ("label is 'cat'", "is not allowed"),
        ("1 if width > 1 else 2", "is neither true nor false"),
        ("width", "'width' at character 1 .* is neither true nor false; compare it"),
        ("width + 1", "is neither true nor false"),
        ("True", "is neither true nor false"),
        ("label[0] == 'c'", "is not allowed"),
        ("json[0] == 'c'", "is not allowed"),
        ("json.tags[0] == 'c'", "is not allowed"),
        ("None == label", "'None' at character 1 .* is not allowed"),
        ("b'a' == label", "is not allowed"),
        ("1j == width", "is not allowed"),
        ("... == width", "is not allowed"),
        ("{1: 2} == json.meta", "is not allowed"),
        ("width >", "is not a condition: invalid syntax at character 8; allowed are width"),
        ("  width > ) 3", "at character 11"),
        ("width = 3", "is not a condition: .* at character"),
        ("", "is not a condition"),
        ("width > 1\0", "is not a condition"),
        ("width > 1; height > 2", "is not a condition"),
        ("(" * 300 + "width > 1" + ")" * 300, "is not a condition: .*nested|is not a condition: .*"),
        ("-" * 900 + "width > 1", "nested"),
        ("not " * 60 + "width > 1", "nested in more than 40"),
        ("width > 1" + " " * MAX_LENGTH, r"has 1009 characters; at most 1000"),
    ],
)
def test_an_invalid_condition_is_refused_with_its_position_and_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=message):
        Condition(text)


def test_only_the_fields_of_json_that_are_read_are_named():
    condition = Condition("json.a.b > 1 and (width > 2 or json['c d'] == 3) and json.a.e == 'x'")
    assert condition.json_names == {"a", "c d"}
    assert Condition("width > 2").json_names == frozenset()


def test_a_condition_can_be_sent_to_another_process():
    condition = Condition("json.similarity > 0.3")
    condition.holds(FIELDS)
    assert pickle.loads(pickle.dumps(condition)) == condition
