"""The chat templates of current families: what is learned of a conversation, and what would be lost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from spp.data.encoding import encode, shown_row
from spp.data.parsing import Conversation, read_source
from spp.errors import ConfigError, DataError, SPPWarning, TargetError
from spp.training import load_data
from spp.training.data import shown_rows
from tests.helpers.models import tiny_tokenizer
from tests.training.helpers import config, run_tune

# Written small, to behave as the published ones do. name: (special tokens, the last of which ends the text; template)
CHATML = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    '{% for c in m.tool_calls or [] %}\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # thoughts stay in what follows the last question
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].replace('<think>', '').strip() %}"
    "{% set said = said.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}"
    "<|start_header_id|>{{ role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}"
    '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA3 = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}{{ p.text | trim }}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (  # ends every text with the end-of-text token, after the end of the turn
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
R1 = (  # opens a thought in the prompt, and takes it from what was said
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
GLM4 = (  # no end of a turn: the heading of the next one ends it
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
SMOLLM3 = (  # without thinking an empty thought is in the prompt and in every answer
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN|><|{{ m.role }}_TOKEN|>"
    "{% if m.role == 'assistant' %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% else %}{{ m.content }}"
    "{% endif %}<|END_OF_TURN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN|><|assistant_TOKEN|>{% endif %}"
)
LATE = (  # the end of a turn is written before the next one
    "{% for m in messages %}{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
)
TAILED = (  # writes something at the end of every text
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}TAIL"
)
PLAIN_LATE = (
    "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant: {% endif %}"
)

FAMILIES: dict[str, tuple[str, str, list[str]]] = {
    "qwen2.5": (CHATML, "<|im_start|> <|im_end|>", ["Yo<|im_end|>", "Tao<|im_end|>"]),
    "llama3": (LLAMA3, "<|start_header_id|> <|end_header_id|> <|eot_id|>", ["Yo<|eot_id|>", "Tao<|eot_id|>"]),
    "mistral": (MISTRAL, "[INST] [/INST]", [" Yo</s>", " Tao</s>"]),
    "gemma3": (GEMMA3, "<start_of_turn> <end_of_turn>", ["Yo<end_of_turn>", "Tao<end_of_turn>"]),
    "phi3": (PHI3, "<|user|> <|assistant|> <|end|>", ["Yo<|end|>", "Tao<|end|>"]),
    "phi4": (PHI4, "<|im_start|> <|im_sep|> <|im_end|>", ["Yo<|im_end|>", "Tao<|im_end|>"]),
    "deepseek-r1": (R1, "<|User|> <|Assistant|>", ["Yo</s>", "Tao</s>"]),
    "glm4": (GLM4, "[gMASK] <sop> <|user|> <|assistant|>", ["Yo<|user|>", "Tao</s>"]),
    "granite": (
        GRANITE,
        "<|start_of_role|> <|end_of_role|> <|end_of_text|>",
        ["Yo<|end_of_text|>", "Tao<|end_of_text|>"],
    ),
    "smollm3": (SMOLLM3, "<|im_start|> <|im_end|>", ["Yo<|im_end|>", "Tao<|im_end|>"]),
    "command-r": (
        COMMAND_R,
        "<|START_OF_TURN|> <|END_OF_TURN|> <|user_TOKEN|> <|assistant_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|>",
        [f"<|START_RESPONSE|>{said}<|END_RESPONSE|><|END_OF_TURN|>" for said in ("Yo", "Tao")],
    ),
    "late": (LATE, "<|im_start|> <|im_end|>", ["Yo<|im_end|>", "Tao<|im_end|>"]),
    "tailed": (TAILED, "", ["Yo</s>", "Tao</s>"]),
}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Tao"},
]


def made(template: str | None, specials: str = "", **options: Any) -> Any:
    """A tokenizer of characters with a template and special tokens of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": specials.split()})
    tokenizer.chat_template = template
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return tokenizer


def learned(
    tokenizer: Any, messages: list[dict[str, Any]], learn: list[bool] | None = None, **options: Any
) -> list[list[str]]:
    rows = encode(tokenizer, Conversation("here", messages, learn, options), block_length=None)
    shown = [shown_row(tokenizer, row.input_ids, row.labels) for row in rows]
    assert all(row.ends for row in rows)
    return [[span.replace("\\n", "\n") for span in re.findall(r"\[\+(.*?)\+\]", text)] for text in shown]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learned_of_each_family(family: str) -> None:
    template, specials, expected = FAMILIES[family]
    tokenizer = made(template, specials)
    assert learned(tokenizer, TURNS) == [expected]
    assert learned(tokenizer, TURNS[:2])[0][0].startswith(expected[0][: expected[0].index("Yo") + 2])
    (row,) = encode(tokenizer, Conversation("here", TURNS), block_length=None)
    text = tokenizer.decode(row.input_ids)
    assert text.startswith(tokenizer.apply_chat_template(TURNS, tokenize=False).rstrip("\n"))
    assert text.count("<s>") == template.count("bos_token")
    masked = learned(tokenizer, TURNS, [True, False, True, True])  # "weight": 0 on the first answer
    assert masked == [expected[1:]]


def test_thoughts_that_a_template_keeps_in_the_last_answer_alone_are_learned_in_a_row_an_answer() -> None:
    tokenizer = made(QWEN3, "<|im_start|> <|im_end|>")
    for first in ({"content": "Yo", "reasoning_content": "hm"}, {"content": "<think>\nhm\n</think>\n\nYo"}):
        turns = [TURNS[0], {"role": "assistant", **first}, *TURNS[2:]]
        thought = "<think>\nhm\n</think>\n\nYo<|im_end|>"
        assert learned(tokenizer, turns) == [[thought], ["<think>\n\n</think>\n\nTao<|im_end|>"]]


def test_an_answer_without_an_end_between_turns_is_a_row_that_ends() -> None:
    tokenizer = made(PLAIN_LATE)
    assert learned(tokenizer, TURNS) == [["Yo</s>"], ["Tao</s>"]]


@pytest.mark.parametrize(
    ("template", "specials", "message", "field"),
    [
        (R1, "<|User|> <|Assistant|>", {"content": "<think>hm</think>Yo"}, "the reasoning in content"),
        (CHATML, "<|im_end|>", {"content": "Yo", "reasoning_content": "hm"}, "reasoning_content"),
        (CHATML, "<|im_end|>", {"content": "Yo", "name": "Ann"}, "name"),
        (CHATML, "<|im_end|>", {"content": "Yo", "score": 3}, "score"),
        (
            PHI4,
            "<|im_end|>",
            {"content": "Yo", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            "tool_calls",
        ),
        (LLAMA3, "<|eot_id|>", {"content": "Yo", "tool_calls": [{"function": {"name": "f"}}]}, "content"),
        (
            LLAMA3,
            "<|eot_id|>",
            {"content": None, "tool_calls": [{"function": {"name": n}} for n in ("f", "g")]},
            r"tool_calls\[1\].function.name",
        ),
    ],
)
def test_a_field_that_a_template_does_not_write_is_refused(
    template: str, specials: str, message: dict[str, Any], field: str, tmp_path: Path
) -> None:
    # Dropped tool calls and reasoning: NVIDIA-NeMo/Automodel #1640, vllm-project/speculators #561.
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [TURNS[0], {"role": "assistant", **message}]}))
    with pytest.raises(DataError, match=rf"d\.jsonl, line 1, message 2: .* does not write {field}"):
        load_data([str(path)], made(template, specials), block_length=99)


def test_tools_and_their_calls_and_results(tmp_path: Path) -> None:
    weather = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1", "name": "weather"},
        TURNS[3],
    ]
    bare = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "42"},
        {"from": "gpt", "value": "Tao"},
    ]
    rows = [
        {"messages": turns, "tools": [weather]},
        {"messages": json.dumps(turns), "tools": json.dumps([weather])},  # as tables store them
        {"messages": turns, "tools": [json.dumps(weather)]},
        {"conversations": bare, "tools": json.dumps([weather["function"]])},
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = made(CHATML, "<|im_start|> <|im_end|>")
    data = load_data([str(path)], tokenizer, block_length=999)
    shown = {shown_row(tokenizer, **data.train[i]) for i in range(len(rows))}
    (text,) = shown
    said = '[+<tool_call>\\n{"name": "weather", "arguments": {"city": "Rome"}}\\n</tool_call><|im_end|>+]'
    assert said in text and "[+Tao<|im_end|>+]" in text and '"description": "d"' in text and "None" not in text
    with pytest.raises(DataError, match=r"line 1: .* refuses this conversation \(it holds .*tool_calls, tools beside"):
        load_data([str(path)], made("{{ raise_exception('no tools') if tools }}" + CHATML), block_length=999)
    with pytest.raises(DataError, match=r"line 1: .* does not write tools"):
        load_data([str(path)], made(CHATML.replace("{% if tools %}", "{% if false %}"), "<|im_end|>"), block_length=999)
    path.write_text(json.dumps({"messages": [turns[0], {**turns[1], "content": None}, *turns[2:]], "tools": [weather]}))
    strict = CHATML.replace("{% if tools %}", "{% if false %}").replace("{{ m.content or '' }}", "{{ '' + m.content }}")
    with pytest.raises(DataError, match=r"line 1: .* does not write tools"):  # not that null is no text: "" would do
        load_data([str(path)], made(strict, "<|im_end|>"), block_length=999)


def test_templates_that_take_arguments_as_text_or_content_in_parts() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    turns = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} "
        "{{ ARGS }}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    for arguments in ("c.function.arguments", "c.function.arguments + ''"):  # prints an object as Python does; raises
        tokenizer = made(text.replace("ARGS", arguments), "<|im_start|> <|im_end|>")
        assert learned(tokenizer, turns) == [['f {"a": 1}<|im_end|>']]
    parts = (
        "{% for m in messages %}<|im_start|>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
        "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    assert learned(made(parts, "<|im_start|> <|im_end|>"), TURNS) == [["Yo<|im_end|>", "Tao<|im_end|>"]]


def with_ends(tokenizer: Any) -> Any:
    """The tokenizer adds <s> and </s> to every text itself."""
    pairs = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=pairs)
    return tokenizer


@pytest.mark.parametrize("template", [None, MISTRAL])
def test_special_tokens_that_the_tokenizer_adds_are_not_doubled(template: str | None, tmp_path: Path) -> None:
    tokenizer = with_ends(made(template, "[INST] [/INST]"))
    (row,) = encode(tokenizer, Conversation("here", TURNS), block_length=None)
    text = tokenizer.decode(row.input_ids)
    assert text.count("<s>") == 1 and text.startswith("<s>") and text.endswith("Tao</s>") and "</s></s>" not in text
    assert tokenizer.decode(row.labels[row.labels >= 0]).replace(" ", "") == "Yo</s>Tao</s>"
    (tmp_path / "d.jsonl").write_text('{"prompt": "<s>q", "completion": "a"}\n{"prompt": "q", "completion": "a</s>"}')
    data = load_data([str(tmp_path / "d.jsonl")], tokenizer, block_length=99)
    assert [shown_row(tokenizer, **data.train[i]) for i in range(2)] == ["<s>q[+a</s>+]"] * 2


def test_a_run_that_learns_no_end_says_so(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": TURNS}))
    tokenizer = made(PLAIN_LATE)
    tokenizer.eos_token = None
    tokenizer.backend_tokenizer.add_special_tokens([])
    with pytest.warns(SPPWarning, match=r"no end token is ever learned \(neither the tokenizer nor its chat template"):
        load_data([str(tmp_path / "d.jsonl")], tokenizer, block_length=99)
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    with pytest.warns(SPPWarning, match="no end token is ever learned: the tokenizer has none, so 2 documents"):
        load_data([str(tmp_path / "t.jsonl")], tokenizer, block_length=3)
    with pytest.warns(SPPWarning, match=r"no end token is ever learned \(every answer is cut"):
        load_data([str(tmp_path / "d.jsonl")], made(GEMMA3, "<end_of_turn>"), block_length=45, completions_only=False)


def test_everything_but_what_is_marked_is_learned_when_asked_for(tmp_path: Path) -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, {**TURNS[2], "train": False}, TURNS[3]]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}))
    tokenizer = made(PHI4, "<|im_start|> <|im_sep|> <|im_end|>")
    data = load_data([str(tmp_path / "d.jsonl")], tokenizer, block_length=99, completions_only=False)
    turn = "<|im_start|>{}<|im_sep|>{}<|im_end|>"
    assert shown_row(tokenizer, **data.train[0]) == (
        f"[+{turn.format('user', 'Hi')}+]{turn.format('assistant', 'Yo')}{turn.format('user', 'Bye')}"
        f"[+{turn.format('assistant', 'Tao')}+]"
    )
    assert read_source([str(tmp_path / "d.jsonl")]).conversations[0].learned == [3]


def test_rows_are_shown_as_they_will_be_learned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "spp")
    rows = [{"instruction": f"Say\n{i}.", "output": f"{i}"} for i in range(24)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for count in (2, 0):
        caplog.clear()
        with pytest.raises(TargetError):  # after the data are read
            run_tune(config(path, tmp_path / "run", show_rows=count, target_modules="nothing", eval_fraction=0.0))
        shown = [text for text in caplog.messages if text.startswith("row ")]
        assert shown == [
            rf"row {i + 1}, what is learned in [+ +]: <|user|>Say\n{i}.</s><|assistant|>[+{i}</s>+]"
            for i in range(count)
        ]
    tokenizer = tiny_tokenizer()
    data = load_data([str(path)], tokenizer, block_length=99)
    assert shown_rows(data, tokenizer, 99) == [shown_row(tokenizer, **data.train[i]) for i in range(24)]
    with pytest.raises(ConfigError, match="show_rows is -1"):
        config(path, tmp_path / "run", show_rows=-1)
