"""What is odd with the conversations of rows, beside their words: marks, keys, system turns, thinking."""

from collections import Counter
from collections.abc import Sequence

from nybble.data.examples import Example
from nybble.data.findings import Finding, find
from nybble.data.supervision import Learnt
from nybble.data.template import ChatTemplate
from nybble.data.thinking import has_thought, keep_thoughts
from nybble.files.spool import Spool


def find_in_conversations(examples: Sequence[Example], template: ChatTemplate) -> list[Finding]:
    """All of what is below."""
    return [
        *find_unread_keys(examples),
        *find_marked_prompts(examples),
        *find_thinking(examples, template.learnt, template.adds_empty_thought),
        *(find_folded_system(examples) if template.folds_system else ()),
    ]


def say_what_is_learnt(examples: Sequence[Example], learnt: Learnt) -> list[str]:
    """In words what becomes of thinking, and which part of a conversation is trained on; nothing of the usual."""
    thoughtful = sum(any(map(has_thought, example.turns())) for example in examples)
    said = [f"{thoughtful} rows hold thinking (--thinking {learnt.thinking})."] if thoughtful else []
    return said + ([f"Trained on: {learnt.train_on} (--train-on)."] if learnt.train_on != "assistant" else [])


def find_unread_keys(examples: Sequence[Example]) -> list[Finding]:
    """Rows with keys inside messages that nothing reads."""
    counts: Counter[str] = Counter()
    concerned: Spool[str] = Spool()
    for example in examples:
        if keys := {key for turn in example.turns() for key in turn.unread}:
            counts.update(keys)
            concerned.append(example.origin)
    detail = ", ".join(f"{key!r} in {count} rows" for key, count in counts.most_common())
    return find("unread-message-keys", concerned, detail)


def find_marked_prompts(examples: Sequence[Example]) -> list[Finding]:
    """Rows with a turn that is marked as to be learnt and is not the assistant's."""
    marked = (e.origin for e in examples if any(turn.weight and turn.role != "assistant" for turn in e.turns()))
    return find("marked-prompt", marked)


def find_thinking(examples: Sequence[Example], learnt: Learnt, adds_empty: bool) -> list[Finding]:
    """Rows that lose thoughts, and rows with an answer before which the template puts an empty one.

    Args:
        learnt: which thoughts are kept, and which answers are trained on.
        adds_empty: whether the template does that.
    """
    lost: Spool[str] = Spool()
    empty: Spool[str] = Spool()
    thoughts = 0
    for example in examples:
        turns, count = keep_thoughts(example.turns(), learnt.thinking)
        lost.extend([example.origin] * bool(count))
        thoughts += count
        if adds_empty and any(not has_thought(turns[index]) for index in learnt.choose(turns)):
            empty.append(example.origin)
    detail = f"{thoughts} thoughts, --thinking {learnt.thinking}"
    return [*find("thinking-left-out", lost, detail), *find("empty-thinking", empty)]


def find_folded_system(examples: Sequence[Example]) -> list[Finding]:
    """Rows with a system turn, for a template that refuses them."""
    return find("system-folded", (e.origin for e in examples if any(turn.role == "system" for turn in e.turns())))
