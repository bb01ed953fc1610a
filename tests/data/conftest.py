"""Small real tokenizers with chat templates of the styles found in the wild."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What is the capital of France? Paris is the capital of France.\n\nThe answer is:\n\n\n    return x\n",
    "assistant\n\nuser\nsystem\n### User:\nhello there, general. You're welcome!\n\n",
    "<think>\n\n</think>\n\n[INST] question [/INST] answer",
] * 20

# The end-of-turn text of each style, and its template, each in a common published manner.
TEMPLATES = {
    "chatml": (
        "<|im_end|>",
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "llama2": (
        "</s>",
        "{% if messages[0]['role'] == 'system' %}"
        "{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set head = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (head if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    ),
    "llama3": (
        "<|eot_id|>",
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
        "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "mistral": (
        "</s>",
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}",
    ),
    "gemma": (
        "<end_of_turn>",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
        "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    # The last answer gets an (empty) thinking block, earlier ones lose theirs.
    "qwen3": (
        "<|im_end|>",
        "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
        "{% set thought = c.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in c else '' %}"
        "{% set said = c.split('</think>')[-1].lstrip('\n') %}"
        "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
        "{{ said + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    # Closes the conversation with a second special token behind the end of the turn.
    "phi3": (
        "<|end|>",
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ),
    # {% generation %} around the words only: the end of the turn is forgotten.
    "generation": (
        "<|im_end|>",
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    # {% generation %} begins behind a forced beginning of the answer.
    "forced": (
        "<|im_end|>",
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{{ 'The\n' }}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
}
SPECIALS = [
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(
    kind: str = "bytes", template: str | None = None, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """kind: "bytes" (GPT-2's split), "cl100k" (Llama-3's), "newlines" (no split, merges reach across anything),
    "metaspace" or "legacy" (SentencePiece manner: a space is put before the text, or before every piece between
    special tokens)."""
    byte_level = kind in ("bytes", "cl100k", "newlines")
    tokenizer = Tokenizer(models.BPE(byte_fallback=not byte_level))
    if byte_level:
        split = [pre_tokenizers.Split(Regex(CL100K), "isolated")] if kind == "cl100k" else []
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bytes")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else ["▁", "\n"],
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIALS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "metaspace":  # like SentencePiece: merges are learnt within words, and applied to the whole text
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind == "legacy":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    eos = {
        "chatml": "<|im_end|>",
        "qwen3": "<|im_end|>",
        "generation": "<|im_end|>",
        "forced": "<|im_end|>",
        "phi3": "<|endoftext|>",
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos.get(template or "", "</s>"),
        pad_token="<|endoftext|>",
    )
    if template:
        fast.chat_template = TEMPLATES[template][1]
    return fast


@pytest.fixture(scope="session")
def tokenizer_of():
    """tokenizer_of(kind, template, adds_bos), built once each."""
    built: dict = {}

    def get(kind: str = "bytes", template: str | None = None, adds_bos: bool = False) -> PreTrainedTokenizerFast:
        key = (kind, template, adds_bos)
        if key not in built:
            built[key] = build_tokenizer(*key)
        return built[key]

    return get


@pytest.fixture(scope="session")
def end_of_turn() -> dict[str, str]:
    return {style: end for style, (end, _) in TEMPLATES.items()}
