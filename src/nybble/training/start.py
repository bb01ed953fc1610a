"""What a run starts from: checkpoint, base, template and examples, read and compared, before anything is computed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import torch

from nybble.data.audit import Audited
from nybble.data.encoded_rows import counted
from nybble.data.new_tokens import describe_tokens, untrained_tokens
from nybble.data.open_template import open_template
from nybble.data.picture_reader import have_pictures
from nybble.data.prepare import PreparedData
from nybble.data.row_kinds import row_kind
from nybble.data.template import ChatTemplate
from nybble.errors import ConfigError, ModelError, RunError
from nybble.events import Listener, Note
from nybble.layers.context import widest_rows
from nybble.layers.precision import set_up
from nybble.options.groups import LoopOptions
from nybble.options.method_groups import WHY, Method
from nybble.options.option import flat, with_options
from nybble.options.seq2seq import for_seq2seq
from nybble.options.verbs import TrainConfig, as_method, config_text, methods_left, settle_method
from nybble.planning.micro_batches import micro_batches_of, total_steps
from nybble.planning.planner import first_that_fits
from nybble.planning.request import plan_run, why_no_blocks
from nybble.planning.run_shape import MicroBatches
from nybble.quantization.adapter_init import check_initialisable
from nybble.runs.adapter_files import StoredAdapter
from nybble.runs.base import in_asked_bits
from nybble.runs.context import read_rows, within_context
from nybble.runs.continued import check_base_of, open_adapter, options_of
from nybble.runs.folder import RunFolder
from nybble.runs.task_file import read_task
from nybble.sizes import rules_for
from nybble.sources.open import open_model
from nybble.sources.skeleton import reads_whole
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import PICTURED, TOKENS, Task, task_of
from nybble.training.checkpoint import Checkpoint, newest_checkpoint
from nybble.training.evaluations import Evaluations, plan_evaluations
from nybble.training.events import ModelOpened
from nybble.training.objective import Objective
from nybble.training.objectives import USUAL_FULL_LR, USUAL_LR, make_objective
from nybble.training.preference import PreferenceObjective
from nybble.training.resume import DataDigests, check_base, check_data, settle_config


@dataclass(frozen=True)
class Opened:
    """What a run starts from.

    Args:
        run: its folder.
        config: options as the checkpoint, the adapter and the base settle them.
        given: those that the run folder keeps: what chooses for itself does so again.
        resumed: the checkpoint that the run goes on from.
        continued: the adapter that a new run trains on from.
    """

    run: RunFolder
    config: TrainConfig
    given: TrainConfig
    resumed: Checkpoint | None
    continued: StoredAdapter | None
    source: StoredModel
    template: ChatTemplate
    device: torch.device
    dtype: torch.dtype

    @property
    def options(self) -> str:
        """The text of the run's `config.yaml`."""
        return config_text(with_options(self.given, resume=False, allow_change=()))


def open_start(given: TrainConfig, run: RunFolder, report: Listener) -> Opened:
    """Checkpoint, base, adapter and template; the number of threads is set."""
    given = settle_method(given)
    resumed = newest_checkpoint(run.checkpoints, report) if given.run.resume else None
    config = given if resumed is None else settle_config(resumed, given)
    adapters, allowed = config.adapters, config.run.allow_change
    device, dtype = set_up(config.machine)
    named = config.model
    source = open_model(named.model, named.tokenizer, report, named.revision)
    # Later, and by other verbs, the same commit is opened.
    config, given = (with_options(options, revision=source.revision) for options in (config, given))
    task = task_of(config.objective.objective, source.config)
    kind = row_kind(config.objective.objective, prompted=task.prompted)
    source = in_asked_bits(source.for_task(task), config.weights)
    config = with_options(config, max_seq_len=within_context(config.data.max_seq_len, source))
    if config.method.method in ("lora", "full"):
        check_widths(source, config.method.method)
    if task.prompted:
        config = for_seq2seq(config)
    if task.prompted or (reads_whole(source.config) and task is not TOKENS):
        if given.memory.packing and "packing" in given.memory.model_fields_set:
            how = "prompts and answers each by themselves" if task.prompted else "since its modules take a row a line"
            report(Note(f"packing: rows of {task.words} are padded, {how}"))
        config, given = (with_options(each, packing=False) for each in (config, given))
    if adapters.init not in ("default", "eva"):
        check_initialisable(source, config.weights.format != "none")
    continued = None
    if adapters.adapter is not None and resumed is None:
        continued = open_adapter(adapters.adapter)
        trained_on = read_task(RunFolder(continued.folder.parent))
        if trained_on is not None and trained_on.kind == "pictured":  # its layers have the names of the whole model's
            source = source.for_task(trained_on)
        config = given = with_options(config, **options_of(continued, adapters, source.skeleton, source.head_modules))
        for note in check_base_of(continued, source, allowed):
            report(Note(note, warning=True))
    same_options = resumed is not None and "config" not in allowed
    recorded = run.chat_template if same_options else None
    template = open_template(config.data, source.load_tokenizer(), recorded, kind, source.picture_reader)
    return Opened(run, config, given, resumed, continued, source, template, device, dtype)


@dataclass(frozen=True)
class Examples:
    """What a run learns from, and for how long.

    Args:
        base: fingerprint of the base, as the run's records name it.
        micro_batches: most rows at once -> what the run's micro-batches come to.
    """

    data: PreparedData
    digests: DataDigests
    base: str
    objective: Objective
    new_tokens: tuple[int, ...]
    num_steps: int
    evaluations: Evaluations
    micro_batches: Callable[[int], MicroBatches]


def take_examples(opened: Opened, report: Listener) -> tuple[Opened, Examples]:
    """The rows, audited, and compared with those of the run that is gone on with; and the base under the head that they
    ask for.
    """
    config, source, resumed = opened.config, opened.source, opened.resumed
    allowed, rows_per_step = config.run.allow_change, config.memory.rows_per_step
    objective = make_objective(config.objective, source.task)
    run = opened.run
    encoded = run.encoded if config.run.resume else run.starting.encoding
    data = read_rows(config.data, source, opened.template, objective.kind, run.path, encoded, report)
    source = for_pictures(source, config, data)
    new_tokens: tuple[int, ...] = ()
    if config.adapters.train_new_tokens:
        data, new_tokens = _take_new_tokens(opened, data)
    if config.method.method == "full":
        data = _all_rows_trained(data)
    report(ModelOpened(source.name, tuple(source.notes)))
    report(Audited(data.audit))
    data.audit.check()
    objective = objective.settled(data, source, _recorded_task(opened))
    if resumed is not None:
        _check_task(run, objective.task)
    source = source.for_task(objective.task)
    data = data.changed(lambda rows: counted(objective.complete(rows, config.data.seed, config.data.max_seq_len)))
    if isinstance(objective, PreferenceObjective) and "lr" not in config.loop.model_fields_set:
        report(Note(f"lr is {config.loop.lr}, the default; preferences are usually learnt with {USUAL_LR}: --lr"))
    elif config.method.method == "full" and "lr" not in config.loop.model_fields_set:
        report(Note(f"lr is {config.loop.lr}, the default; whole models usually take {USUAL_FULL_LR}: --lr"))
    base, digests = source.fingerprint(), DataDigests.of(data)
    if resumed is not None:
        check_base(resumed, base, allowed)
        check_data(resumed, data, digests, allowed)
    num_steps = total_steps(config.loop, len(data.train), rows_per_step)
    begun_with = None if resumed is None else resumed.about.get("evaluated_rows")
    evaluations = plan_evaluations(
        config.data, config.loop.eval_every, data.train, data.validation, rows_per_step, num_steps, begun_with
    )
    if data.mixture is not None:
        report(Note(data.mixture.describe(num_steps * rows_per_step)))
    if not evaluations.rows:
        _refuse_without_evaluations(config.loop)
    if evaluations.note:
        report(Note(evaluations.note))
    micro_batches = micro_batches_for(config, source, data, num_steps, opened.device, opened.dtype)
    examples = Examples(data, digests, base, objective, new_tokens, num_steps, evaluations, micro_batches)
    return replace(opened, source=source), examples


def for_pictures(source: StoredModel, config: TrainConfig, data: PreparedData) -> StoredModel:
    """The whole vision-language model where rows have pictures; else the source as it is.

    Raises:
        ConfigError: an option is for models that read text alone, or the other way round.
    """
    towers = config.weights.quantize_towers
    if not have_pictures(data.train + data.validation):
        if towers != "language":
            raise ConfigError(
                f"quantize-towers is {towers}, and no row has a picture.",
                "Of a vision-language model the language model alone is trained over texts.",
                "Leave --quantize-towers out.",
            )
        return source
    refused = {
        "objective": config.objective.objective != "sft",
        "method": config.method.method in ("full", "auto"),
        "init": config.adapters.init != "default",
        "neftune_alpha": bool(config.objective.neftune_alpha),
        "mixed": config.rounding.mixed is not None,
    }
    if name := next((name for name, found in refused.items() if found), None):
        flag = name.replace("_", "-")
        raise ConfigError(
            f"{flag} is {flat(config)[name]}, and rows have pictures.",
            "Learnt from pictures within texts: --objective sft, by adapters that begin as usual, one format for all.",
            f"Leave --{flag} out, or remove the rows with pictures.",
        )
    return source.for_task(replace(PICTURED, towers=towers))


def _recorded_task(opened: Opened) -> Task | None:
    """The task of the run that is gone on with, or whose adapter is trained on, where it is of the same kind."""
    run = opened.run if opened.continued is None else RunFolder(opened.continued.folder.parent)
    found = None if opened.resumed is None and opened.continued is None else read_task(run)
    if found is None or found.kind == opened.source.task.kind:
        return found
    return found if {found.kind, opened.source.task.kind} == {"scores", "tags"} else None  # rows say which of them


def _check_task(run: RunFolder, task: Task) -> None:
    """Refuse to go on with a run under another head than the one it has trained.

    Raises:
        RunError: it is another.
    """
    own = read_task(run) or TOKENS
    if (own.kind, own.labels, own.problem, own.towers) != (task.kind, task.labels, task.problem, task.towers):
        raise RunError(
            f"The run in {run.path} is {_describe(own)}; with these options and rows it would be {_describe(task)}.",
            "A run goes on with the head that it has trained, whatever --allow-change says.",
            "Restore options and rows, or start a new run: --out DIR.",
        )


def _describe(task: Task) -> str:
    return f"{task.words} ({', '.join(task.labels[:20])})" if task.labels else task.words


def check_widths(source: StoredModel, method: Method) -> None:
    """Refuse a base in few bits where its 16 bits are wanted.

    Raises:
        ModelError: it is one.
    """
    if source.quant_spec is not None:
        raise ModelError(
            f"method is {method}, and {source.name} is in {source.quant_spec.format} already.",
            WHY[method],
            "Give the model in 16 bits, or leave --method out: qlora trains over the bits that are there.",
        )


def choose_method(opened: Opened, examples: Examples, report: Listener) -> tuple[Opened, Examples]:
    """What --method auto means for this run; as they are where the user said which."""
    config = opened.config
    if config.method.method != "auto":
        return opened, examples
    left = [method for method in methods_left(config) if method == "qlora" or opened.source.quant_spec is None]
    plans, _ = plan_run(config, opened.source, None, examples.micro_batches, opened.dtype, opened.device)
    method, why = first_that_fits(plans, left, config.memory.memory)
    report(Note(f"method: {method}: {why}"))
    config, given = as_method(config, method), as_method(opened.given, method)
    opened = replace(opened, config=config, given=given)
    data = _all_rows_trained(examples.data) if method == "full" else examples.data
    micro_batches = micro_batches_for(config, opened.source, data, examples.num_steps, opened.device, opened.dtype)
    return opened, replace(examples, data=data, micro_batches=micro_batches)


def _all_rows_trained(data: PreparedData) -> PreparedData:
    """Without the finding that rows of new tokens are not."""
    findings = tuple(found for found in data.audit.findings if found.id != "untrained-tokens")
    return replace(data, audit=replace(data.audit, findings=findings))


def _take_new_tokens(opened: Opened, data: PreparedData) -> tuple[PreparedData, tuple[int, ...]]:
    """The tokens whose rows are trained, and the rows without the finding that these are not.

    Raises:
        ConfigError: there are none.
    """
    template, source = opened.template, opened.source
    vocab_size, sequences = source.config.get_text_config().vocab_size, chain(data.train, data.validation)
    tokens = untrained_tokens(sequences, template.tokenizer, template.chat_template, vocab_size, source.embedding_rows)
    if not tokens:
        raise ConfigError(
            "train-new-tokens is on, and the rows have no token that the base never learnt.",
            "New are tokens added to the tokenizer that its template does not mention, or with rows never trained.",
            "Leave --train-new-tokens out.",
        )
    findings = tuple(found for found in data.audit.findings if found.id != "untrained-tokens")
    notice = f"rows of {describe_tokens(tokens, template.tokenizer)} are trained"
    audit = replace(data.audit, findings=findings, notices=(*data.audit.notices, notice))
    return replace(data, audit=audit), tuple(tokens)


def _refuse_without_evaluations(loop: LoopOptions) -> None:
    given = {"early-stopping-patience": loop.early_stopping_patience is not None, "keep-best": loop.keep_best}
    if asked := [name for name, there in given.items() if there]:
        raise ConfigError(
            f"{asked[0]} is given, and no row is held out.",
            "Which adapter is best is seen on held-out rows.",
            f"Hold rows out (--validation-data, --validation-fraction), or leave --{asked[0]} out.",
        )


def micro_batches_for(
    config: TrainConfig,
    source: StoredModel,
    data: PreparedData,
    num_steps: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[int], MicroBatches]:
    """What the run's micro-batches come to, by the most rows at once."""
    full = config.method.method == "full"
    shares = not full and why_no_blocks(config, source.skeleton, device, in_four_bits=source.in_four_bits) is None
    positions, seed = widest_rows(source.skeleton, source.config), config.data.seed
    rules = rules_for(device.type, dtype.itemsize, positions)
    return micro_batches_of(
        data, config.memory, rules, steps=num_steps, seed=seed, shares=shares, apart=source.task.prompted
    )
