"""The news that memory has become free, from whoever frees some to all loads that wait for some."""

import asyncio


class Space:
    """One pod's. `news` is set once memory has become free after it was read."""

    __slots__ = ("news",)

    def __init__(self) -> None:
        self.news = asyncio.Event()

    def freed(self) -> None:
        """To be called whenever memory has become free, or a load has ended."""
        news, self.news = self.news, asyncio.Event()
        news.set()
