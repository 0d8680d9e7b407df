"""What one request asks to be done to the model's scores before a token is chosen from them.

In order: logit bias, penalties, no token that ends the text before `min_tokens`, and none that
the grammar does not allow. Where the grammar leaves nothing but the end, `min_tokens` yields.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from colm_serve.core import DecodeRequest
from colm_serve.engine.grammar import GrammarState
from colm_serve.engine.grammar_compiler import CompiledGrammar
from colm_serve.engine.penalties import Penalties


class LogitsProcessor:
    """The rules of one sequence; most requests have none, and then `make` gives None."""

    def __init__(
        self,
        request: DecodeRequest,
        tokens: Sequence[int],
        eos_token_ids: Iterable[int],
        grammar: CompiledGrammar | None = None,
    ) -> None:
        sampling = request.sampling
        self._tokens = tokens
        self._bias = sampling.logit_bias
        self._num_before_end = len(request.prompt) + sampling.min_tokens
        self._ending = sorted(sampling.ending_token_ids(eos_token_ids))
        num_prompt_tokens = len(request.prompt) - request.num_resumed_tokens
        self._penalties: Penalties | None = None
        if Penalties.apply_to(sampling):
            self._penalties = Penalties(sampling, tokens, num_prompt_tokens)
        #: Another thread prepares the grammar's next token.
        self.is_preparing = False
        self._grammar: GrammarState | None = None
        if grammar is not None:
            self._grammar = GrammarState(grammar, tokens, num_prompt_tokens)

    @classmethod
    def make(
        cls,
        request: DecodeRequest,
        tokens: Sequence[int],
        eos_token_ids: Iterable[int],
        grammar: CompiledGrammar | None = None,
    ) -> LogitsProcessor | None:
        """The rules of a request, or None when it leaves the scores as they are.

        Args:
            tokens: the sequence's own list, prompt first, to which its tokens will be added.
            grammar: that of the request, compiled.
        """
        sampling = request.sampling
        has_rules = sampling.logit_bias or sampling.min_tokens or Penalties.apply_to(sampling)
        if has_rules or grammar is not None:
            return cls(request, tokens, eos_token_ids, grammar)
        return None

    @property
    def grammar(self) -> GrammarState | None:
        """Where in its grammar the sequence is, if it has one."""
        return self._grammar

    def can_follow(self, drafts: Sequence[int]) -> bool:
        """Whether `process` can tell, without a wait, what may come after `drafts`."""
        if self._grammar is None:
            return True
        return not self.is_preparing and self._grammar.can_follow(drafts)

    def process(self, logits_V: Tensor, drafts: Sequence[int] = ()) -> Tensor:
        """The scores to choose the next token from, in fp32; `logits_V` stays as it is.

        Args:
            drafts: tokens guessed to follow the sequence's own: the rules are those of the token
                after them. They are not kept.
        """
        logits_V = logits_V.float()
        if self._bias:
            logits_V = logits_V.clone()
            token_ids, biases = zip(*self._bias, strict=True)
            logits_V[list(token_ids)] += torch.tensor(biases, device=logits_V.device)
        if self._penalties is not None:
            logits_V = self._penalties.apply(logits_V, drafts)
        may_end = len(self._tokens) + len(drafts) >= self._num_before_end
        if self._grammar is not None:
            allowed_V = self._grammar.allowed(drafts)
            may_end = may_end or not bool(allowed_V.sum() > allowed_V[self._ending].sum())
            allowed_V = allowed_V.to(logits_V.device)
            logits_V = logits_V.masked_fill(~allowed_V, float("-inf"))
        if self._ending and not may_end:
            logits_V = logits_V.clone()
            logits_V[self._ending] = float("-inf")
        return logits_V
