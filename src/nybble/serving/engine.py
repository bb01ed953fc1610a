"""Who answers: runs that share one base in memory, one request at a time, from a bounded queue.

Each run is a model of its own whose frozen tensors are the others' too: copying the base's modules with its
parameters kept costs nothing, and no adapter has to be swapped in or out between requests. One thread computes; the
event loop that serves clients is never blocked. What is left out: batching requests that wait at the same time.
"""

import asyncio
import copy
import queue
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble.data.template import ChatTemplate
from nybble.errors import NybbleError, RunError
from nybble.events import Listener, silent
from nybble.generation.generate import Sampling, generate
from nybble.layers.convert import enable_adapters
from nybble.layers.precision import set_up
from nybble.options.groups import MachineOptions
from nybble.options.option import flat
from nybble.runs.adapter_files import StoredAdapter, read_adapter
from nybble.runs.open_run import OpenRun, check_answers, load_frozen, load_tuned, open_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAME = ("format", "block_size", "double_quant", "mixed", "quality", "template")  # options that runs on one base share


class QueueFull(Exception):
    """As many requests wait as are allowed to."""


class _Cancelled(Exception):
    """Raised where tokens are handed over, to end a request whose client has gone."""


@dataclass(frozen=True)
class ServedModel:
    """One name that clients may ask for."""

    name: str
    model: "PreTrainedModel"
    template: ChatTemplate


@dataclass
class Job:
    """A request: what to answer, and where its tokens go. None ends them, an exception says why there are no more."""

    served: ServedModel
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stop_ids: Sequence[int]
    beside: Mapping[str, Tensor]
    loop: asyncio.AbstractEventLoop
    tokens: "asyncio.Queue[int | Exception | None]" = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def give(self, token: int | Exception | None) -> None:
        """Hand a token to the request; the computing thread calls this."""
        self.loop.call_soon_threadsafe(self.tokens.put_nowait, token)


class Engine:
    """Answers requests one after another in a thread of its own.

    Args:
        models: by name.
        max_queue: requests that may wait or run.
    """

    def __init__(self, models: Sequence[ServedModel], max_queue: int, threads: int | None = None):
        self.models = {served.name: served for served in models}
        self._room = threading.BoundedSemaphore(max_queue)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = threads
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def answer(
        self,
        served: ServedModel,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: Sequence[int] = (),
        beside: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> AsyncGenerator[int, None]:
        """The tokens of an answer as they come. Leaving the iterator early ends the computation.

        Args:
            stop_ids: tokens that end it, beside those of the model's template.
            beside: what the model is given of the prompt's pictures, by name.

        Raises:
            QueueFull: before the first token.
            NybbleError: the prompt does not fit into the model's context.
        """
        if not self._room.acquire(blocking=False):
            raise QueueFull
        job = Job(served, prompt, max_new_tokens, sampling, stop_ids, beside, asyncio.get_running_loop())
        self._jobs.put(job)
        try:
            while (token := await job.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise token
                yield token
        finally:
            job.cancelled.set()

    def stop(self) -> None:
        """End the thread once what it computes now is done."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        while (job := self._jobs.get()) is not None:
            try:
                if not job.cancelled.is_set():
                    _compute(job)
            finally:
                self._room.release()


def _compute(job: Job) -> None:
    def hand_over(_: int, token: int) -> None:
        if job.cancelled.is_set():
            raise _Cancelled
        job.give(token)

    try:
        generate(
            job.served.model,
            [job.prompt],
            stop_ids=[*job.served.template.stop_ids, *job.stop_ids],
            max_new_tokens=job.max_new_tokens,
            sampling=job.sampling,
            on_token=hand_over,
            beside=job.beside,
        )
        job.give(None)
    except _Cancelled:
        return
    except Exception as error:  # the client is told, and the thread goes on with the next request
        job.give(error)


def load_models(runs: Sequence[Path], machine: MachineOptions, report: Listener = silent) -> list[ServedModel]:
    """The runs, each under its folder's name, and their base under its own.

    Raises:
        RunError: two runs have the same name, or other bases.
    """
    opened = [open_run(run, report) for run in runs]
    for each in opened:
        check_answers(each)
        _check_decoder(each)
    first, (device, dtype) = opened[0], set_up(machine)
    for other in opened[1:]:
        _check_same_base(first, other)
    if whole := [run for run in opened if run.full]:
        if len(opened) > 1:
            raise RunError(
                f"{whole[0].run.path} trained every weight, and {len(opened)} runs are to be served.",
                "Runs that are served together share their base; such a run has none.",
                "Serve it alone, on another --port.",
            )
        name = first.run.path.resolve().name
        return [ServedModel(name, load_tuned(first, dtype, device, report), first.template)]
    base = load_frozen(first, dtype, device, report)
    served: list[ServedModel] = []
    for run in opened:
        name = run.run.path.resolve().name
        if name in [model.name for model in served]:
            raise RunError(
                f"Two runs are named {name}.", "Models are served under their folders' names.", "Rename one."
            )
        tuned = _with_shared_tensors(base)
        read_adapter(tuned, run.run.adapter)
        served.append(ServedModel(name, tuned.requires_grad_(False).eval(), run.template))
    return [*served, ServedModel(f"{first.source.name} (base)", _untuned(base, first), first.template)]


def _check_decoder(opened: OpenRun) -> None:
    """Refuse an encoder-decoder, which has no conversations.

    Raises:
        RunError: it is one.
    """
    if opened.source.task.prompted:
        raise RunError(
            f"The run in {opened.run.path} is {opened.source.task.words}, which answers one prompt.",
            "Served are decoders, which go on with conversations and texts.",
            'Ask it with nybble.open_run(RUN).generate("..."), or `nybble chat --run RUN --prompt ..`.',
        )


def _untuned(base: "PreTrainedModel", run: OpenRun) -> "PreTrainedModel":
    """The base; with what the run's adapter took out of it back in, where it did."""
    if not StoredAdapter(run.run.adapter).taken_by:
        return base
    model = _with_shared_tensors(base)
    read_adapter(model, run.run.adapter)
    enable_adapters(model, False)
    return model.requires_grad_(False).eval()


def _with_shared_tensors(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of the modules on the same tensors."""
    tensors = (*model.parameters(), *model.buffers())
    clone: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return clone


def _check_same_base(first: OpenRun, other: OpenRun) -> None:
    options, others = flat(first.config), flat(other.config)
    differing = [name for name in SAME if options[name] != others[name]]
    if first.template.chat_template != other.template.chat_template:
        differing.append("chat_template")
    other_bits = not differing and first.formats != other.formats
    if first.base.fingerprint() != other.base.fingerprint() or differing or other_bits:
        what = f"other options: {', '.join(differing)}" if differing else f"the base {other.source.name}"
        what = "other formats of its layers" if other_bits else what
        raise RunError(
            f"{other.run.path} has {what} than {first.run.path}.",
            "Runs that are served together share their base and its four bits.",
            "Serve it on another --port.",
        )


def as_error(error: Exception) -> str:
    """What a client may be told: a user's mistake in words, else only that it was none."""
    return str(error) if isinstance(error, NybbleError) else "The server failed to answer; its log says why."
