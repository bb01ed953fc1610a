"""Which body runs: preference, explicit requests that never fall back, and what the errors say."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nybble.errors import KernelError
from nybble.kernels import registry


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty registry with three backends for one op; "cpp" does not run here, "fast" refuses negative factors."""
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(registry, "_backends", {})
    monkeypatch.setattr(registry, "_registrations", {})
    monkeypatch.setattr(registry, "PREFERENCE", {"cpu": ("cpp", "fast", "reference"), "cuda": ("fast", "reference")})
    registry.register_backend("reference", devices=None, probe=lambda: None)
    registry.register_backend("cpp", devices=("cpu",), probe=lambda: "not built")
    registry.register_backend("fast", devices=("cpu",), probe=lambda: None)
    registry.register("scale", "reference")(lambda x, factor: "reference")
    registry.register("scale", "cpp")(lambda x, factor: "cpp")
    registry.register("scale", "fast", lambda x, factor: "needs a positive factor" if factor < 0 else None)(
        lambda x, factor: "fast"
    )
    registry.register("reference_only", "reference")(lambda x: "reference")
    yield


def chosen(op: str = "scale", device: str = "cpu", backend: str | None = None, factor: float = 1.0) -> str:
    x = torch.zeros(1)
    body = registry.body(op, device, backend, (x, factor))
    result = body(x, factor) if op == "scale" else body(x)
    assert isinstance(result, str)
    return result


def test_preference_skips_what_cannot_run(backends: None) -> None:
    assert chosen() == "fast"  # cpp is not built
    assert chosen(factor=-1.0) == "reference"  # fast does not support it
    assert chosen(device="cuda") == "reference"  # fast is for the CPU
    assert chosen(device="xpu") == "reference"
    assert chosen("reference_only") == "reference"


def test_a_body_that_reads_values_waits_where_they_are_not_in_the_hosts_memory(backends: None) -> None:
    registry.register("looks", "reference", waits=True)(lambda x: "reference")
    assert registry.waits("looks", torch.device("meta")) and not registry.waits("looks", torch.device("cpu"))
    assert not registry.waits("reference_only", torch.device("meta"))
    registry.register_backend("meta_only", devices=("meta",), probe=lambda: None)
    registry.register("looks", "meta_only", lambda x: None if len(x) else "needs an element")(lambda x: "meta_only")
    with registry.use("meta_only", "reference"):
        assert not registry.waits("looks", torch.device("meta"), (torch.zeros(1),))
        assert registry.waits("looks", torch.device("meta"), (torch.zeros(0),))


def test_an_explicit_backend_never_falls_back(backends: None) -> None:
    assert chosen(backend="reference") == "reference"
    for kwargs, reason in (
        ({"backend": "cpp"}, "cpp: not built"),
        ({"backend": "fast", "factor": -1.0}, "fast: needs a positive factor"),
        ({"backend": "fast", "device": "cuda"}, "fast: runs on cpu only"),
        ({"backend": "fast", "op": "reference_only"}, "fast: has no body for this op"),
        ({"backend": "triton"}, "triton: not part of this build"),
    ):
        with pytest.raises(KernelError) as error:
            chosen(**kwargs)  # type: ignore[arg-type]
        assert reason in str(error.value)
        assert "reference" in error.value.allowed  # what does exist


def test_use_and_its_nesting(backends: None) -> None:
    with registry.use("reference"):
        assert chosen() == "reference"
        with registry.use("fast"):
            assert chosen() == "fast"
            with pytest.raises(KernelError, match="has no body"):
                chosen("reference_only")
        assert chosen() == "reference"
    assert chosen() == "fast"


def test_use_is_undone_by_an_exception(backends: None) -> None:
    with pytest.raises(RuntimeError), registry.use("reference"):
        raise RuntimeError
    assert chosen() == "fast"


def test_several_names_are_an_order(backends: None) -> None:
    with registry.use("cpp", "reference"):
        assert chosen() == "reference"
    with registry.use("cpp"), pytest.raises(KernelError, match="not built"):
        chosen()


def test_environment_variable(backends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    assert chosen() == "reference"
    with registry.use("fast"):  # the nearer request holds
        assert chosen() == "fast"
    monkeypatch.setenv("NYBBLE_KERNELS", "cpp")
    with pytest.raises(KernelError, match="cpp: not built"):
        chosen()
    monkeypatch.setenv("NYBBLE_KERNELS", "cpp,reference")
    assert chosen() == "reference"
    monkeypatch.setenv("NYBBLE_KERNELS", "")
    assert chosen() == "fast"


def test_unknown_names_are_errors_that_list_the_known(backends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match=r"'cuda'.*use\(\)") as error, registry.use("cuda"):
        raise AssertionError("entered")
    assert "reference, cpp, fast" in str(error.value)
    monkeypatch.setenv("NYBBLE_KERNELS", "fats")
    with pytest.raises(KernelError, match="'fats' in NYBBLE_KERNELS"):
        chosen()


def test_a_probe_runs_once_and_only_when_needed(backends: None) -> None:
    calls = []

    def probe() -> None:
        calls.append(1)

    registry.register_backend("slow_to_find", devices=None, probe=probe)
    registry.register("scale", "slow_to_find")(lambda x, factor: "found")
    assert chosen() == "fast" and not calls
    assert [chosen(backend="slow_to_find") for _ in range(3)] == ["found"] * 3
    assert len(calls) == 1


def test_registering_twice_or_for_nobody_is_a_bug(backends: None) -> None:
    with pytest.raises(AssertionError, match="twice"):
        registry.register_backend("cpp", devices=None, probe=lambda: None)
    with pytest.raises(AssertionError, match="two cpp"):
        registry.register("scale", "cpp")(lambda: None)
    registry.register("scale", "triton")(lambda x, factor: "triton")
    with pytest.raises(AssertionError, match="no backend triton"):
        registry.available()


def test_blocks_of_ops_run_where_each_op_has_a_body(backends: None) -> None:
    assert registry.runs(("scale", "reference_only"), "cpu") is None
    with registry.use("fast"):
        assert registry.runs(("scale",), "cpu") is None
        assert (
            registry.runs(("scale", "reference_only"), "cpu") == "reference_only on cpu (fast: has no body for this op)"
        )
        assert registry.runs(("scale",), "cuda") == "scale on cuda (fast: runs on cpu only)"
    with registry.use("cpp", "fast"):
        assert registry.runs(("scale",), "cpu") is None


def test_plain_bodies_alone_carry_blocks_on_the_cpu_only(backends: None) -> None:
    for device in ("cuda", "xpu"):
        assert registry.body("reference_only", device)(None) == "reference"
        assert str(registry.runs(("reference_only",), device)).startswith(f"reference_only on {device} (")
        with registry.use("reference"):
            assert registry.runs(("reference_only",), device) is not None
    registry.register_backend("for_cuda", devices=("cuda",), probe=lambda: None)
    registry.register("reference_only", "for_cuda")(lambda x: "for_cuda")
    registry.PREFERENCE["cuda"] = ("for_cuda", "reference")
    assert registry.runs(("reference_only",), "cuda") is None
    assert "scale on cuda (for_cuda: has no body" in str(registry.runs(("reference_only", "scale"), "cuda"))


def test_of_a_device_elsewhere_only_the_bodies_count(backends: None) -> None:
    registry.register_backend("for_cuda", devices=("cuda",), probe=lambda: "no card")
    registry.register("reference_only", "for_cuda")(lambda x: "for_cuda")
    registry.PREFERENCE["cuda"] = ("for_cuda", "reference")
    assert "for_cuda: no card" in str(registry.runs(("reference_only",), "cuda"))
    assert registry.runs(("reference_only",), "cuda", here=False) is None
    assert "has no body" in str(registry.runs(("scale",), "cuda", here=False))


def test_available_tells_why_not(backends: None) -> None:
    rows = {(row.op, row.backend): row for row in registry.available()}
    assert rows["scale", "reference"] == ("scale", "reference", "any", True, "")
    assert rows["scale", "cpp"] == ("scale", "cpp", "cpu", False, "not built")
    assert rows["scale", "fast"].available
    assert ("reference_only", "cpp") not in rows


def test_a_declared_op_checks_then_dispatches(backends: None) -> None:
    def check(x: Tensor, factor: float) -> None:
        if x.dim() != 1:
            raise KernelError("x must have one dimension")

    registry.declare("test_double", "(Tensor x, float factor) -> Tensor", check, lambda x, factor: torch.empty_like(x))
    registry.register("test_double", "reference")(lambda x, factor: x * factor)
    registry.register("test_double", "fast", lambda x, factor: "no" if factor < 0 else None)(
        lambda x, factor: x * factor + 100
    )
    op = torch.ops.nybble.test_double
    assert op(torch.ones(2), 3.0).tolist() == [103, 103]
    assert op(torch.ones(2), -3.0).tolist() == [-3, -3]
    assert op(torch.ones(2, device="meta"), 3.0).shape == (2,)
    for x in (torch.ones(2, 2), torch.ones(2, 2, device="meta")):
        with pytest.raises(KernelError, match="one dimension"):
            op(x, 3.0)


def test_the_four_bit_ops_always_have_a_reference() -> None:
    rows = {(row.op, row.backend): row for row in registry.available()}
    for op in ("quantize_4bit", "dequantize_4bit", "dequantize_4bit_out"):
        assert rows[op, "reference"].available
        assert rows[op, "bitsandbytes"].device == "cuda"
        if not torch.cuda.is_available():
            assert rows[op, "bitsandbytes"].reason == "no CUDA device"
