"""One channel to an address, open for as long as it is used."""

from __future__ import annotations

import grpc
import grpc.aio

from colm_serve.transport.channel_cache import ChannelCache
from tests.transport.echo import call, echo, serving


def is_closed(channel: grpc.aio.Channel) -> bool:
    return channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN


async def touch(cache: ChannelCache, number: int) -> grpc.aio.Channel:
    async with cache.use(f"127.0.0.1:{number}") as channel:
        return channel


async def test_the_cache_keeps_one_channel_to_an_address() -> None:
    cache = ChannelCache(None)
    async with serving(echo) as address:
        async with cache.use(address) as channel:
            assert await call(channel) == b"ping"
        async with cache.use(address) as again:
            assert again is channel
        await cache.close()
        assert is_closed(channel)


async def test_the_cache_closes_the_channel_unused_for_longest() -> None:
    cache = ChannelCache(None, max_channels=2)
    first, second = await touch(cache, 1), await touch(cache, 2)
    await touch(cache, 1)
    await touch(cache, 3)
    assert is_closed(second)
    assert not is_closed(first)
    assert await touch(cache, 1) is first
    await cache.close()


async def test_a_channel_in_use_stays_open_whatever_comes() -> None:
    cache = ChannelCache(None, max_channels=2)
    async with serving(echo) as address:
        async with cache.use(address) as used, cache.use(address) as shared:
            others = [await touch(cache, number) for number in range(1, 5)]
            assert shared is used
            assert await call(used) == b"ping"
        assert [is_closed(other) for other in others] == [True, True, True, False]
        await touch(cache, 5)
        await touch(cache, 6)
        assert is_closed(used)
        await cache.close()


async def test_more_channels_than_the_bound_are_closed_once_they_are_unused() -> None:
    cache = ChannelCache(None, max_channels=1)
    async with cache.use("127.0.0.1:1") as first, cache.use("127.0.0.1:2") as second:
        assert not is_closed(first)
        assert not is_closed(second)
    third = await touch(cache, 3)
    assert is_closed(first)
    assert is_closed(second)
    assert not is_closed(third)
    await cache.close()
