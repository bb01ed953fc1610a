"""What a model is to give of a text, and so which head stands on it."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from nybble.options.objective_groups import Pooling

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEADS = ("classifier", "score")  # what PEFT takes for the head of a model that gives scores

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Task:
    """What a model is for.

    Args:
        kind: tokens: the logits of the next token (AutoModelForCausalLM). scores: of the whole text
            (AutoModelForSequenceClassification). tags: scores of each token (AutoModelForTokenClassification). states:
            its last states, no head (AutoModel).
        labels: what each score is of, in their order.
        problem: what scores are compared with, in transformers' words.
        stored_head: the head of the checkpoint gives these scores; else one begins anew.
        pooling: of states into one; None where they are not pooled, or that is not known yet.
    """

    kind: Literal["tokens", "scores", "tags", "states"] = "tokens"
    labels: tuple[str, ...] = ()
    problem: Problem | None = None
    stored_head: bool = False
    pooling: Pooling | None = None

    @property
    def words(self) -> str:
        """For messages."""
        return {
            "tokens": "a causal language model",
            "scores": "a model that gives scores",
            "tags": "a model that gives scores of tokens",
            "states": "a model that embeds texts",
        }[self.kind]

    @property
    def gives_scores(self) -> bool:
        """Whether a head stands on it whose scores have names."""
        return self.kind in ("scores", "tags")

    def config(self, config: "PretrainedConfig") -> "PretrainedConfig":
        """A model's config as the model of this task has it."""
        if not self.gives_scores:
            return config
        own = copy.deepcopy(config)
        own.id2label = dict(enumerate(self.labels))
        own.label2id = {label: number for number, label in enumerate(self.labels)}
        if self.kind == "scores":
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
TAGS = Task("tags", ("0", "1"), "single_label_classification")
REWARD = Task("scores", ("reward",), "regression")  # one number, and nothing that is done to it
STATES = Task("states")
TASKS: Mapping[str, Task] = {  # of objectives that learn no next tokens
    "classify": SCORES,
    "reward": REWARD,
    "embed": STATES,
}


def task_of(objective: str) -> Task:
    """What a model that learns by an objective is for, before anything is known of its rows."""
    return TASKS.get(objective, TOKENS)
