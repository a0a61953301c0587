"""The news that memory has become free, for all loads that wait for some."""

import asyncio


class Space:
    """The news of one pod. `news` is an event for the next time that memory becomes free."""

    __slots__ = ("news",)

    def __init__(self) -> None:
        self.news = asyncio.Event()

    def freed(self) -> None:
        """Wakes waiting loads: memory has become free, or a load has ended."""
        news, self.news = self.news, asyncio.Event()
        news.set()
