"""Conversations typed into a fake terminal."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.cli.conversation import Conversation
from nybble.cli.render import Terminal
from nybble.data.examples import Message
from nybble.data.template import ChatTemplate
from nybble.errors import ConfigError
from nybble.evaluation import chat as chat_module
from nybble.evaluation.chat import load_chat
from nybble.generation.generate import generate
from nybble.generation.text_pieces import TextPieces
from nybble.layers.convert import adapters_of, attach_adapters, enable_adapters, resolve_targets
from nybble.options.option import build_options
from nybble.options.use_groups import ChatOptions
from nybble.options.verbs import ChatConfig
from nybble.quantization.synth import byte_tokenizer
from nybble.runs.open_run import LoadedModel

CONTEXT = 160


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    return LoadedModel(model, ChatTemplate(tokenizer))


class Typed:
    """A console, the lines that are typed into it, and the prompts that the model got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *typed: str | type[BaseException]):
        self.console = Console(file=io.StringIO(), width=100)
        self.prompts: list[list[int]] = []
        self.replies: list[list[int]] = []
        lines: Iterator[str | type[BaseException]] = iter(typed)

        def read() -> str:
            line = next(lines, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(chat_module, "generate", self.generate)

    def generate(self, model, prompts, **options):
        self.prompts += prompts
        self.replies += generate(model, prompts, **options)

    def talk(self, loaded: LoadedModel, options: ChatOptions) -> None:
        Conversation(loaded, options, Terminal(self.console)).hold()

    @property
    def shown(self) -> str:
        return self.console.file.getvalue()


def options(**given: object) -> ChatOptions:
    return ChatOptions(max_new_tokens=8, **given)


def test_a_conversation_goes_on_until_it_is_reset(monkeypatch, loaded):
    typed = Typed(monkeypatch, "Hello", "", "And now?", "/reset", "Again", "/quit", "never read")
    typed.talk(loaded, options())

    template, decode = loaded.template, loaded.template.tokenizer.decode
    first, second = (decode(ids, skip_special_tokens=True).strip() for ids in typed.replies[:2])
    talk = [Message("user", "Hello"), Message("assistant", first), Message("user", "And now?")]
    expected = [talk[:1], talk, [Message("user", "Again")]]
    assert typed.prompts == [template.encode_prompt(messages) for messages in expected]
    assert first and first in typed.shown and second in typed.shown
    assert "/reset" in typed.shown.splitlines()[0], "what can be typed is said first"


def test_the_end_of_input_leaves(monkeypatch, loaded):
    Typed(monkeypatch, "Hello").talk(loaded, options())


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is_of_it(monkeypatch, loaded):
    typed = Typed(monkeypatch, "Hello", "More")
    plain_add: Callable[[TextPieces, int], str] = TextPieces.add

    def add(self: TextPieces, token: int) -> str:
        text = plain_add(self, token)
        if len(typed.prompts) == 1 and len(self.ids) == 5:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(TextPieces, "add", add)
    typed.talk(loaded, options())
    (whole,) = generate(loaded.model, typed.prompts[:1], stop_ids=(), max_new_tokens=8)
    said = loaded.template.tokenizer.decode(whole[:5], skip_special_tokens=True).strip()
    talk = [Message("user", "Hello"), Message("assistant", said), Message("user", "More")]
    assert typed.prompts[1] == loaded.template.encode_prompt(talk)
    assert "[stopped]" in typed.shown


def test_ctrl_c_before_the_first_token_forgets_the_message(monkeypatch, loaded):
    typed = Typed(monkeypatch, "Hello", "More")
    plain_generate = typed.generate

    def interrupted(model, prompts, **given):
        if not typed.prompts:
            typed.prompts += prompts
            raise KeyboardInterrupt
        plain_generate(model, prompts, **given)

    monkeypatch.setattr(chat_module, "generate", interrupted)
    typed.talk(loaded, options())
    assert typed.prompts[1] == loaded.template.encode_prompt([Message("user", "More")])


def test_ctrl_c_at_the_prompt_says_how_to_leave(monkeypatch, loaded):
    typed = Typed(monkeypatch, KeyboardInterrupt, "/quit")
    typed.talk(loaded, options())
    assert typed.shown.count("/quit") == 2


def test_a_message_beyond_the_context_is_refused_and_the_chat_goes_on(monkeypatch, loaded):
    typed = Typed(monkeypatch, "Hello", "x" * CONTEXT, "And now?")
    typed.talk(loaded, options())
    assert f"Allowed: 1 to {CONTEXT - 1}" in typed.shown and "left out" in typed.shown
    assert "xxx" not in loaded.template.tokenizer.decode(typed.prompts[2])
    assert "Hello" in loaded.template.tokenizer.decode(typed.prompts[2])


def test_an_answer_that_fills_the_context_says_so(monkeypatch, loaded):
    room = 4
    empty = len(loaded.template.encode_prompt([Message("user", "")]))
    monkeypatch.setattr(loaded.template, "stop_ids", ())
    typed = Typed(monkeypatch, "x" * (CONTEXT - room - empty))
    typed.talk(loaded, options())
    assert len(typed.replies[0]) == room and "context" in typed.shown


def test_one_prompt_is_answered_and_the_seed_decides(monkeypatch, loaded):
    monkeypatch.setattr(chat_module, "load_run", lambda *arguments: loaded)
    shown = []
    for seed in (1, 1, 2):
        typed = Typed(monkeypatch)
        config = build_options(ChatConfig, {"run": "run", "max_new_tokens": 8, "temperature": 2.0, "seed": seed})
        Conversation(load_chat(config), config.answers, Terminal(typed.console)).ask("Hello")
        shown.append(typed.shown)
    assert shown[0] == shown[1] != shown[2]


def test_the_base_answers_beside_the_tuned_model(monkeypatch, loaded):
    loaded = LoadedModel(copy.deepcopy(loaded.model), loaded.template)
    attach_adapters(loaded.model, resolve_targets(loaded.model, "all-linear"), rank=2, alpha=8.0)
    for adapter in adapters_of(loaded.model).values():
        torch.nn.init.normal_(adapter.lora_B)
    typed = Typed(monkeypatch, "/base", "Hello", "/base", "More")
    typed.talk(loaded, options())
    asked = [loaded.template.encode_prompt([Message("user", "Hello")])] * 2
    assert typed.prompts[:2] == asked and len(typed.prompts) == 3
    enable_adapters(loaded.model, False)
    base = generate(loaded.model, asked[:1], stop_ids=loaded.template.stop_ids, max_new_tokens=8)[0]
    enable_adapters(loaded.model, True)
    tuned = generate(loaded.model, asked[:1], stop_ids=loaded.template.stop_ids, max_new_tokens=8)[0]
    assert typed.replies[:2] == [base, tuned] and base != tuned
    said = loaded.template.tokenizer.decode(tuned, skip_special_tokens=True).strip()
    assert said in loaded.template.tokenizer.decode(typed.prompts[2]), "only the tuned answer is part of the talk"


def test_models_without_adapters_have_no_base_to_show(monkeypatch, loaded):
    typed = Typed(monkeypatch, "/base", "Hello")
    typed.talk(loaded, options())
    assert "no adapter" in typed.shown and len(typed.prompts) == 1


def test_a_system_message_opens_every_conversation(monkeypatch, loaded):
    typed = Typed(monkeypatch, "Hello", "/reset", "Hello")
    typed.talk(loaded, options(system="Be brief."))
    opened = loaded.template.encode_prompt([Message("system", "Be brief."), Message("user", "Hello")])
    assert typed.prompts == [opened, opened]


@pytest.mark.parametrize("given", [{}, {"run": "r", "model": "m"}])
def test_a_run_or_a_model_is_given(given):
    with pytest.raises(ConfigError, match="run"):
        build_options(ChatConfig, given)
