"""One request's course through a decode worker: admit, get the KV, decode, release."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from colm_serve.core import (
    Admitted,
    Decoded,
    DecodedToken,
    DecodeEvent,
    DecodeRequest,
    FinishReason,
    StageTimings,
)
from colm_serve.decode_worker.grammars import GrammarQueue
from colm_serve.decode_worker.prompt_kv import PromptFetcher
from colm_serve.decode_worker.scheduler import Sequence
from colm_serve.decode_worker.worker import DecodeWorker, PromptComputed
from colm_serve.errors import ColmError

_Progress = PromptComputed | DecodedToken | FinishReason | ColmError


class DecodeSession:
    """Runs one request; its pages live exactly as long as `events` does."""

    def __init__(
        self,
        worker: DecodeWorker,
        fetcher: PromptFetcher,
        grammars: GrammarQueue,
        request: DecodeRequest,
        local_prefill_tokens: int,
    ) -> None:
        self._worker = worker
        self._fetcher = fetcher
        self._grammars = grammars
        self._request = request
        self._local_prefill_tokens = local_prefill_tokens
        self._progress: asyncio.Queue[_Progress] = asyncio.Queue()
        self._sequence: Sequence | None = None
        self._level = request.level

    def move_level(self, level: int) -> None:
        """Make the tokens at another level from the next step on; InvalidArgument if none such."""
        if self._sequence is not None:
            self._worker.move_level(self._sequence, level)

    def fail(self, error: ColmError) -> None:
        """End the request with `error`."""
        self._progress.put_nowait(error)

    async def events(self) -> AsyncGenerator[DecodeEvent]:
        """Admitted, the tokens, Decoded. Closing the generator frees the pages within one step.

        Raises:
            ColmError: refused (see `GrammarQueue.compile`, `DecodeWorker.admit`), or the compute
                thread failed.
        """
        loop = asyncio.get_running_loop()
        grammar = await self._grammars.compile(self._request.sampling)
        sequence = self._sequence = self._worker.admit(
            self._request,
            lambda item: loop.call_soon_threadsafe(self._progress.put_nowait, item),
            grammar,
        )
        try:
            yield Admitted(sequence.num_cached)
            begin = time.perf_counter()
            await self._get_prompt_kv(sequence)
            prefilled = time.perf_counter()
            self._worker.begin(sequence)
            first: float | None = None
            while not isinstance(item := await self._next(), FinishReason):
                assert isinstance(item, DecodedToken), "the prompt is complete"
                first = first or time.perf_counter()
                yield item
            end = time.perf_counter()
            timings = StageTimings(
                prefill_s=prefilled - begin,
                first_step_s=(first or end) - prefilled,
                decode_s=end - (first or end),
            )
            yield Decoded(item, sequence.num_cached, sequence.num_shipped, timings)
        finally:
            self._worker.release(sequence)

    async def _get_prompt_kv(self, sequence: Sequence) -> None:
        if sequence.num_missing > self._local_prefill_tokens:
            await self._fetcher.fetch(sequence)
        if sequence.num_missing:
            self._worker.compute_prompt(sequence)
            assert isinstance(await self._next(), PromptComputed), "the prompt was not complete"

    async def _next(self) -> _Progress:
        item = await self._progress.get()
        if isinstance(item, ColmError):
            raise item
        return item
