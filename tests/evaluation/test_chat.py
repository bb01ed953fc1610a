"""Conversations typed into a fake terminal, and text that streams whole characters only."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nybble.data.examples import Message
from nybble.data.template import ChatTemplate
from nybble.errors import ConfigError
from nybble.evaluation import chat as chat_module
from nybble.evaluation.chat import TextPieces, chat, converse
from nybble.generation.generate import Sampling, choose_tokens, generate
from nybble.layers.convert import adapters_of, attach_adapters, enable_adapters, resolve_targets
from nybble.options.option import build_options
from nybble.options.verbs import ChatConfig
from nybble.runs.open_run import LoadedModel

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "Déjà vu: 日本語, 🙂👍🏽 and  two spaces.\nA new line\t(tab)"
CONTEXT = 160


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, so that most characters beyond ASCII take several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their space before them, bytes for what is unknown, as Llama 2 has them."""
    words = [*"▁ :,().", "▁vu", "▁and", "▁two", "▁spaces", "▁new", "▁line", "▁A", "tab"]
    vocabulary = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", *words]
    tokenizer = Tokenizer(
        models.Unigram([(token, -float(len(vocabulary) - i)) for i, token in enumerate(vocabulary)], 256, True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, sentencepiece_tokenizer])
def test_pieces_are_the_text_and_never_half_a_character(make_tokenizer):
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = TextPieces(tokenizer)
    shown = [pieces.add(token) for token in ids]
    assert "".join(shown) == tokenizer.decode(ids) and "日本語" in "".join(shown)
    assert "\ufffd" not in "".join(shown) and pieces.rest() == ""
    assert len([piece for piece in shown if piece]) > 20 and "" in shown, "as they come, but for unfinished ones"


def test_an_unfinished_character_is_shown_only_at_the_end():
    tokenizer = byte_tokenizer()
    pieces = TextPieces(tokenizer)
    ids = tokenizer.encode("ok 🙂", add_special_tokens=False)[:-1]
    assert "".join(pieces.add(token) for token in ids) == "ok "
    assert pieces.rest() == "\ufffd" and pieces.rest() == ""


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


class Terminal:
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

    @property
    def shown(self) -> str:
        return self.console.file.getvalue()


def options(**given: object) -> ChatConfig:
    return ChatConfig(run="run", max_new_tokens=8, **given)


def test_a_conversation_goes_on_until_it_is_reset(monkeypatch, loaded):
    terminal = Terminal(monkeypatch, "Hello", "", "And now?", "/reset", "Again", "/quit", "never read")
    assert converse(loaded, options(), terminal.console) == 0

    template, decode = loaded.template, loaded.template.tokenizer.decode
    first, second = (decode(ids, skip_special_tokens=True).strip() for ids in terminal.replies[:2])
    talk = [Message("user", "Hello"), Message("assistant", first), Message("user", "And now?")]
    expected = [talk[:1], talk, [Message("user", "Again")]]
    assert terminal.prompts == [template.encode_prompt(messages) for messages in expected]
    assert first and first in terminal.shown and second in terminal.shown
    assert "/reset" in terminal.shown.splitlines()[0], "what can be typed is said first"


def test_the_end_of_input_leaves(monkeypatch, loaded):
    assert converse(loaded, options(), Terminal(monkeypatch, "Hello").console) == 0


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is_of_it(monkeypatch, loaded):
    terminal = Terminal(monkeypatch, "Hello", "More")
    plain_add: Callable[[TextPieces, int], str] = TextPieces.add

    def add(self: TextPieces, token: int) -> str:
        text = plain_add(self, token)
        if len(terminal.prompts) == 1 and len(self.ids) == 5:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(TextPieces, "add", add)
    assert converse(loaded, options(), terminal.console) == 0
    (whole,) = generate(loaded.model, terminal.prompts[:1], stop_ids=(), max_new_tokens=8)
    said = loaded.template.tokenizer.decode(whole[:5], skip_special_tokens=True).strip()
    talk = [Message("user", "Hello"), Message("assistant", said), Message("user", "More")]
    assert terminal.prompts[1] == loaded.template.encode_prompt(talk)
    assert "[stopped]" in terminal.shown


def test_ctrl_c_before_the_first_token_forgets_the_message(monkeypatch, loaded):
    terminal = Terminal(monkeypatch, "Hello", "More")
    plain_generate = terminal.generate

    def interrupted(model, prompts, **given):
        if not terminal.prompts:
            terminal.prompts += prompts
            raise KeyboardInterrupt
        plain_generate(model, prompts, **given)

    monkeypatch.setattr(chat_module, "generate", interrupted)
    assert converse(loaded, options(), terminal.console) == 0
    assert terminal.prompts[1] == loaded.template.encode_prompt([Message("user", "More")])


def test_ctrl_c_at_the_prompt_says_how_to_leave(monkeypatch, loaded):
    terminal = Terminal(monkeypatch, KeyboardInterrupt, "/quit")
    assert converse(loaded, options(), terminal.console) == 0
    assert terminal.shown.count("/quit") == 2


def test_a_message_beyond_the_context_is_refused_and_the_chat_goes_on(monkeypatch, loaded):
    terminal = Terminal(monkeypatch, "Hello", "x" * CONTEXT, "And now?")
    assert converse(loaded, options(), terminal.console) == 0
    assert f"Allowed: 1 to {CONTEXT - 1}" in terminal.shown and "left out" in terminal.shown
    assert "xxx" not in loaded.template.tokenizer.decode(terminal.prompts[2])
    assert "Hello" in loaded.template.tokenizer.decode(terminal.prompts[2])


def test_an_answer_that_fills_the_context_says_so(monkeypatch, loaded):
    room = 4
    empty = len(loaded.template.encode_prompt([Message("user", "")]))
    monkeypatch.setattr(loaded.template, "stop_ids", ())
    terminal = Terminal(monkeypatch, "x" * (CONTEXT - room - empty))
    assert converse(loaded, options(), terminal.console) == 0
    assert len(terminal.replies[0]) == room and "context" in terminal.shown


def test_one_prompt_is_answered_and_the_seed_decides(monkeypatch, loaded):
    monkeypatch.setattr(chat_module, "load_run", lambda *arguments: loaded)
    shown = []
    for seed in (1, 1, 2):
        terminal = Terminal(monkeypatch)
        assert chat(options(prompt="Hello", temperature=2.0, seed=seed), terminal.console) == 0
        shown.append(terminal.shown)
    assert shown[0] == shown[1] != shown[2]


def test_the_base_answers_beside_the_tuned_model(monkeypatch, loaded):
    loaded = LoadedModel(copy.deepcopy(loaded.model), loaded.template)
    attach_adapters(loaded.model, resolve_targets(loaded.model, "all-linear"), rank=2, alpha=8.0)
    for adapter in adapters_of(loaded.model).values():
        torch.nn.init.normal_(adapter.lora_B)
    terminal = Terminal(monkeypatch, "/base", "Hello", "/base", "More")
    assert converse(loaded, options(), terminal.console) == 0
    asked = [loaded.template.encode_prompt([Message("user", "Hello")])] * 2
    assert terminal.prompts[:2] == asked and len(terminal.prompts) == 3
    enable_adapters(loaded.model, False)
    base = generate(loaded.model, asked[:1], stop_ids=loaded.template.stop_ids, max_new_tokens=8)[0]
    enable_adapters(loaded.model, True)
    tuned = generate(loaded.model, asked[:1], stop_ids=loaded.template.stop_ids, max_new_tokens=8)[0]
    assert terminal.replies[:2] == [base, tuned] and base != tuned
    said = loaded.template.tokenizer.decode(tuned, skip_special_tokens=True).strip()
    assert said in loaded.template.tokenizer.decode(terminal.prompts[2]), "only the tuned answer is part of the talk"


def test_models_without_adapters_have_no_base_to_show(monkeypatch, loaded):
    terminal = Terminal(monkeypatch, "/base", "Hello")
    assert converse(loaded, options(), terminal.console) == 0
    assert "no adapter" in terminal.shown and len(terminal.prompts) == 1


def test_a_system_message_opens_every_conversation(monkeypatch, loaded):
    terminal = Terminal(monkeypatch, "Hello", "/reset", "Hello")
    assert converse(loaded, options(system="Be brief."), terminal.console) == 0
    opened = loaded.template.encode_prompt([Message("system", "Be brief."), Message("user", "Hello")])
    assert terminal.prompts == [opened, opened]


@pytest.mark.parametrize("given", [{}, {"run": "r", "model": "m"}])
def test_a_run_or_a_model_is_given(given):
    with pytest.raises(ConfigError, match="run"):
        build_options(ChatConfig, given)


def test_few_likeliest_tokens():
    logits = torch.tensor([[0.0, 3.0, 2.0, 2.5]]).repeat(200, 1)
    assert set(choose_tokens(logits, Sampling(1.0, top_k=2)).tolist()) == {1, 3}
    assert set(choose_tokens(logits, Sampling(5.0)).tolist()) == {0, 1, 2, 3}
