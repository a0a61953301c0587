"""Limits of copies by type: the document that an operator writes, and the errors in it."""

import pytest

from placement.copies import CopyLimits
from placement.limits import parse


def test_types_have_their_own_limits_and_a_default():
    limits = parse('{"fraud": {"min": 1, "max": 4, "pinned": true}, "_default": {"max": 8}}')
    assert limits.of("fraud") == CopyLimits(1, 4, True)
    assert limits.of("other") == CopyLimits(maximum=8)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param('{"a": 3}', "limits of type 'a' are not an object", id="number"),
        pytest.param(
            '{"a": {"least": 1}}', "limits of type 'a' have the unknown key 'least': use min, max and pinned", id="key"
        ),
        pytest.param('{"a": {"min": 1.5}}', "min of type 'a' must be a whole number", id="fraction"),
        pytest.param('{"a": {"max": true}}', "max of type 'a' must be a whole number", id="boolean"),
        pytest.param('{"a": {"pinned": 1}}', "pinned of type 'a' must be true or false", id="pinned"),
        pytest.param(
            '{"a": {"min": 2, "max": 1}}',
            "type 'a': the maximum of copies must be the minimum of 2 or more, not 1",
            id="conflict",
        ),
    ],
)
def test_errors_name_the_type_and_the_cause(text, why):
    with pytest.raises(ValueError, match=why):
        parse(text)
