"""A decode worker that drafts gives every request the text it would have without."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colm_serve.config import DecodeConfig
from colm_serve.core import DecodedToken, DecodeRequest, FinishReason, SamplingParams, StepCost
from colm_serve.decode_worker import worker as worker_module
from colm_serve.decode_worker.sequence import Sequence as WorkerSequence
from colm_serve.decode_worker.worker import DecodeWorker, Readmitted, SequenceNews
from colm_serve.engine.loading import load_for_serving
from colm_serve.errors import ColmError, UnknownRequest
from colm_serve.model.checkpoint import load_model, save_model
from tests.helpers import (
    GREEDY,
    before_each_block,
    generate_alone,
    make_model_folder,
    make_prompt,
    with_tokens,
)

#: So dear are the upper chains here that a draft pays at almost any acceptance.
CHEAP_DRAFTS = StepCost((0.001, 1.0, 1.0), (0.0, 0.0, 0.0))
DEAR_DRAFTS = StepCost((1.0, 0.001, 0.001), (0.1, 0.0, 0.0))
SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, seed=3)
RULED = replace(
    SAMPLED, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.5, logit_bias=((5, 2.0),)
)
SAMPLINGS = {
    "greedy": with_tokens(GREEDY, 24),
    "sampled": SAMPLED,
    "ruled": RULED,
    "greedy and ruled": replace(RULED, temperature=0),
}
DRAFT_LEVEL = 1


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose upper chains say little: its levels agree about most tokens, not all."""
    folder = make_model_folder(tmp_path_factory.mktemp("models") / "agreeing")
    model = load_model(folder).model
    assert model.head is not None
    with torch.no_grad():
        for weight in list(model.head.weights)[1:]:
            weight *= 0.35
    save_model(model, folder)
    return folder


@dataclass
class Client:
    """One request at a worker, without the wire."""

    worker: DecodeWorker
    request: DecodeRequest
    on_token: Callable[[Client], object] | None = None
    got: list[DecodedToken] = field(default_factory=list)
    sequence: WorkerSequence | None = None
    _news: queue.Queue[SequenceNews] = field(default_factory=queue.Queue)

    def open(self) -> Client:
        self.sequence = self.worker.admit(self.request, self._hear)
        self.worker.begin(self.sequence)
        return self

    def _hear(self, news: SequenceNews) -> None:
        # On the compute thread, between two steps.
        if isinstance(news, DecodedToken):
            self.got.append(news)
            if self.on_token is not None:
                self.on_token(self)
        self._news.put(news)

    def move_level(self, level: int) -> None:
        assert self.sequence is not None
        with suppress(UnknownRequest):  # The last token has come, or is about to.
            self.worker.move_level(self.sequence, level)

    def finish(self) -> FinishReason:
        assert self.sequence is not None
        try:
            while True:
                news = self._news.get(timeout=60)
                if isinstance(news, FinishReason):
                    return news
                if isinstance(news, Readmitted):
                    self.worker.begin(self.sequence)
                assert not isinstance(news, ColmError), news
        finally:
            self.worker.release(self.sequence)

    @property
    def tokens(self) -> list[int]:
        return [token.token_id for token in self.got]

    @property
    def levels(self) -> list[int]:
        return [token.level for token in self.got]


@contextmanager
def decode_worker(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    cost: StepCost = CHEAP_DRAFTS,
    before_block: Callable[[], object] | None = None,
    **changes: Any,
) -> Iterator[DecodeWorker]:
    monkeypatch.setattr(worker_module, "measure_step_cost", lambda model, pool: cost)
    speculation = {"sampled": True, **changes.pop("speculation", {})}
    config = DecodeConfig.model_validate({"kv_tokens": 4096, "speculation": speculation, **changes})
    loaded = load_for_serving(folder, num_chains=None, with_head=True)
    if before_block is not None:
        before_each_block(loaded.model, before_block)
    worker = DecodeWorker(loaded, config, "decode", epoch=1)
    nan = torch.full((config.num_pages * config.page_size, *worker_kv_shape(worker)), torch.nan)
    for layer in range(worker.layout.num_layers):
        worker.pool.write(layer, worker.pool.table(range(config.num_pages)), 0, nan, nan)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
        worker.check_alive()
        worker.check_integrity()
        status = worker.status()
        assert status.num_free_pages == status.num_pages, "pages were not given back"


def worker_kv_shape(worker: DecodeWorker) -> tuple[int, int]:
    return worker.layout.num_kv_heads, worker.layout.head_dim


def make_request(
    worker: DecodeWorker, prompt: tuple[int, ...], level: int, sampling: SamplingParams
) -> DecodeRequest:
    return DecodeRequest("r", prompt, level, sampling, (), worker.kv_identity)


def assert_speculated(worker: DecodeWorker) -> None:
    status = worker.status()
    assert 0 < status.num_accepted < status.num_drafted


@pytest.mark.parametrize("max_drafts", [1, 3, 8])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_texts_of_a_batch_are_those_of_the_whole_model(
    agreeing: Path, monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams, max_drafts: int
) -> None:
    cases = [(make_prompt(n, seed=n), 1 + i % 3) for i, n in enumerate((40, 7, 1, 33, 64, 20))]
    with decode_worker(
        agreeing, monkeypatch, speculation={"max_drafts": max_drafts}, max_rows=4
    ) as worker:
        clients = [
            Client(worker, make_request(worker, prompt, level, sampling)).open()
            for prompt, level in cases
        ]
        assert [client.finish() for client in clients] == [FinishReason.LENGTH] * 6
        assert_speculated(worker)
        assert worker.num_steps < 36, "24 tokens of 6 requests, 4 rows a step: drafts save nothing"
    for client, (prompt, level) in zip(clients, cases, strict=True):
        assert client.levels == [level] * 24
        expected = generate_alone(agreeing, prompt, [level] * 24, sampling, DRAFT_LEVEL)
        assert client.tokens == expected


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_text_is_the_same_where_drafting_does_not_pay(
    agreeing: Path, monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams
) -> None:
    with decode_worker(agreeing, monkeypatch, cost=DEAR_DRAFTS) as worker:
        client = Client(worker, make_request(worker, make_prompt(9), 3, sampling)).open()
        client.finish()
        assert worker.status().num_drafted == 0
    expected = generate_alone(agreeing, make_prompt(9), [3] * 24, sampling, DRAFT_LEVEL)
    assert client.tokens == expected


@pytest.mark.parametrize("speculation", [{"enabled": False}, {"sampled": False}])
def test_a_worker_that_may_not_draft_draws_plainly(
    agreeing: Path, monkeypatch: pytest.MonkeyPatch, speculation: dict[str, bool]
) -> None:
    with decode_worker(agreeing, monkeypatch, speculation=speculation) as worker:
        client = Client(worker, make_request(worker, make_prompt(9), 3, SAMPLED)).open()
        client.finish()
        assert worker.status().num_drafted == 0
    assert client.tokens == generate_alone(agreeing, make_prompt(9), [3] * 24, SAMPLED)


@pytest.mark.parametrize("min_tokens", [0, 15])
def test_a_text_ends_where_it_would_have(
    agreeing: Path, monkeypatch: pytest.MonkeyPatch, min_tokens: int
) -> None:
    """Whichever token ends it: accepted, rejected or after all drafts; nothing comes after it."""
    prompt = make_prompt(12)
    plain = generate_alone(agreeing, prompt, [3] * 24, SAMPLINGS["greedy"])
    with decode_worker(agreeing, monkeypatch) as worker:
        for stop in sorted(set(plain)):
            sampling = replace(SAMPLINGS["greedy"], stop_token_ids=(stop,), min_tokens=min_tokens)
            client = Client(worker, make_request(worker, prompt, 3, sampling)).open()
            reason = client.finish()
            expected = generate_alone(agreeing, prompt, [3] * 24, sampling)
            if stop in expected:
                assert reason is FinishReason.STOP
                expected = expected[: expected.index(stop) + 1]
            assert client.tokens == expected
            assert len(expected) > min_tokens
        assert_speculated(worker)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5])
def test_no_more_tokens_are_made_than_asked(
    agreeing: Path, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    sampling = with_tokens(SAMPLINGS["greedy"], max_tokens)
    with decode_worker(agreeing, monkeypatch) as worker:
        client = Client(worker, make_request(worker, make_prompt(16), 3, sampling)).open()
        assert client.finish() is FinishReason.LENGTH
    assert client.tokens == generate_alone(agreeing, make_prompt(16), [3] * max_tokens)


def test_what_was_drafted_and_rejected_is_not_found_by_the_next_turn(
    agreeing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = make_prompt(21)
    with decode_worker(agreeing, monkeypatch, speculation={"max_drafts": 8}) as worker:
        first = Client(worker, make_request(worker, prompt, 3, SAMPLED)).open()
        first.finish()
        assert_speculated(worker)
        next_turn = (*prompt, *first.tokens, 1, 2, 3)
        again = Client(worker, make_request(worker, next_turn, 3, SAMPLED)).open()
        again.finish()
        assert again.sequence is not None
        assert again.sequence.num_cached == 32, "of 45 tokens the last was never run"
    expected = generate_alone(agreeing, next_turn, [3] * 24, SAMPLED, DRAFT_LEVEL)
    assert again.tokens == expected


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_levels_move_in_the_middle(
    agreeing: Path, monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams
) -> None:
    path = {3: 1, 9: 2, 15: 3, 19: 1}

    def move(client: Client) -> None:
        assert client.sequence is not None
        for num_tokens, level in path.items():
            if len(client.got) >= num_tokens:
                moved = level
        if len(client.got) >= 3:
            client.move_level(moved)

    prompt = make_prompt(30)
    with decode_worker(agreeing, monkeypatch) as worker:
        client = Client(worker, make_request(worker, prompt, 3, sampling), move).open()
        client.finish()
        assert_speculated(worker)
    assert {1, 2, 3} == set(client.levels)
    assert client.tokens == generate_alone(agreeing, prompt, client.levels, sampling, DRAFT_LEVEL)


def test_a_request_cancelled_in_a_drafting_pass_leaves_nothing(
    agreeing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[Client] = []

    def cancel() -> None:
        if cancelled and cancelled[0].got and cancelled[0].sequence is not None:
            worker.release(cancelled[0].sequence)

    prompts = make_prompt(30), make_prompt(31)
    with decode_worker(agreeing, monkeypatch, before_block=cancel) as worker:
        other = Client(worker, make_request(worker, prompts[0], 3, SAMPLED))
        cancelled.append(Client(worker, make_request(worker, prompts[1], 3, SAMPLED)).open())
        other.open().finish()
    assert other.tokens == generate_alone(agreeing, prompts[0], [3] * 24, SAMPLED, DRAFT_LEVEL)
    assert len(cancelled[0].got) < 24


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_combination_changes_a_text(
    agreeing: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """Preemption, shared prefixes, level moves and drafts, greedy and drawn."""
    head = make_prompt(data.draw(st.integers(0, 40), "shared prefix"))
    num_requests = data.draw(st.integers(1, 5), "requests")
    moves = data.draw(
        st.lists(
            st.tuples(st.integers(0, num_requests - 1), st.integers(1, 20), st.integers(1, 3)),
            max_size=6,
        ),
        "moves",
    )
    samplings = [
        replace(data.draw(st.sampled_from(list(SAMPLINGS.values()))), max_tokens=32)
        for _ in range(num_requests)
    ]
    levels = [data.draw(st.integers(1, 3)) for _ in range(num_requests)]
    speculation = {"max_drafts": data.draw(st.integers(1, 8), "max_drafts")}
    config: dict[str, Any] = {
        "kv_tokens": data.draw(st.sampled_from([112, 160, 2048]), "kv_tokens"),
        "max_rows": data.draw(st.integers(1, 4), "max_rows"),
        "expected_output_tokens": 1,
        "max_batch_tokens": data.draw(st.integers(5, 40), "max_batch_tokens"),
    }

    def mover(index: int) -> Callable[[Client], object]:
        mine = {at: level for request, at, level in moves if request == index}

        def move(client: Client) -> None:
            level = mine.get(len(client.got))
            if level is not None and client.sequence is not None:
                client.move_level(level)

        return move

    with decode_worker(agreeing, monkeypatch, speculation=speculation, **config) as worker:
        clients = []
        for i, (level, sampling) in enumerate(zip(levels, samplings, strict=True)):
            prompt = (*head, *make_prompt(3 + i, seed=i))
            client = Client(worker, make_request(worker, prompt, level, sampling), mover(i))
            try:
                clients.append(client.open())
            except ColmError:
                break  # There is no room for more.
        for client in clients:
            client.finish()
    for client in clients:
        request = client.request
        expected = generate_alone(
            agreeing, request.prompt, client.levels, request.sampling, DRAFT_LEVEL
        )
        assert client.tokens == expected
