"""How a template writes thoughts and calls is found by rendering, and answers in that form are read back. The templates
are small ones of our own that write calls as published families do."""

import pytest
from rendered import template_of

from nybble.data.answer_forms import AnswerForm, CallGrammar, read_calls
from nybble.data.examples import Message, ToolCall

USER = Message("user", "Weather?")
SCHEMAS = {"weather": {"city": {"type": "string"}, "days": {"type": "integer"}, "more": {"type": ["object", "null"]}}}
CALLS = (
    ToolCall("weather", {"city": 'Zü"rich\n{Old Town}', "days": 3, "more": {"a": [1, None, True]}}, "abcdefgh1"),
    ToolCall("now", {}, "abcdefgh2"),
)
SAID = "m['content'] or ''"
NAME, JSON = "c['function']['name']", "(c['function']['arguments'] | tojson)"


def chat(
    call: str, before: str = "''", behind: str = "''", said: str = "m['content'] or ''", prompt: str = "''"
) -> str:
    """A template of turns whose calls are written by the Jinja text `call`, of a call c."""
    calls = f"{{% if m['tool_calls'] %}}{{{{ {before} }}}}{{% for c in m['tool_calls'] %}}{call}{{% endfor %}}"
    calls += f"{{{{ {behind} }}}}{{% endif %}}"
    return (
        f"{{% for m in messages %}}{{{{ '<|im_start|>' + m['role'] + '\n' }}}}{{{{ {said} }}}}{calls}<|im_end|>\n"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' + {prompt} }}}}{{% endif %}}"
    )


def values(each: str) -> str:
    """Jinja text that writes the arguments of a call c one by one, by their names k and values v."""
    return "{% for k, v in c['function']['arguments'] | items %}{{ " + each + " }}{% endfor %}"


def joined(each: str, comma: str) -> str:
    """As `values`, with commas between them."""
    return values(f"{each} + ('{comma}' if not loop.last else '')")


GEMMA_VALUE = (
    "{% macro said(v) %}{% if v is string %}{{ '<|\"|>' + v + '<|\"|>' }}{% elif v is mapping %}{{ '{' }}"
    "{% for k, e in v | items %}{{ k + ':' + said(e) }}{% endfor %}{{ '}' }}{% elif v is iterable %}{{ '[' }}"
    "{% for e in v %}{{ said(e) + (',' if not loop.last else '') }}{% endfor %}{{ ']' }}"
    "{% else %}{{ v | tojson }}{% endif %}{% endmacro %}"
)
PYTHON_VALUE = (
    "\"'\" + v.replace('\\\\', '\\\\\\\\').replace(\"'\", \"\\\\'\").replace('\n', '\\\\n') + \"'\" if v is string"
    " else (v | string if v is boolean or v is none else v | tojson)"
)


STYLES: dict[str, str] = {
    "Hermes": chat(
        "{{ '\n<tool_call>\n{\"name\": ' + ("
        + NAME
        + " | tojson) + ', \"arguments\": ' + "
        + JSON
        + " + '}\n</tool_call>' }}"
    ),
    "Llama 3": chat(
        '{{ \'{"name": "\' + ' + NAME + ' + \'", "parameters": \' + ' + JSON + " + '}' }}"
        "{% if m['tool_calls'] | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    ),
    "Mistral, a list": chat(
        '{{ \'{"name": "\' + ' + NAME + ' + \'", "arguments": \' + ' + JSON + " + ', \"id\": \"' + c['id'] + '\"}' }}"
        "{{ ', ' if not loop.last else '' }}",
        before="'[TOOL_CALLS] ['",
        behind="']'",
    ),
    "Mistral, named": chat("{{ '[TOOL_CALLS]' + " + NAME + " + '[ARGS]' + " + JSON + " }}"),
    "DeepSeek": chat(
        "{{ '<call>function<sep>' + " + NAME + " + '\n```json\n' + " + JSON + " + '\n```</call>' }}",
        before="'<calls>'",
        behind="'</calls>'",
    ),
    "GLM": chat(
        "{{ '\n<tool_call>' + "
        + NAME
        + " + '\n' }}"
        + values("'<arg_key>' + k + '</arg_key>\n<arg_value>' + (v if v is string else v | tojson) + '</arg_value>\n'")
        + "{{ '</tool_call>' }}"
    ),
    "Qwen 3.5": chat(
        "{{ '<tool_call>\n<function=' + "
        + NAME
        + " + '>\n' }}"
        + values("'<parameter=' + k + '>\n' + (v if v is string else v | tojson) + '\n</parameter>\n'")
        + "{{ '</function>\n</tool_call>' }}"
    ),
    "Gemma 4": GEMMA_VALUE
    + chat("{{ '<|call>call:' + " + NAME + " + '{' }}" + joined("k + ':' + said(v)", ",") + "{{ '}<call|>' }}"),
    "LFM2": chat(
        "{{ "
        + NAME
        + " + '(' }}"
        + joined("k + '=' + (" + PYTHON_VALUE + ")", ", ")
        + "{{ ')' + (', ' if not loop.last else '') }}",
        before="'<|tool_call_start|>['",
        behind="']<|tool_call_end|>'",
    ),
}


def form_of(tokenizer_of, text: str) -> AnswerForm:
    return template_of(tokenizer_of, text, "<|im_end|>").answer_form


def written(tokenizer_of, text: str, *calls: ToolCall) -> str:
    """What a model writes that calls them, up to the token that ends its turn."""
    template = template_of(tokenizer_of, text, "<|im_end|>")
    prompt, answer = (USER,), Message("assistant", "", calls=calls)
    rest = template.render((*prompt, answer), False)[len(template.render(prompt, True)) :]
    return rest[: rest.rindex("<|im_end|>")]


def read(grammar: CallGrammar, text: str) -> list[tuple[str, dict]] | None:
    found = read_calls(grammar, text[text.index(grammar.mark) :], SCHEMAS)
    return None if found is None or found[1] else [(call.name, call.arguments) for call in found[0]]


@pytest.mark.parametrize("style", STYLES)
def test_calls_are_read_as_they_are_written(tokenizer_of, style: str) -> None:
    grammar = form_of(tokenizer_of, STYLES[style]).calls
    assert grammar is not None
    for calls in (CALLS[:1], CALLS[1:], CALLS, (*CALLS, *CALLS)):
        if style != "Llama 3" or len(calls) == 1:
            text = written(tokenizer_of, STYLES[style], *calls)
            assert read(grammar, text) == [(call.name, call.arguments) for call in calls]
            if calls == CALLS[:1]:
                assert read(grammar, text[: len(text) * 3 // 4]) is None


@pytest.mark.parametrize(
    ("style", "text", "calls"),
    [
        ("Hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", {"a": 1})]),
        ("Hermes", '<tool_call> {"name":"f","arguments":"{\\"a\\": 1}"} </tool_call>\n', [("f", {"a": 1})]),
        ("Hermes", '<tool_call>\n{"name": "f"}\n</tool', [("f", {})]),  # it stopped within the end
        ("Hermes", '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>', None),
        ("Hermes", '<tool_call>\n{"name": "f", arguments: {}}\n</tool_call>', None),
        ("Hermes", '<tool_call>\n{"nam": "f"}\n</tool_call>', None),
        ("Llama 3", '{"name": "f", "arguments": {"a": null}}', [("f", {"a": None})]),
        ("Llama 3", '{"answer": 3}', None),
        ("DeepSeek", "<calls><call>function<sep>f\n```json\n{}\n```", [("f", {})]),
        ("DeepSeek", "<calls><call>function<sep>f\n{}\n```", None),
        ("Qwen 3.5", "<tool_call><function=weather><parameter=days>x</parameter></function></tool_call>",
         [("weather", {"days": "x"})]),
        ("GLM", "<tool_call>weather<arg_key>days</arg_key><arg_value>3", None),
        ("LFM2", "<|tool_call_start|>[f(a='it\\'s', b=[1, 'x'], c={\"k\": None}), g()]<|tool_call_end|>",
         [("f", {"a": "it's", "b": [1, "x"], "c": {"k": None}}), ("g", {})]),
        ("LFM2", "<|tool_call_start|>[f(a=True, b=-1.5e3)]", [("f", {"a": True, "b": -1500.0})]),
        ("LFM2", "<|tool_call_start|>[f(a='it's')]<|tool_call_end|>", None),
        ("LFM2", "<|tool_call_start|>[f(a=b)]<|tool_call_end|>", None),
        ("LFM2", "<|tool_call_start|>[f(1)]<|tool_call_end|>", None),
        ("LFM2", "<|tool_call_start|>[f(a=" + "[" * 99_999, None),
        ("Gemma 4", '<|call>call:f{a:<|"|>, b:{<|"|>,b:[true,{c:None}]}<call|>',
         [("f", {"a": ", b:{", "b": [True, {"c": None}]})]),
        ("Gemma 4", '<|call>call:f{"a": "x", b: 2}', [("f", {"a": "x", "b": 2})]),
        ("Gemma 4", '<|call>call:f{a:<|"|>x}<call|>', None),
        ("Gemma 4", "<|call>call:f{a:}<call|>", None),
    ],
)  # fmt: skip
def test_what_models_write_otherwise(tokenizer_of, style: str, text: str, calls: list | None) -> None:
    grammar = form_of(tokenizer_of, STYLES[style]).calls
    assert grammar is not None
    assert read(grammar, text) == calls


def test_thoughts_and_words_have_their_marks(tokenizer_of) -> None:
    thought = "('<think>\n' + m['reasoning_content'] + '\n</think>\n\n' if m['reasoning_content'] else '')"
    said = thought + " + (m['content'] or '')"
    assert form_of(tokenizer_of, chat("")).thought is None
    assert form_of(tokenizer_of, chat("", said=said)).thought == ("<think>", "</think>", False)
    assert form_of(tokenizer_of, chat("", said=said, prompt="'<think>\n'")).thought == ("<think>", "</think>", True)
    always = said.replace("else ''", "else '<think>\n\n</think>\n\n'")
    closed = form_of(tokenizer_of, chat("", said=always, prompt="'<think>\n\n</think>\n\n'"))
    assert closed.thought == ("<think>", "</think>", False)
    gone = chat("", prompt="'<think>\n'")  # thoughts of finished answers are taken away
    assert form_of(tokenizer_of, gone).thought == ("<think>", "</think>", True)
    empty = STYLES["Hermes"].replace("m['content'] or ''", "'<think>\n\n</think>\n\n' + (m['content'] or '')")
    assert form_of(tokenizer_of, empty).calls is not None
    assert form_of(tokenizer_of, chat("", said="'<|channel|>final' + (m['content'] or '')")).words == "<|channel|>final"


def test_calls_that_are_not_understood_have_no_form(tokenizer_of) -> None:
    python = chat("{{ " + NAME + " }}({% for k, v in c['function']['arguments'] | items %}{{ k }}={{ v }}{% endfor %})")
    quoted = chat("{{ '<call>' + " + NAME + " }}" + values("'<p=' + k + '>' + (v | tojson) + '</p>'") + "</call>")
    twice = chat("{{ '<c>' + " + NAME + " + '<c>' + " + NAME + " + " + JSON + " }}")
    for text in (chat(""), python, quoted, twice):
        assert form_of(tokenizer_of, text).calls is None
