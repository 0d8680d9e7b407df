"""An imported LLaMA is served as it is: prompts, chats and text are transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from colm_serve.router.tokenizer import Tokenizer
from tests.convert.llamas import open_llama
from tests.system.served import served

CHAT: Any = [
    {"role": "user", "content": " How much is é + 1? "},
    {"role": "assistant", "content": "é1"},
    {"role": "user", "content": "def add(a, b):"},
]
VARIANTS = ["llama3 rope", "wide heads"]


@torch.no_grad()
def greedy_text(llama: Path, prompt: list[int], num_tokens: int) -> str:
    """What transformers makes of a prompt, up to the end of the text."""
    whole = open_llama(llama).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    text: str = AutoTokenizer.from_pretrained(llama).decode(
        whole[0, len(prompt) :], skip_special_tokens=True
    )
    return text


@pytest.mark.parametrize("variant", VARIANTS)
async def test_greedy_text_is_transformers(
    llama_of: Callable[[str], Path], imported_of: Callable[[str], Path], variant: str
) -> None:
    llama, prompt = llama_of(variant), "def total(values: list[float]) -> float:\n"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    from_text = greedy_text(llama, tokenizer(prompt)["input_ids"], 24)
    from_chat = greedy_text(
        llama,
        tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
        24,
    )
    assert len(set(from_text)) > 5, "text too constant to compare"
    assert from_text != from_chat
    async with served(imported_of(variant)) as client:
        asked: dict[str, Any] = {"model": "imported", "max_tokens": 24, "temperature": 0}
        completion = await client.completions.create(prompt=prompt, **asked)
        chat = await client.chat.completions.create(messages=CHAT, **asked)
    assert completion.choices[0].text == from_text
    assert chat.choices[0].message.content == from_chat


def test_the_tokenizer_begins_prompts_with_bos(imported_of: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.load(imported_of("grouped"))
    assert tokenizer is not None
    assert tokenizer.encode("é")[0] == 0
