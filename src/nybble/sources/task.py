"""What a model is to give of a text, and so which head stands on it."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from nybble.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nybble.options.objective_groups import Pooling

HEADS = ("classifier", "score")  # what PEFT takes for the head of a model that gives scores

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Task:
    """What a model is for.

    Args:
        kind: tokens: the logits of the next token (AutoModelForCausalLM). scores: of the whole text
            (AutoModelForSequenceClassification). tags: scores of each token (AutoModelForTokenClassification).
            pictures: scores of a picture (AutoModelForImageClassification). states: its last states, no head
            (AutoModel).
        labels: what each score is of, in their order.
        problem: what scores are compared with, in transformers' words.
        stored_head: the head of the checkpoint gives these scores; else one begins anew.
        pooling: of states into one; None where they are not pooled, or that is not known yet.
    """

    kind: Literal["tokens", "scores", "tags", "pictures", "states"] = "tokens"
    labels: tuple[str, ...] = ()
    problem: Problem | None = None
    stored_head: bool = False
    pooling: "Pooling | None" = None

    @property
    def words(self) -> str:
        """For messages."""
        return {
            "tokens": "a causal language model",
            "scores": "a model that gives scores",
            "tags": "a model that gives scores of tokens",
            "pictures": "a model that gives scores of pictures",
            "states": "a model that embeds texts",
        }[self.kind]

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
        return asdict(self) | {"labels": list(self.labels)}

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
        )


TOKENS = Task()
SCORES = Task("scores", ("0", "1"), "single_label_classification")  # until rows have said which labels there are
PICTURES = Task("pictures", ("0", "1"), "single_label_classification")
TAGS = Task("tags", ("0", "1"), "single_label_classification")
REWARD = Task("scores", ("reward",), "regression")  # one number, and nothing that is done to it
STATES = Task("states")
TASKS: Mapping[str, Task] = {  # of objectives that learn no next tokens
    "classify": SCORES,
    "reward": REWARD,
    "embed": STATES,
}


def task_of(objective: str, config: "PretrainedConfig | None" = None) -> Task:
    """What a model that learns by an objective is for, before anything is known of its rows.

    Args:
        config: the model's: of a vision model pictures are told apart.

    Raises:
        ModelError: the objective is for texts, and the model reads pictures.
    """
    task = TASKS.get(objective, TOKENS)
    if config is None or not reads_pictures(config):
        return task
    if task is not SCORES:
        raise ModelError(
            "The model is a vision model, which reads pictures and no text.",
            "Allowed with it: --objective classify, which tells pictures apart.",
        )
    return PICTURES


def reads_pictures(config: "PretrainedConfig") -> bool:
    """Whether a model of this config is a vision model, which reads pictures and no text."""
    import transformers

    kinds = (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    own = type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return own and not any(type(config) in kind for kind in kinds)
