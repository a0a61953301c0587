"""Attributes of records in JSON. Reading an invalid record raises `ValueError`, or one of `BAD`."""

import json
from collections.abc import Mapping
from typing import Any

BAD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""The errors that reading an unexpected JSON value may raise. Each of them means that the record is invalid."""


def integer(value: Any) -> int:
    """Returns the value as an integer. Raises one of `BAD` if it is not a number, or does not fit into 64 bits, as all
    fields and messages require. (1e999 does not.)"""
    number = value if type(value) is int else int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError("a number does not fit into 64 bits")
    return number


def text_of(value: Any) -> str:
    """Returns the value as text. Raises one of `BAD` if it contains lone surrogates, which JSON can represent, but
    UTF-8 cannot."""
    text = value if type(value) is str else str(value)
    if not text.isascii():  # a router reads hundreds of thousands of records at its start, most of them ASCII
        text.encode()
    return text


def why(error: Exception) -> str:
    """Returns what is wrong with a record. `error`, one of `BAD`, was raised when an attribute was read."""
    if isinstance(error, KeyError):
        return f"it lacks the attribute {error.args[0]}"
    if isinstance(error, TypeError | AttributeError):
        return "one of its attributes has a value of the wrong type"
    return f"one of its attributes cannot be used ({error})"


def read_object(value: bytes) -> dict[str, Any]:
    """Reads a JSON object. Raises ValueError for anything else."""
    try:
        data = json.loads(value)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return data


def write_object(data: Mapping[str, Any]) -> bytes:
    """Encodes a JSON object, without spaces."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:  # unknown attributes may hold text that can only be written with JSON's escapes
        return json.dumps(data, separators=(",", ":")).encode()
