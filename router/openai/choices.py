"""Several choices for one prompt: separate generations with seeds of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from colm_serve.core import MAX_SEED
from colm_serve.router.request import Finished, GenerationEvent, GenerationRequest, Token

Events = AsyncGenerator[GenerationEvent, None]
Generate = Callable[[GenerationRequest], Events]


def choices(generate: Generate, request: GenerationRequest, num_choices: int) -> list[Events]:
    """The event streams of a prompt's choices; choice i has the request's seed + i.

    All but the first wait for its first token: the prompt's KV is then in the prefix cache, and
    the others find it there. So the first has to be read for the others to begin.
    """
    if num_choices == 1:
        return [generate(request)]
    is_cached = asyncio.Event()
    first = _first(generate(request), is_cached)
    return [first, *(_other(generate, request, i, is_cached) for i in range(1, num_choices))]


async def _first(events: Events, is_cached: asyncio.Event) -> Events:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Token | Finished):
                is_cached.set()
            yield event


async def _other(
    generate: Generate, request: GenerationRequest, index: int, is_cached: asyncio.Event
) -> Events:
    await is_cached.wait()
    seed = None if request.seed is None else (request.seed + index) % (MAX_SEED + 1)
    async with aclosing(generate(replace(request, seed=seed))) as events:
        async for event in events:
            yield event
