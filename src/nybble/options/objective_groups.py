"""The options of what is minimised, as groups.py declares the others."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import model_validator

from nybble.errors import ConfigError
from nybble.options.option import Name, Options, knob

Pooling = Literal["mean", "cls", "last", "max"]  # of the states of a text's tokens


class ObjectiveName(Options, group="Objective"):
    """What rows are learnt from."""

    objective: Literal["sft", "dpo", "ipo", "simpo", "orpo", "kto", "classify", "reward", "distill", "embed"] = knob(
        "sft",
        "What is minimised. sft: examples to follow. dpo, ipo, simpo, orpo: pairs of a chosen and a rejected answer. "
        "kto: answers labelled good or bad. classify: texts or pictures with a label, several, or a number; tokens "
        "with labels. reward: pairs, for a model that gives answers a number. distill: examples, and what a teacher "
        "says in their place. embed: texts that are near each other, for a model that embeds them.",
        aliases=("loss_type", "rl", "stage", "pref_loss"),
    )


class ObjectiveOptions(ObjectiveName):
    """What an objective is made of; None takes the objective's own default."""

    beta: float | None = knob(
        None,
        "dpo, ipo, kto: how closely the model stays with its reference (0.1); simpo: factor on log-probabilities (2).",
        gt=0,
        aliases=("pref_beta", "rl_beta", "dpo_beta", "kto_beta"),
    )
    label_smoothing: float | None = knob(
        None,
        "sft: part of each target's probability that is spread over the vocabulary (0). dpo, simpo: share of pairs "
        "whose answers are taken to be swapped (0, below 0.5); conservative DPO.",
        ge=0,
        lt=1,
        aliases=("label_smoothing_factor", "dpo_label_smoothing", "rl_label_smoothing"),
    )
    neftune_alpha: float | None = knob(
        None,
        "sft: noise on the embeddings while training, uniform up to this over the root of a row's tokens times the "
        "width (0; NEFTune).",
        ge=0,
        aliases=("neftune_noise_alpha",),
    )
    z_loss: float | None = knob(
        None,
        "sft: weight of the square of the log of the logits' sum of exponentials in the training's loss (0).",
        ge=0,
    )
    simpo_gamma: float | None = knob(None, "simpo: the margin that is aimed at (1).", ge=0, aliases=("gamma",))
    orpo_lambda: float | None = knob(
        None, "orpo: weight of the odds ratio beside the likelihood (0.1).", gt=0, aliases=("orpo_alpha", "orpo_beta")
    )
    desirable_weight: float | None = knob(
        None, "kto: weight of good answers (1).", gt=0, aliases=("kto_desirable_weight", "kto_chosen_weight")
    )
    undesirable_weight: float | None = knob(
        None, "kto: weight of bad answers (1).", gt=0, aliases=("kto_undesirable_weight", "kto_rejected_weight")
    )
    center_rewards_coefficient: float | None = knob(
        None, "reward: weight of the square of a pair's summed rewards, which keeps them around zero (0).", ge=0
    )
    augment: Literal["crop", "flip", "crop-flip"] | None = knob(
        None,
        "classify, pictures: what is drawn anew each time that one is learnt from. crop: a part of 8 to 100 % of it, "
        "sides 3:4 to 4:3. flip: left and right swapped, every other time.",
    )
    pooling: Pooling | None = knob(
        None,
        "embed: what the states of a text's tokens become: their mean, that of the first (cls) or last token, or the "
        "largest of each element. Left out: what the model's own files say, else mean for encoders and last for "
        "decoders.",
        aliases=("pooling_mode", "pooling_method"),
    )
    similarity_scale: float | None = knob(
        None,
        "embed: factor on cosines before their softmax, the inverse of a temperature (20).",
        gt=0,
        aliases=("scale",),
    )
    reference: Literal["precomputed", "step"] | None = knob(
        None,
        "dpo, ipo, kto: when the model that training begins with is asked. precomputed: once, before the first step, "
        "into the run folder (the default). step: in each step, adapters off.",
        aliases=("precompute_ref_log_probs",),
    )

    teacher: Name | None = knob(
        None,
        "distill: the model that is learnt from, asked once before the first step: as --model. Its tokens must be the "
        "base's.",
        aliases=("teacher_model_name_or_path", "kd_teacher"),
    )
    teacher_format: Literal["auto", "none", "stored", "nf4"] | None = knob(
        None,
        "distill: bits of the teacher's weights. none: 16. stored: its own few. auto (the default): as it is stored, "
        "streamed from its 4-bit folder where that does not fit, else nf4.",
    )
    teacher_top_k: int | None = knob(
        None, "distill: likeliest tokens that are kept of each distribution (64).", ge=1, aliases=("kd_top_k",)
    )
    distill_alpha: float | None = knob(
        None,
        "distill: weight of the KL to the teacher, times the temperature's square; cross-entropy has the rest (0.5).",
        gt=0,
        le=1,
        aliases=("kd_alpha", "kd_ratio"),
    )
    distill_temperature: float | None = knob(
        None, "distill: what logits of both are divided by for the KL (1).", gt=0, aliases=("kd_temperature",)
    )

    @model_validator(mode="after")
    def _only_what_is_used(self) -> Self:
        used = OBJECTIVE_OPTIONS[self.objective]
        for name in dict.fromkeys(name for names in OBJECTIVE_OPTIONS.values() for name in names):
            if getattr(self, name) is not None and name not in used:
                users = ", ".join(objective for objective, names in OBJECTIVE_OPTIONS.items() if name in names)
                raise ConfigError(
                    f"{name.replace('_', '-')} is {getattr(self, name)}, and objective is {self.objective}.",
                    f"It belongs to --objective {users}.",
                    f"Leave --{name.replace('_', '-')} out, or choose such an objective.",
                )
        return self

    @model_validator(mode="after")
    def _somebody_teaches(self) -> Self:
        if self.objective == "distill" and self.teacher is None:
            raise ConfigError(
                "objective is distill, and there is no teacher.",
                "teacher: the model that is learnt from; any that --model takes, with the same tokens.",
                "Add --teacher MODEL.",
            )
        return self

    @model_validator(mode="after")
    def _fewer_pairs_swapped_than_not(self) -> Self:
        if self.objective != "sft" and (self.label_smoothing or 0) >= 0.5:
            raise ConfigError(
                f"label-smoothing is {self.label_smoothing}, and objective is {self.objective}.",
                "Allowed: below 0.5; at a half, neither answer of a pair is the better one.",
            )
        return self


OBJECTIVE_OPTIONS: Mapping[str, tuple[str, ...]] = {  # what each objective is made of
    "sft": ("label_smoothing", "neftune_alpha", "z_loss"),
    "dpo": ("beta", "label_smoothing", "reference"),
    "ipo": ("beta", "reference"),
    "simpo": ("beta", "label_smoothing", "simpo_gamma"),
    "orpo": ("orpo_lambda",),
    "kto": ("beta", "desirable_weight", "undesirable_weight", "reference"),
    "classify": ("augment",),
    "reward": ("center_rewards_coefficient",),
    "distill": ("teacher", "teacher_format", "teacher_top_k", "distill_alpha", "distill_temperature"),
    "embed": ("pooling", "similarity_scale"),
}
PREFERENCES = ("dpo", "ipo", "simpo", "orpo", "kto")
OF_TEXTS = ("classify", "embed")  # rows that no chat template writes down
WITHOUT_NEXT_TOKENS = (*OF_TEXTS, "reward")  # models that give something of a whole text
WITH_REFERENCE = tuple(name for name, options in OBJECTIVE_OPTIONS.items() if "reference" in options)
