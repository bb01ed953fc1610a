"""Mixers that carry a state from token to token, computed here where no kernels are installed for them.

transformers' own PyTorch code lets a row see the one that lies before it, and takes most of a step. So a mixer of
transformers gets a class with a second forward, for all that computes without a cache: the same linear layers, and the
scans of `layers/scans.py` between them, which know where rows begin. Which classes those are says `FORWARDS`. Whether a
model so computed gives what transformers' code gives for each row alone, the probe asks of each (`layers/probe.py`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask

from nybble.layers.recurrence import kernel_packages, recurrent_mixers
from nybble.layers.scans import CHUNK, causal_conv, gated_delta_rule, selective_scan, state_space_scan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORM_EPS = 1e-6  # of queries and keys of a delta rule, as transformers has it
CACHES = ("cache_params", "past_key_values")  # the arguments that a mixer may be given one by


class CallingMixer(nn.Module):
    """Mixed in before a mixer's own class: it calls its linear layers. In training mode transformers hands the weight
    of the last one to a fused kernel, which goes past few bits and adapters; mixers have nothing else that this mode
    changes, so they are never in it.
    """

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.training = False
        return self


class RowMixer(CallingMixer):
    """Mixed in before a mixer's own class, whose forward is left to answers: those have a cache.

    Rows are side by side, and `seq_idx` (1, T) numbers them, or their mask does (`masks_of_rows`), or padded, (B, T).
    What lies before or behind a padded row counts as a row of its own.
    """

    def forward(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        if any(keywords.get(name) is not None for name in CACHES):
            answered: Tensor = super().forward(hidden_states, **keywords)
            return answered
        rows = keywords.get("seq_idx")
        if rows is None:
            rows = _numbered(hidden_states, keywords.get("attention_mask"))
        together = hidden_states.flatten(0, 1)[None]  # (1, B * T, hidden)
        output = FORWARDS[class_of(self).__name__](self, together, rows.flatten())
        return output.view(*hidden_states.shape[:2], -1)


def _numbered(states: Tensor, mask: Tensor | None) -> Tensor:
    """The number of each token's row, (B, T); that of padding is one less. A mask of one row may be such numbers."""
    numbers = 2 * torch.arange(len(states), device=states.device)[:, None] + 1
    return numbers.expand(states.shape[:2]) if mask is None else numbers - 1 + mask.to(numbers.dtype)


def class_of(module: nn.Module) -> Any:
    """The module's class, or the one that it had before one of these was mixed in."""
    return next(each for each in type(module).__mro__ if not issubclass(each, CallingMixer))


def compute_mixers(model: nn.Module) -> None:
    """Give the model's mixers their second forward, in place, where it is known for all of them and none of the
    packages is there whose kernels transformers runs; else let those that are known call their layers.
    """
    mixers = recurrent_mixers(model).values()
    ours = not any(kernel_packages(model).values()) and all(type(mixer).__name__ in FORWARDS for mixer in mixers)
    for mixer in mixers:
        if calls_its_layers(mixer):
            mixer.__class__ = _mixed(RowMixer if ours else CallingMixer, class_of(mixer))
            mixer.training = False


def restore_mixers(model: nn.Module) -> None:
    """Undo `compute_mixers`."""
    for mixer in recurrent_mixers(model).values():
        mixer.__class__ = class_of(mixer)
        mixer.training = model.training


def calls_its_layers(module: nn.Module) -> bool:
    """Whether it is a mixer that `compute_mixers` knows, and so never in training mode."""
    return class_of(module).__name__ in FORWARDS


def computes_mixers(model: nn.Module) -> bool:
    """Whether all of the model's mixers, at least one, have their second forward."""
    mixers = recurrent_mixers(model).values()
    return bool(mixers) and all(isinstance(mixer, RowMixer) for mixer in mixers)


def masks_of_rows(model: "PreTrainedModel", borders: Mapping[str, Any], position_ids: Tensor) -> dict[str, Any]:
    """The attention mask of rows side by side for a model that hands nothing else on to all of its layers: the numbers
    of rows for its mixers (Mamba), beside what follows from positions for its attention (Jamba; Granite's hybrid, which
    makes that of a mask alone); under the name that its forward takes it by. Nothing for other models.

    Args:
        borders: of `recurrence.row_borders`. position_ids: (1, T), of each token in its row.
    """
    classes = {class_of(mixer).__name__ for mixer in recurrent_mixers(model).values()}
    rows = borders["seq_idx"]
    if classes <= {"MambaMixer", "FalconMambaMixer"}:
        return {"attention_mask": rows}
    if not classes <= {"JambaMambaMixer", "GraniteMoeHybridMambaLayer"}:
        return {}
    states = torch.empty((*position_ids.shape, 0), dtype=model.dtype, device=position_ids.device)
    attended = create_causal_mask(model.config, states, None, None, position_ids)
    return {"attention_mask": {"full_attention": attended, "linear_attention": rows}}


@functools.cache
def _mixed(mixin: type[CallingMixer], own_class: Any) -> Any:
    # Its name and its file are those of the class whose code it has: what reads that code looks at both.
    return type(own_class.__name__, (mixin, own_class), {"__module__": own_class.__module__})


# ---- the forwards: (mixer, states (1, T, hidden), rows (T)) -> (1, T, hidden) --------------------------------------


def short_convolution(mixer: Any, states: Tensor, rows: Tensor) -> Tensor:
    """LFM2's: a gated convolution over few tokens."""
    gate, out_gate, x = mixer.in_proj(states).chunk(3, dim=-1)
    output: Tensor = mixer.out_proj(out_gate * _convolved(mixer.conv, gate * x, rows))
    return output


def delta_net(mixer: Any, states: Tensor, rows: Tensor) -> Tensor:
    """Qwen3-Next's and Qwen3.5's gated delta rule."""
    if hasattr(mixer, "in_proj_qkvz"):
        parts = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(states), mixer.in_proj_ba(states))
        *qkv, z, b, a = parts
        mixed = torch.cat([part.flatten(2) for part in qkv], dim=-1)
    else:
        mixed, z = mixer.in_proj_qkv(states), mixer.in_proj_z(states)
        b, a = mixer.in_proj_b(states), mixer.in_proj_a(states)
    mixed = ACT2FN[mixer.activation](_convolved(mixer.conv1d, mixed, rows))[0]
    query, key, value = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    key_heads, value_heads = (-1, mixer.head_k_dim), (-1, mixer.head_v_dim)
    query, key = (_unit(x.unflatten(-1, key_heads).float()) for x in (query, key))
    shared = mixer.num_v_heads // mixer.num_k_heads  # heads of values that a head of keys serves
    query, key = (x.repeat_interleave(shared, dim=1) for x in (query * mixer.head_k_dim**-0.5, key))
    log_decay = -mixer.A_log.float().exp() * F.softplus(a[0].float() + mixer.dt_bias)
    values = value.unflatten(-1, value_heads).float()
    output = gated_delta_rule(query, key, values, log_decay, b[0].sigmoid().float(), rows).to(states.dtype)
    normed = mixer.norm(output.flatten(0, 1), z.reshape(-1, mixer.head_v_dim))
    return mixer.out_proj(normed.view(*states.shape[:2], -1))


def state_space(mixer: Any, states: Tensor, rows: Tensor) -> Tensor:
    """Mamba 2's, and Falcon-H1's, which has factors of its own and may do without the norm."""
    factors = hasattr(mixer, "mup_vector")
    projected = mixer.in_proj(states * mixer.ssm_in_multiplier if factors else states)
    projected = projected * mixer.mup_vector if factors else projected
    gate, mixed, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
    mixed = ACT2FN[mixer.activation](_convolved(mixer.conv1d, mixed, rows))[0]
    grouped = mixer.n_groups * mixer.ssm_state_size
    x, b, c = mixed.split([mixer.intermediate_size, grouped, grouped], dim=-1)
    x = x.unflatten(-1, (mixer.num_heads, -1)).float()
    b, c = (part.unflatten(-1, (mixer.n_groups, -1)).float() for part in (b, c))
    dt = F.softplus(dt[0] + mixer.dt_bias.to(dt.dtype)).clamp(*mixer.time_step_limit).float()
    y = state_space_scan(x, dt, -mixer.A_log.float().exp(), b, c, rows) + mixer.D[:, None] * x
    y = y.flatten(1)[None]
    normed = mixer.norm(y, gate) if getattr(mixer, "mamba_rms_norm", True) else y * F.silu(gate)
    return mixer.out_proj(normed.to(states.dtype))


def selective_state_space(mixer: Any, states: Tensor, rows: Tensor) -> Tensor:
    """Mamba's; Falcon-Mamba's and Jamba's norm the step sizes and what the state takes in and gives."""
    x, gate = mixer.in_proj(states).chunk(2, dim=-1)
    x = ACT2FN[mixer.activation](_convolved(mixer.conv1d, x, rows))
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    steps, b, c = mixer.x_proj(x).split(sizes, dim=-1)
    if hasattr(mixer, "dt_layernorm"):
        steps, b, c = mixer.dt_layernorm(steps), mixer.b_layernorm(b), mixer.c_layernorm(c)
    dt = F.softplus(mixer.dt_proj(steps).float())
    wide = x[0].float()
    y = selective_scan(wide, dt[0], -mixer.A_log.float().exp(), b[0].float(), c[0].float(), rows) + mixer.D * wide
    return mixer.out_proj((y[None] * F.silu(gate)).to(states.dtype))


def _convolved(conv: nn.Conv1d, x: Tensor, rows: Tensor) -> Tensor:
    """(1, T, C) -> (1, T, C)."""
    return causal_conv(x[0].to(conv.weight.dtype), conv.weight[:, 0], conv.bias, rows)[None].to(x.dtype)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


Forward = Callable[[Any, Tensor, Tensor], Tensor]
FORWARDS: dict[str, Forward] = {
    "Lfm2ShortConv": short_convolution,
    "Lfm2MoeShortConv": short_convolution,
    "Qwen3NextGatedDeltaNet": delta_net,
    "Qwen3_5GatedDeltaNet": delta_net,
    "Qwen3_5MoeGatedDeltaNet": delta_net,
    "MambaMixer": selective_state_space,
    "FalconMambaMixer": selective_state_space,
    "JambaMambaMixer": selective_state_space,
    "Mamba2Mixer": state_space,
    "BambaMixer": state_space,
    "FalconH1Mixer": state_space,
    "GraniteMoeHybridMambaLayer": state_space,
    "Zamba2MambaMixer": state_space,
    "NemotronHMamba2Mixer": state_space,
}


# ---- what they hold for their backward pass, in numbers of fp32 ----------------------------------------------------


def held_values(model: nn.Module) -> tuple[int, int]:
    """Of the mixer that holds most: for each token, and beside them for a chunk; (0, 0) without such mixers."""
    held = [(0, 0)]
    for mixer in recurrent_mixers(model).values():
        forward = FORWARDS.get(class_of(mixer).__name__)
        if forward is not None:
            held.append(HELD[forward](mixer))
    return max(value for value, _ in held), max(fixed for _, fixed in held)


def _short_convolution_holds(mixer: Any) -> tuple[int, int]:
    return 8 * mixer.conv.in_channels, 0


def _delta_net_holds(mixer: Any) -> tuple[int, int]:
    keys, heads = mixer.num_v_heads * mixer.head_k_dim, mixer.num_v_heads
    states = keys * mixer.head_v_dim // CHUNK
    return 4 * mixer.conv_dim + 14 * keys + 12 * mixer.value_dim + 9 * CHUNK * heads + 3 * states, 0


def _state_space_holds(mixer: Any) -> tuple[int, int]:
    inner, states = mixer.intermediate_size, mixer.intermediate_size * mixer.ssm_state_size // CHUNK
    return 5 * mixer.conv_dim + 16 * inner + 8 * CHUNK * mixer.num_heads + 4 * states, 0


def _selective_holds(mixer: Any) -> tuple[int, int]:
    inner, state = mixer.intermediate_size, mixer.intermediate_size * mixer.ssm_state_size
    return 16 * inner + 2 * state // CHUNK, 6 * CHUNK * state


HELD: dict[Forward, Callable[[Any], tuple[int, int]]] = {
    short_convolution: _short_convolution_holds,
    delta_net: _delta_net_holds,
    state_space: _state_space_holds,
    selective_state_space: _selective_holds,
}
