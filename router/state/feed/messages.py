"""What pod and workers say to each other: a length (4 bytes, big-endian) and JSON, an array that begins with a word.

| from | message | says |
| --- | --- | --- |
| worker | `hello, name, {range: [epoch, revision]}` | which ranges it reads, and how far it has read each |
| worker | `ready, reason` | null: it is |
| worker | `metrics, number, snapshot` | the answer to `ask` |
| worker | `stats, number` | asks for the metrics of the whole router pod |
| pod | `begin, range` | all of a range follows; what has come of an earlier `begin` is void |
| pod | `items, range, items` | some of it |
| pod | `snapshot, range, epoch, revision` | that was all of it |
| pod | `delta, range, revision, items` | one revision's changes |
| pod | `ask, number` | asks for the worker's metrics |
| pod | `merged, number, snapshot` | the answer to `stats` |
| pod | `drain` | the router stops |

An epoch is the text that names one reading of a range from etcd: revisions compare within it alone, for etcd may have
begun again on other data. Either side ignores what it does not know, and says so in its log.

Keys and values are bytes, written as Latin-1 text so that any byte comes through.
"""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from router.state.feed.ranges import Item

MAX_MESSAGE = 64 << 20  # bytes

Message = list[Any]


def encode(message: Message) -> bytes:
    """Returns one message as it is sent."""
    body = json.dumps(message, separators=(",", ":"), ensure_ascii=True).encode()
    return len(body).to_bytes(4, "big") + body


async def receive(reader: asyncio.StreamReader) -> Message:
    """Returns the next message. Raises EOFError at the end, ValueError for what is none."""
    length = int.from_bytes(await reader.readexactly(4), "big")
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    message = json.loads(await reader.readexactly(length))
    if not isinstance(message, list) or not message:
        raise ValueError("not a message")
    return message


def pack(items: Iterable[Item]) -> list[list[str | None]]:
    """Returns keys and values as a message holds them."""
    return [[key.decode("latin-1"), None if value is None else value.decode("latin-1")] for key, value in items]


def unpack(items: list[list[str | None]]) -> list[Item]:
    """Returns keys and values of a message."""
    return [((key or "").encode("latin-1"), None if value is None else value.encode("latin-1")) for key, value in items]
