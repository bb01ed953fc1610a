"""A conversation with a model in the terminal, one streamed answer at a time; a run's base can answer beside it."""

from nybble.cli.render import Terminal
from nybble.data.examples import Message
from nybble.errors import NybbleError
from nybble.evaluation.chat import answer, opening
from nybble.generation.text_pieces import TextPieces
from nybble.layers.convert import adapters_of, enable_adapters
from nybble.options.use_groups import AnswerOptions
from nybble.runs.open_run import LoadedModel

HELP = (
    "Type a message. /reset forgets what was said, /base shows the base's answers too (again: no more), "
    "/quit leaves, Ctrl-C stops an answer."
)


class Conversation:
    """What was said so far, and with whom.

    Args:
        loaded: the model.
        options: how it answers.
        terminal: where its answers are shown.
    """

    def __init__(self, loaded: LoadedModel, options: AnswerOptions, terminal: Terminal):
        self.loaded, self.options, self.terminal = loaded, options, terminal
        self._messages, self._with_base = opening(options.system), False

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
                self._messages = opening(self.options.system)
            elif line == "/base":
                self._toggle_base()
            elif line:
                self._take_turn(Message("user", line))

    def ask(self, prompt: str) -> None:
        """Answer one message.

        Raises:
            DataError: it does not fit into the model's context, or the template refuses it.
        """
        self._answer([*self._messages, Message("user", prompt)], TextPieces(self.loaded.template.tokenizer))

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
