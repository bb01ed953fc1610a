"""A conversation with a model in the terminal, one streamed answer at a time; a run's base can answer beside it."""

from nybble.cli.render import Terminal
from nybble.data.examples import Message
from nybble.errors import NybbleError
from nybble.evaluation.chat import answer, opening, with_images
from nybble.generation.text_pieces import TextPieces
from nybble.layers.convert import adapters_of, enable_adapters
from nybble.options.use_groups import ChatOptions
from nybble.runs.open_run import LoadedModel

HELP = (
    "Type a message. /image FILE shows a picture with the next message, /reset forgets what was said, "
    "/base shows the base's answers too (again: no more), /quit leaves, Ctrl-C stops an answer."
)


class Conversation:
    """What was said so far, and with whom.

    Args:
        loaded: the model.
        options: how it answers.
        terminal: where its answers are shown.
    """

    def __init__(self, loaded: LoadedModel, options: ChatOptions, terminal: Terminal):
        self.loaded, self.options, self.terminal = loaded, options, terminal
        self._messages, self._with_base = opening(options.system), False
        self._images = list(options.image)  # of the next message

    def hold(self) -> None:
        """Answer what the user types until they leave."""
        self.terminal.say(HELP)
        while True:
            try:
                line = self.terminal.console.input("[bold]> [/bold]").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.terminal.say(f"\n{HELP}")
                continue
            if line == "/quit":
                return
            if line == "/reset":
                self._messages, self._images = opening(self.options.system), []
            elif line == "/base":
                self._toggle_base()
            elif line.startswith("/image ") or line == "/image":
                self._show(line.removeprefix("/image").strip())
            elif line:
                self._say(line)

    def ask(self, prompt: str) -> None:
        """Answer one message.

        Raises:
            DataError: it does not fit into the model's context, or the template refuses it.
        """
        message = with_images(prompt, self._images)
        self._answer([*self._messages, message], TextPieces(self.loaded.template.tokenizer))

    def _show(self, file: str) -> None:
        """Keep a picture for the next message."""
        if self.loaded.template.reader is None:
            self.terminal.say("This model reads text alone; one of vision and language is asked with --image.")
        elif not file:
            self.terminal.say("Name a file: /image FILE")
        else:
            self._images.append(file)

    def _say(self, words: str) -> None:
        try:
            message = with_images(words, self._images)
        except NybbleError as error:
            self.terminal.say(str(error), style="red")
        else:
            self._take_turn(message)
        self._images = []

    def _toggle_base(self) -> None:
        if not adapters_of(self.loaded.model):
            self.terminal.say("This model has no adapter that could be switched off.")
            return
        self.terminal.say(f"The base's answers are {'no longer' if self._with_base else 'now'} shown too.")
        self._with_base = not self._with_base

    def _take_turn(self, message: Message) -> None:
        """Answer; what the base would say to the same conversation does not become part of it."""
        messages = [*self._messages, message]
        if self._with_base:
            self.terminal.say("base:", style="dim")
            enable_adapters(self.loaded.model, False)
            try:
                self._next(messages)
            finally:
                enable_adapters(self.loaded.model, True)
            self.terminal.say("tuned:", style="dim")
        self._messages = self._next(messages)

    def _next(self, messages: list[Message]) -> list[Message]:
        """The conversation with its answer; without its last message where that got none."""
        pieces = TextPieces(self.loaded.template.tokenizer)
        try:
            self._answer(messages, pieces)
        except KeyboardInterrupt:
            self.terminal.console.out(f"{pieces.rest()} [stopped]", highlight=False)
        except NybbleError as error:
            self.terminal.say(str(error), style="red")
        if reply := pieces.text():
            return [*messages, Message("assistant", reply)]
        self.terminal.say("No answer, so the message is left out of the conversation.")
        return messages[:-1]

    def _answer(self, messages: list[Message], pieces: TextPieces) -> None:
        """Print the answer as it comes."""
        out = self.terminal.console.out
        filled = answer(self.loaded, messages, self.options, pieces, lambda text: out(text, end="", highlight=False))
        out(pieces.rest(), highlight=False)
        if filled:
            self.terminal.say("The answer ends where the model's context does.")
