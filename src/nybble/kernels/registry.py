"""Which body runs an op: each op is declared once, backends register bodies for it.

    registry.register_backend("cpp", devices=("cpu",), probe=why_unavailable)

    @registry.register("dequantize_4bit", "cpp")
    def dequantize_4bit(packed, scales, ...):      # the op's own arguments
        ...

A call takes the first backend of the device's preference that is available and supports the
arguments. An explicit request, by `use("cpp")` or NYBBLE_KERNELS=cpp, replaces the preference:
nothing outside the request runs, and a request that cannot be met is an error that says why. Several
names ("cpp", "reference" or NYBBLE_KERNELS=cpp,reference) are tried in the order given.

Parts of nybble that replace a model's own modules, such as its decoder blocks, ask `runs` first.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.errors import KernelError
from nybble.kernels.heap import lies_in_heap

ENVIRONMENT_VARIABLE = "NYBBLE_KERNELS"
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "reference"),
    "cuda": ("triton", "flash", "bitsandbytes", "reference"),
}
PLAIN_BLOCKS = ("cpu",)  # devices where blocks of plain PyTorch bodies are worth more than a model's own modules

Body = Callable[..., Any]


class Backend(NamedTuple):
    """Where a backend can run, and why it cannot run here."""

    devices: tuple[str, ...] | None  # device types, None for all
    probe: Callable[[], str | None]  # None when available, else the reason


class Registration(NamedTuple):
    """One backend's body for one op."""

    body: Body
    unsupported: Callable[..., str | None] | None  # given the op's arguments: None, or what it lacks
    waits: bool


class Row(NamedTuple):
    """One line of `nybble doctor`'s kernel table."""

    op: str
    backend: str
    device: str  # a device type, or "any"
    available: bool
    reason: str


_backends: dict[str, Backend] = {}
_registrations: dict[str, dict[str, Registration]] = {}  # op -> backend -> body
_requested: tuple[str, ...] = ()


def register_backend(name: str, devices: tuple[str, ...] | None, probe: Callable[[], str | None]) -> None:
    """Make a backend known.

    Args:
        devices: the device types it runs on ("cpu", "cuda"), or None for all.
        probe: returns None when the backend can run here, else the reason; called once, when first needed.
    """
    assert name not in _backends, f"backend {name} is registered twice"
    _backends[name] = Backend(devices, functools.cache(probe))


def register(
    op: str, backend: str, unsupported: Callable[..., str | None] | None = None, *, waits: bool = False
) -> Callable[[Body], Body]:
    """Decorator: the function is `backend`'s body for `op` and takes the op's arguments.

    Args:
        unsupported: called with the op's arguments; returns None, or what the body lacks for them.
        waits: it reads values of its arguments, for which it waits where they lie on a GPU.
    """

    def add(body: Body) -> Body:
        bodies = _registrations.setdefault(op, {})
        assert backend not in bodies, f"{op} has two {backend} bodies"
        bodies[backend] = Registration(body, unsupported, waits)
        return body

    return add


def declare(op: str, schema: str, check: Callable[..., None], fake: Body) -> None:
    """Declare the torch op `nybble::<op>`; its body is looked up here at each call.

    Args:
        schema: torch schema of the arguments and result, such as "(Tensor x, float eps) -> Tensor".
        check: called with the arguments of real and fake calls alike; raises when shapes, dtypes or
            layouts are wrong, so that bodies may trust their arguments.
        fake: makes the result's empty tensors (for torch.compile and meta tensors).
    """

    def run(*args: Any) -> Any:
        check(*args)
        device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        return body(op, device_type, args=args)(*args)

    def run_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    name = f"nybble::{op}"
    torch.library.define(name, schema)
    torch.library.impl(name, "CompositeExplicitAutograd", run)
    torch.library.register_fake(name, run_fake)


def body(op: str, device_type: str, backend: str | None = None, args: tuple[Any, ...] = ()) -> Body:
    """The body that runs `op` on tensors of `device_type`: that of `backend_of`."""
    return _registrations[op][backend_of(op, device_type, backend, args)].body


def backend_of(op: str, device_type: str, backend: str | None = None, args: tuple[Any, ...] = ()) -> str:
    """The backend whose body runs `op` on tensors of `device_type`.

    Args:
        backend: only this one will do; None takes the request in force, else the device's preference.
        args: the op's arguments, for bodies that support only some.

    Raises:
        KernelError: no backend of those asked for can run it; says why for each.
    """
    wanted = (backend,) if backend else _request() or _preference(device_type)
    reasons = []
    for name in wanted:
        reason = _reason_against(op, name, device_type, args)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise KernelError(
        f"No kernel of those asked for runs {op} on {device_type}: {'; '.join(reasons)}.",
        f"Backends with a body for {op}: {', '.join(_registrations.get(op, {})) or 'none'}.",
        f"Unset {ENVIRONMENT_VARIABLE}, or name one that is available (nybble doctor lists them).",
    )


def waits(op: str, device: torch.device, args: tuple[Any, ...] = ()) -> bool:
    """Whether the body that runs `op` on a device waits for it: then no graph can hold the op.

    Args:
        args: as `backend_of` takes them.
    """
    return not lies_in_heap(device) and _registrations[op][backend_of(op, device.type, args=args)].waits


def runs(ops: Iterable[str], device_type: str, here: bool = True) -> str | None:
    """None where blocks made of these ops may replace a model's own modules on `device_type`, else the op and who of
    those asked for lacks it. What a body refuses at a call, the next one runs: that is no reason.

    Args:
        here: the device is this machine's; else nobody is asked whether it is available.
    """
    wanted = [
        name for name in _request() or _preference(device_type) if name != "reference" or device_type in PLAIN_BLOCKS
    ]
    for op in ops:
        reasons = [_reason_against(op, name, device_type, None, here) for name in wanted]
        if None not in reasons:
            against = "; ".join(f"{name}: {reason}" for name, reason in zip(wanted, reasons, strict=True))
            return f"{op} on {device_type} ({against or 'no backend is made for it'})"
    return None


@contextmanager
def use(*backends: str) -> Iterator[None]:
    """Within the block, only these backends run, tried in this order; for the whole process.

    Raises:
        KernelError: a name is unknown (at once), or none of them can run an op (at the call).
    """
    global _requested
    previous = _requested
    _requested = _known(backends, "use()")
    try:
        yield
    finally:
        _requested = previous


def available() -> list[Row]:
    """Every op, backend and device, and why a backend is unavailable; for `nybble doctor`."""
    rows = []
    for op, registrations in _registrations.items():
        for name in registrations:
            assert name in _backends, f"{op} has a body of no backend {name}"
            for device in _backends[name].devices or ("any",):
                reason = _reason_against(op, name, device, None)
                rows.append(Row(op, name, device, reason is None, reason or ""))
    return rows


def _reason_against(
    op: str, name: str, device_type: str, args: tuple[Any, ...] | None, here: bool = True
) -> str | None:
    """None when backend `name` runs `op` there, else why not. `args` None or empty: any arguments."""
    if name not in _backends:
        return "not part of this build"
    registration = _registrations.get(op, {}).get(name)
    if registration is None:
        return "has no body for this op"
    devices = _backends[name].devices
    if devices is not None and device_type not in devices:
        return f"runs on {', '.join(devices)} only"
    reason = _backends[name].probe() if here else None
    if reason is None and args and registration.unsupported:
        return registration.unsupported(*args)
    return reason


def _preference(device_type: str) -> tuple[str, ...]:
    return PREFERENCE.get(device_type, ("reference",))


def _request() -> tuple[str, ...]:
    """The explicit request in force: `use` first, then the environment; empty when there is none."""
    if _requested:
        return _requested
    names = os.environ.get(ENVIRONMENT_VARIABLE)
    return _known(tuple(names.split(",")), ENVIRONMENT_VARIABLE) if names else ()


def _known(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    unknown = [name for name in names if name not in _backends]
    if unknown:
        raise KernelError(
            f"Unknown kernel backend {unknown[0]!r} in {where}.", f"Known backends: {', '.join(_backends)}."
        )
    return names
