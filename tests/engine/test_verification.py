"""Drafts of a real model's level 1 verified at its level 3: the text is that without drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from colm_serve.core import DecodeRequest, SamplingParams
from colm_serve.engine.logits_processor import LogitsProcessor
from colm_serve.engine.sampler import Run, Sampled, draft
from tests.helpers import (
    TINY,
    generate_alone,
    make_model_folder,
    next_logits,
    p_value,
    sample_all,
    whole_model,
)

PROMPT = (3, 1, 4, 1, 5)
EOS = 6
LEVEL, DRAFT_LEVEL = 3, 1
SAMPLED = SamplingParams(max_tokens=14, temperature=0.9)
SAMPLINGS = {
    "greedy": replace(SAMPLED, temperature=0),
    "sampled": SAMPLED,
    "filtered": replace(SAMPLED, temperature=1.5, top_k=6, min_p=0.02, top_p=0.9),
    "ruled": replace(
        SAMPLED, presence_penalty=0.4, frequency_penalty=0.5, repetition_penalty=1.3,
        min_tokens=14, logit_bias=((2, 1.5),),
    ),
    "greedy and ruled": replace(
        SAMPLED, temperature=0, frequency_penalty=1.0, min_tokens=14, repetition_penalty=1.2
    ),
}  # fmt: skip
#: Scores of the next token after a prefix at a level, [V].
Score = Callable[[tuple[int, ...], int], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(TINY, vocab_size=8, eos_token_ids=(EOS,))
    return make_model_folder(tmp_path_factory.mktemp("models") / "small", config)


@pytest.fixture(scope="module")
def score(folder: Path) -> Score:
    # Softer than random weights have them: every token is drawn now and then.
    return cache(lambda tokens, level: 0.3 * next_logits(whole_model(folder), tokens, level)[0])


class Speculation:
    """Turns of one sequence: up to `num_drafts` drafts, one verification."""

    def __init__(self, score: Score, sampling: SamplingParams, num_drafts: int) -> None:
        self.tokens = list(PROMPT)
        self.num_drafted = self.num_accepted = 0
        self._score = score
        self._sampling = sampling
        self._num_drafts = num_drafts
        request = DecodeRequest("r", PROMPT, LEVEL, sampling, (), "")
        self._processor = LogitsProcessor.make(request, self.tokens, (EOS,))

    def text(self, num_tokens: int) -> list[int]:
        while len(self.tokens) < len(PROMPT) + num_tokens:
            self.take_turn()
        return self.tokens[len(PROMPT) :][:num_tokens]

    def take_turn(self) -> Sampled:
        run = Run(self._sampling, len(self.tokens), self._processor)
        for _ in range(self._num_drafts):
            [token] = draft(self._scores(run, DRAFT_LEVEL)[-1:], [run])
            assert isinstance(token, int)
            run = replace(run, drafts=(*run.drafts, token))
        if self._sampling.temperature > 0:
            run = replace(run, drafter_logits_SV=self._scores(run, DRAFT_LEVEL))
        [sampled] = sample_all(self._scores(run, LEVEL), [run])
        self.tokens += sampled.tokens
        self.num_drafted += len(run.drafts)
        self.num_accepted += len(sampled.tokens) - 1
        return sampled

    def _scores(self, run: Run, level: int) -> Tensor:
        prefixes = [(*self.tokens, *run.drafts[:i]) for i in range(run.num_rows)]
        return torch.stack([self._score(prefix, level) for prefix in prefixes])


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_text_does_not_depend_on_how_much_is_drafted(
    score: Score, sampling: SamplingParams
) -> None:
    num_drafted = num_accepted = 0
    for seed in range(12):
        seeded = replace(sampling, seed=seed)
        plain = Speculation(score, seeded, num_drafts=0).text(14)
        for num_drafts in (1, 2, 3, 7):
            speculation = Speculation(score, seeded, num_drafts)
            assert speculation.text(14) == plain
            num_drafted += speculation.num_drafted
            num_accepted += speculation.num_accepted
    assert 0 < num_accepted < num_drafted


@pytest.mark.parametrize("name", ["greedy", "greedy and ruled"])
def test_greedy_text_is_the_models_own(folder: Path, name: str) -> None:
    def score(tokens: tuple[int, ...], level: int) -> Tensor:
        return next_logits(whole_model(folder), tokens, level)[0]

    expected = generate_alone(folder, PROMPT, [LEVEL] * 14, SAMPLINGS[name])
    assert Speculation(score, SAMPLINGS[name], num_drafts=3).text(14) == expected


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_the_first_tokens_are_jointly_distributed_as_the_model_has_them(
    score: Score, num_drafts: int
) -> None:
    def probability(tokens: tuple[int, ...]) -> float:
        prefixes = [(*PROMPT, *tokens[:i]) for i in range(len(tokens))]
        chances = [
            torch.softmax(score(prefix, LEVEL).double() / 0.9, dim=0)[token]
            for prefix, token in zip(prefixes, tokens, strict=True)
        ]
        return float(torch.stack(chances).prod())

    texts = list(product(range(8), repeat=2))
    expected = torch.tensor([probability(text) for text in texts], dtype=torch.float64)
    outcomes = [
        texts.index((*Speculation(score, replace(SAMPLED, seed=seed), num_drafts).text(2),))
        for seed in range(2000)
    ]
    assert p_value(outcomes, expected) > 1e-4
    drafted = torch.tensor([probability((*text[:1], text[0])) for text in texts])
    assert p_value(outcomes, drafted / drafted.sum()) < 1e-9, "any distribution passes"


def test_runs_of_a_batch_are_sampled_each_by_itself(score: Score) -> None:
    runs = [Run(replace(SAMPLED, seed=i), 5, drafts=(2, 3)[:i]) for i in range(3)]
    logits_SV = torch.stack([score((*PROMPT, i), LEVEL) for i in range(6)])
    together = sample_all(logits_SV, runs)
    apart = [sample_all(logits_SV[first:end], [run]) for run, first, end in zip(
        runs, (0, 1, 3), (1, 3, 6), strict=True
    )]  # fmt: skip
    assert [[sampled] for sampled in together] == apart


def test_a_run_ends_with_the_first_token_that_was_not_drafted() -> None:
    logits_SV = torch.eye(4)[[1, 2, 3, 0]]
    greedy = SamplingParams(1, temperature=0, logprobs=1)
    for drafts, tokens in (
        ((), [1]),
        ((0,), [1]),
        ((1,), [1, 2]),
        ((1, 0, 3), [1, 2]),
        ((1, 2, 3), [1, 2, 3, 0]),
    ):
        [sampled] = sample_all(logits_SV[: 1 + len(drafts)], [Run(greedy, 9, drafts=drafts)])
        assert sampled.tokens == tokens
        assert sampled.logprobs is not None
        assert [logprobs.chosen.token_id for logprobs in sampled.logprobs] == tokens
