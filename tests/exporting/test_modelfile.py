"""Ollama's Modelfile: a layout that renders as the chat template does, or none."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nybble.data.examples import Message
from nybble.data.template import ChatTemplate
from nybble.exporting.modelfile import find_layout, modelfile

SMOLLM = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}"


def template(tiny_model: Path, text: str | None) -> ChatTemplate:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize("text", [SMOLLM, None])
def test_a_layout_renders_as_the_template(tiny_model: Path, text: str | None) -> None:
    made = template(tiny_model, text)
    layout = find_layout(made)
    assert layout is not None
    for roles in (
        ("user",),
        ("system", "user"),
        ("user", "assistant", "user"),
        ("system", "user", "assistant", "user"),
    ):
        messages = [Message(role, f"says {role}\n{number}") for number, role in enumerate(roles)]
        assert layout.render(messages) == made.render(messages, True)


def test_the_go_template_of_chatml(tiny_model: Path) -> None:
    made = template(tiny_model, SMOLLM)
    text = modelfile("./model.gguf", made)
    assert text == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nBe kind<|im_end|>\n{{ end }}'
        "{{ range .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ end }}'
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n{{ end }}'
        '{{ if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\n'
    )


def test_what_the_go_template_lacks_is_said(tiny_model: Path) -> None:
    calls = "{% for c in m['tool_calls'] or [] %}{{ c | tojson }}{% endfor %}"
    made = template(tiny_model, SMOLLM.replace("{% endfor %}", calls + "{% endfor %}"))
    said = "# TEMPLATE lays out plain turns: tools and their calls are not in it.\n"
    assert said in modelfile("./model.gguf", made)
    assert said not in modelfile("./model.gguf", template(tiny_model, SMOLLM))


def test_a_system_turn_that_the_template_refuses_opens_the_users(tiny_model: Path) -> None:
    made = template(tiny_model, NO_SYSTEM)
    layout = find_layout(made)
    assert layout is not None and layout.folded
    assert layout.system == ("[INST] ", "\n\n") and layout.user == ("[INST] ", " [/INST]")
    assert made.render([Message("system", "s"), Message("user", "u")], True) == "[INST] s\n\nu [/INST]"
    assert layout.go_template() == (
        "{{ $opened := false }}{{ range .Messages }}"
        '{{ if eq .Role "system" }}[INST] {{ .Content }}\n\n{{ $opened = true }}{{ end }}'
        '{{ if eq .Role "user" }}{{ if not $opened }}[INST] {{ end }}{{ $opened = false }}'
        "{{ .Content }} [/INST]{{ end }}"
        '{{ if eq .Role "assistant" }} {{ .Content }}<|im_end|>{{ end }}{{ end }}'
    )


def test_a_system_turn_that_the_template_leaves_out_stays_out(tiny_model: Path) -> None:
    silent = NO_SYSTEM.replace("for m in messages", "for m in messages if m.role != 'system'")
    layout = find_layout(template(tiny_model, silent))
    assert layout is not None and layout.system is None and layout.user == ("[INST] ", " [/INST]")


def test_templates_that_fixed_pieces_cannot_say(tiny_model: Path) -> None:
    made = template(tiny_model, NUMBERED)
    assert find_layout(made) is None
    assert "TEMPLATE by hand" in modelfile("base.gguf", made, "./adapter.gguf")
    assert "ADAPTER ./adapter.gguf" in modelfile("base.gguf", made, "./adapter.gguf")
