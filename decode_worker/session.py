"""One request's course through a decode worker: admit, get the KV, decode, release."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

from colm_serve.core import (
    Admitted,
    Decoded,
    DecodedToken,
    DecodeEvent,
    DecodeRequest,
    FinishReason,
    ScoredPrompt,
    StageTimings,
)
from colm_serve.decode_worker.grammars import GrammarQueue
from colm_serve.decode_worker.prompt_kv import PromptFetcher
from colm_serve.decode_worker.sequence import Sequence
from colm_serve.decode_worker.waiting import end_tasks
from colm_serve.decode_worker.worker import DecodeWorker, PromptComplete, Readmitted, SequenceNews

_Progress = PromptComplete | ScoredPrompt | DecodedToken | FinishReason | BaseException


class DecodeSession:
    """Runs one request; its pages live exactly as long as `events` does.

    Whoever takes the events slowly delays nobody: keys and values come, and come again after a
    preemption, in a task of their own. Events wait for their reader meanwhile; there are no more
    of them than the request may have tokens.
    """

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
        self._is_over = False
        self._filling: set[asyncio.Task[None]] = set()
        self._num_shipped = 0

    def move_level(self, level: int) -> None:
        """Make the tokens at another level from the next step on.

        Raises:
            InvalidArgument: there is no such level.
            UnknownRequest: its last token has been made.
        """
        if self._sequence is None:
            self._worker.check_level(level)
            self._request = replace(self._request, level=level)
        else:
            self._worker.move_level(self._sequence, level)

    async def events(self) -> AsyncGenerator[DecodeEvent]:
        """Admitted, the prompt's scores if wanted, the tokens, Decoded.

        Closing the generator frees the pages within one step.

        Raises:
            ColmError: refused (see `GrammarQueue.compile`, `DecodeWorker.admit`), or the compute
                thread failed.
        """
        loop = asyncio.get_running_loop()
        ttft_s = self._request.ttft_s
        due = None if ttft_s is None else time.perf_counter() + ttft_s
        grammar = await self._grammars.compile(self._request.sampling)
        sequence = self._sequence = self._worker.admit(
            self._request, lambda item: loop.call_soon_threadsafe(self._hear, item), grammar
        )
        prefilled: float | None = None
        first: float | None = None
        begin = time.perf_counter()
        self._fill(sequence, due)
        try:
            yield Admitted(sequence.num_cached)
            while not isinstance(item := await self._next(), FinishReason):
                match item:
                    case PromptComplete():
                        prefilled = prefilled or time.perf_counter()
                    case ScoredPrompt():
                        yield item
                    case DecodedToken():
                        first = first or time.perf_counter()
                        yield item
            end = time.perf_counter()
            prefilled = prefilled or end
            timings = StageTimings(
                prefill_s=prefilled - begin,
                first_step_s=(first or end) - prefilled,
                decode_s=end - (first or end),
            )
            yield Decoded(item, sequence.num_cached, self._num_shipped, timings)
        finally:
            self._is_over = True
            try:
                await end_tasks(*self._filling)
            finally:
                self._worker.release(sequence)

    def _hear(self, news: SequenceNews) -> None:
        if not isinstance(news, Readmitted):
            self._progress.put_nowait(news)
        elif self._sequence is not None and not self._is_over:
            self._fill(self._sequence)

    def _fill(self, sequence: Sequence, due: float | None = None) -> None:
        filling = asyncio.create_task(self._get_kv(sequence, due))
        self._filling.add(filling)
        filling.add_done_callback(self._filled)

    def _filled(self, filling: asyncio.Task[None]) -> None:
        self._filling.discard(filling)
        if not filling.cancelled() and (error := filling.exception()) is not None:
            self._progress.put_nowait(error)

    async def _get_kv(self, sequence: Sequence, due: float | None) -> None:
        """Fill the sequence's pages, at first with its prompt, later with its output too."""
        if sequence.num_missing > self._local_prefill_tokens and not sequence.is_scoring:
            await self._fetcher.fetch(sequence, due)
        if not sequence.num_preemptions:
            self._num_shipped = sequence.num_shipped
        self._worker.begin(sequence)

    async def _next(self) -> PromptComplete | ScoredPrompt | DecodedToken | FinishReason:
        item = await self._progress.get()
        if isinstance(item, BaseException):
            raise item
        return item
