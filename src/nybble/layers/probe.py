"""Whether a way of computing a model trains it on its own loss: asked of the model at hand before the first step.

A document of a few tokens goes through the model's own forward, alone, and through the way that is to be trained,
between two others. Compared are the logits, the loss and the gradients of the adapters, with random B (A has no
gradient where B is 0), in the dtype that will run, through the same four-bit modules. Only some tokens of the
document count in the loss, so that what they must not see is told by gradients that are zero exactly, whatever the
dtype: the document's later tokens (else the model is no decoder) and its neighbours (else they are mixed).

It costs two forward and two backward passes over some twenty tokens, in which the whole base is read. Adapters,
gradients, buffers and the random generators are left as they were.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nybble.data.examples import EncodedExample
from nybble.data.packing import Batch, collate
from nybble.errors import ModelError, first_line, foreign_errors
from nybble.kernels.heap import TrimmedHeap
from nybble.layers.backbone import Layout, accepted, beside_tokens
from nybble.layers.convert import adapters_of
from nybble.layers.dense import input_embedding
from nybble.layers.rotary import length_of_change
from nybble.layers.streamed import BlockStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nybble.layers.batch_model import BatchModel
    from nybble.layers.causal_lm import CausalLM

LENGTHS = (5, 9, 12)  # of the documents; the one in the middle is asked about
ASKED = 1  # its place
FIRST, LAST = 2, 7  # its positions that have a target, the last not included
RANDOM_B = 0.1  # how far a random B moves the output of a layer whose input has elements of size 1
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # what roundings alone may come to
SAVED_A_TRIM = 64  # of the tensors that the model's own pass saves: some three blocks'
MOST_PARAMETERS = 2**24  # of adapters whose gradients are compared; of more, some layers


class Part(StrEnum):
    """What can differ from a model's own forward and loss."""

    CAUSALITY = "causality"
    LOSS = "the loss"
    PACKING = "packing"
    HEAD = "the head"
    GRADIENT = "the gradient"


@dataclass(frozen=True)
class Difference:
    """Where a way differs from the model's own.

    Args:
        size: relative, for logits, loss and gradients.
    """

    part: Part
    size: float


@dataclass(frozen=True)
class Outcome:
    """What a document's supervised positions gave.

    Args:
        logits: fp32 `(positions, vocabulary)`.
        loss: mean over them, in nats.
        gradients: of the compared parameters.
        embeddings: gradients of what the embedding gave, one for each time that it was asked, where there is one.
    """

    logits: Tensor
    loss: float
    gradients: list[Tensor]
    embeddings: list[Tensor | None]


class Probe:
    """A model's own forward and loss, to compare ways with.

    Args:
        model: its adapters, if it has any, are compared; they are as they were when a method returns.
        store: of a streamed base's blocks.

    Raises:
        ModelError: the model's states see later tokens, or its loss is not that of the next token.
    """

    def __init__(self, model: "PreTrainedModel", store: BlockStore | None = None):
        self.model, self.store = model, store
        self.first, self.last = FIRST, LAST
        self._documents = self.documents()
        self._starts = _starts(model)
        with self._asking() as (parameters, embedded):
            self._own = [self._own_outcome(starts[ASKED], parameters, embedded) for starts in self._starts]

    def difference(self, way: "BatchModel") -> Difference | None:
        """Where a way of computing the model differs from its own forward and loss; None where it does not."""
        with self._asking() as (parameters, embedded):
            for own, starts in zip(self._own, self._starts, strict=True):
                found = self._compare(own, way, starts, parameters, embedded)
                if found is not None:
                    return found
        return None

    # ---- the model's own -------------------------------------------------------------------------

    def documents(self) -> list[Tensor]:
        """What the model is asked about: one, between two others."""
        return _documents(self.model)

    def _rows(self) -> list[EncodedExample]:
        """The documents as rows; none has a target yet."""
        return [EncodedExample(ids.int(), torch.zeros_like(ids, dtype=torch.bool), "probe") for ids in self._documents]

    def _collated(self, rows: list[EncodedExample], packed: bool) -> Batch:
        return collate(rows, packed)

    def _own_outcome(self, start: int, parameters: list[Tensor], embedded: list[Tensor]) -> Outcome:
        """The asked document alone, through the model's own forward."""
        batch = self._collated([self._rows()[ASKED]], packed=False).to(next(self.model.parameters()).device)
        ids, first, last = batch.input_ids[0], self.first, self.last
        labels = torch.full_like(ids, -100)
        labels[first + 1 : last + 1] = ids[first + 1 : last + 1]
        wanted: dict[str, Any] = {"input_ids": ids[None], "labels": labels[None], "use_cache": False}
        wanted |= beside_tokens(batch)
        if getattr(self.model.config.get_text_config(), "output_router_logits", False):
            wanted["output_router_logits"] = False  # routers are frozen: what balances them is not trained on
        if start:
            wanted["position_ids"] = (torch.arange(len(ids), device=ids.device) + start)[None]
        if self.store is not None:
            self.store.begin(will_return=True)
        taken = accepted(self.model, **wanted)
        heap = TrimmedHeap(SAVED_A_TRIM)
        explain = partial(self._fails, f"a text of {LENGTHS[ASKED]} tokens")
        with foreign_errors(explain), saved_tensors_hooks(heap.put, heap.get):
            output = self.model(**taken)
            logits = output.logits[0].float()
            loss = F.cross_entropy(logits[first:last], ids[first + 1 : last + 1])
            outcome = outcome_of(logits[first:last], loss, parameters, embedded)
        self._check_decoder(outcome)
        if "labels" in taken:
            # Some families leave it to the caller to shift the labels by a token.
            unshifted = F.cross_entropy(logits.detach(), labels)
            self._check_loss(float(output.loss.detach()), [outcome.loss, float(unshifted)])
        return outcome

    def _fails(self, what: str, error: Exception) -> ModelError:
        return ModelError(
            f"{type(self.model).__name__} fails over {what}, forward or backward: {first_line(error)}",
            "Allowed: models of transformers that can be trained on text alone.",
            "Choose another model, or update transformers.",
        )

    def _check_decoder(self, own: Outcome) -> None:
        if any(gradient is not None and gradient[0, self.last :].any() for gradient in own.embeddings):
            raise ModelError(
                f"{type(self.model).__name__} is no decoder: what it says of a token has seen the tokens after it.",
                "Allowed: causal language models.",
                "Give --model one that is made to continue text; an encoder is not.",
            )
        if not any(gradient is not None and gradient.any() for gradient in own.embeddings):
            raise ModelError(
                f"No gradient reaches the embedding of {type(self.model).__name__}, nor then its first adapters.",
                "Allowed: models of transformers whose forward pass can be differentiated to their first layer.",
            )
        if not all(part.isfinite().all() for part in (own.logits, *own.gradients)):
            raise ModelError(
                f"{type(self.model).__name__} gives numbers that are not finite for a text of {LENGTHS[ASKED]} tokens.",
                "Allowed: a model whose answers and gradients are finite.",
                "Look at its weights; or use --compute-dtype fp32.",
            )

    def _check_loss(self, loss: float, meant: Sequence[float]) -> None:
        if not any(abs(loss - each) <= self._tolerance * max(each, 1.0) for each in meant):
            raise ModelError(
                f"The loss of {type(self.model).__name__} is {loss:.4f}; that of the next token is {meant[0]:.4f}.",
                "Allowed: models that are trained to predict the next token.",
            )

    # ---- the way's -------------------------------------------------------------------------------

    def _compare(
        self, own: Outcome, way: "BatchModel", starts: Sequence[int], parameters: list[Tensor], embedded: list[Tensor]
    ) -> Difference | None:
        with self._modules_of(way):
            ours, asked = self._outcome_of(way, starts, parameters, embedded)
        tolerance = self._tolerance
        mixed = self._seen_elsewhere(ours, asked, way.backbone.layout)
        if mixed:
            return Difference(Part.PACKING, mixed)
        size = _relative([ours.logits], [own.logits])
        if not size <= tolerance:
            return Difference(Part.HEAD if way.backbone.layout == "single" else Part.PACKING, size)
        size = abs(ours.loss - own.loss) / max(own.loss, 1.0)
        if not size <= tolerance:
            return Difference(Part.HEAD, size)
        size = _relative(ours.gradients, own.gradients)
        return None if size <= tolerance else Difference(Part.GRADIENT, size)

    def _outcome_of(
        self, way: Any, starts: Sequence[int], parameters: list[Tensor], embedded: list[Tensor]
    ) -> tuple[Outcome, tuple[int, int]]:
        """What the way gives, and which of the batch's tokens that may depend on."""
        model: CausalLM = way
        batch, asked = self._lay_out(starts, model.backbone.layout)
        batch = batch.to(model.device)
        states = model.hidden(batch)
        loss = model.head.loss(states, batch.supervised_targets, float(batch.supervised_tokens))
        with torch.no_grad():
            logits = model.head.logits(states.detach()).float()
        return outcome_of(logits, loss, parameters, embedded), asked

    def _lay_out(self, starts: Sequence[int], layout: Layout) -> tuple[Batch, tuple[int, int]]:
        """A batch of the documents, whose positions begin at `starts`, and which of its flattened tokens the supervised
        positions may see.
        """
        lengths = [len(ids) for ids in self._documents]
        rows = []
        for number, row in enumerate(self._rows()):
            supervised = torch.zeros(len(row), dtype=torch.bool)
            supervised[self.first + 1 : self.last + 1] = number == ASKED
            rows.append(replace(row, supervised=supervised))
        batch = self._collated(rows, layout == "packed")
        offsets = torch.tensor(starts)
        if batch.attention_mask is None:
            offsets, first = offsets.repeat_interleave(torch.tensor(lengths))[None], sum(lengths[:ASKED])
        else:
            offsets, first = offsets[:, None] * batch.attention_mask, ASKED * batch.input_ids.shape[1]
        return replace(batch, position_ids=batch.position_ids + offsets), (first, first + self.last)

    def _seen_elsewhere(self, ours: Outcome, asked: tuple[int, int], layout: Layout) -> float:
        """How much what is asked depends on tokens that it must not see; 0 exactly where it does not."""
        return seen_elsewhere(ours.embeddings, asked, layout)

    def _modules_of(self, way: "BatchModel") -> AbstractContextManager[None]:
        """Around what the model's own code computes; what decoder blocks raise is nybble's own fault, and stays."""
        if way.verdict.path == "blocks":
            return nullcontext()
        return foreign_errors(partial(self._fails, f"{way.backbone.layout} rows of {list(LENGTHS)} tokens"))

    # ---- common ----------------------------------------------------------------------------------

    def _embeddings(self) -> list[nn.Module]:
        """What makes states of tokens."""
        return [input_embedding(self.model)]

    @property
    def _tolerance(self) -> float:
        return TOLERANCE[self._dtype]

    @contextmanager
    def _asking(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The model with random B, nothing dropped and gradients on; then as it was.

        Gives the parameters to compare, and a list to which each answer of the embedding is added.
        """
        embedded: list[Tensor] = []

        def cut(module: nn.Module, inputs: Any, output: Any) -> Any:
            states, *beside = output if isinstance(output, tuple) else (output,)  # how many patches a picture has
            self._dtype = states.dtype
            embedded.append(states.detach().requires_grad_())
            given = embedded[-1].clone()  # some models add to it in place
            return (given, *beside) if beside else given

        adapters = _some_adapters(self.model)
        parameters: list[Tensor] = [p for each in adapters for p in (each.lora_A, each.lora_B)]
        training = {module: module.training for module in self.model.modules()}
        buffers = {buffer: buffer.clone() for buffer in self.model.buffers()}
        kept_b = [each.lora_B.detach().clone() for each in adapters]
        generator = torch.Generator().manual_seed(0)
        handles = [embedding.register_forward_hook(cut) for embedding in self._embeddings()]
        try:
            self.model.eval()
            with torch.no_grad():
                for each in adapters:
                    noise = torch.randn(each.lora_B.shape, generator=generator).to(each.lora_B.device)
                    each.lora_B.add_(noise, alpha=RANDOM_B / (each.scaling * each.rank**0.5))
            with torch.enable_grad(), torch.random.fork_rng():
                yield parameters, embedded
        finally:
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for each, b in zip(adapters, kept_b, strict=True):
                    each.lora_B.copy_(b)
                for buffer, values in buffers.items():
                    buffer.copy_(values)
            for module, was in training.items():
                module.training = was


def outcome_of(logits: Tensor, loss: Tensor, parameters: list[Tensor], embedded: list[Tensor]) -> Outcome:
    gradients = torch.autograd.grad(loss, [*parameters, *embedded], allow_unused=True)
    own = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=False)]
    embeddings: list[Tensor | None] = list(gradients[len(parameters) :])
    embedded.clear()
    return Outcome(logits.detach(), float(loss.detach()), own, embeddings)


def _some_adapters(model: "PreTrainedModel") -> list[Any]:
    """The adapters that are in use; where they are too many, every n-th."""
    adapters = [each for each in adapters_of(model).values() if each.enabled and each.lora_B.requires_grad]
    total = sum(each.lora_A.numel() + each.lora_B.numel() for each in adapters)
    return adapters[:: max(1, -(-total // MOST_PARAMETERS))]


def _documents(model: "PreTrainedModel") -> list[Tensor]:
    """int64 `(tokens)` each: tokens from all over the vocabulary, but for those that mean something to the model."""
    config = model.config.get_text_config()
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    special = {token for each in named for token in (each if isinstance(each, list) else [each])}
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(config.vocab_size, generator=generator).tolist()
    ids = [token for token in order if token not in special][: sum(LENGTHS)]
    ids = (ids * sum(LENGTHS))[: sum(LENGTHS)]  # a vocabulary may be smaller
    return list(torch.tensor(ids).split(LENGTHS))


def _starts(model: "PreTrainedModel") -> list[tuple[int, ...]]:
    """Positions that the documents start at: 0; where a row's length changes its angles, also such that the asked one
    is longer than that and another one longer still, as if their first tokens had been cut off.
    """
    change = length_of_change(model)
    if change is None:
        return [(0, 0, 0)]
    return [(0, 0, 2 * change), (0, change - 2, 2 * change)]


def seen_elsewhere(embeddings: Sequence[Tensor | None], asked: tuple[int, int], layout: Layout) -> float:
    """How large the gradients of tokens are that the supervised positions must not see: 0 exactly where they do not.

    An answer of the embedding is for the whole batch, but for rows that go one at a time: then only the asked one's has
    a gradient, and begins at 0.
    """
    first, last = (0, asked[1] - asked[0]) if layout == "single" else asked
    rows = [gradient.flatten(0, -2) for gradient in embeddings if gradient is not None]
    return float(sum(torch.cat([row[:first], row[last:]]).norm() for row in rows))


def _relative(ours: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    """‖ours − own‖ / ‖own‖ of all tensors together, 0 where they are equal, without a copy of them all."""
    distance = math.hypot(*(float(torch.dist(a.float(), b.float())) for a, b in zip(ours, own, strict=True)))
    size = math.hypot(*(float(b.float().norm()) for b in own))
    return 0.0 if not distance else distance / size if size else math.inf
