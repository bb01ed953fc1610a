"""A model without weights: its modules and names on the meta device, where a tensor takes no memory."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nybble.errors import ModelError, first_line, foreign_errors
from nybble.layers.dense import ends_of
from nybble.sources.task import ARCHITECTURES, SEQ2SEQ, STATES, TOKENS, Task, is_seq2seq, reads_both, reads_pictures

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # a layer's, as configs call them
MOST_COMPUTED = 1 << 29  # elements of a mask, or of a table of positions
EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token")


def config_refused(where: object) -> Callable[[Exception], ModelError]:
    """For `foreign_errors` around what transformers makes of a config: `where` names it."""

    def refused(error: Exception) -> ModelError:
        return ModelError(
            f"transformers does not take {where}: {first_line(error)}",
            "Allowed: architectures of the installed transformers; a model's own code is never run.",
            "Choose another model, or update transformers.",
        )

    return refused


def config_from_json(written: dict[str, Any]) -> "PretrainedConfig":
    """What transformers makes of a config.json's content. JSON has no infinity: there it is an object of its own."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**_with_floats(written))


def _with_floats(value: Any) -> Any:
    match value:
        case {"__float__": str(number)} if len(value) == 1:
            return float(number)
        case dict():
            return {name: _with_floats(each) for name, each in value.items()}
        case list():
            return [_with_floats(each) for each in value]
    return value


def build_skeleton(
    config: "PretrainedConfig", dtype: torch.dtype = torch.bfloat16, task: Task = TOKENS
) -> "PreTrainedModel":
    """The model that `config` describes for a task, every parameter and buffer on the meta device.

    Attention runs through PyTorch's scaled_dot_product_attention where the architecture allows it.

    Raises:
        ModelError: transformers has no such model for this config.
    """
    return _build(partial(auto_class(task).from_config, trust_remote_code=False), config, dtype, task)


def untie(model: "PreTrainedModel", names: Iterable[str]) -> "PreTrainedModel":
    """The model, on the meta device, with weights of their own for parameters that its config ties, in place."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(torch.empty_like(getattr(module, leaf)), requires_grad=False))
        model.all_tied_weights_keys.pop(name)
    return model


def auto_class(task: Task) -> Any:
    """transformers' AutoModel class of a task."""
    import transformers

    kinds = {
        "tokens": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "scores": transformers.AutoModelForSequenceClassification,
        "tags": transformers.AutoModelForTokenClassification,
        "pictures": transformers.AutoModelForImageClassification,
        "states": transformers.AutoModel,
        "pictured": transformers.AutoModelForImageTextToText,
    }
    return kinds[task.kind]


def _build(
    make: Callable[..., "PreTrainedModel"],
    config: "PretrainedConfig",
    dtype: torch.dtype = torch.bfloat16,
    task: Task = TOKENS,
) -> "PreTrainedModel":
    def cannot_be_built(error: Exception) -> ModelError:
        return ModelError(
            f"The model type {config.model_type!r} cannot be built as {task.words}: {first_line(error)}",
            f"Allowed: {'the decoder ' if task is TOKENS else 'such '}architectures of the installed transformers; a "
            "model's own code is never run.",
            _instead(config),
        )

    _check_experts(config)
    with foreign_errors(cannot_be_built), torch.device("meta"):
        model = make(config, dtype=dtype)
        _check_sizes(model)
    return model


def _check_sizes(model: "PreTrainedModel") -> None:
    """Refuse weights of no size, and tables that would be computed and are larger than any model's.

    Raises:
        ValueError: names what has such a size.
    """
    odd = [(name, each) for name, each in model.named_parameters() if not each.numel()]
    odd += [(name, each) for name, each in model.named_buffers() if each.numel() > MOST_COMPUTED]
    for name, tensor in odd[:1]:
        raise ValueError(f"{name} would have the shape {list(tensor.shape)}")


def _check_experts(config: "PretrainedConfig") -> None:
    """Refuse to send a token to none of a mixture's experts, or to more than there are.

    Raises:
        ModelError: the config says so.
    """
    text = config.get_text_config()
    counts = {name: value for name in EXPERTS if type(value := getattr(text, name, None)) is int and value > 1}
    chosen = {name: value for name in EXPERTS_A_TOKEN if type(value := getattr(text, name, None)) is int}
    for (count, of), (name, value) in product(counts.items(), chosen.items()):
        if not 1 <= value <= of:
            raise ModelError(
                f"The config has {name} = {value}, and {count} = {of}.",
                f"Allowed: 1 to {of} experts a token.",
                "Check config.json, or fetch the model again.",
            )


def _instead(config: "PretrainedConfig") -> str:
    """What can be done with a model of another kind."""
    if reads_pictures(config):
        return "It is a vision model, which tells pictures apart: nybble train --objective classify."
    if is_seq2seq(config):
        return "It is an encoder-decoder, which learns answers to prompts: nybble train."
    if reads_both(config):
        return "It is a vision-language model, which learns from conversations with pictures: nybble train."
    return "Choose another model, or update transformers."


def is_encoder(config: "PretrainedConfig") -> bool:
    """Whether models of this config see a text's later tokens too: those that are made to fill in masked ones."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def reads_whole(config: "PretrainedConfig") -> bool:
    """Whether models of this config are encoders, of texts or of pictures: a row goes through whole, one a line."""
    return is_encoder(config) or reads_pictures(config)


def stored_task(config: "PretrainedConfig") -> Task:
    """What the model that is stored is for, by its config: of an encoder that has a head for scores, these, and else
    its states; of other models what comes next.
    """
    if is_seq2seq(config):
        return SEQ2SEQ
    if not reads_whole(config):
        return TOKENS
    made_for, problem = getattr(config, "architectures", None) or [""], config.problem_type
    kind = next((kind for kind, end in ARCHITECTURES.items() if made_for[0].endswith(end)), None)
    if kind is None:
        return STATES
    labels = tuple(str(label) for label in config.id2label.values())
    return Task(kind, labels, problem or "single_label_classification", stored_head=True)


def text_config(config: "PretrainedConfig") -> "PretrainedConfig":
    """The config of the text model within a larger one, such as a vision-language model; of others their own."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = getattr(config, "text_config", None)
    return text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else config


def stored_text_config(
    config: "PretrainedConfig", written: dict[str, Any], whole: "PreTrainedModel | None"
) -> "PretrainedConfig":
    """The text model's config, of a config.json as it is written. Whether head and embedding are one, the larger model
    decides, if it is known: its parts may say otherwise.

    Args:
        whole: what `build_whole` gives for the config.
    """
    text = text_config(config)
    if text is config:
        return text
    if whole is not None and (head := whole.get_output_embeddings()) is not None:
        names = [f"{name}.weight" for name, module in whole.named_modules() if module is head]
        tied = whole.all_tied_weights_keys
        text.tie_word_embeddings = any(name in (*tied.keys(), *tied.values()) for name in names)
    elif "tie_word_embeddings" not in (written.get("text_config") or {}):
        text.tie_word_embeddings = written.get("tie_word_embeddings", text.tie_word_embeddings)
    return text


def is_taken_alone(config: "PretrainedConfig") -> bool:
    """Whether transformers' AutoModelForCausalLM takes the same model of this config as is trained here."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = text_config(config)
    taken = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return text is config or taken is MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]


def build_whole(config: "PretrainedConfig") -> "PreTrainedModel | None":
    """The larger model that a text model is part of, every parameter on the meta device; None where there is none.

    Raises:
        ModelError: transformers cannot build it.
    """
    from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING

    if text_config(config) is config or type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return None
    make = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]._from_config
    return _build(make, config)


def dense_end_weights(model: "PreTrainedModel") -> set[str]:
    """Names of the parameters that stay in 16 bits: those of the input embeddings and of the output head."""
    ends = ends_of(model).items()
    return {f"{name}.{leaf}" for name, module in ends for leaf, _ in module.named_parameters(recurse=False)}
