"""Readers of untrusted bytes, fuzzed: whatever the bytes are, the outcome is a value or a message for the user.

NYBBLE_FUZZ sets how many examples each test draws; `make drills` draws many more than the default suite.
"""

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.data.examples import Example
from nybble.data.readers import read_examples
from nybble.data.template import ChatTemplate
from nybble.errors import NybbleError
from nybble.formats.gguf import GgufFile
from nybble.formats.safetensors import SafetensorsFolder

sys.path.insert(0, str(Path(__file__).parent))

from bad_gguf import ARRAY, LLAMA, STRING, U32, gguf_bytes, gguf_pair, gguf_string, gguf_tensor

EXAMPLES = int(os.environ.get("NYBBLE_FUZZ", "60"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)
SIZES = st.sampled_from([0, 1, 2, 4, 8, 64, -1, 2**31, 2**63, 2**64, 1.5, "4", None, True])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F8_E4M3", "X", None, 3]),
        "shape": st.lists(SIZES, max_size=3) | JSON,
        "data_offsets": st.lists(SIZES, max_size=3) | JSON,
    },
)


def value_or_message(read: Callable[[], object]) -> None:
    try:
        read()
    except NybbleError as error:
        assert str(error)


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a few bytes replaced, inserted or cut."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        width = draw(st.integers(0, 8))
        changed[place : place + width] = draw(st.binary(max_size=8))
    return bytes(changed)


@fuzzed
@given(
    header=st.dictionaries(st.text(max_size=6), ENTRY | JSON, max_size=3) | JSON,
    length=st.none() | st.integers(0, 2**64 - 1),
    data=st.binary(max_size=64),
)
def test_safetensors_headers(tmp_path, header, length, data):
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    def read() -> None:
        stored = SafetensorsFolder(path)
        for name, entry in stored.entries.items():
            assert stored.read(name).shape == entry.shape

    value_or_message(read)


@fuzzed
@given(st.data())
def test_gguf_headers(tmp_path, data):
    pairs = [
        LLAMA,
        gguf_pair(b"llama.block_count", U32, struct.pack("<I", 1)),
        gguf_pair(b"x", ARRAY, struct.pack("<IQ", STRING, 2) + gguf_string(b"ab") + gguf_string(b"c")),
        gguf_pair(b"general.alignment", U32, struct.pack("<I", 32)),
    ]
    good = gguf_bytes(pairs, [gguf_tensor(b"a", [32, 4]), gguf_tensor(b"b", [32, 2], 2, 512)])
    path = tmp_path / "m.gguf"
    path.write_bytes(data.draw(mutated(good[:-4096])) + good[-4096:])

    def read() -> None:
        stored = GgufFile(path)
        for name in stored.entries:
            stored.read(name)

    value_or_message(read)


@fuzzed
@given(st.data())
def test_rows_of_json(tmp_path, data):
    row = {"messages": [{"role": "user", "content": "a \U0001f600"}, {"role": "assistant", "content": "b"}]}
    good = [json.dumps(row).encode(), b'{"prompt": "a", "completion": "\\u00e9"}', b'{"text": "a"}']
    lines = data.draw(
        st.lists(
            st.sampled_from(good).flatmap(mutated) | st.binary(max_size=40) | JSON.map(lambda v: json.dumps(v).encode())
        )
    )
    suffix = data.draw(st.sampled_from([".jsonl", ".json", ".csv"]))
    path = tmp_path / f"r{suffix}"
    path.write_bytes(b"\n".join(lines))
    value_or_message(lambda: read_examples(str(path)))


FRAGMENTS = st.sampled_from(
    [
        *("{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{% if m %}", "{% endif %}"),
        *(
            "{{ messages[0] }}",
            "{{ messages[9].content }}",
            "{% set x = m.content * 1000 %}",
            "{{ x + x }}",
            "{% else %}",
        ),
        *(
            "{{ eos_token }}",
            "{% generation %}",
            "{% endgeneration %}",
            "{{ 1 / 0 }}",
            "{{ [] | first }}",
            "{{ x.y.z }}",
        ),
        *(
            "{{ raise_exception('x') }}",
            "{% macro f() %}",
            "{% endmacro %}",
            "{{ f() }}",
            "<|im_start|>",
            "<|im_end|>\n",
        ),
        *("{{ messages | tojson }}", "{{ ''.__class__ }}", "{% if add_generation_prompt %}", "assistant\n", "{#", "#}"),
        *("{{ range(99999) | list | length }}", "{{ m.content.split('a')[1] }}", "{{ m.content | trim }}", "{{", "%}"),
    ]
)


@fuzzed
@given(template=st.lists(FRAGMENTS | st.text(max_size=5), max_size=12).map("".join))
def test_chat_templates(tokenizer, template):
    tokenizer.chat_template = template or " "

    def use() -> None:
        chat = ChatTemplate(tokenizer)
        (row,) = chat.encode_example(Example("r:1", prompt="Say a", completion="b"))
        assert row.supervised_tokens
        chat.encode_prompt(Example("r:1", prompt="Say a", completion="b").conversation()[:1])

    value_or_message(use)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)
