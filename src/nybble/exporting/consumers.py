"""Artefacts, loaded the way those who use them load them, behind one small interface.

    peft       PEFT on the run's own base, its four bits widened to dense layers
    16bit      transformers
    nf4        transformers with bitsandbytes
    gguf       llama.cpp through llama-cpp-python; without it nybble's own GGUF reader
    gguf-lora  the gguf package's reader, and the matrices beside the run's own base

bitsandbytes 0.50.2 computes wrongly on CPUs in two ways (docs/lab-notes.md): what it loaded is therefore dequantised
by its own function, and multiplied by PyTorch. Rows that are no multiple of a block it also dequantises wrongly;
such models are read by nybble instead. What stands in for a consumer that is not installed says so in its name.
"""

import copy
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from nybble.data.prompted_rows import PromptedRow
from nybble.data.prompts import PromptTemplate
from nybble.data.template import ChatTemplate
from nybble.errors import ExportError
from nybble.evaluation.divergence import text_logits
from nybble.events import Listener, silent
from nybble.exporting.gguf_keys import ARCHITECTURES, READABLE
from nybble.exporting.gguf_model import ADAPTER_FILE, MODEL_FILE, read_gguf_adapter
from nybble.generation.generate import generate
from nybble.layers.backbone import given_beside
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import attach_adapters
from nybble.layers.dense import is_encoder_decoder
from nybble.layers.lora import linear_features
from nybble.layers.quantized_experts import widen_experts
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.layers.seq2seq_lm import LABELS
from nybble.options.use_groups import ArtefactKind
from nybble.runs.adapter_files import StoredAdapter, read_adapter
from nybble.runs.open_run import OpenRun, load_frozen
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.skeleton import auto_class
from nybble.sources.task import TOKENS, Task
from nybble.sources.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CPU = torch.device("cpu")
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
BNB_ROW = 64  # elements that rows must be a multiple of for bitsandbytes' CPU kernels to be right


class Consumer(Protocol):
    """A loaded artefact.

    Attributes:
        name: of what loaded it, for the user.
        chat_template: the Jinja text that it would render conversations with.
        stop_ids: tokens at which it ends an answer by itself.
    """

    name: str
    chat_template: str | None
    stop_ids: frozenset[int]

    def logits(self, ids: Sequence[int], positions: Tensor, beside: Mapping[str, Tensor] = NOTHING) -> Tensor:
        """Logits after the tokens at `positions` of a text, `(N, vocabulary)` in fp32; or of an encoder-decoder, by
        which it chooses the tokens at `positions` of its answer to the text.

        Args:
            beside: what a vision-language model is given of the text's pictures, by name.
        """

    def answer(self, prompt: Sequence[int], max_new_tokens: int, beside: Mapping[str, Tensor] = NOTHING) -> list[int]:
        """The greedy continuation, as far as it goes by itself; a stop token, where it came to one, is not part."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that spells its special tokens."""


class NybbleConsumer:
    """A model in memory, through nybble's own layers."""

    def __init__(
        self, name: str, model: "PreTrainedModel", template: ChatTemplate, computed_by: type[CausalLM] = CausalLM
    ):
        self.name, self.model, self.template = name, model, template
        self.chat_template, self.stop_ids = template.chat_template, frozenset(template.stop_ids)
        self._causal_lm = computed_by.of(model)
        self.beside = self._causal_lm.beside

    def logits(self, ids: Sequence[int], positions: Tensor, beside: Mapping[str, Tensor] = NOTHING) -> Tensor:
        if LABELS not in beside:
            return text_logits(self._causal_lm, ids, positions, beside)
        row = PromptedRow.of(ids, beside[LABELS][0].tolist(), "held out")
        return self._causal_lm.logits(self._causal_lm.collate([row]), positions).float()

    def answer(self, prompt: Sequence[int], max_new_tokens: int, beside: Mapping[str, Tensor] = NOTHING) -> list[int]:
        stops = sorted(self.stop_ids)
        return generate(self.model, [prompt], stop_ids=stops, max_new_tokens=max_new_tokens, beside=beside)[0]

    def encode(self, text: str) -> list[int]:
        return self.template.encoder.encode(text)


class TransformersConsumer:
    """A model in transformers' own layers, with the tokenizer and generation config that lie beside it."""

    def __init__(self, name: str, model: Any, tokenizer: "PreTrainedTokenizerBase", stop_ids: Sequence[int]):
        self.name, self.model, self.tokenizer = name, model.eval(), tokenizer
        self.chat_template, self.stop_ids = tokenizer.chat_template, frozenset(stop_ids)

    @torch.no_grad()
    def logits(self, ids: Sequence[int], positions: Tensor, beside: Mapping[str, Tensor] = NOTHING) -> Tensor:
        given = given_beside(self.model, beside, CPU)
        return self.model(input_ids=torch.tensor([list(ids)]), use_cache=False, **given).logits[0, positions].float()

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], max_new_tokens: int, beside: Mapping[str, Tensor] = NOTHING) -> list[int]:
        ids = torch.tensor([list(prompt)])
        begun = 1 if is_encoder_decoder(self.model) else len(prompt)
        new = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=min(self.stop_ids),
            do_sample=False,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            **given_beside(self.model, beside, CPU),
        )[0, begun:].tolist()
        return new[:-1] if new and new[-1] in self.stop_ids else new

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class LlamaCppConsumer:
    """A GGUF file in llama.cpp.

    Args:
        context: tokens that the longest text needs.
        adapter: a GGUF adapter to put on it.
    """

    def __init__(self, name: str, file: Path, context: int, adapter: Path | None = None):
        import llama_cpp

        self.name, self._ffi = name, llama_cpp
        lora = None if adapter is None else str(adapter)
        self._llama = llama_cpp.Llama(
            str(file),
            n_ctx=context,
            n_batch=context,
            n_ubatch=context,
            n_threads=torch.get_num_threads(),
            logits_all=True,
            lora_path=lora,
            verbose=False,
        )
        self.chat_template = self._llama.metadata.get("tokenizer.chat_template")
        vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        ends = (token for token in range(self._llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, token))
        self.stop_ids = frozenset(ends)

    def logits(self, ids: Sequence[int], positions: Tensor, beside: Mapping[str, Tensor] = NOTHING) -> Tensor:
        self._llama.reset()
        self._llama.eval(list(ids))
        return torch.from_numpy(self._llama.scores[: len(ids)])[positions]

    def answer(self, prompt: Sequence[int], max_new_tokens: int, beside: Mapping[str, Tensor] = NOTHING) -> list[int]:
        new: list[int] = []
        self._llama.reset()
        self._llama.eval(list(prompt))
        while True:
            token = int(self._llama.scores[self._llama.n_tokens - 1].argmax())
            if token in self.stop_ids:
                return new
            new.append(token)
            if len(new) == max_new_tokens:
                return new
            self._llama.eval([token])

    def encode(self, text: str) -> list[int]:
        return list(self._llama.tokenize(text.encode(), add_bos=False, special=True))


# ---- loading each kind ---------------------------------------------------------------------------


def load_consumer(
    kind: ArtefactKind, opened: OpenRun, artefact: Path, dtype: torch.dtype, context: int, report: Listener = silent
) -> Consumer:
    """The artefact of this kind in the consumer that is made for it, or in what stands in for it.

    Args:
        artefact: the folder that was written.
        dtype: of the products, where the consumer lets it be chosen.
        context: tokens that the longest text needs.
    """
    if kind is ArtefactKind.PEFT:
        return _load_peft(opened, artefact, dtype, report)
    if kind is ArtefactKind.DENSE:
        return _load_folder("transformers", artefact, dtype, opened.source.task)
    if kind is ArtefactKind.FOUR_BIT:
        return _load_four_bit(opened, artefact, dtype)
    if kind is ArtefactKind.GGUF:
        return _load_gguf(opened, artefact / MODEL_FILE, dtype, context)
    assert kind is ArtefactKind.GGUF_ADAPTER, kind
    return _load_gguf_adapter(opened, artefact / ADAPTER_FILE, dtype, context, report)


def _load_peft(opened: OpenRun, artefact: Path, dtype: torch.dtype, report: Listener) -> Consumer:
    base = base_of_adapters(opened, dtype, report)
    if not _installed("peft"):
        read_adapter(base, artefact)
        name = "nybble's own reader of adapters (PEFT is not installed)"
        return NybbleConsumer(name, base.eval(), _template(artefact, opened), opened.computed_by)
    from peft import PeftModel

    widen(base)
    tuned = PeftModel.from_pretrained(base, artefact)
    return TransformersConsumer(
        "PEFT on the run's base, widened", tuned, load_tokenizer(str(artefact)), opened.template.stop_ids
    )


def _load_folder(
    name: str, artefact: Path, dtype: torch.dtype, task: Task = TOKENS, **options: Any
) -> TransformersConsumer:
    model = auto_class(task).from_pretrained(artefact, dtype=dtype, **options)
    stops = model.generation_config.eos_token_id
    return TransformersConsumer(
        name, model, load_tokenizer(str(artefact)), stops if isinstance(stops, list) else [stops]
    )


def _load_four_bit(opened: OpenRun, artefact: Path, dtype: torch.dtype) -> Consumer:
    missing = [package for package in ("bitsandbytes", "accelerate") if not _installed(package)]
    source = open_model(str(artefact)).for_task(opened.source.task)
    why = f"{' and '.join(missing)} not installed" if missing else ""
    why = "only nybble reads experts in few bits" if source.experts else why
    stored = source.in_four_bits or set()
    rows = [linear_features(source.skeleton.get_submodule(n))[0] for n in source.linears if n in stored]
    if not why and any(row % BNB_ROW for row in rows):
        why = "bitsandbytes' CPU kernel reads rows of this width wrongly"
    if why:
        model = load_model(source, None, dtype)
        return NybbleConsumer(f"nybble's own reader ({why})", model, _template(artefact, opened))
    consumer = _load_folder(
        "transformers + bitsandbytes, dequantised by it, multiplied by PyTorch", artefact, dtype, device_map="cpu"
    )
    _widen_bitsandbytes(consumer.model, dtype)
    nn.Module.to(consumer.model, dtype)  # a quantised model refuses its own; nothing quantised is left in this one
    return consumer


def _load_gguf(opened: OpenRun, file: Path, dtype: torch.dtype, context: int) -> Consumer:
    if _installed("llama_cpp"):
        return LlamaCppConsumer("llama.cpp", file, context)
    if ARCHITECTURES[opened.source.config.model_type] not in READABLE:
        raise ExportError(
            f"Nothing here reads GGUF files of {opened.source.config.model_type} models.",
            "llama.cpp does, through the package llama-cpp-python, which is not installed.",
            "Install it and export again.",
        )
    source = open_model(str(file))
    template = ChatTemplate(source.load_tokenizer(), opened.config.data.template)
    name = "nybble's own GGUF reader (llama-cpp-python is not installed)"
    return NybbleConsumer(name, load_model(source, None, dtype), template)


def _load_gguf_adapter(opened: OpenRun, file: Path, dtype: torch.dtype, context: int, report: Listener) -> Consumer:
    """On the very base that was trained on, so that what differs is the adapter."""
    model = base_of_adapters(opened, dtype, report)
    alpha, matrices = read_gguf_adapter(file, opened.source)
    ranks = {re.escape(layer): a.shape[-2] for layer, (a, _) in matrices.items()}
    adapters = attach_adapters(model, matrices, rank=1, alpha=alpha, rank_pattern=ranks)
    with torch.no_grad():
        for name, adapter in adapters.items():
            adapter.lora_A.copy_(matrices[name][0])
            adapter.lora_B.copy_(matrices[name][1])
    return NybbleConsumer("the gguf package's reader, on the run's base", model.eval(), opened.template)


def _template(artefact: Path, opened: OpenRun) -> ChatTemplate:
    if opened.source.task.prompted:
        return PromptTemplate(load_tokenizer(str(artefact)))
    return ChatTemplate(load_tokenizer(str(artefact)), opened.config.data.template)


def base_of_adapters(opened: OpenRun, dtype: torch.dtype, report: Listener) -> "PreTrainedModel":
    """The run's base; with what its adapters took out of it back in, where they did."""
    model, adapter = load_frozen(opened, dtype, CPU, report), StoredAdapter(opened.run.adapter)
    if not adapter.taken_by:
        return model
    widen(model)
    for name in adapter.names:
        linear = model.get_submodule(name)
        begun = adapter.initial(name, *linear_features(linear))
        assert begun is not None
        with torch.no_grad():
            weight = linear.weight.float() + adapter.scaling_of(name) * begun[1] @ begun[0]
            linear.weight.copy_(weight)
    return model


def widen(model: "PreTrainedModel") -> None:
    """Put dense layers and experts in place of those in few bits."""
    for dtype in {module.compute_dtype for module in model.modules() if isinstance(module, QuantizedLinear)}:
        widen_experts(model, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            _set_dense(model, name, module.dequantize(), module.bias)


def _widen_bitsandbytes(model: nn.Module, dtype: torch.dtype) -> None:
    """The same for bitsandbytes' layers, by its own function, which rounds to the dtype that a weight recorded."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            state = copy.copy(module.weight.quant_state)
            state.dtype = dtype
            _set_dense(model, name, bnb.functional.dequantize_4bit(module.weight.data, state), module.bias)


def _set_dense(model: nn.Module, name: str, weight: Tensor, bias: Tensor | None) -> None:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    model.set_submodule(name, linear)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
