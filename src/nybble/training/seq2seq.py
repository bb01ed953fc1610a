"""Learning answers to prompts with an encoder-decoder."""

from nybble.data.prepare import RowKind
from nybble.data.prompts import PROMPTED_ROWS
from nybble.layers.batch_model import BatchModel
from nybble.layers.seq2seq_lm import Seq2SeqLM
from nybble.sources.task import SEQ2SEQ, Task
from nybble.training.objective import SupervisedFineTuning


class PromptAnswering(SupervisedFineTuning):
    """The mean of −log p over the tokens of answers, in nats, whose prompts the encoder has read."""

    task: Task = SEQ2SEQ
    model: type[BatchModel] = Seq2SeqLM

    @property
    def kind(self) -> RowKind:
        """Prompts, each with an answer."""
        return PROMPTED_ROWS

    @property
    def capturable(self) -> bool:
        """As `Objective` says: rows are padded."""
        return False
