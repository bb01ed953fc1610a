"""What every source of a base model offers, wherever it comes from."""

from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

Kind = Literal["folder", "hub", "gguf", "bundled"]


class ModelSource(Protocol):
    """What can be asked of a base model before it is loaded.

    Attributes:
        name: what the user called it.
        kind: where it comes from.
        config: of transformers, without a quantisation entry.
        quant_spec: the four-bit format that the model is already in, else None.
        dense_dtype: in which embeddings and head are kept: fp16 where the model is stored in fp16, else bf16.
        notes: sentences the user should see.
    """

    name: str
    kind: Kind
    config: "PretrainedConfig"
    quant_spec: QuantSpec | None
    dense_dtype: torch.dtype

    @property
    def notes(self) -> tuple[str, ...]: ...

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer, or the one that was named instead."""
        ...

    def load_generation_config(self) -> "GenerationConfig":
        """How the model's makers generate with it; end-of-turn tokens among others."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 over the config, every tensor's name, type and shape, and samples of its bytes."""
        ...

    def tensor_names(self) -> list[str]:
        """Names as transformers has them, in the order in which reading them is quickest."""
        ...

    def is_quantized(self, name: str) -> bool:
        """Whether `read` gives this one as a QuantizedTensor."""
        ...

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """One tensor, in memory that nothing else refers to: it is gone when the caller drops it."""
        ...
