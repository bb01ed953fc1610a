"""Published families' own templates, with tools, calls and thinking, against renderers of other projects: the same
tokens, and the same of them the model's to write. Those projects, their templates and real tokenizers (Qwen3.5's,
DeepSeek's) are in an environment of their own; a stand-in with its marks is there for each other family."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from nybble.data.readers import read_examples
from nybble.data.template import ChatTemplate
from tests.data.conftest import build_tokenizer

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-oracles" / "bin" / "python"
ASKING = Path(__file__).with_name("render_with_oracles.py")
MARKS = re.compile(
    r"<\|[^|<>\s]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|\[/?[A-Z_]+\]"
)
BESIDE = {
    "<|endoftext|>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<|image>",
    "<image|>",
    "<|image|>",
    "<|audio>",
    "<audio|>",
}
BESIDE |= {"<|audio|>", "<|video|>", '<|"|>', "<|think|>"}
PLAIN_MARKS = ("tool_call", "tool_response", "think", "arg_key", "arg_value")  # in vocabularies, and not special

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def call(id: str, **arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


SYSTEM, ASK = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Zürich?\n\nNow."}
MORE = {"role": "user", "content": "And 12 more?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [call("abcdefgh1", city="Zürich", days=3)]}
BOTH = CALLS | {"tool_calls": [*CALLS["tool_calls"], call("abcdefgh2", city='Oslo "N"')]}
GREY = {"role": "tool", "tool_call_id": "abcdefgh1", "name": "get_weather", "content": "grey, 7 °C"}
BLUE = GREY | {"tool_call_id": "abcdefgh2", "content": "blue"}
SAYS = {"role": "assistant", "content": "Grey.\n\nTake a coat."}
THINKS = {"role": "assistant", "content": "Colder still.", "reasoning_content": "It is\nwinter."}
CONVERSATIONS = {
    "turns": [SYSTEM, ASK, SAYS, MORE, SAYS],
    "no system": [ASK, SAYS],
    "call": [SYSTEM, ASK, CALLS, GREY, SAYS],
    "calls": [ASK, BOTH, GREY, BLUE, SAYS, MORE, SAYS],
    "calls without tools": [ASK, BOTH, GREY, BLUE, SAYS],
    "thought": [SYSTEM, ASK, THINKS],
    "thoughts": [ASK, THINKS, MORE, THINKS],
    "thought, call": [ASK, CALLS | {"reasoning_content": "I look."}, GREY, THINKS],
}
WORDS, TOOLS = ("turns", "no system"), ("call", "calls")
EMPTY = "<think>\n\n</think>\n\n"
THOUGHTS = ("thought", "thoughts", "thought, call")


class Family(NamedTuple):
    """A family's template, and who renders the same.

    template: TRL's file of it. oracle, name: who, and its name there. own: what the oracle marks of the prompt, too, or
    an empty thought that it marks. without: what is taken out of the template, with what is put there.
    """

    template: str
    oracle: str
    name: str
    conversations: tuple[str, ...]
    tokenizer: str = "stand-in"
    own: tuple[str, ...] = ()
    without: tuple[str, str] = ("", "")
    bos: str | None = None
    eos: str = "<|im_end|>"


FAMILIES = {
    "Llama 3": Family("llama3", "trl", "llama3_training", WORDS, bos="<|begin_of_text|>", eos="<|eot_id|>"),
    "Qwen2.5": Family("qwen2_5", "trl", "qwen2_5_training", WORDS + TOOLS, own=("\n",)),
    "Gemma 3": Family("gemma3", "trl", "gemma3_training", WORDS, bos="<bos>", eos="<end_of_turn>"),
    "Qwen3": Family("qwen3", "renderers", "qwen3", TOOLS + THOUGHTS, own=(EMPTY,)),
    "Qwen3.5": Family("qwen3_5_think", "renderers", "qwen3.5", THOUGHTS, "qwen", own=("<think>\n",)),
    "Gemma 4": Family("gemma4_v5", "renderers", "gemma4", WORDS + TOOLS, bos="<bos>", eos="<turn|>"),
    "DeepSeek V3": Family(
        "deepseekv3",
        "trl",
        "deepseekv3_training",
        (*WORDS, "calls without tools"),
        "deepseek",
        own=("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
        without=("<think>\\n", ""),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "gpt-oss": Family(
        "gptoss",
        "trl",
        "gptoss_training",
        (*WORDS, "call", "thought", "thoughts"),
        own=("<|start|>assistant",),
        eos="<|return|>",
    ),
    "GLM 4.5": Family(
        "glm4moe",
        "trl",
        "glm4moe_training",
        WORDS + TOOLS + THOUGHTS,
        own=("\n<think></think>\n",),
        eos="<|endoftext|>",
    ),
}


def ask(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run([PYTHON, ASKING], input=json.dumps(questions), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def stand_in(folder: Path, family: Family, text: str) -> None:
    """A small tokenizer with all marks of a template."""
    tokenizer = build_tokenizer("cl100k")
    marks = {*MARKS.findall(text), *filter(None, (family.bos, family.eos)), *BESIDE}
    spelled = [f"<{slash}{mark}>" for mark in PLAIN_MARKS for slash in ("", "/") if f"<{slash}{mark}>" in text]
    tokenizer.add_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in sorted(marks)], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in spelled])
    tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
    tokenizer.save_pretrained(folder)


def runs(tokenizer: Any, ids: list[int], mask: list[bool]) -> list[str]:
    found, run = [], []
    for token, learnt in [*zip(ids, mask, strict=True), (0, False)]:
        if learnt:
            run.append(token)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return found


def endings(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The beginnings of a conversation that end in an answer."""
    return [messages[: n + 1] for n, message in enumerate(messages) if message["role"] == "assistant"]


slow = pytest.mark.slow
needs_oracles = pytest.mark.skipif(
    not PYTHON.exists(), reason="no renderers: `make .venv-oracles/.installed` needs PyPI"
)


def template_text(family: Family) -> str:
    packed = next(PYTHON.parents[1].glob("lib/python*/site-packages/trl/chat_templates"))
    return (packed / f"{family.template}.jinja").read_text(encoding="utf-8").replace(*family.without)


def tools_of(conversation: str) -> list[dict[str, Any]]:
    return [TOOL] if "call" in conversation and "without" not in conversation else []


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, list[dict[str, Any]]]]]:
    """Family -> its tokenizer's folder, and what the oracle makes of each beginning of each conversation."""
    folder = tmp_path_factory.mktemp("tokenizers")
    asked = [{"oracle": "real", "name": name, "folder": str(folder / name)} for name in ("qwen", "deepseek")]
    places = [("", ""), ("", "")]
    for known_as, family in FAMILIES.items():
        own = folder / (known_as if family.tokenizer == "stand-in" else family.tokenizer)
        if family.tokenizer == "stand-in":
            stand_in(own, family, template_text(family))
        for name in family.conversations:
            for messages in endings(CONVERSATIONS[name]):
                shown = {"messages": messages, "tools": tools_of(name), "folder": str(own)}
                asked.append({"oracle": family.oracle, "name": family.name} | shown)
                places.append((known_as, name))
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (known_as, name), answer in zip(places, ask(asked), strict=True):
        found.setdefault(known_as, {}).setdefault(name, []).append(answer)
    return {
        known_as: (folder / (known_as if family.tokenizer == "stand-in" else family.tokenizer), found[known_as])
        for known_as, family in FAMILIES.items()
    }


@slow
@needs_oracles
@pytest.mark.parametrize("known_as", FAMILIES)
def test_tokens_and_what_is_learnt_equal_those_of_an_independent_renderer(
    rendered, tmp_path: Path, known_as: str
) -> None:
    """Every sequence has the tokens of a beginning of the conversation as the oracle renders it, and what is learnt of
    all of them are the answers that the oracle marks at the end of each beginning."""
    family, (folder, answers) = FAMILIES[known_as], rendered[known_as]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template_text(family)
    template = ChatTemplate(tokenizer)
    for name in family.conversations:
        row = tmp_path / "row.jsonl"
        row.write_text(json.dumps({"messages": CONVERSATIONS[name], "tools": tools_of(name)}))
        [example] = read_examples(str(row)).examples
        sequences = template.encode_example(example)
        assert all("error" not in each for each in answers[name]), (name, answers[name])
        known = [each["ids"] for each in answers[name]]
        for sequence in sequences:
            ids = sequence.input_ids.tolist()
            assert ids in known, (name, tokenizer.decode(ids), [tokenizer.decode(each) for each in known])
        ours = [run for s in sequences for run in runs(tokenizer, s.input_ids.tolist(), s.supervised.tolist())]
        theirs = [runs(tokenizer, each["ids"], each["mask"])[-1].rstrip("\n") for each in answers[name]]
        for own in family.own:
            theirs = [run.removeprefix(own) for run in theirs]
        assert sorted(ours) == sorted(theirs), name


# Mistral's format of Tekken, written from what mistral-common renders: the tools stand before the last user's turn.
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(last=0, system='') %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% if tools and loop.index0 == ns.last %}"
    "{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + (ns.system if loop.index0 == ns.last else '') + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}"
    "{{ '[TOOL_RESULTS]{\"content\": ' + (m['content'] | tojson) }}"
    "{{ ', \"call_id\": \"' + m['tool_call_id'] + '\"}[/TOOL_RESULTS]' }}"
    "{% elif m['tool_calls'] %}{{ '[TOOL_CALLS][' }}{% for c in m['tool_calls'] %}"
    "{% if c['id'] | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
    "{{ '{\"name\": \"' + c['function']['name'] + '\", \"arguments\": ' + (c['function']['arguments'] | tojson) }}"
    "{{ ', \"id\": \"' + c['id'] + '\"}' }}"
    "{{ ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@slow
@needs_oracles
def test_mistrals_text_equals_mistral_commons(tmp_path: Path) -> None:
    """All prompts are mistral-common's text (its tokens are of Tekken's vocabulary)."""
    family = Family("", "mistral", "v3", (), bos="<s>", eos="</s>")
    stand_in(tmp_path / "tokenizer", family, MISTRAL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = MISTRAL
    template = ChatTemplate(tokenizer)
    for name in WORDS + TOOLS:
        tools = [TOOL] if "call" in name else []
        prompts = [beginning[:-1] for beginning in endings(CONVERSATIONS[name])]
        answers = ask([{"oracle": "mistral", "name": "v3", "messages": each, "tools": tools} for each in prompts])
        (tmp_path / "row.jsonl").write_text(json.dumps({"messages": CONVERSATIONS[name], "tools": tools}))
        [example] = read_examples(str(tmp_path / "row.jsonl")).examples
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = template.encode_prompt(example.messages[: len(prompt)], example.tools)
            assert tokenizer.decode(ids) == answer["text"], name
        sequences = template.encode_example(example)
        learnt = [run for s in sequences for run in runs(tokenizer, s.input_ids.tolist(), s.supervised.tolist())]
        assert len(learnt) == len(prompts) and all(run.endswith("</s>") for run in learnt)
