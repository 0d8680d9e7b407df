"""Constraints of the output, a part of SamplingParams."""

from __future__ import annotations

from colm_serve.errors import InvalidArgument
from colm_serve.grammar import Grammar, GrammarKind
from colm_serve.proto.colm.v1 import common_pb2


def grammar_to_proto(grammar: Grammar | None) -> common_pb2.Grammar | None:
    if grammar is None:
        return None
    message = common_pb2.Grammar(field=grammar.field)
    value = True if grammar.kind is GrammarKind.JSON_OBJECT else grammar.text
    setattr(message, grammar.kind.value, value)
    return message


def grammar_from_proto(message: common_pb2.SamplingParams) -> Grammar | None:
    """The grammar of sampling parameters; raises InvalidArgument for one without a kind."""
    if not message.HasField("grammar"):
        return None
    grammar = message.grammar
    kind = grammar.WhichOneof("kind")
    if kind is None or (kind == "json_object" and not grammar.json_object):
        kinds = ", ".join(kind.value for kind in GrammarKind)
        raise InvalidArgument(grammar.field or "grammar", "no kind", f"one of {kinds}")
    text = "" if kind == "json_object" else getattr(grammar, kind)
    return Grammar(GrammarKind(kind), text, grammar.field)
