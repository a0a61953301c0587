"""The messages between pod and workers: a length (4 bytes, big-endian) and a JSON array that begins with a word.

| from | message | says |
| --- | --- | --- |
| worker | `hello, name, {range: [epoch, revision]}` | the ranges that the worker reads, and how far it has read each |
| worker | `ready, reason` | the reason why the worker is not ready, or null if it is |
| worker | `metrics, number, snapshot` | the answer to `ask` |
| worker | `stats, number` | asks for the metrics of the whole router pod |
| pod | `begin, range` | the complete range follows; parts after an earlier `begin` are void |
| pod | `items, range, items` | a part of the complete range, or of the changes in the next `delta` |
| pod | `snapshot, range, epoch, revision` | the range is complete |
| pod | `delta, range, revision, items` | one revision's changes, or the last part of them |
| pod | `ask, number` | asks for the worker's metrics |
| pod | `merged, number, snapshot` | the answer to `stats` |
| pod | `beat` | a sign of life |
| pod | `drain` | the router is stopping |

An epoch is a string that names one reading of a range from etcd: revisions can only be compared within an epoch,
because etcd may have restarted with other data. Both sides log unknown messages, and ignore them.

Keys and values are bytes, written as Latin-1 text, which can hold any byte.
"""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from router.state.feed.ranges import Item

MAX_MESSAGE = 64 << 20  # bytes

Message = list[Any]


def encode(message: Message) -> bytes:
    """Returns one message in the form in which it is sent."""
    body = json.dumps(message, separators=(",", ":"), ensure_ascii=True).encode()
    return len(body).to_bytes(4, "big") + body


async def receive(reader: asyncio.StreamReader) -> Message:
    """Returns the next message. Raises EOFError if the connection ends, ValueError if what arrives is not a message of
    at most MAX_MESSAGE bytes."""
    length = int.from_bytes(await reader.readexactly(4), "big")
    if length > MAX_MESSAGE:
        raise ValueError(f"a message has {length} bytes, more than the limit of {MAX_MESSAGE}")
    message = json.loads(await reader.readexactly(length))
    if not isinstance(message, list) or not message:
        raise ValueError("a message is not a JSON array with a word in it")
    return message


def pack(items: Iterable[Item]) -> list[list[str | None]]:
    """Returns keys and values in the form that they have in a message."""
    return [[key.decode("latin-1"), None if value is None else value.decode("latin-1")] for key, value in items]


def unpack(items: list[list[str | None]]) -> list[Item]:
    """Returns keys and values of a message."""
    return [((key or "").encode("latin-1"), None if value is None else value.encode("latin-1")) for key, value in items]
