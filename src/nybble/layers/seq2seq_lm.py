"""An encoder-decoder as training and evaluation see it: prompts and answers in, losses of the answers out.

transformers' own encoder and decoder are called; the loss head makes logits of the decoder's last states, a chunk at a
time, with whatever the model does there (T5 scales tied ones by 1/√d, BART adds `final_logits_bias`). Rows are padded.
What the decoder is given is the labels as the model itself shifts them.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.packing import IGNORE, Batch, widen
from nybble.data.prompted_rows import PromptedBatch, PromptedRow, collate_prompted
from nybble.errors import foreign_errors
from nybble.layers.backbone import Layout, ModuleForward, accepted
from nybble.layers.causal_lm import CausalLM
from nybble.layers.dense import input_embedding
from nybble.layers.loss_head import Head
from nybble.layers.probe import ASKED, FIRST, LAST, LENGTHS, Outcome, Probe, outcome_of, seen_elsewhere

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LABELS = "labels"  # what transformers' encoder-decoders are given an answer as


def shifted_labels(model: "PreTrainedModel", labels: Tensor) -> Tensor:
    """What the model's decoder is given for labels, int64 (B, A) with IGNORE behind each answer: by its own rule, or
    where it has none for callers by transformers' usual one, the decoder's start token and all labels but the last.
    """
    own: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        found: Tensor = own(labels=labels.clone())
        return found
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    return F.pad(labels[:, :-1], (1, 0), value=start).masked_fill(F.pad(labels[:, :-1], (1, 0)) == IGNORE, pad or 0)


def answer_states(model: "PreTrainedModel", prompts: Tensor, mask: Tensor | None, given: Tensor) -> Tensor:
    """The decoder's last states, `(B, A, hidden)`.

    Args:
        prompts: int64 `(B, T)`.
        mask: int64 `(B, T)`, 0 on padding.
        given: int64 `(B, A)`, the decoder's inputs.
    """
    encoder: Any = model.get_encoder()
    decoder: Any = model.get_decoder()
    read = encoder(input_ids=prompts, attention_mask=mask).last_hidden_state
    cross = {"encoder_hidden_states": read, "encoder_attention_mask": mask, "use_cache": False}
    states: Tensor = decoder(input_ids=given, **accepted(decoder, **cross)).last_hidden_state
    return states


class AnswerProbe(Probe):
    """Asks an encoder-decoder: what it gives of an answer's tokens between two other rows, and the gradients of its
    adapters, are what its own forward gives for the row alone, from labels.
    """

    def _own_outcome(self, start: int, parameters: list[Tensor], embedded: list[Tensor]) -> Outcome:
        """As `Probe` says."""
        row = self._row(ASKED)
        device = next(self.model.parameters()).device
        prompt, labels = row.encoder_ids.long()[None].to(device), row.label_ids.long()[None].to(device)
        if self.store is not None:
            self.store.begin(will_return=True)
        with foreign_errors(partial(self._fails, f"a prompt of {LENGTHS[ASKED]} tokens")):
            output = self.model(**accepted(self.model, input_ids=prompt, labels=labels, use_cache=False))
            logits = output.logits[0].float()
            loss = F.cross_entropy(logits[FIRST:LAST], labels[0, FIRST:LAST])
            outcome = outcome_of(logits[FIRST:LAST], loss, parameters, embedded)
        self._check_decoder(replace(outcome, embeddings=outcome.embeddings[-1:]))
        own = float(F.cross_entropy(logits.detach(), labels[0]))
        self._check_loss(float(output.loss.detach()), [own])
        return outcome

    def _outcome_of(
        self, way: Any, starts: Any, parameters: list[Tensor], embedded: list[Tensor]
    ) -> tuple[Outcome, tuple[int, int]]:
        """As `Probe` says; which tokens of the answers are asked about."""
        model: Seq2SeqLM = way
        rows = [self._row(number) for number in range(len(LENGTHS))]
        batch = model.collate(rows).to(model.device)
        states = model.hidden(batch)
        loss = model.head.loss(states, batch.supervised_targets, float(batch.supervised_tokens))
        with torch.no_grad():
            logits = model.head.logits(states.detach()).float()
        first = ASKED * batch.targets.shape[1]
        return outcome_of(logits, loss, parameters, embedded), (first, first + LAST)

    def _seen_elsewhere(self, ours: Outcome, asked: tuple[int, int], layout: Layout) -> float:
        """As `Probe` says, of prompts and of answers."""
        length = LENGTHS[ASKED]
        prompt = ASKED * max(LENGTHS), ASKED * max(LENGTHS) + length
        return seen_elsewhere(ours.embeddings[::2], prompt, layout) + seen_elsewhere(
            ours.embeddings[1::2], asked, layout
        )

    def _embeddings(self) -> list[Any]:
        """As `Probe` says: the encoder's and the decoder's."""
        parts: tuple[Any, Any] = (self.model.get_encoder(), self.model.get_decoder())
        return list(dict.fromkeys(input_embedding(part) for part in parts))

    def _row(self, number: int) -> PromptedRow:
        """A document as a prompt, answered by the next; only some tokens of the asked one's answer have a target."""
        prompt, answer = self._documents[number], self._documents[(number + 1) % len(LENGTHS)]
        supervised = torch.zeros(len(prompt) + len(answer), dtype=torch.bool)
        supervised[len(prompt) + FIRST : len(prompt) + LAST] = number == ASKED
        ids = torch.cat([prompt, answer]).int()
        return PromptedRow(ids, supervised, "probe", prompt_tokens=len(prompt))


class Seq2SeqLM(CausalLM):
    """A model of transformers whose encoder reads prompts and whose decoder writes answers, its adapters trained and
    its weights frozen, computed from batch to loss.

    Batches are of `collate`; their `supervised_positions` are positions of answers.
    """

    probe = AnswerProbe
    trainable = "encoder-decoders whose decoder is given shifted labels and the encoder's last states"

    @classmethod
    def _layouts(cls, head: Head, packing: bool) -> tuple[Layout, ...]:
        return super()._layouts(head, packing=False)

    def collate(self, rows: Sequence[Any]) -> PromptedBatch:
        """As `CausalLM` says: prompts padded, and answers padded."""
        return collate_prompted(rows, self.pad_id, partial(shifted_labels, self.module))

    def beside(self, row: EncodedExample) -> dict[str, Tensor]:
        """As `CausalLM` says: a row's answer."""
        if not isinstance(row, PromptedRow) or not len(row.label_ids):
            return {}
        return {LABELS: row.label_ids.long()[None]}

    def hidden(self, batch: Batch, positions: Tensor | None = None) -> Tensor:
        """The decoder's final states, as `BatchModel` says; positions are indices into the B * A of all answers."""
        self._check_layout(batch)
        assert isinstance(batch, PromptedBatch) and isinstance(self.backbone, ModuleForward)
        states = self.backbone.through(partial(self._states, batch)).flatten(0, 1)
        return states.index_select(0, batch.supervised_positions if positions is None else positions)

    def _states(self, batch: PromptedBatch) -> Tensor:
        """(B, A, hidden); zeros on the padding of rows that go through one at a time."""
        assert isinstance(self.backbone, ModuleForward)
        if self.backbone.layout != "single":
            prompts, answers = batch.input_ids.shape[1], batch.decoder_input_ids.shape[1]
            wide = widen(batch, self.backbone.rules.padded_width(prompts), self.pad_id)
            missing = self.backbone.rules.padded_width(answers) - answers
            given = F.pad(batch.decoder_input_ids, (0, missing), value=self.pad_id)
            return answer_states(self.module, wide.input_ids, wide.attention_mask, given)[:, :answers]
        rows, width = [], batch.targets.shape[1]
        lengths = zip(batch.document_lengths, batch.answer_lengths, strict=True)
        for number, (both, answer) in enumerate(lengths):
            prompt = batch.input_ids[number, None, : both - answer]
            given = batch.decoder_input_ids[number, None, :answer]
            states = answer_states(self.module, prompt, torch.ones_like(prompt), given)[0]
            rows.append(F.pad(states, (0, 0, 0, width - answer)))
        return torch.stack(rows)
