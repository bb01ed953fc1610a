"""`nybble.open_run`: a run of `nybble.train`, from its folder."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nybble.api.keywords import RunLike, as_options
from nybble.data.examples import Example, Message
from nybble.data.turn_pictures import with_pictures
from nybble.data.turns import link_results, read_turns
from nybble.errors import ConfigError, DataError
from nybble.events import Listener, silent
from nybble.generation.generate import Sampling, generate
from nybble.generation.text_pieces import TextPieces
from nybble.layers.precision import set_up
from nybble.options.groups import MachineOptions
from nybble.options.option import build_options
from nybble.options.verbs import AnswerConfig, OpenConfig, TrainConfig
from nybble.runs import open_run as opening
from nybble.runs.events import read_events

if TYPE_CHECKING:
    from torch import Tensor


class Run:
    """An opened run; its model is loaded by the first answer. Wherever a run's path is taken, it is too.

    Args:
        opened: its folder, options, base and template.
        machine: where, and in which type, answers are computed.
        report: told what is loaded.
    """

    def __init__(self, opened: opening.OpenRun, machine: MachineOptions, report: Listener = silent):
        self._opened, self._machine, self._report = opened, machine, report

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._opened.run.path

    @property
    def config(self) -> TrainConfig:
        """The options that it was trained with."""
        return self._opened.config

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, in PEFT's format; of a run that has one."""
        return self._opened.run.adapter

    @property
    def trained(self) -> Path:
        """The folder of what was trained: the adapter, or the whole model of a run that trained every weight."""
        return self._opened.trained

    @property
    def loss_before(self) -> float | None:
        """Held-out loss before the first step, nats a supervised token; None where it was not evaluated."""
        return next((event["loss"] for event in self._evaluations() if event["step"] == 0), None)

    @property
    def loss_after(self) -> float | None:
        """Held-out loss of the last evaluation, nats a supervised token; None where there was none."""
        return next((event["loss"] for event in reversed(self._evaluations())), None)

    def events(self) -> Iterator[dict[str, Any]]:
        """What happened in the run, in order: `{"event": kind, ...}`, as `events.jsonl` has it."""
        return read_events(self._opened.run.events)

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str:
        """The tuned model's answer.

        Args:
            prompt: what the user says; or a conversation, turns of `{"role": ..., "content": ...}`, whose contents may
                be lists of parts with pictures, as in rows.
            system: system message before it.
            max_new_tokens: most tokens in the answer.
            temperature: 0 takes the likeliest token every time.
            top_p, top_k: sample among the likeliest tokens only; 1 and 0 sample among all.
            seed: of the sampling.

        Raises:
            ConfigError: an argument is not allowed.
            DataError: the prompt does not fit into the model's context, or the template refuses the conversation.
            RunError: the adapter is missing or damaged.

        Example:
            >>> nybble.open_run(run).generate("What is 3 plus 3?", max_new_tokens=8)
            'It is 6.'
        """
        opening.check_answers(self._opened)
        said = {"system": system, "prompt": prompt if isinstance(prompt, str) else None}
        numbers = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        options = build_options(AnswerConfig, said | numbers | {"seed": seed}).answers
        first = [] if options.system is None else [Message("system", options.system)]
        template = self._opened.template
        pieces = TextPieces(template.tokenizer)
        ids, beside = template.asked([*first, *_asked(prompt)])
        generate(
            self._model,
            [ids],
            stop_ids=template.stop_ids,
            max_new_tokens=options.max_new_tokens,
            sampling=Sampling(options.temperature, options.top_p, options.top_k, seed=options.seed),
            on_token=lambda _, token: pieces.add(token),
            beside=beside,
        )
        return pieces.text()

    def classify(self, texts: Sequence[Any]) -> list[Any]:
        """What a run of `--objective classify` says of texts, or of pictures: of each its likeliest class and how
        likely that is; of one that learnt numbers, "score" and the number; of one that learnt any number of classes a
        text, a list of those that are likelier than not.

        Args:
            texts: each a text, or two beside each other where the run was trained on such; or, of a run over pictures,
                the path or the bytes of a picture's file.

        Raises:
            ConfigError: the run is one of a language model, or labels tokens.
            DataError: a picture cannot be decoded.
            RunError: the adapter is missing or damaged.
        """
        from nybble.evaluation.asked import classify_pictures, classify_texts

        if self._opened.source.task.kind == "pictures":
            return classify_pictures(*self._labels_of("pictures"), texts)
        return classify_texts(*self._labels_of("scores"), texts, self.config.data.max_seq_len)

    def tag(self, texts: Sequence[str | Sequence[str]]) -> list[Any]:
        """What a run of `--objective classify` over labels of tokens says.

        Args:
            texts: each a list of words, as of a run that was trained on words; or a text, as of one that was trained
                on texts with entities.

        Returns:
            Of a list of words the label of each, None where they are too many for the run's max_seq_len. Of a text
            `(kind, start, end)` of each entity: characters, the end not included.

        Raises:
            ConfigError: the run is one of a language model, or of whole texts.
            RunError: the adapter is missing or damaged.
        """
        from nybble.evaluation.asked import are_texts, check_asked, is_text, tag_texts, tag_words

        asked, length = self._labels_of("tags"), self.config.data.max_seq_len
        check_asked(texts, lambda text: is_text(text) or are_texts(text), "a text, or a list of words")
        whole = iter(tag_texts(*asked, [text for text in texts if isinstance(text, str)], length))
        words = iter(tag_words(*asked, [text for text in texts if not isinstance(text, str)], length))
        return [next(whole) if isinstance(text, str) else next(words) for text in texts]

    def _labels_of(self, kind: Literal["scores", "tags", "pictures"]) -> tuple[Any, Any, Any]:
        """Model, task and tokenizer of a run that learnt labels, of texts or of tokens.

        Raises:
            ConfigError: it learnt something else.
        """
        self._check_objective("classify")
        task = self._opened.source.task
        if task.kind != kind:
            raise ConfigError(
                f"The run in {self.path} is of {task.words}.",
                f"Allowed here: runs over labels of {'tokens' if kind == 'tags' else 'texts'}.",
                f"Ask it for {'classify(texts)' if kind == 'tags' else 'tag(texts)'}.",
            )
        return self._scored, task, self._opened.template.tokenizer

    def embed(self, texts: Sequence[str]) -> "Tensor":
        """The embeddings of a run of `--objective embed`, fp32 `(texts, hidden)`, each of length 1, on the CPU.

        Raises:
            ConfigError: the run is of another objective, or what is given is no list of texts.
            RunError: the adapter is missing or damaged.
        """
        from nybble.data.text_rows import encode_texts
        from nybble.evaluation.asked import check_asked, is_text
        from nybble.evaluation.embeddings import embed_texts

        self._check_objective("embed")
        tokenizer, pooling = self._opened.template.tokenizer, self._opened.source.task.pooling
        assert pooling is not None
        check_asked(texts, is_text, "a text")
        rows = [encode_texts(tokenizer, [text], "text").truncate(self.config.data.max_seq_len) for text in texts]
        return embed_texts(self._embedded, rows, pooling)

    def rewards(self, conversations: Sequence[tuple[str, str] | Sequence[Mapping[str, Any]]]) -> list[float]:
        """What a run of `--objective reward` gives the last answer of each conversation.

        Args:
            conversations: each a list of turns such as `{"role": "user", "content": ...}`, the last the assistant's;
                or a tuple of what the user says and the answer.

        Raises:
            ConfigError: the run is of another objective, or a conversation is none.
            DataError: the template refuses a conversation, or it is longer than the run's `max_seq_len`.
            RunError: the adapter is missing or damaged.
        """
        from nybble.data.reward_rows import conversation_row
        from nybble.evaluation.classes import scores_of

        self._check_objective("reward")
        template, length = self._opened.template, self.config.data.max_seq_len
        rows = [conversation_row(template, _as_example(each), length) for each in conversations]
        return [float(scores[0, 0]) for scores in scores_of(self._scored, rows)]

    def _check_objective(self, name: str) -> None:
        """Refuse to ask a run for what only runs of another objective give.

        Raises:
            ConfigError: it is so.
        """
        own = self.config.objective.objective
        if own != name:
            raise ConfigError(
                f"The run in {self.path} is of --objective {own}.",
                f"Allowed: runs of `nybble train --objective {name}`.",
                f"Ask it for what it gives: {opening.ASKED.get(own, 'generate(prompt)')}.",
            )

    @cached_property
    def _embedded(self) -> Any:
        from nybble.layers.embedded import EmbeddedModel

        return EmbeddedModel.of(self._model)

    @cached_property
    def _scored(self) -> Any:
        from nybble.evaluation.classes import scored_model

        return scored_model(self._opened, self._model)

    @cached_property
    def _model(self) -> Any:
        device, dtype = set_up(self._machine)
        return opening.load_tuned(self._opened, dtype, device, self._report)

    def _evaluations(self) -> list[dict[str, Any]]:
        return list(read_events(self._opened.run.events, "eval"))


def _as_example(conversation: tuple[str, str] | Sequence[Mapping[str, Any]]) -> Example:
    match conversation:
        case (str(prompt), str(answer)):
            return Example("a conversation", prompt=prompt, completion=answer)
        case [Mapping(), *_]:
            return Example("a conversation", messages=tuple(_turns(conversation)))
    allowed = "Allowed: a list of turns that ends in an answer, or a tuple of what the user says and the answer."
    raise ConfigError(f"A conversation is {conversation!r}.", allowed)


def _turns(prompt: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    if isinstance(prompt, str):
        return [Message("user", prompt)]
    try:
        read = read_turns([dict(turn) for turn in prompt], "prompt", "prompt", pictures=True)
        return list(with_pictures(Example("prompt", link_results(read, "prompt")), {}, None).conversation())
    except (TypeError, ValueError, DataError) as error:
        allowed = "Allowed: text, or a list of turns such as {'role': 'user', 'content': 'Hello.'}."
        raise ConfigError(f"prompt is {prompt!r}: {error}", allowed) from error


def _asked(prompt: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    """The same of what is to be answered."""
    turns = _turns(prompt)
    if turns[-1].role in ("assistant", "system"):
        raise ConfigError(
            f"prompt ends in a turn by {turns[-1].role}.",
            "Allowed: a conversation that ends in a user's turn, or in a tool's.",
            "Leave that turn out, or ask `nybble serve` to go on with it (continue_final_message).",
        )
    return turns


def open_run(run: RunLike, *, on_event: Listener = silent, **options: Any) -> Run:
    """Open a run that `nybble.train` or the command line made; no weights are read yet.

    Args:
        run: the path of its folder, or what `nybble.train` returned.
        on_event: told what is loaded, once something is.
        options: `device`, `compute_dtype` and `threads` as the flags of `nybble chat`.

    Raises:
        NybbleError: the folder holds no run, another version of nybble made it and this one cannot read it, or its base
            is another now.

    Example:
        >>> opened = nybble.open_run("runs/first")
        >>> opened.config.adapters.rank, opened.loss_after < opened.loss_before
        (4, True)
        >>> [event["step"] for event in opened.events() if event["event"] == "step"]
        [1, 2]
    """
    config = build_options(OpenConfig, as_options({"run": run} | options))
    return Run(opening.open_run(config.run.run, on_event), config.machine, on_event)
