"""A base less what its adapters begin with, for the ways to begin that take their first value out of the weights.

    pissa   the r largest singular values and vectors of W (Meng et al. 2024, arXiv 2404.02948)
    olora   the first r columns of Q and rows of R, of W = Q R (Büyükakyüz 2024, arXiv 2406.01775)

Training begins with W = (W - s B A) + s B A: only the first part is frozen, and put into four bits. It is smaller than
W, so that less is lost. The names are PEFT's, which does the same.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from nybble.calibration.adapter_init import leading_columns, nearest_product
from nybble.errors import ConfigError
from nybble.sources.stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[Tensor, Tensor]
PRODUCTS: Mapping[str, Callable[[Tensor, int, float], Pair]] = {"pissa": nearest_product, "olora": leading_columns}


class ResidualSource(StoredModel):
    """W - s B A of every adapted layer, all else as the source has it, one tensor at a time.

    Args:
        source: in 16 bits.
        way: one of PRODUCTS.
        ranks: of each adapted layer, (r, s): the rank, and what the product is multiplied by.

    Raises:
        ConfigError: one of them is the embedding or the head, which stay as they are.
    """

    def __init__(self, source: StoredModel, way: str, ranks: Mapping[str, tuple[int, float]]):
        if ends := sorted(set(ranks) - set(source.linears)):
            raise ConfigError(
                f"init is {way}, and {ends[0]} gets an adapter.",
                f"--init {way} is for adapters on linear layers of the blocks.",
                "Leave it out of --target-modules, or use --init default.",
            )
        self.source, self.way, self.ranks = source, way, dict(ranks)
        self.name, self.config, self.dense_dtype = source.name, source.config, source.dense_dtype
        self.task = source.task
        self._begun: dict[str, Pair] = {}

    @property
    def skeleton(self) -> "PreTrainedModel":
        return self.source.skeleton

    @property
    def notes(self) -> tuple[str, ...]:
        return self.source.notes

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.source.load_tokenizer()

    def load_generation_config(self) -> "GenerationConfig":
        return self.source.load_generation_config()

    def fingerprint(self) -> str:
        text = f"{self.source.fingerprint()} less {self.way} {sorted(self.ranks.items())}"
        return hashlib.sha256(text.encode()).hexdigest()

    def tensor_names(self) -> list[str]:
        return list(self.source.placements)

    def read(self, name: str) -> Tensor:
        """A tensor as the module keeps it, adapted weights in fp32."""
        tensor, layer = self.source.read_parameter(name), name.removesuffix(".weight")
        assert isinstance(tensor, Tensor)
        if layer not in self.ranks:
            return tensor
        a, b = self._product(layer)
        return tensor.float() - self.turned(layer, self.ranks[layer][1] * b @ a)

    def read_part(self, name: str, index: int) -> Tensor:
        """An expert, which has no adapter that begins so."""
        expert = self.source.read_part(self.source.placements[name].name, index)
        assert isinstance(expert, Tensor)
        return expert

    def hand_over(self, layer: str) -> Pair:
        """A `(r, in)` and B `(out, r)`, fp32, that a layer's adapter begins with; they are not kept any longer."""
        pair = self._product(layer)
        del self._begun[layer]
        return pair

    def _product(self, layer: str) -> Pair:
        if layer not in self._begun:
            weight = self.source.read_linear(layer)
            assert isinstance(weight, Tensor)
            self._begun[layer] = PRODUCTS[self.way](weight.float(), *self.ranks[layer])
        return self._begun[layer]
