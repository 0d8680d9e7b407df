"""Turns what a client asks for into what can be served, or says which field cannot be."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from colm_serve.config import MAX_S, MIN_S, LimitsConfig, SlaClass, heavier_tpot_s
from colm_serve.core import MAX_SEED, SamplingParams
from colm_serve.errors import InvalidArgument, InvalidConfig
from colm_serve.router.model_facts import ModelFacts
from colm_serve.router.reading.encode import check_length
from colm_serve.router.request import ChatPrompt, GenerationRequest, TextPrompt, TokenPrompt
from colm_serve.router.sizes import check_sizes

#: Token ids of a request's text or chat; raises InvalidArgument.
Encode = Callable[[GenerationRequest], Awaitable[tuple[int, ...]]]

DEFAULT_MAX_TOKENS = 256
#: What a request may name itself, and how much one of its units is in seconds.
_TARGETS = {"ttft_ms": 1e-3, "tpot_ms": 1e-3, "deadline_s": 1.0}


@dataclass(frozen=True)
class CheckedRequest:
    """A request that a decode worker can serve, with every choice made but the placement."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...]
    min_level: int
    max_level: int
    ttft_s: float | None
    tpot_s: float | None
    deadline_s: float
    cache_salt: str
    sla_class: str
    weight: float = 1.0
    heavier_tpot_s: float | None = None  # as `RequestFacts` has it
    #: Targets that the request itself names, rather than its class.
    own_targets: frozenset[str] = frozenset()
    is_scored_only: bool = False


class Validator:
    """Checks requests against one model and the cluster's SLA classes.

    Args:
        encode_text: None for a model without a tokenizer.
        limits: None for the defaults.

    Raises:
        InvalidConfig: a class whose `min_level` the model does not have.
    """

    def __init__(
        self,
        model: ModelFacts,
        encode_text: Encode | None,
        sla_classes: Mapping[str, SlaClass],
        default_sla_class: str,
        limits: LimitsConfig | None = None,
    ) -> None:
        self._model = model
        self._encode_text = encode_text
        self._limits = limits or LimitsConfig()
        self._sla_classes = sla_classes
        self._default_sla_class = default_sla_class
        self._heavier_tpot_s = heavier_tpot_s(sla_classes)
        for name, sla in sla_classes.items():
            if sla.min_level > model.num_levels:
                key = f"sla_classes.{name}.min_level"
                raise InvalidConfig(key, sla.min_level, f"1 to {model.num_levels}, the levels")

    async def check(
        self, request: GenerationRequest, sla_classes: Sequence[str] = ()
    ) -> CheckedRequest:
        """Check and tokenize a request.

        Args:
            sla_classes: those that the caller may name, its default first; none for all.

        Raises:
            InvalidArgument: names the field, its value and what is allowed.
        """
        check_sizes(request, self._limits)
        sla_class = self._sla_class(request.sla_class, sla_classes)
        sla = self._sla_classes[sla_class]
        min_level, max_level = self._levels(request, sla)
        sla = _with_own_targets(request, sla)
        if request.stop and self._encode_text is None:
            raise InvalidArgument("stop", list(request.stop), "none: this model has no tokenizer")
        if request.grammar is not None and self._encode_text is None:
            allowed = "none: this model has no tokenizer"
            raise InvalidArgument(request.grammar.field, request.grammar.text, allowed)
        prompt = await self._encode(request)
        return CheckedRequest(
            prompt=prompt,
            sampling=self._sampling(request, len(prompt)),
            stop=request.stop,
            min_level=min_level,
            max_level=max_level,
            ttft_s=None if sla.ttft_ms is None else sla.ttft_ms / 1000,
            tpot_s=None if sla.tpot_ms is None else sla.tpot_ms / 1000,
            deadline_s=sla.deadline_s,
            weight=sla.weight,
            heavier_tpot_s=self._heavier_tpot_s.get(sla_class),
            sla_class=sla_class,
            own_targets=frozenset(t for t in _TARGETS if getattr(request, t) is not None),
            is_scored_only=_is_scored_only(request),
            cache_salt=request.cache_salt,
        )

    def check_level(self, level: int, sla_class: str) -> None:
        """Raise InvalidArgument unless requests of the class may be at the level."""
        low, high = self._levels_of(self._sla_classes[sla_class])
        if not low <= level <= high:
            raise InvalidArgument("level", level, f"{low} to {high}")

    def _sla_class(self, name: str | None, own: Sequence[str]) -> str:
        if name is None:
            name = own[0] if own else self._default_sla_class
        allowed = own or sorted(self._sla_classes)
        if name not in allowed:
            raise InvalidArgument("sla_class", name, ", ".join(allowed))
        return name

    def _levels(self, request: GenerationRequest, sla: SlaClass) -> tuple[int, int]:
        """The class's bounds, narrowed by the request's own."""
        low, high = self._levels_of(sla)
        asked = {
            "level": request.level,
            "min_level": request.min_level,
            "max_level": request.max_level,
        }
        for field, level in asked.items():
            if level is not None and not low <= level <= high:
                raise InvalidArgument(field, level, f"{low} to {high}")
        if request.level is not None:
            if request.min_level is not None or request.max_level is not None:
                bounds = (request.min_level, request.max_level)
                raise InvalidArgument("level", request.level, f"no min_level, max_level {bounds}")
            return request.level, request.level
        low, high = request.min_level or low, request.max_level or high
        if low > high:
            raise InvalidArgument("min_level", low, f"at most max_level, {high}")
        return low, high

    def _levels_of(self, sla: SlaClass) -> tuple[int, int]:
        num_levels = self._model.num_levels
        return sla.min_level, min(sla.max_level or num_levels, num_levels)

    async def _encode(self, request: GenerationRequest) -> tuple[int, ...]:
        match request.prompt:
            case TokenPrompt(token_ids):
                check_length("prompt", token_ids, self._model.max_context)
                return self._check_token_ids(token_ids)
            case TextPrompt(text):
                encoder = self._need_encoder("prompt", text)
            case ChatPrompt(messages):
                encoder = self._need_encoder("messages", [m.role for m in messages])
        return await encoder(request)

    def _check_token_ids(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        vocab_size = self._model.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            wrong = (i for i, token_id in enumerate(token_ids) if not 0 <= token_id < vocab_size)
            position = next(wrong)
            allowed = f"token ids 0 to {vocab_size - 1}"
            raise InvalidArgument(f"prompt[{position}]", token_ids[position], allowed)
        return token_ids

    def _need_encoder(self, field: str, value: object) -> Encode:
        if self._encode_text is None:
            raise InvalidArgument(field, value, "token ids: this model has no tokenizer")
        return self._encode_text

    def _sampling(self, request: GenerationRequest, num_prompt_tokens: int) -> SamplingParams:
        room = self._model.max_context - num_prompt_tokens
        max_tokens = request.max_tokens
        if max_tokens is None:
            max_tokens = min(DEFAULT_MAX_TOKENS, room)
        if _is_scored_only(request):
            max_tokens = 1  # A worker makes one at least; the request ends before it.
        if max_tokens > room:
            allowed = (
                f"1 to {room}: the context holds {self._model.max_context} tokens, the prompt has "
                f"{num_prompt_tokens}"
            )
            raise InvalidArgument("max_tokens", max_tokens, allowed)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            # More than all tokens is all of them, and fits the wire's integer.
            top_k=min(request.top_k, self._model.vocab_size),
            seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
            ignore_eos=request.ignore_eos,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            stop_token_ids=request.stop_token_ids,
            min_tokens=request.min_tokens,
            logprobs=request.logprobs,
            grammar=request.grammar,
            prompt_logprobs=request.prompt_logprobs,
        )
        sampling.check_vocabulary(self._model.vocab_size, self._model.eos_token_ids)
        return sampling


def _is_scored_only(request: GenerationRequest) -> bool:
    return request.max_tokens == 0 and request.prompt_logprobs is not None


def _with_own_targets(request: GenerationRequest, sla: SlaClass) -> SlaClass:
    """The class with the targets that the request names itself."""
    own = {field: getattr(request, field) for field in _TARGETS}
    given = {field: value for field, value in own.items() if value is not None}
    for field, value in given.items():
        # Written so that NaN fails too.
        least, most = MIN_S / _TARGETS[field], MAX_S / _TARGETS[field]
        if not least <= value <= most:
            raise InvalidArgument(field, value, f"{least:g} to {most:.0f}")
    return sla.model_copy(update=given) if given else sla
