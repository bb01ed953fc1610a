"""Projections as one product each way, against the formula in fp64 and against the projections of several products."""

import pytest
import torch
from tiny import SMALL, put_into_four_bits, tune
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from nybble.data.packing import pack_tokens
from nybble.errors import KernelError
from nybble.formats.quant_spec import QuantSpec
from nybble.kernels.ops.four_bit import augmented_weight_, dequantize, quantize
from nybble.layers import augmented
from nybble.layers.augmented import AugmentedProjection, projection_on
from nybble.layers.backbone import FusedForward
from nybble.layers.lora import LoraLinear
from nybble.layers.projection import DenseWeights, Projection
from nybble.layers.quantized_linear import QuantizedLinear

# Widths are whole tiles, all outputs together: with AMX oneDNN multiplies what lies beside other matrices with zeros,
# in bf16, and finds the NaN there. Such devices take the projections of several products, beside which nothing is NaN.
TOKENS, IN = 29, 64
OUTS = (40, 24, 32)
KINDS = {  # (rank, bias, in 16 bits) of each linear
    "odd ranks": ((3, False, False), (5, False, False), (1, False, False)),
    "wide ranks": ((70, False, False), (2, False, False), (3, False, False)),
    "no adapters": ((0, False, False), (0, True, False), (0, False, False)),
    "biases": ((3, True, False), (5, True, False), (7, True, False)),
    "some adapters, one bias, one dense": ((0, True, False), (5, False, True), (3, False, False)),
    "one linear": ((3, True, False),),
}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 4, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16}
MODELS = {"llama": LlamaConfig(**SMALL), "qwen2": Qwen2Config(**SMALL), "gemma2": Gemma2Config(**SMALL, **GEMMA)}


def linear(out_features: int, rank: int, bias: bool, dense: bool, dtype: torch.dtype) -> nn.Module:
    base: nn.Module
    if dense:
        base = nn.Linear(IN, out_features, bias=bias, dtype=dtype).requires_grad_(False)
    else:
        base = QuantizedLinear(IN, out_features, bias, QuantSpec(), dtype)
        base.load_quantized(quantize(torch.randn(out_features, IN), QuantSpec()))
    if bias:
        base.bias.data = torch.randn(out_features).to(dtype)
    if not rank:
        return base
    adapter = LoraLinear(base, rank, alpha=2.0 * rank)
    nn.init.normal_(adapter.lora_B)
    return adapter


def exact(modules: list[nn.Module], x: Tensor, residual: Tensor | None, grad: Tensor) -> list[Tensor]:
    """y, dx and the gradients of the adapters, in fp64, by autograd."""
    x = x.double().requires_grad_()
    y, parameters = [], []
    for module in modules:
        base = module.base if isinstance(module, LoraLinear) else module
        weight = dequantize(base.quantized(), base.compute_dtype) if isinstance(base, QuantizedLinear) else base.weight
        part = x @ weight.double().T
        part = part if base.bias is None else part + base.bias.double()
        if isinstance(module, LoraLinear):
            a, b = (p.detach().double().requires_grad_() for p in (module.lora_A, module.lora_B))
            part = part + module.scaling * (x @ a.T @ b.T)
            parameters += [a, b]
        y.append(part)
    whole = torch.cat(y, 1) if residual is None else residual.double() + torch.cat(y, 1)
    return [whole.detach(), *torch.autograd.grad(whole, [x, *parameters], grad.double())]


def computed(projection: Projection, x: Tensor, residual: Tensor | None, grad: Tensor) -> list[Tensor]:
    """The same by a projection whose rows are filled with NaN where it has room of its own."""
    rows = torch.full((len(x), projection.in_width), torch.nan, dtype=x.dtype)
    rows[:, :IN] = x
    z = projection.low_rank(rows)
    y = projection.forward(rows, z, residual)[:, : projection.out_features].clone()
    grad_y = projection.gradient(grad)
    grad_z = projection.backward_low_rank(grad_y)
    return [y, projection.backward_input(grad_y, grad_z), *projection.backward_adapters(grad_y, grad_z, rows, z)]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def case(kind: str, dtype: torch.dtype, with_residual: bool, seed: int = 0):
    torch.manual_seed(seed)
    modules = [linear(out, *each, dtype) for out, each in zip(OUTS, KINDS[kind], strict=False)]
    out = sum(OUTS[: len(modules)])
    x, residual, grad = (torch.randn(TOKENS, width).to(dtype) for width in (IN, out, out))
    return modules, x, residual if with_residual else None, grad


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_product_gives_what_several_give(kind, with_residual):
    modules, *given = case(kind, torch.float32, with_residual)
    expected = exact(modules, *given)
    for own_class in (Projection, AugmentedProjection):
        got = computed(own_class(modules, DenseWeights()), *given)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape and error(a, b) <= 1e-6, own_class


@pytest.mark.parametrize("with_residual", [False, True])
def test_in_bf16_it_is_no_further_from_the_exact_ones(with_residual):
    ours, theirs = (torch.zeros(2) for _ in range(2))
    for seed in range(5):
        modules, *given = case("odd ranks", torch.bfloat16, with_residual, seed)
        expected = exact(modules, *given)[:2]
        for own_class, errors in ((AugmentedProjection, ours), (Projection, theirs)):
            got = computed(own_class(modules, DenseWeights()), *given)
            errors += torch.tensor([error(a, b) for a, b in zip(got, expected, strict=False)])
    assert (ours <= theirs).all(), (ours, theirs)  # y and dx


def test_gradients_of_adapters_in_bf16_are_added_up_in_fp32():
    """They have the rounding of what is multiplied, and none of their own."""
    modules, x, _, grad = case("odd ranks", torch.bfloat16, False)
    apart = {}
    for own_class in (AugmentedProjection, Projection):
        projection = own_class(modules, DenseWeights())
        grad_y, z = projection.gradient(grad), projection.low_rank(x)
        grad_z = projection.backward_low_rank(grad_y)
        got = projection.backward_adapters(grad_y, grad_z, x, z)
        expected = []
        for module, columns, ranks in zip(modules, projection.columns, projection.ranks, strict=True):
            a = grad_z[:, ranks].double().T @ x.double()
            expected += [a, module.scaling * grad_y[:, columns].double().T @ z[:, ranks].double()]
        assert all(gradient.dtype == torch.float32 for gradient in got)
        apart[own_class] = [error(a, b) for a, b in zip(got, expected, strict=True)]
    assert max(apart[AugmentedProjection]) <= 1e-6 and min(apart[Projection]) > 5e-4


def test_adapters_that_are_switched_off_do_nothing():
    modules, x, residual, _ = case("biases", torch.float32, True)
    projection = AugmentedProjection(modules, DenseWeights())
    projection.forward(x, projection.low_rank(x), residual)
    for module in modules:
        module.enabled = False
    assert projection.low_rank(x) is None
    plain = Projection([module.base for module in modules], DenseWeights())
    assert error(projection.forward(x, None, residual), plain.forward(x, None, residual).double()) <= 1e-6


def test_a_weight_is_made_once_for_recomputation_and_backward_and_anew_when_something_changed(monkeypatch):
    modules, x, _, grad = case("odd ranks", torch.float32, False)
    weights = DenseWeights()
    projection, other = (AugmentedProjection(modules, weights) for _ in range(2))
    made = []
    write = AugmentedProjection._write
    monkeypatch.setattr(AugmentedProjection, "_write", lambda self, matrix: (made.append(self), write(self, matrix)))
    computed(projection, x, None, grad)
    assert made == [projection]
    before = computed(other, x, None, grad)[0]
    with torch.no_grad():
        modules[0].lora_A.mul_(2)
    assert error(computed(other, x, None, grad)[0], before.double()) > 1e-2
    weights.begin(will_return=False)
    computed(other, x, None, grad)
    assert made == [projection, other, other, other]


@pytest.mark.parametrize("keep", ["nothing", "attention", "everything"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_one_product_have_the_gradients_of_blocks_of_several(monkeypatch, name, keep):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    put_into_four_bits(model)
    tune(model)
    batch, towards = pack_tokens(torch.randint(96, (30,)).split((7, 1, 22))), torch.randn(30, 64)

    def states_and_gradients() -> tuple[Tensor, list[Tensor]]:
        states = FusedForward(model, keep).hidden(batch, torch.arange(30))
        parameters = [p for p in model.parameters() if p.requires_grad]
        return states.detach(), list(torch.autograd.grad((states * towards).sum(), parameters))

    states, gradients = states_and_gradients()
    monkeypatch.setitem(augmented.ONE_PRODUCT, "cpu", True)
    assert projection_on("cpu") is AugmentedProjection
    wide_states, wide_gradients = states_and_gradients()
    assert error(wide_states, states.double()) <= 1e-5
    assert len(gradients) == 2 * 2 * 7
    assert all(error(a, b.double()) <= 1e-5 for a, b in zip(wide_gradients, gradients, strict=True))


def test_a_cpu_has_the_projections_of_several_products():
    assert projection_on("cpu") is Projection


def test_the_op_writes_b_beside_the_weight_and_refuses_rows_without_room():
    q = quantize(torch.randn(6, 32), QuantSpec())
    out, b = torch.zeros(6, 40), torch.ones(6, 3)
    augmented_weight_(out, q, b, 0.5, 5)
    assert torch.equal(out[:, :32], dequantize(q, torch.float32)) and (out[:, 37:] == 0.5).all()
    assert not out[:, 32:37].any()
    spec = q.spec
    given = (q.packed, q.scales, q.shape, spec.format, spec.block_size, spec.double_quant, b, 0.5, 5)
    torch.library.opcheck(torch.ops.nybble.augmented_weight_.default, (*given, out))
    for wrong in ((out, b, 6), (out[:, :31], None, 0), (out[:5], None, 0), (out.T, None, 0), (out, b[:5], 0)):
        with pytest.raises(KernelError):
            augmented_weight_(wrong[0], q, wrong[1], 0.5, wrong[2])
