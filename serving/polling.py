"""What the service does again and again beside answering."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Self

from serving.logs import log


class Polling:
    """Steps that are each repeated with a pause, in seconds, as long as its context; one that fails is logged."""

    def __init__(self, pause_s: float, *steps: Callable[[], Awaitable[None]]) -> None:
        self._pause_s = pause_s
        self._steps = steps
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._repeat(step)) for step in self._steps]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop; a library in between may turn a cancellation into an error, so it does not depend on that."""
        self._stopping.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while not self._stopping.is_set():
            try:
                await step()
            except Exception as failure:
                log(logging.ERROR, "poll_failed", failure=failure)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s):
                    await self._stopping.wait()
