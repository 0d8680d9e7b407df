"""Templates in the manner of LLaMA 3.x give what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from colm_serve.router.request import ChatMessage
from colm_serve.router.tokenizer import Tokenizer
from tests.router.cluster import save_tokenizer

LLAMA_3_2 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|system|>" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n\\n'+ message['content'] | trim }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n\\n' }}
{%- endif %}
"""
AS_JSON = "{% for m in messages %}{{ m | tojson }}{{ m.content | tojson(indent=2) }}{% endfor %}"
UNTIL_A_USER = "{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}x{% endfor %}"
MESSAGES = [
    ChatMessage("system", " Be <brief> & kind. "),
    ChatMessage("user", "é 'quoted' <b>"),
    ChatMessage("assistant", "def add(a):\n"),
]


@pytest.mark.parametrize(
    "template", [LLAMA_3_2, AS_JSON, UNTIL_A_USER], ids=["llama 3.2", "json", "break"]
)
def test_a_chat_is_transformers(template: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template=template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": m.role, "content": m.content} for m in MESSAGES]
    text = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    assert list(tokenizer.encode_chat(MESSAGES)) == expected


def test_a_file_s_own_truncation_and_padding_are_not_for_prompts(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text("utf-8"))
    raw["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    raw["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    path.write_text(json.dumps(raw), "utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    text = "def add(first, second):\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 4 < len(tokenizer.encode(text)) < 64
