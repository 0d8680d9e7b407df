"""The grammars' part of each token, worked out beside the model's steps, never on their way.

A sequence whose last token took little runs in the next step already: what it may make is known
before its scores are, or the step waits for it for `GRACE_S` at most. One whose tokens take longer
is left out of the steps until it is known.
"""

from __future__ import annotations

from collections.abc import Callable

from colm_serve.decode_worker.daemon_threads import DaemonThreads
from colm_serve.decode_worker.sequence import Sequence, Stage
from colm_serve.engine.grammar import GrammarState
from colm_serve.engine.logits_processor import LogitsProcessor
from colm_serve.errors import ColmError, RowFailed

#: What takes long waits for its like, and takes at most so many cores.
_NUM_QUICK, _NUM_SLOW = 2, 2

#: Of a step, for all of its rows: a thread that has its turn needs no more.
GRACE_S = 0.002

#: Called on a thread of these when a sequence may go on, or why it cannot.
OnReady = Callable[[Sequence, ColmError | None], None]


class GrammarSteps:
    """Prepares sequences' next tokens; all but what runs on its threads is the worker's to call.

    Args:
        on_ready: takes the worker's lock.
    """

    def __init__(self, on_ready: OnReady) -> None:
        self._on_ready = on_ready
        self._quick = DaemonThreads(_NUM_QUICK, "grammar")
        self._slow = DaemonThreads(_NUM_SLOW, "slow grammar")

    def begin(self, sequence: Sequence, processor: LogitsProcessor | None) -> None:
        """The sequence has other tokens now; with the worker's lock held."""
        if processor is None or (state := processor.grammar) is None:
            return
        processor.is_preparing = True
        sequence.is_held = not state.is_cheap
        threads = self._quick if state.is_cheap else self._slow
        threads.submit(lambda: self._prepare(sequence, state))

    def close(self) -> None:
        self._quick.close()
        self._slow.close()

    def _prepare(self, sequence: Sequence, state: GrammarState) -> None:
        if sequence.stage is Stage.FINISHED:
            return
        try:
            state.prepare()
            failure: ColmError | None = state.failure
        except Exception as error:  # noqa: BLE001 - it is that request's alone
            failure = RowFailed(f"its grammar could not be followed: {error!r}")
        self._on_ready(sequence, failure)
