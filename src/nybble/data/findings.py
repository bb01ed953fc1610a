"""What the audit knows to be wrong with rows: the ids of its findings, what each means and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from nybble.data.near_duplicates import NEAR_SIMILARITY
from nybble.errors import ConfigError

Level = Literal["error", "warning"]
ROWS_NAMED = 5
MAX_ROW_CHARACTERS = 1_000_000
NEVER_ALLOWED = ("no-rows", "ids-beyond-vocabulary")  # training could not go on
MOST_DROPPED = 0.1  # of the rows; losing more changes what is learnt

# id: (what it means, what to do)
FINDINGS: dict[str, tuple[str, str]] = {
    "no-rows": ("no row is left to train on", "see the other findings for what became of the rows"),
    "unreadable-row": ("rows cannot be read, as if the file were damaged or cut off", "mend or remove them"),
    "unread-lesson": (
        "rows have columns that nybble does not read, though they are part of what is to be learnt",
        "remove the rows or the columns, or put what they say into the text",
    ),
    "beyond-text": (
        "rows have turns with content that is no text",
        "remove them, or write what these say into the content",
    ),
    "unread-weight": (
        "rows weigh turns by what is no weight, or weigh turns that are not the assistant's",
        "give numbers of 0 or more, to the assistant's turns, or remove them",
    ),
    "odd-call": (
        "rows with tool calls that cannot be read were dropped",
        "mend them: a call has a name, and arguments that are a JSON object",
    ),
    "stray-result": (
        "rows with the result of a tool call that no turn before it makes were dropped",
        "mend the order of their turns, or the ids of their calls",
    ),
    "thinking-left-out": (
        "rows lose thinking, as --thinking has it",
        "nothing, if that is meant; --thinking keep learns all of it",
    ),
    "empty-thinking": (
        "rows have answers without thinking, before which the template puts an empty thought; it is read, not learnt",
        "nothing: to have it learnt too, write the empty thought into the content",
    ),
    "no-assistant-turn": (
        "rows without an assistant's turn train on nothing",
        "remove them, or give the text to learn as a `text` column",
    ),
    "not-one-prompt": (
        "rows that are no single prompt with its answer, which is what an encoder-decoder learns, were dropped",
        "give a prompt and its completion, or conversations of a user's turn and its answer; write what else they say "
        "into the prompt",
    ),
    "no-user-turn": (
        "rows in which no user's turn precedes an assistant's have no prompt",
        "remove them, or give the text to learn as a `text` column",
    ),
    "no-supervised-tokens": (
        "rows in which not one token is supervised",
        "check the chat template's {% generation %} blocks, choose another with --chat-template, or remove the rows",
    ),
    "nothing-to-learn": (
        "rows in which every assistant's turn is marked as not to be learnt were dropped",
        "nothing, if the marks (weight, train, loss) are meant so",
    ),
    "no-end-of-turn": (
        "rows have answers that do not end in a supervised end-of-turn token, so the model would not learn to stop",
        "choose a template that ends answers in a special token: --chat-template FILE|NAME; rows of a prompt and a "
        "completion can do without (--template none), and end in eos",
    ),
    "template-loses-content": (
        "the chat template leaves out part of what the rows say",
        "choose a template that renders it: --chat-template FILE|NAME, or move that content to a role that is rendered",
    ),
    "template-rewrites-prompt": (
        "the chat template renders answers so that they do not follow the prompt that chat would send",
        "choose a template that does not: --chat-template FILE|NAME (a Jinja file, or one of nybble's own)",
    ),
    "unread-message-keys": (
        "rows have turns with keys that nybble does not read, and that may change what is to be learnt",
        "remove these keys, or put what they say into the content",
    ),
    "marked-prompt": (
        "rows mark turns as to be learnt that are not the assistant's; only the assistant's are",
        "remove the mark, or give the text to learn as a `text` column",
    ),
    "system-folded": (
        "rows have system turns, which the chat template refuses: their words go before the next user's",
        "nothing: chat, serve and export do the same; to have it otherwise, choose another --chat-template",
    ),
    "needs-template": (
        "rows of messages need a chat template",
        "leave out --template none, or give prompt/completion columns",
    ),
    "ids-beyond-vocabulary": (
        "the tokenizer gives ids that the model's embedding does not have",
        "use the tokenizer that belongs to the model; where tokens were added to it, spell them as ordinary text, or "
        "resize and train the base's embedding first",
    ),
    "untrained-tokens": (
        "rows use tokens that were added to the tokenizer and that nothing shows to be trained; embeddings are frozen, "
        "so the model reads and writes them as noise",
        "train them (--train-new-tokens), or spell them as ordinary text; nothing, if they are trained",
    ),
    "one-class": (
        "all answers are judged alike, so that there is nothing to tell apart",
        "add rows with the other label; or train on the good ones: --objective sft",
    ),
    "one-label": (
        "all rows have one label, so that there is nothing to tell apart",
        "add rows with others, or check which column holds the label: --label-field",
    ),
    "mixed-labels": (
        "rows have fractions and names among their labels",
        "give all rows names or whole numbers (classes), or all of them fractions (a number is learnt then)",
    ),
    "unseen-label": (
        "validation rows have labels that no training row has",
        "add training rows with them, or remove these rows",
    ),
    "rare-label": ("rows are the only ones with their label", "add more of their kind, or leave the label out"),
    "missing-picture": ("rows without a picture, or whose file is not there, were dropped", "mend their paths"),
    "broken-picture": ("rows whose picture cannot be decoded were dropped", "mend or remove them"),
    "huge-picture": (
        "rows whose picture has more pixels than Pillow decodes without a warning were dropped",
        "make them smaller: the model sees a few hundred pixels a side",
    ),
    "converted-picture": (
        "rows have pictures that are not in red, green and blue of 8 bits; they are converted, transparency dropped",
        "nothing, if that is meant",
    ),
    "animated-picture": ("rows have pictures that move, of which the first is taken", "nothing, if that is meant"),
    "picture-url": (
        "rows whose picture lies on a network were dropped: nothing is fetched",
        "download it first and name the file, from the folder of the rows",
    ),
    "picture-marks": (
        "rows with more or fewer pictures than places for them were dropped",
        "write <image> where each picture of the `images` column stands, or a part of the type image",
    ),
    "picture-in-answer": ("rows with a picture in an assistant's turn were dropped", "move it to a user's turn"),
    "pictures-unread": (
        "rows have pictures, and the model reads text alone",
        "choose a vision-language model, or remove the rows",
    ),
    "template-loses-pictures": (
        "the chat template leaves out pictures that rows have, or writes more than they have",
        "choose a template that writes each down: --chat-template FILE, and spell the token for a picture in no text",
    ),
    "mixed-forms": (
        "rows are labelled otherwise than most: a label a text, a list of labels, or labels of tokens",
        "give all rows the same form, or train on each by itself",
    ),
    "odd-labels": (
        "rows whose labels are no list of names where others have one, or the other way round, were dropped",
        "give each row a list of the names that hold, an empty one where none does",
    ),
    "odd-tags": (
        "rows whose words and tags do not fit together were dropped",
        "give a list of words and a list of as many tags, names or whole numbers; -100 for a word without one",
    ),
    "odd-span": (
        "rows whose entities cannot be laid on their tokens were dropped",
        "mend their places: characters from `start` up to `end`, none within another, at the ends of words",
    ),
    "unknown-tag": (
        "rows have tags that say no entity (O, B-X, I-X, E-X, S-X), among such that do",
        "mend them; to train on them all the same: --allow unknown-tag",
    ),
    "stray-inside": (
        "rows have tags that go on with an entity which no tag before them begins (I-X behind no B-X or I-X)",
        "nothing where that begins an entity (IOB1): it is read so; else mend them",
    ),
    "word-without-token": (
        "rows have words with a tag of which the tokenizer makes no token; these tags are not learnt",
        "remove these words (empty, or invisible characters), or nothing",
    ),
    "missing-label": ("rows without a label were dropped", "add it, or remove them; --label-field names its column"),
    "empty-text": ("rows with an empty text were dropped", "remove them, or check which column holds the text"),
    "validation-leak": (
        "validation rows that also stand in the training data",
        "remove them from one of the two, or leave the validation data out and let nybble split",
    ),
    "huge-row": (
        f"rows of more than {MAX_ROW_CHARACTERS:,} characters, of which training would see a small part at most",
        "split them, or remove them",
    ),
    "many-dropped": (
        f"rows, more than {MOST_DROPPED:.0%} of all, would be left out",
        "see the other findings for what takes them out",
    ),
    "unread-columns": ("rows have columns that nothing reads", "nothing, if they are not to be learnt"),
    "number-as-text": (
        "rows have numbers, true or false where text is needed; they are read as JSON writes them",
        "nothing, unless you want them written otherwise: then make them text",
    ),
    "near-leak": (
        f"validation rows share {NEAR_SIMILARITY:.0%} or more of their wording with a training row",
        "remove them from one of the two, else the held-out loss looks better than it is",
    ),
    "same-answer": (
        "most rows have one and the same answer",
        "check which column holds the answer; a model that always gives this one would look good",
    ),
    "missing-column": ("rows without a column that the others have were dropped", "add it, or remove them"),
    "not-text": ("rows with something else where text is needed were dropped", "put text there, or remove them"),
    "odd-turn": ("rows with conversations that nybble cannot read were dropped", "mend them, or remove them"),
    "template-refuses": ("rows that the chat template refuses were dropped", "check the order of their roles"),
    "empty-answer": (
        "rows with an empty answer were dropped",
        "remove them, or check which column holds the answer: --completion-field",
    ),
    "equal-answers": ("pairs whose answers are the same teach nothing and were dropped", "remove them"),
    "different-prompts": (
        "pairs whose answers follow different prompts were dropped",
        "give both answers to one prompt: a `prompt` column, or conversations that begin alike",
    ),
    "one-held-out-pair": (
        "a pair alone is held out, so that its loss is 0 whatever is learnt",
        "add rows, or raise --validation-fraction",
    ),
    "equal-texts": ("rows whose texts are the same teach nothing and were dropped", "remove them, or what is twice"),
    "odd-score": ("pairs whose score is no number, or not of one pair, were dropped", "mend them, or remove them"),
    "mixed-scores": ("rows have scores where others have none", "give all pairs scores, or none"),
    "one-score": (
        "all pairs have one score, so that none is nearer than another",
        "add others, check which column holds the score (--label-field), or remove it to learn from near pairs alone",
    ),
    "one-pair": ("one pair alone, from which its texts cannot be told apart", "add others, or a negative"),
    "odd-margin": ("pairs whose margin is no number were dropped", "give a number, or leave the margin out"),
    "empty-prompt": ("rows without a prompt have nothing to answer and were dropped", "add it, or remove them"),
    "unknown-label": ("rows with a label that is neither true nor false were dropped", "mend them, or remove them"),
    "no-token-border": (
        "rows in which the tokenizer has no border where an answer begins or ends were dropped",
        "check white space at the beginning of these answers",
    ),
    "too-long": (
        "rows were dropped because what they teach is not within max_seq_len",
        "raise --max-seq-len, or shorten their prompts",
    ),
    "truncated": ("rows longer than max_seq_len lost their end", "raise --max-seq-len to train on all of them"),
    "beyond-context": (
        "rows are longer than the context that the model was made for, where it computes less well",
        "lower --max-seq-len to that context, unless the model is meant to learn longer ones",
    ),
    "template-rewrites-history": (
        "the chat template words earlier answers differently once a conversation goes on; rows were split",
        "nothing: each answer is trained as chat would produce it, at the cost of more tokens",
    ),
    "special-token-in-content": (
        "rows spell special tokens in their own text",
        "remove them: the model reads them as control tokens",
    ),
    "special-token-in-text": (
        "text rows spell special tokens; no begin or end is added where one stands, and all of the text is trained on",
        "nothing, if that is meant; to train on the answers of conversations alone, give them as `messages`",
    ),
    "duplicates": ("rows say the same as an earlier row", "remove them, unless they are meant to weigh more"),
    "no-validation": (
        "no validation rows, so nothing will show how the model does on text it has not seen",
        "add rows, or give a validation fraction above 0",
    ),
}


# What a run goes on with; all other findings are errors.
WARNINGS = {
    *("odd-call", "stray-result", "thinking-left-out", "empty-thinking"),
    *("nothing-to-learn", "system-folded", "untrained-tokens", "unread-columns", "number-as-text"),
    *("near-leak", "same-answer", "missing-column", "not-text", "odd-turn", "template-refuses"),
    *("equal-answers", "different-prompts", "empty-prompt", "unknown-label", "odd-margin"),
    *("equal-texts", "odd-score", "one-held-out-pair"),
    *("rare-label", "missing-label", "empty-text"),
    *("missing-picture", "broken-picture", "huge-picture", "converted-picture", "animated-picture"),
    *("picture-url", "picture-marks", "picture-in-answer"),
    *("odd-labels", "odd-tags", "odd-span", "stray-inside", "word-without-token"),
    *("empty-answer", "not-one-prompt", "no-token-border", "too-long", "truncated", "beyond-context"),
    *("template-rewrites-history", "special-token-in-content", "special-token-in-text", "duplicates"),
    "no-validation",
}


@dataclass(frozen=True)
class Finding:
    """What is wrong, or odd, with some rows.

    Args:
        id: a key of `FINDINGS`.
        num_rows: how many rows it concerns; 0 where it is not about rows.
        rows: the first `ROWS_NAMED` of them, "file:line".
        detail: what is wrong with the first of them, where there is more to say than the id does.
    """

    id: str
    num_rows: int
    rows: tuple[str, ...]
    detail: str = ""

    @property
    def level(self) -> Level:
        return "warning" if self.id in WARNINGS else "error"

    @property
    def message(self) -> str:
        return FINDINGS[self.id][0]

    @property
    def fix(self) -> str:
        return FINDINGS[self.id][1]

    def __str__(self) -> str:
        rest = self.num_rows - len(self.rows)
        rows = f": {', '.join(self.rows)}" + (f" and {rest} more" if rest else "") if self.rows else ""
        count = f"{self.num_rows} x " if self.num_rows else ""
        return f"{self.id}: {count}{self.message}{rows}" + (f" ({self.detail})" if self.detail else "")


def check_allowed(allowed: Iterable[str]) -> None:
    """Refuse ids of findings that do not exist or cannot be accepted.

    Raises:
        ConfigError: names the ids that can.
    """
    for id in allowed:
        if id not in FINDINGS or id in NEVER_ALLOWED:
            problem = "cannot be accepted" if id in FINDINGS else "is no finding of the audit"
            raise ConfigError(
                f"allow: {id!r} {problem}.",
                f"Allowed: {', '.join(known for known in FINDINGS if known not in NEVER_ALLOWED)}.",
                "Take the id from the audit that `nybble data check` prints.",
            )


def find(finding: str, rows: Iterable[str], detail: str = "") -> list[Finding]:
    """A list of one finding, or of none where no rows are concerned. A row that is named twice in a row is one."""
    count, named = 0, []
    for origin, _ in groupby(rows):
        count += 1
        if count <= ROWS_NAMED:
            named.append(origin)
    return [Finding(finding, count, tuple(named), detail)] if named else []
