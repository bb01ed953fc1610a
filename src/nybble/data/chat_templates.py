"""Chat templates of our own writing, a user's template file, and what a template needs to take system turns."""

from dataclasses import dataclass
from pathlib import Path

from nybble.data.text_encoder import TextEncoder
from nybble.errors import ConfigError

MAX_TEMPLATE_BYTES = 1_000_000


@dataclass(frozen=True)
class NamedTemplate:
    """The layout of a family, reduced to plain turns: every turn's words stand in it whole.

    Args:
        turn: Jinja expression of a message m.
        prompt: Jinja expression of what an answer follows.
        marks: special tokens that it spells and a tokenizer must have.
    """

    turn: str
    prompt: str
    marks: tuple[str, ...] = ()

    def jinja(self, bos: bool) -> str:
        """The template, with the beginning of a sequence before the first turn where `bos` is set."""
        head = "{{ bos_token }}" if bos else ""
        turns = f"{{% for m in messages %}}{{{{ {self.turn} }}}}{{% endfor %}}"
        return f"{head}{turns}{{% if add_generation_prompt %}}{{{{ {self.prompt} }}}}{{% endif %}}"


TEMPLATES = {
    # Headings that any vocabulary can spell; the only special token is the one that ends an answer.
    "plain": NamedTemplate(
        r"'### ' + m['role'] | capitalize + ':\n' + m['content']"
        r" + (eos_token + '\n' if m['role'] == 'assistant' else '\n\n')",
        r"'### Assistant:\n'",
    ),
    "chatml": NamedTemplate(
        r"'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'",
        r"'<|im_start|>assistant\n'",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": NamedTemplate(
        r"'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>'",
        r"'<|start_header_id|>assistant<|end_header_id|>\n\n'",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": NamedTemplate(
        r"'<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content']"
        r" + '<end_of_turn>\n'",
        r"'<start_of_turn>model\n'",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi": NamedTemplate(
        r"'<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n'",
        r"'<|assistant|>\n'",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    # R1's marks; the thinking stays in the answer, and the model opens it itself.
    "deepseek": NamedTemplate(
        "m['content'] if m['role'] == 'system' else '<｜User｜>' + m['content'] if m['role'] == 'user'"
        " else '<｜Assistant｜>' + m['content'] + eos_token",
        "'<｜Assistant｜>'",
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
}

# Put before a template that takes no system turn: what the system says goes before the next user's words.
FOLD_SYSTEM = (
    "{%- set fold = namespace(turns=[], system='') -%}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{%- set fold.system = fold.system + m['content'] + '\\n\\n' -%}"
    "{%- elif m['role'] == 'user' and fold.system -%}"
    "{%- set fold.turns = fold.turns + [{'role': 'user', 'content': fold.system + m['content']}] -%}"
    "{%- set fold.system = '' -%}"
    "{%- else -%}{%- set fold.turns = fold.turns + [m] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = fold.turns %}\n"  # Jinja drops this newline, and the template's own first line begins one
)


def find_template(name: str, encoder: TextEncoder) -> str:
    """The Jinja text of a template's name or file.

    Args:
        encoder: of the tokenizer, which must know the marks of a named template.

    Raises:
        ConfigError: there is neither such a name nor such a file, it cannot be read, or marks are missing.
    """
    if name in TEMPLATES:
        missing = [mark for mark in TEMPLATES[name].marks if mark not in encoder.special_tokens]
        if missing:
            raise ConfigError(
                f"chat-template: {name} needs special tokens that the tokenizer does not have: {', '.join(missing)}.",
                "Allowed: a template whose marks the tokenizer knows; plain needs none.",
                "Use --chat-template plain, or a Jinja file with the tokenizer's own marks.",
            )
        return TEMPLATES[name].jinja(bos=encoder.leading_bos is not None)
    path = Path(name).expanduser()
    allowed = f"Allowed: a Jinja file, or one of {', '.join(TEMPLATES)}."
    if not path.is_file():
        fix = f"Looked in {path.parent.resolve()}. For bare strings without a template: --template none."
        raise ConfigError(f"chat-template: {name!r} is neither a file nor a template's name.", allowed, fix)
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ConfigError(f"chat-template: {path} has more than {MAX_TEMPLATE_BYTES:,} bytes.", allowed)
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat-template: {path} cannot be read: {error}.", allowed) from error
