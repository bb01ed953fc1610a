"""`nybble plan`: a run's plan from the model's config.json alone, for this machine or one that is not here."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nybble.config import DataConfig, PlanConfig
from nybble.data.template import ChatTemplate
from nybble.errors import ModelError
from nybble.formats.bnb import layer_specs_from_config, spec_from_config, true_config
from nybble.layers.backbone import why_not_config
from nybble.layers.precision import resolve_compute_dtype, resolve_device
from nybble.memory.costs import MicroBatches, ModelShape
from nybble.memory.machine import Machine, named_machine, this_machine
from nybble.memory.planner import Ask, Plans, make_plans
from nybble.models.hub import fetch_config, looks_like_hub_id
from nybble.models.shapes import SHAPES
from nybble.models.source import open_source
from nybble.training.deal import dealer, even_run
from nybble.training.plan import ask_for
from nybble.training.session import prepare_data

PROCESS_BYTES = 300_000_000  # Python, PyTorch and transformers as a training run imports them, measured


def foresee(options: PlanConfig) -> tuple[Plans, Ask, Ask]:
    """The plans for these options, what was asked, and the same with every choice left to the planner.

    Raises:
        ModelError: the config cannot be found or lacks a field that the arithmetic needs.
    """
    config = read_config(options.model)
    shape = ModelShape.from_config(config)
    machine, dtype, on_cpu = _machine(options)
    knows = on_cpu and options.packing and not options.dropout and why_not_config(_Fields(config)) is None
    path = "blocks" if knows else "generic"
    deal = _dealer(options, shape)
    spec, layer_specs = spec_from_config(config), layer_specs_from_config(config)

    def ask(freely: bool) -> Ask:
        return ask_for(
            options,
            shape,
            deal=deal,
            adapter_parameters=shape.adapter_parameters(options.rank, options.target_modules),
            path=path,
            dtype=dtype,
            on_cpu=on_cpu,
            why_not_streamed=_why_not_streamed(options, spec is not None),
            spec=spec,
            specs=layer_specs,
            freely=freely,
        )

    asked = ask(freely=False)
    return make_plans(asked, machine), asked, ask(freely=True)


def read_config(model: str) -> dict[str, Any]:
    """A model's config.json (that of its text part) as it is written, without its weights.

    Args:
        model: one of SHAPES, a folder, a hub id, a .gguf file or an alias.

    Raises:
        ModelError: there is none, or it is not JSON.
    """
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model).expanduser()
    if not path.is_dir() and (path.is_file() or not looks_like_hub_id(model) or "/" not in model):
        config: dict[str, Any] = open_source(model).config.to_dict()
    else:
        file = path / "config.json" if path.is_dir() else fetch_config(model)
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} is not readable JSON: {error}.", fix="Check the path.") from error
        if not isinstance(config, dict):
            raise ModelError(f"{file} holds no object.", "Allowed: a config.json written by transformers.")
    config = true_config(config)
    text: dict[str, Any] = config.get("text_config") or config
    return text


class _Fields:
    """A config.json's fields as attributes, as transformers' config objects have them."""

    def __init__(self, config: dict[str, Any]):
        self.model_type, self.hidden_act = config.get("model_type"), config.get("hidden_act", "silu")


def _machine(options: PlanConfig) -> tuple[Machine, torch.dtype, bool]:
    """The machine, the compute dtype, and whether it is a CPU."""
    if options.device in ("auto", "cpu", "cuda"):
        device = resolve_device(options.device)
        dtype = resolve_compute_dtype(options.compute_dtype, device)
        machine = this_machine(device, dtype, options.memory, options.host_memory)
        if device.type == "cuda":
            return machine, dtype, False
        # A run imports more than this verb, and a budget for another day need not be free now.
        process = max(PROCESS_BYTES, machine.process_bytes)
        return replace(machine, process_bytes=process, budget_bytes=options.memory or machine.budget_bytes), dtype, True
    dtype = torch.float32 if options.compute_dtype == "fp32" else torch.bfloat16
    return named_machine(options.device, options.memory, options.host_memory), dtype, False


def _dealer(options: PlanConfig, shape: ModelShape) -> Callable[[int], MicroBatches]:
    """Most rows at once -> what micro-batches of so many come to."""
    if options.data is None:
        length, rows = options.max_seq_len, options.rows_per_step
        return lambda size: even_run(length, rows_per_step=rows, size=size, packed=options.packing)
    source = open_source(options.model, options.tokenizer)
    template = ChatTemplate(source.load_tokenizer(), options.template)
    fields = {name: getattr(options, name) for name in DataConfig.model_fields}
    return dealer(options, prepare_data(DataConfig(**fields), template, shape.vocab_size))


def _why_not_streamed(options: PlanConfig, in_four_bits: bool) -> str | None:
    if options.init != "default":
        return f"--init {options.init} needs the whole base"
    if in_four_bits or options.model in SHAPES:
        return None
    return "read from a 4-bit folder only, which `nybble quantize` makes"
