"""The objectives that users choose among."""

from nybble.layers.distillation import Mixture
from nybble.layers.regularisers import PLAIN, Regularisers
from nybble.options.objective_groups import WITH_REFERENCE, ObjectiveOptions
from nybble.sources.task import TOKENS, Task
from nybble.training.classify import Classification
from nybble.training.distill import Distillation
from nybble.training.embed import Embedding
from nybble.training.kto import KTO
from nybble.training.objective import Objective, SupervisedFineTuning
from nybble.training.preference import DPO, IPO, ORPO, SimPO
from nybble.training.reward import RewardModelling
from nybble.training.seq2seq import PromptAnswering

BETA, SIMPO_BETA, SIMPO_GAMMA, ORPO_LAMBDA = 0.1, 2.0, 1.0, 0.1  # of the papers
ALPHA, TEMPERATURE = 0.5, 1.0  # of distillation
SIMILARITY_SCALE = 20.0  # of sentence-transformers
USUAL_LR = "5e-6 to 5e-5"  # of adapters that learn preferences; examples to follow take more
USUAL_FULL_LR = "5e-6 to 5e-5"  # a tenth of what adapters take


def make_objective(options: ObjectiveOptions, task: Task = TOKENS) -> Objective:
    """The objective that the options choose, with its own defaults where they say nothing.

    Args:
        task: what the model is for: an encoder-decoder learns answers to prompts.
    """
    if task.prompted:
        return PromptAnswering()
    beta = options.beta or (SIMPO_BETA if options.objective == "simpo" else BETA)
    smoothing = options.label_smoothing or 0.0
    match options.objective:
        case "sft":
            return SupervisedFineTuning()
        case "dpo":
            return DPO(beta, smoothing)
        case "ipo":
            return IPO(beta)
        case "simpo":
            return SimPO(beta, SIMPO_GAMMA if options.simpo_gamma is None else options.simpo_gamma, smoothing)
        case "orpo":
            return ORPO(options.orpo_lambda or ORPO_LAMBDA)
        case "classify":
            return Classification(augment=options.augment)
        case "reward":
            return RewardModelling(options.center_rewards_coefficient or 0.0)
        case "distill":
            return Distillation(mixture_of(options))
        case "embed":
            return Embedding(options.pooling, options.similarity_scale or SIMILARITY_SCALE)
        case "kto":
            return KTO(beta, options.desirable_weight or 1.0, options.undesirable_weight or 1.0)


def mixture_of(options: ObjectiveOptions) -> Mixture:
    """How a student is distilled, with what is usual where the options say nothing."""
    alpha = ALPHA if options.distill_alpha is None else options.distill_alpha
    return Mixture(alpha, options.distill_temperature or TEMPERATURE)


def make_regularisers(options: ObjectiveOptions) -> Regularisers:
    """What the options add to the plain loss of examples; nothing to that of preferences."""
    if options.objective != "sft":
        return PLAIN
    return Regularisers(options.neftune_alpha or 0.0, options.label_smoothing or 0.0, options.z_loss or 0.0)


def asks_before(options: ObjectiveOptions) -> bool:
    """Whether a reference is asked once, before the first step."""
    return options.objective in WITH_REFERENCE and options.reference != "step"
