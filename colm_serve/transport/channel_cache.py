"""The channels that a process keeps to its peers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio

from colm_serve.config import TlsConfig
from colm_serve.transport.channel import connect


@dataclass
class _Entry:
    channel: grpc.aio.Channel
    num_users: int = 0


class ChannelCache:
    """One channel to each address, or one for each of several lanes, opened when first used.

    It belongs to one event loop. Of those that nobody uses, the least recently used beyond
    `max_channels` are closed: addresses of workers long gone.
    """

    def __init__(self, tls: TlsConfig | None, max_channels: int = 256) -> None:
        self._tls = tls
        self._max_channels = max_channels
        self._entries: OrderedDict[tuple[str, int], _Entry] = OrderedDict()

    @asynccontextmanager
    async def use(self, address: str, lane: int = 0) -> AsyncIterator[grpc.aio.Channel]:
        """The channel to an address; it stays open for as long as the block lasts."""
        key = (address, lane)
        if key not in self._entries:
            self._entries[key] = _Entry(connect(address, self._tls, is_alone=lane > 0))
        self._entries.move_to_end(key)
        entry = self._entries[key]
        entry.num_users += 1
        try:
            await self._close_unused()
            yield entry.channel
        finally:
            entry.num_users -= 1

    async def close(self) -> None:
        """Close all of them, and end the calls on them."""
        entries, self._entries = self._entries, OrderedDict()
        for entry in entries.values():
            await entry.channel.close()

    async def _close_unused(self) -> None:
        num_excess = len(self._entries) - self._max_channels
        unused = [key for key, entry in self._entries.items() if entry.num_users == 0]
        for entry in [self._entries.pop(key) for key in unused[: max(0, num_excess)]]:
            await entry.channel.close()
