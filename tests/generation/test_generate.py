"""Generation through packed weights against transformers' generation on the dequantised dense model."""

import copy

import pytest
import torch
from tiny import put_into_four_bits, tune
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nybble.data.examples import EncodedExample
from nybble.data.packing import pack
from nybble.errors import ConfigError, DataError
from nybble.formats.quant_spec import QuantSpec
from nybble.generation import decoding
from nybble.generation.decoding import CachedDecoder
from nybble.generation.generate import (
    MIN_TEMPERATURE,
    PENALTIES,
    RepetitionPenalty,
    Sampling,
    choose_tokens,
    generate,
)
from nybble.kernels import registry
from nybble.kernels.backends.cpp import library
from nybble.kernels.backends.reference.decode import OpByOp
from nybble.kernels.ops.decode import MAX_ROWS
from nybble.layers.backbone import FusedForward, why_not_forward
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, attach_adapters, enable_adapters, quantizable_linears, resolve_targets
from nybble.layers.lora import LoraLinear

VOCABULARY = 101
NF4 = QuantSpec()
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied, biased": LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama, one kv head, wide": LlamaConfig(**{**SMALL, "num_key_value_heads": 1}, head_dim=32),
    "llama3 rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "yarn rope": LlamaConfig(**SMALL, rope_parameters=YARN),
    "dynamic rope": LlamaConfig(
        **{**SMALL, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
    "mistral, window": MistralConfig(**SMALL, sliding_window=6),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2, window in one layer": Qwen2Config(
        **SMALL,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
}
ROOM = 16  # tokens of an answer: past every window, and past the positions that rotary angles were made for
PROMPTS = [[5, 17, 40, 3, 88, 21, 60], [9], [70, 2, 2, 31, 90, 14, 55, 6, 77, 41, 12, 8, 33]]


_MADE: dict[object, nn.Module] = {}


def four_bit_model(config, *how: object, **also: object) -> nn.Module:
    """A small model whose block linears are in four bits and whose answers depend on all of the prompt. Those that are
    alike are made once, and copied.
    """
    key = config.to_json_string(), how, *also.items()
    if key not in _MADE:
        _MADE[key] = _make(config, *how, **also)
    torch.manual_seed(0)
    return copy.deepcopy(_MADE[key])


def _make(
    config, dtype: torch.dtype = torch.float32, rank: int = 0, dropout: float = 0.1, spec: QuantSpec = NF4
) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
        else:
            nn.init.normal_(parameter, std=0.2)
    put_into_four_bits(model, spec, dtype)
    if rank:
        tune(model, rank=rank, dropout=dropout, seed=0)
    return model.eval()


def dense_twin(model: nn.Module) -> nn.Module:
    """The model with each four-bit weight written out, its adapter added where it is enabled."""
    twin = copy.deepcopy(model)
    for name in quantizable_linears(twin):
        layer = twin.get_submodule(name)
        base = layer.base if isinstance(layer, LoraLinear) else layer
        weight = base.dequantize()
        if isinstance(layer, LoraLinear) and layer.enabled:
            weight = weight + layer.scaling * (layer.lora_B @ layer.lora_A).detach()
        linear = nn.Linear(base.in_features, base.out_features, base.bias is not None)
        linear.weight, linear.bias = nn.Parameter(weight), base.bias
        twin.set_submodule(name, linear)
    return twin


def by_transformers(model: nn.Module, prompt: list[int], max_new_tokens: int, penalty: float = 1.0) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        repetition_penalty=penalty,
    )
    return out[0, len(prompt) :].tolist()


def expected_of(model: nn.Module) -> list[list[int]]:
    """What transformers says to each prompt on the model's weights written out."""
    twin = dense_twin(model)
    return [by_transformers(twin, prompt, ROOM) for prompt in PROMPTS]


def answers(
    model: nn.Module, prompts=PROMPTS, max_new_tokens: int = ROOM, stop_ids=(), on_token=None, **sampling
) -> list[list[int]]:
    """Continuations; `sampling` as `Sampling` takes it."""
    return generate(
        model,
        prompts,
        stop_ids=stop_ids,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(**sampling),
        on_token=on_token,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_the_dequantised_dense_model(name):
    model = four_bit_model(CONFIGS[name], rank=4)
    assert why_not_forward(model) is None
    twin = dense_twin(model)
    prompts = [prompt[:6] for prompt in PROMPTS] if name == "dynamic rope" else PROMPTS
    room = 10 if name == "dynamic rope" else ROOM  # its context is that of the small original
    expected = [by_transformers(twin, prompt, room) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) == len(prompts), "the answers must tell the prompts apart"
    assert answers(model, prompts, room) == expected, "batched, ragged"
    assert [answers(model, [prompt], room)[0] for prompt in prompts] == expected, "one by one"


def test_adapters_count_only_while_they_are_enabled():
    model = four_bit_model(CONFIGS["qwen3"], rank=4)
    tuned = answers(model)
    enable_adapters(model, False)
    base = answers(model)
    assert base == expected_of(model) and base != tuned
    enable_adapters(model, True)
    assert answers(model) == tuned


def test_adapters_on_some_layers_only():
    model = four_bit_model(CONFIGS["llama, tied, biased"])
    attach_adapters(model, resolve_targets(model, ["v_proj", "gate_proj"]), rank=4, alpha=8)
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.lora_B, std=0.3)
    assert answers(model) == expected_of(model)


@pytest.mark.parametrize("format", ["nf3", "nf2"])
def test_weights_in_fewer_bits(format):
    model = four_bit_model(CONFIGS["llama"], rank=4, spec=QuantSpec(format))
    assert answers(model) == expected_of(model)


def test_more_texts_than_the_matrix_vector_product_takes():
    model = four_bit_model(CONFIGS["mistral, window"], rank=4)
    prompts = [[(7 * i + 3 * j) % VOCABULARY for j in range(1 + i % 5)] for i in range(MAX_ROWS + 3)]
    twin = dense_twin(model)
    assert answers(model, prompts, 12) == [by_transformers(twin, prompt, 12) for prompt in prompts]


def test_logits_of_each_step_are_those_of_the_whole_text():
    model = four_bit_model(CONFIGS["qwen2, window in one layer"], rank=4)
    twin = dense_twin(model)
    decoder = CachedDecoder(model)
    texts = [list(prompt) for prompt in PROMPTS]
    logits = decoder.start(texts, 20)
    for step in range(20):
        for text, row in zip(texts, logits, strict=True):
            torch.testing.assert_close(row, twin(torch.tensor([text])).logits[0, -1], rtol=1e-4, atol=1e-4)
        tokens = (torch.arange(len(texts)) * 13 + step * 7) % VOCABULARY
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        logits = decoder.step(tokens)


def test_bf16_is_as_near_to_the_exact_logits_as_transformers_in_bf16():
    narrow = four_bit_model(CONFIGS["llama"], torch.bfloat16)
    narrow_twin = dense_twin(narrow)
    exact = dense_twin(narrow).float()
    text = PROMPTS[2] + PROMPTS[0]
    expected = exact(torch.tensor([text])).logits[0, len(PROMPTS[2]) - 1 : -1]
    theirs = narrow_twin(torch.tensor([text])).logits[0, len(PROMPTS[2]) - 1 : -1]
    decoder = CachedDecoder(narrow)
    ours = [decoder.start([PROMPTS[2]], len(PROMPTS[0]))]
    ours += [decoder.step(torch.tensor([token])) for token in PROMPTS[0][:-1]]
    error = (torch.cat(ours).float() - expected).norm() / expected.norm()
    assert error < 1.3 * (theirs.float() - expected).norm() / expected.norm() < 0.1


def test_the_plain_pytorch_kernels_give_the_same_tokens():
    model = four_bit_model(CONFIGS["llama"], rank=4)
    with registry.use("reference"):
        assert answers(model) == expected_of(model)


def test_the_cache_grows_by_doubling_up_to_what_was_asked_for(monkeypatch):
    model = four_bit_model(CONFIGS["llama"])
    expected = answers(model)
    monkeypatch.setattr(decoding, "FIRST_ROOM", 1)
    assert answers(model) == expected
    decoder = CachedDecoder(model)
    decoder.start([[1, 2, 3, 4]], 20)
    capacities = []
    for _ in range(20):
        decoder.step(torch.tensor([1]))
        capacities.append(decoder.cache.capacity)
    assert sorted(set(capacities)) == [5, 10, 20, 24]


def adapter_gradients(model: nn.Module) -> list[torch.Tensor]:
    """Of a loss through the decoder blocks, as training takes them."""
    model.zero_grad(set_to_none=True)
    causal_lm = CausalLM.of(model)
    assert isinstance(causal_lm.backbone, FusedForward)
    prompts = [torch.tensor(prompt, dtype=torch.int32) for prompt in (PROMPTS[0], PROMPTS[2])]
    rows = [EncodedExample(prompt, torch.ones(len(prompt), dtype=torch.bool), "row") for prompt in prompts]
    causal_lm.loss(pack(rows)).backward()
    return [parameter.grad.clone() for parameter in trained(model)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_answering_between_two_steps_changes_no_bit_of_the_second(dtype):
    steps = {}
    for answering in (False, True):
        model = four_bit_model(CONFIGS["qwen3"], dtype, rank=4, dropout=0.0).train()
        first = adapter_gradients(model)
        with torch.no_grad():
            for parameter, grad in zip(trained(model), first, strict=True):
                parameter -= 0.1 * grad
        if answering:
            answers(model)
        steps[answering] = [*first, *adapter_gradients(model)]
    assert any(grad.any() for grad in steps[False])
    assert all(torch.equal(a, b) for a, b in zip(steps[False], steps[True], strict=True))


@pytest.mark.skipif(library.why_unavailable() is not None, reason=str(library.why_unavailable()))
@pytest.mark.parametrize("rows", [1, 3, MAX_ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama, tied, biased", "mistral, window", "qwen2, window in one layer", "qwen3"])
def test_the_kernel_and_its_twin(name, dtype, rows):
    """One kernel for all layers, and op by op in plain PyTorch, on the same texts; in bf16 the kernel rounds less."""
    model = four_bit_model(CONFIGS[name], dtype, rank=4)
    prompts = [(PROMPTS * 3)[i][: 1 + i] for i in range(rows)]

    def logits(model: nn.Module, backend: str) -> torch.Tensor:
        with registry.use(backend):
            decoder = CachedDecoder(model)
            assert isinstance(decoder.few_rows, OpByOp) == (backend == "reference")
            decoder.start(prompts, 8)
            return torch.stack([decoder.step(torch.arange(rows) + 5 * i).float() for i in range(8)])

    exact = logits(copy.deepcopy(model).float(), "reference")
    twin, kernel = ((logits(model, backend) - exact).norm() / exact.norm() for backend in ("reference", "cpp"))
    assert kernel < (1e-5 if dtype == torch.float32 else 1.2 * twin)
    assert twin < 0.05


GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2)


@pytest.mark.parametrize("config", [CONFIGS["llama"], GPT2], ids=["llama", "gpt2"])
class TestBothWays:
    """What holds through the decoder blocks and through transformers alike."""

    def test_which_way_it_goes(self, config):
        assert (why_not_forward(four_bit_model(config)) is None) == (config.model_type == "llama")

    def test_ragged_prompts_are_answered_as_alone(self, config):
        model = four_bit_model(config)
        assert answers(model) == [answers(model, [prompt])[0] for prompt in PROMPTS]

    def test_an_answer_ends_before_its_stop_token_and_the_others_go_on(self, config):
        model = four_bit_model(config)
        full = answers(model)
        stops = (full[0][4], full[2][9])
        expected = [ids[: min((ids.index(stop) for stop in stops if stop in ids), default=None)] for ids in full]
        assert answers(model, stop_ids=stops) == expected and len({len(ids) for ids in expected}) > 1
        assert answers(model, PROMPTS[:1], stop_ids=(full[0][0],)) == [[]]

    def test_tokens_are_reported_as_they_come(self, config):
        model = four_bit_model(config)
        seen: list[tuple[int, int]] = []
        got = answers(model, on_token=lambda prompt, token: seen.append((prompt, token)))
        assert seen == [(prompt, ids[i]) for i in range(ROOM) for prompt, ids in enumerate(got)]
        seen.clear()
        got = answers(model, stop_ids=(got[2][5],), on_token=lambda prompt, token: seen.append((prompt, token)))
        assert [[token for i, token in seen if i == prompt] for prompt in range(len(PROMPTS))] == got

    def test_sampling_depends_on_the_seed_and_on_nothing_else(self, config):
        model = four_bit_model(config)
        first = answers(model, temperature=1.5, top_p=0.9, seed=3)
        torch.manual_seed(99)
        state = torch.get_rng_state()
        assert answers(model, temperature=1.5, top_p=0.9, seed=3) == first
        assert torch.equal(torch.get_rng_state(), state), "a seed leaves torch's own generator alone"
        assert answers(model, temperature=1.5, top_p=0.9, seed=4) != first
        assert answers(model, temperature=1.5) != answers(model, temperature=1.5), "without a seed, torch's goes on"

    def test_a_nucleus_of_next_to_nothing_is_greedy(self, config):
        model = four_bit_model(config)
        assert answers(model, temperature=1.0, top_p=1e-6) == answers(model)

    def test_tokens_less_likely_than_a_share_of_the_likeliest_are_left_out(self, config):
        model = four_bit_model(config)
        assert answers(model, temperature=1.0, min_p=0.99999) == answers(model)
        assert answers(model, temperature=1.5, min_p=0.3, seed=3) != answers(model, temperature=1.5, seed=3)

    def test_a_penalty_on_repetition_is_transformers_own(self, config):
        """Prompts of several lengths: what they are padded with is no part of the text."""
        model = four_bit_model(config)
        twin = dense_twin(model)
        for penalty in (1.7, 1e4):
            expected = [by_transformers(twin, prompt, ROOM, penalty) for prompt in PROMPTS]
            assert answers(model, repetition_penalty=penalty) == expected != answers(model)
            stop = expected[1][7]  # a text that ends early leaves the others theirs
            stopped = [ids[: ids.index(stop)] if stop in ids else ids for ids in expected]
            assert answers(model, repetition_penalty=penalty, stop_ids=(stop,)) == stopped

    def test_the_models_own_penalties_and_sampling_do_not_apply(self, config):
        model = four_bit_model(config)
        expected = answers(model)
        model.generation_config.repetition_penalty = 5.0
        model.generation_config.top_k = 1
        model.generation_config.min_p = 0.9999
        assert answers(model) == expected
        assert answers(model, temperature=2.0, seed=1) != expected

    @pytest.mark.parametrize(
        "own",
        [
            *({"num_beams": 3}, {"guidance_scale": 3.0}, {"max_time": 1e-6}, {"num_return_sequences": 2}),
            *({"stop_strings": ["a"]}, {"typical_p": 0.1}, {"forced_eos_token_id": 9}, {"min_new_tokens": 8}),
            {"suppress_tokens": list(range(VOCABULARY - 1))},
        ],
        ids=lambda own: next(iter(own)),
    )
    def test_nothing_of_the_models_own_generation_config_applies(self, config, own):
        model = four_bit_model(config)
        ways = ({}, {"temperature": 1.5, "seed": 3})
        expected = [answers(model, max_new_tokens=10, stop_ids=(5,), **way) for way in ways]
        for name, value in own.items():
            setattr(model.generation_config, name, value)
        assert [answers(model, max_new_tokens=10, stop_ids=(5,), **way) for way in ways] == expected
        assert all(getattr(model.generation_config, name) == value for name, value in own.items()), "it is given back"

    def test_the_context_ends_the_answer_and_a_full_one_is_refused(self, config):
        config = copy.deepcopy(config)
        config.max_position_embeddings = 20
        model = four_bit_model(config)
        assert [len(ids) for ids in answers(model, [[1] * 15])] == [5]
        for prompt in ([1] * 20, []):
            with pytest.raises(DataError, match=f"has {len(prompt)} tokens"):
                answers(model, [prompt])

    def test_training_mode_is_left_as_it_was(self, config):
        model = four_bit_model(config).train()
        answers(model, max_new_tokens=1)
        assert model.training

    def test_no_prompts_no_answers(self, config):
        assert answers(four_bit_model(config), []) == []


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_smallest_temperature_takes_the_likeliest_token_under_any_penalty(penalty):
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 1e3
    penalised = RepetitionPenalty([[0, 1, 2]] * 3, penalty)(logits)
    assert torch.equal(choose_tokens(penalised, Sampling(MIN_TEMPERATURE)), penalised.argmax(dim=-1))


@pytest.mark.parametrize(
    "option",
    [
        *({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}),
        *({"min_p": 1.0}, {"min_p": -0.1}, {"repetition_penalty": 0.0}),
        *({"temperature": 1e-300}, {"temperature": 1e-40}, {"repetition_penalty": 1e-300}),
        *({"repetition_penalty": 1e300}, {"temperature": float("nan")}, {"temperature": float("inf")}),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        answers(four_bit_model(CONFIGS["llama"]), **option)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"top_p": 0.8}, 3),
        ({"top_k": 2}, 2),
        ({"min_p": 0.5}, 3),
        ({"top_k": 4, "top_p": 0.85}, 3),
        ({"top_p": 0.9, "min_p": 0.6}, 3),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.97}, 1),
    ],
    ids=str,
)
def test_sampled_frequencies_are_those_of_transformers_warpers(options, left):
    """Of five tokens so many are left; what is in the text already counts less."""
    logits = torch.tensor([0.1, 0.35, 0.05, 0.3, 0.2]).log()[None] + 2.0
    text, temperature, penalty = torch.tensor([[1, 1, 4]]), 1.25, 1.3
    expected = RepetitionPenaltyLogitsProcessor(penalty)(text, logits) / temperature
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in options:
            expected = warper(options[name])(text, expected)
    expected = expected.softmax(-1)[0]
    assert int((expected > 0).sum()) == left
    sampling = Sampling(temperature, repetition_penalty=penalty, **options)
    penalised = RepetitionPenalty(text.tolist(), penalty)(logits)
    draws = choose_tokens(penalised.expand(40000, -1), sampling, torch.Generator().manual_seed(0))
    frequencies = torch.bincount(draws, minlength=5) / len(draws)
    assert torch.equal(frequencies == 0, expected == 0)
    torch.testing.assert_close(frequencies, expected, atol=0.01, rtol=0)


def test_few_likeliest_tokens():
    logits = torch.tensor([[0.0, 3.0, 2.0, 2.5]]).repeat(200, 1)
    assert set(choose_tokens(logits, Sampling(1.0, top_k=2)).tolist()) == {1, 3}
    assert set(choose_tokens(logits, Sampling(5.0)).tolist()) == {0, 1, 2, 3}
