"""What writes a run's rows down: a chat template, a bare tokenizer, or a vision model's image processor."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from nybble.data.chat_templates import find_template
from nybble.data.picture_reader import PictureReader
from nybble.data.picture_rows import PictureProcessor, PictureTemplate
from nybble.data.prepare import EXAMPLE_ROWS, RowKind
from nybble.data.prompts import PROMPTED_ROWS, PromptTemplate
from nybble.data.supervision import Learnt
from nybble.data.template import ChatTemplate
from nybble.data.text_encoder import TextEncoder
from nybble.options.groups import RowOptions


def open_template(
    options: RowOptions,
    tokenizer: PreTrainedTokenizerBase | PictureProcessor,
    recorded: Path | None = None,
    kind: RowKind = EXAMPLE_ROWS,
    reader: PictureReader | None = None,
) -> ChatTemplate:
    """The template that the options choose; none where rows are no conversations.

    Args:
        recorded: file of the template that a run was trained with; where it exists, it is the one.
        kind: of the rows.
        reader: of a vision-language model.

    Raises:
        ConfigError: --chat-template names none.
        DataError: as `ChatTemplate`.
    """
    if isinstance(tokenizer, PictureProcessor):
        return PictureTemplate(tokenizer)
    if kind is PROMPTED_ROWS:
        return PromptTemplate(tokenizer)
    if not kind.conversations:
        return ChatTemplate(tokenizer, "none")
    chosen, learnt = options.chat_template, Learnt(options.train_on, options.thinking)
    if recorded is not None and recorded.is_file():
        return ChatTemplate(tokenizer, options.template, recorded.read_text(encoding="utf-8"), (), learnt, reader)
    if chosen is None:
        return ChatTemplate(tokenizer, options.template, learnt=learnt, reader=reader)
    notice = f"Chat template: {chosen}, in place of the tokenizer's own."
    text = find_template(chosen, TextEncoder(tokenizer))
    return ChatTemplate(tokenizer, options.template, text, (notice,), learnt, reader)
