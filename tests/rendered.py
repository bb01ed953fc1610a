"""Chat templates as a test writes them, and what is learnt of a conversation that one renders."""

from nybble.data.examples import Example
from nybble.data.supervision import Learnt
from nybble.data.template import ChatTemplate


def template_of(tokenizer_of, text: str, eos: str = "</s>", **learnt) -> ChatTemplate:
    """A Jinja text over the ChatML tokenizer."""
    tokenizer = tokenizer_of("cl100k", "chatml")
    copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token=eos)
    copy.chat_template = text
    return ChatTemplate(copy, learnt=Learnt(**learnt))


def learnt_texts(template: ChatTemplate, example: Example) -> list[str]:
    """The texts of the supervised runs, in the order of the sequences."""
    texts = []
    for row in template.encode_example(example):
        run: list[int] = []
        for token, supervised in [*zip(row.input_ids.tolist(), row.supervised.tolist(), strict=True), (0, False)]:
            if supervised:
                run.append(token)
            elif run:
                texts.append(template.tokenizer.decode(run))
                run = []
    return texts
