"""What a model is to give of a text, and so which head stands on it."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from nybble.errors import ModelError
from nybble.layers.convert import TOWERS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nybble.options.objective_groups import Pooling

HEADS = ("classifier", "score")  # what PEFT takes for the head of a model that gives scores

ARCHITECTURES: Mapping[Literal["scores", "tags", "pictures"], str] = {
    "scores": "ForSequenceClassification",
    "tags": "ForTokenClassification",
    "pictures": "ForImageClassification",
}  # how their names end

Towers = Literal["language", "vision", "all"]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Task:
    """What a model is for.

    Args:
        kind: tokens: the logits of the next token (AutoModelForCausalLM). seq2seq: the same of an answer, by a decoder,
            to a prompt that an encoder reads (AutoModelForSeq2SeqLM). scores: of the whole text
            (AutoModelForSequenceClassification). tags: scores of each token (AutoModelForTokenClassification).
            pictures: scores of a picture (AutoModelForImageClassification). states: its last states, no head
            (AutoModel). pictured: the logits of the next token of texts with pictures in them
            (AutoModelForImageTextToText).
        labels: what each score is of, in their order.
        problem: what scores are compared with, in transformers' words.
        stored_head: the head of the checkpoint gives these scores; else one begins anew.
        pooling: of states into one; None where they are not pooled, or that is not known yet.
        towers: of a model that reads texts and pictures, which of its parts are in few bits and adapted: the language
            model, the tower that reads pictures, or all.
    """

    kind: Literal["tokens", "seq2seq", "scores", "tags", "pictures", "states", "pictured"] = "tokens"
    labels: tuple[str, ...] = ()
    problem: Problem | None = None
    stored_head: bool = False
    pooling: "Pooling | None" = None
    towers: Towers = "language"

    @property
    def words(self) -> str:
        """For messages."""
        return {
            "tokens": "a causal language model",
            "seq2seq": "an encoder-decoder",
            "scores": "a model that gives scores",
            "tags": "a model that gives scores of tokens",
            "pictures": "a model that gives scores of pictures",
            "states": "a model that embeds texts",
            "pictured": "a language model that reads pictures",
        }[self.kind]

    @property
    def writes(self) -> bool:
        """Whether it goes on with a text, or answers one."""
        return self.kind in ("tokens", "seq2seq", "pictured")

    @property
    def prompted(self) -> bool:
        """Whether rows are taken apart into a prompt and its answer."""
        return self.kind == "seq2seq"

    @property
    def gives_scores(self) -> bool:
        """Whether a head stands on it whose scores have names."""
        return self.kind in ("scores", "tags", "pictures")

    @property
    def pads(self) -> bool:
        """Whether transformers' own pipelines of such models pad texts."""
        return self.kind in ("scores", "tags")

    def config(self, config: "PretrainedConfig") -> "PretrainedConfig":
        """A model's config as the model of this task has it."""
        if self.kind == "pictured":
            own = copy.deepcopy(config)
            setattr(own, TOWERS, self.towers)
            return own
        if not self.gives_scores:
            return config
        own = copy.deepcopy(config)
        own.id2label = dict(enumerate(self.labels))
        own.label2id = {label: number for number, label in enumerate(self.labels)}
        if self.kind in ("scores", "pictures"):
            own.problem_type = self.problem
        return own

    def to_json(self) -> dict[str, Any]:
        """Plain strings and lists."""
        said = asdict(self) | {"labels": list(self.labels)}
        return {name: value for name, value in said.items() if name != "towers" or self.kind == "pictured"}

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> Self:
        """What `to_json` gave.

        Raises:
            KeyError, TypeError: it is something else.
        """
        return cls(
            said["kind"],
            tuple(map(str, said["labels"])),
            said["problem"],
            bool(said["stored_head"]),
            said.get("pooling"),
            said.get("towers", "language"),
        )


TOKENS = Task()
SEQ2SEQ = Task("seq2seq")
SCORES = Task("scores", ("0", "1"), "single_label_classification")  # until rows have said which labels there are
PICTURES = Task("pictures", ("0", "1"), "single_label_classification")
TAGS = Task("tags", ("0", "1"), "single_label_classification")
REWARD = Task("scores", ("reward",), "regression")  # one number, and nothing that is done to it
STATES = Task("states")
PICTURED = Task("pictured")
TASKS: Mapping[str, Task] = {  # of objectives that learn no next tokens
    "classify": SCORES,
    "reward": REWARD,
    "embed": STATES,
}


def task_of(objective: str, config: "PretrainedConfig | None" = None) -> Task:
    """What a model that learns by an objective is for, before anything is known of its rows.

    Args:
        config: the model's: of a vision model pictures are told apart; one of texts and pictures that transformers has
            no text model for is taken whole; an encoder-decoder answers prompts.

    Raises:
        ModelError: the objective is not one of such a model.
    """
    task = TASKS.get(objective, TOKENS)
    if config is not None and reads_both(config) and not _has_decoder(config):
        if objective != "sft":
            raise ModelError(
                f"The model reads texts and pictures, and objective is {objective}.",
                "Allowed with it: --objective sft, from conversations with pictures or without.",
                "Leave --objective out, or take a language model.",
            )
        return PICTURED
    if config is not None and is_seq2seq(config):
        if objective != "sft":
            raise ModelError(
                f"The model is an encoder-decoder, and objective is {objective}.",
                "Allowed with it: --objective sft, from rows of a prompt and its answer.",
                "Leave --objective out, or take a decoder.",
            )
        return SEQ2SEQ
    if config is None or not reads_pictures(config):
        return task
    if task is not SCORES:
        raise ModelError(
            "The model is a vision model, which reads pictures and no text.",
            "Allowed with it: --objective classify, which tells pictures apart.",
        )
    return PICTURES


def _has_decoder(config: "PretrainedConfig") -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def is_seq2seq(config: "PretrainedConfig") -> bool:
    """Whether a model of this config is an encoder-decoder: its encoder reads a prompt, its decoder answers it."""
    from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    return bool(getattr(config, "is_encoder_decoder", False)) and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING


def reads_both(config: "PretrainedConfig") -> bool:
    """Whether a model of this config reads pictures within texts."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def check_classifier(config: "PretrainedConfig") -> None:
    """Refuse vision models that transformers has no classifier for.

    Raises:
        ModelError: it is one.
    """
    import transformers

    model: Any = transformers.MODEL_MAPPING.get(type(config), None)
    texts = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if getattr(model, "main_input_name", "") == "pixel_values" and not texts and not reads_pictures(config):
        raise ModelError(
            f"A {config.model_type} model reads pictures, and the installed transformers has no classifier made of it.",
            "Allowed: vision models that AutoModelForImageClassification knows, such as dinov2, vit, siglip and swin.",
            "Choose one of these, or update transformers.",
        )


def reads_pictures(config: "PretrainedConfig") -> bool:
    """Whether a model of this config is a vision model, which reads pictures and no text."""
    import transformers

    kinds = (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    own = type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return own and not any(type(config) in kind for kind in kinds)
