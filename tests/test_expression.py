"""Conditions on samples: the same values as Python's own, and only the grammar."""

from __future__ import annotations

import pytest

from mmgen.expression import Condition, Lacking

FIELDS = {"similarity": 0.31, "width": 300, "caption": "a cat", "tags": ["cat", "pet"], "nsfw": None, "ok": True}


@pytest.mark.parametrize(
    "text",
    [
        "similarity > 0.28 and width >= 256",
        "similarity > 0.28 and width >= 512",
        "not (width < 256 or similarity < 0.2)",
        "200 < width <= 300",
        "'cat' in tags",
        "'dog' in tags or caption == 'a cat'",
        "'cat' in caption and 'dog' not in caption",
        "width / 2 + 3 * 2 - 1 == 155",
        "width in [300, 400]",
        "len(caption) > 4",
        "nsfw == None",
        "ok",
        "-width < 0",
    ],
)
def test_a_condition_has_the_value_of_python(text: str) -> None:
    assert Condition(text)(FIELDS) == bool(eval(text, {"len": len}, dict(FIELDS)))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "caption.upper() == 'A'",
        "tags[0] == 'cat'",
        "(lambda: 1)()",
        "[x for x in tags]",
        "width ** 9999",
        "width << 9",
        "open('/etc/passwd')",
        "len(caption, 2)",
        "f'{width}'",
        "width if ok else 0",
        "(x := 3)",
        "{'a': 1}",
        "b'x' == caption",
        "len.x",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not allowed in a condition"):
        Condition(text)


@pytest.mark.parametrize("text", ["", "width >", "width = 3", "a b", "(" * 300, "1 " * 600])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a condition|more than 1000"):
        Condition(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("score > 3", "it has no field 'score'"),
        ("caption > 3", "cannot be compared"),
        ("caption * 3 == 'a'", "arithmetic needs numbers"),
        ("width / 0 > 1", "cannot be compared"),
        ("nsfw < 1", "cannot be compared"),
        ("len(width) > 1", "cannot be compared"),
    ],
)
def test_a_sample_to_which_it_does_not_apply_has_a_reason(text: str, reason: str) -> None:
    with pytest.raises(Lacking, match=reason):
        Condition(text)(FIELDS)


def test_only_what_decides_is_read() -> None:
    assert Condition("ok or score > 3")(FIELDS)
    assert Condition("width > 3 and 'cat' in tags").names == {"width", "tags"}
