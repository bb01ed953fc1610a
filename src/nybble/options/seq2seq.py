"""What options say of encoder-decoders, of which no option knows before the model's config is read."""

from collections.abc import Iterator
from typing import TypeVar

from nybble.errors import ConfigError
from nybble.options.option import flat, with_options
from nybble.options.verbs import DataConfig, PlanConfig, TrainConfig

Config = TypeVar("Config", TrainConfig, PlanConfig, DataConfig)
LEARNT = "Of an encoder-decoder adapters of a rank that is given are trained, on linear layers of its blocks."
WRITTEN = "Its tokenizer alone writes a prompt and the answer, which is what is learnt."


def for_seq2seq(config: Config) -> Config:
    """The options as an encoder-decoder takes them: rows are padded.

    Raises:
        ConfigError: it has no use for one of them.
    """
    if (found := next(_unused(config), None)) is not None:
        name, why = found
        flag = name.replace("_", "-")
        raise ConfigError(
            f"{flag} is {flat(config)[name]}, and the model is an encoder-decoder.", why, f"Leave --{flag} out."
        )
    return config if isinstance(config, DataConfig) else with_options(config, packing=False)


def _unused(config: TrainConfig | PlanConfig | DataConfig) -> Iterator[tuple[str, str]]:
    """Options as they are that it has no use for, and why."""
    for name in ("train_on", "thinking", "tools", "chat_template"):
        if getattr(config.data, name) != type(config.data).model_fields[name].default:
            yield name, WRITTEN
    if isinstance(config, DataConfig):
        return
    adapters = config.adapters
    if config.method.method in ("auto", "full"):
        yield "method", LEARNT
    if adapters.rank == "auto":
        yield "rank", LEARNT
    if adapters.modules_to_save:
        yield "modules_to_save", LEARNT
    if isinstance(config, TrainConfig) and config.adapters.train_new_tokens:
        yield "train_new_tokens", LEARNT
    if adapters.init in ("activation", "eva"):
        yield "init", "Adapters that begin along a layer's inputs are for decoders, which read one text."
    if config.rounding.mixed is not None:
        yield "mixed", "What a layer may lose is measured on texts that decoders go on with."
    if config.objective.neftune_alpha:
        yield "neftune_alpha", "Noise is added to a decoder's one embedding; an encoder-decoder has two."
