"""The event that wakes loads which wait for memory."""

import asyncio


class Space:
    """The notifier of one pod. `news` is an event that is set when memory becomes free the next time."""

    __slots__ = ("news",)

    def __init__(self) -> None:
        self.news = asyncio.Event()

    def freed(self) -> None:
        """Wakes waiting loads, because memory has become free or a load has ended."""
        news, self.news = self.news, asyncio.Event()
        news.set()
