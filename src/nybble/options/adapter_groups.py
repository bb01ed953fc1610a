"""Options of adapters: which layers get one, how large, and what they begin with."""

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, field_validator, model_validator

from nybble.errors import ConfigError
from nybble.options.option import COMMA, AlphaPattern, AutoRank, Name, Options, RankPattern, Seed, knob, split_names

TAKES_FROM_BASE = ("pissa", "olora")  # ways to begin that leave the base with other weights


class AdapterSizes(Options, group="Adapters"):
    """Which adapters there are, and how large."""

    rank: AutoRank = knob(
        16,
        "Rank of each adapter. auto: what the tokens that there are to learn take, lowered to what their first "
        "gradients need.",
        aliases=("r", "lora_r", "lora_rank"),
    )
    dropout: float = knob(0.0, "Dropout on each adapter's input.", ge=0, lt=1, aliases=("lora_dropout",))
    dora: bool = knob(
        False,
        "Train the length of each row of adapted weights beside its direction (DoRA).",
        aliases=("use_dora",),
    )
    target_modules: str | tuple[Name, ...] = knob(
        "all-linear",
        "Layers that get an adapter: all-linear, attention, experts, names such as q_proj,v_proj,lm_head,embed_tokens,"
        " or patterns: layers.1*.q_proj, or a regular expression for whole names.",
        aliases=("lora_target_modules", "targets"),
    )
    modules_to_save: Annotated[tuple[Name, ...], BeforeValidator(split_names)] = knob(
        (),
        "Modules that are trained whole beside the adapters and saved with them, such as lm_head,embed_tokens or norm.",
        aliases=("additional_target", "lora_modules_to_save", "trained_modules"),
    )
    rank_pattern: RankPattern = knob(
        {},
        "Ranks of layers that have another: regular expressions for ends of names, as in PEFT; the first that matches "
        "counts.",
    )

    @property
    def settled_rank(self) -> int:
        """The rank, where it is a number, or has become one."""
        assert self.rank != "auto"
        return self.rank

    @field_validator("target_modules", mode="after")
    @classmethod
    def _split_names(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if value in ("all-linear", "attention"):
            return value
        names = re.split(COMMA, value) if isinstance(value, str) else value
        names = tuple(name.strip() for name in names)
        if not names or not all(names):
            raise ValueError("no names")
        return names

    @model_validator(mode="after")
    def _dora_drops_nothing(self) -> Self:
        if self.dora and self.dropout:
            raise ConfigError(
                f"dora is on, and dropout is {self.dropout:g}.",
                "DoRA scales what base and adapter give together, of one input.",
                "Leave --dora or --dropout out.",
            )
        return self


class AdapterInit(Options, group="Adapters"):
    init: Literal["default", "loftq", "activation", "eva", "pissa", "olora"] = knob(
        "default",
        "What adapters begin with. default: nothing. loftq: what quantising lost of the weights. activation: of the"
        " layers' outputs on the training rows. eva: nothing, along the layers' largest inputs. pissa, olora: the"
        " weights' largest part, or leading columns, which the frozen weights are then less.",
        aliases=("init_lora_weights",),
    )


class EvaOptions(AdapterInit):
    eva_rho: float = knob(
        1.0,
        "With --init eva: give the ranks out once more, to the layers whose inputs they explain most of; a layer gets "
        "up to so many times its rank, or none.",
        ge=1,
        aliases=("rho",),
    )

    @model_validator(mode="after")
    def _rho_is_evas(self) -> Self:
        if self.eva_rho != 1 and self.init != "eva":
            raise ConfigError(
                f"eva-rho is {self.eva_rho:g}, and init is {self.init}.",
                "Ranks are given out by what --init eva finds.",
                "Use --init eva, or leave --eva-rho out.",
            )
        return self


class AdapterScaling(Options, group="Adapters"):
    alpha: float = knob(32.0, "Adapters are scaled by alpha / rank.", gt=0, aliases=("lora_alpha",))
    alpha_pattern: AlphaPattern = knob({}, "Alphas of layers that have another, as --rank-pattern says which.")
    rslora: bool = knob(False, "Scale by alpha / sqrt(rank) instead (rsLoRA).", aliases=("use_rslora",))


class PlannedAdapters(EvaOptions, AdapterSizes):
    """What of adapters decides how a run fits."""


class NewAdapters(AdapterScaling, AdapterSizes):
    """What adapters are made with."""


class SeededAdapters(NewAdapters):
    """The adapters of a model that nothing is known of but its layers."""

    rank: int = knob(16, "Rank of each adapter.", ge=1, aliases=("r", "lora_r", "lora_rank"))
    seed: Seed = knob(0, "Seed of the adapters.")


class AdapterOptions(NewAdapters, PlannedAdapters):
    """The adapters of a run."""

    train_new_tokens: bool = knob(
        False,
        "Train the embedding's and the head's rows of tokens in the examples that the base never learnt.",
        aliases=("trainable_token_indices", "new_tokens"),
    )
    adapter: Name | None = knob(
        None,
        "Adapter folder, nybble's or PEFT's, to train on from; its rank, alpha and layers are taken.",
        aliases=("adapter_name_or_path", "lora_model_dir", "peft_model_id"),
    )

    @property
    def begins_with_an_effect(self) -> bool:
        """Whether training begins with adapters that change what the base says; eva's B are zeros, as by default."""
        return self.adapter is not None or self.init not in ("default", "eva")

    @model_validator(mode="after")
    def _begins_once(self) -> Self:
        if self.adapter is not None and self.init != "default":
            raise ConfigError(
                f"init is {self.init}, and adapter is {self.adapter!r}.",
                "Adapters begin either as --init says or with an adapter that exists.",
                "Leave --init or --adapter out.",
            )
        return self
