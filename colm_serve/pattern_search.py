"""`colm search-patterns`: a pattern file for a model's chain 1, from text that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from colm_serve.engine.loading import load_for_serving
from colm_serve.engine.sparse.pattern_file import HeadPattern, save_patterns
from colm_serve.engine.sparse.search import search_patterns
from colm_serve.engine.sparse.selectors import NUM_LAST_QUERIES
from colm_serve.errors import InvalidArgument
from colm_serve.model.vocabulary import load_model_tokenizer
from colm_serve.training.corpus import read_corpus

#: Files that the bundled model was not trained on; any share does for text to look at.
_HELDOUT_FRACTION = 0.03


def write_pattern_file(
    model: Path, out: Path, data: Sequence[Path], num_tokens: int, budget: float
) -> list[list[HeadPattern]]:
    """Search every layer's chain-1 heads and write the file.

    Args:
        model: a model folder with its tokenizer.
        data: text files, read one after the other; none: the standard library's held-out source.
        num_tokens: how long a text to look at.
        budget: share of the keys that a head may read.

    Raises:
        InvalidArgument: too little text, more tokens than the model's context, no such budget.
        CheckpointError, InvalidConfig: the folder is no model that can be served, or has no
            tokenizer.
    """
    if not 0 < budget <= 1:
        raise InvalidArgument("budget", budget, "above 0 and at most 1")
    loaded = load_for_serving(model, num_chains=1, with_head=True)
    max_context = loaded.model.config.max_context
    if not NUM_LAST_QUERIES <= num_tokens <= max_context:
        allowed = f"{NUM_LAST_QUERIES} to {max_context}, the model's context"
        raise InvalidArgument("tokens", num_tokens, allowed)
    tokenizer = load_model_tokenizer(model, loaded.model.config.vocab_size)
    ids = tokenizer.encode(_read_text(data)).ids
    if len(ids) < num_tokens:
        raise InvalidArgument("tokens", num_tokens, f"at most the text's {len(ids)}")
    layers = search_patterns(loaded, ids[:num_tokens], budget)
    save_patterns(out, layers)
    return layers


def patterns_table(layers: Sequence[Sequence[HeadPattern]]) -> Table:
    """For a terminal."""
    table = Table(title="patterns of chain 1's heads")
    for heading in ("layer", "head", "pattern", "sizes", "attention mass kept"):
        table.add_column(heading, justify="left" if heading == "pattern" else "right")
    for layer, heads in enumerate(layers):
        for head, pattern in enumerate(heads):
            kind, first, second, score = pattern.to_json()
            table.add_row(str(layer), str(head), f"{kind}", f"{first}, {second}", f"{score:.1%}")
    return table


def _read_text(files: Sequence[Path]) -> str:
    if not files:
        return "\n".join(document.text for document in read_corpus(None, _HELDOUT_FRACTION).heldout)
    texts = []
    for path in files:
        try:
            texts.append(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument("data", str(path), f"a readable text file ({error})") from error
    return "\n".join(texts)
