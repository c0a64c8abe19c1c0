"""The arms of the laboratory: restarts that each differ in one thing from a full one."""

from __future__ import annotations

from dataclasses import dataclass

from milepost.config.schema import Config
from milepost.core.errors import MilepostError, UsageError
from milepost.data.run_data import open_run_data
from milepost.experiments.lab.setting import Setting
from milepost.runs.lineage import DATA, FULL, SCHEDULE, parse_restore
from milepost.train.installed import check_optimizer

FULL_ARM = "full"
RANKS_ARM = "ranks"
NO_MOMENTS = "weights,schedule,data"
_VALIDATION_FACTOR = 2
"""The authors' script scores 20 microbatches a process, so that two GPUs score twice the text of
one, the first half of it the same (train.py, `val_loss_steps`, `DataLoaderLite`)."""


@dataclass(frozen=True)
class Arm:
    """One way to restart.

    Attributes:
        name: of its folder, and on the command line.
        title: in figures and tables.
        what: what differs from a full restore, a sentence.
        restore: see `milepost train --restore`.
        words: settings that differ from the parent's.
        ranks: processes that train it.
        keeps_bits: whether it must have the parent's bits.
        has_other_text: whether its validation loss is that of other text than the parent's, so
            that it has no way back into the parent's noise.
    """

    name: str
    title: str
    what: str
    restore: str = FULL
    words: tuple[str, ...] = ()
    ranks: int = 1
    keeps_bits: bool = False
    has_other_text: bool = False

    @property
    def has_other_batches(self) -> bool:
        """Whether it sees other batches than the parent at the same place."""
        return DATA not in parse_restore(self.restore)

    def first_step(self, setting: Setting) -> int:
        """Its own number of the step it begins at."""
        return setting.at if SCHEDULE in parse_restore(self.restore) else 0

    def last_step(self, setting: Setting) -> int:
        """Its own number of the step it ends at."""
        return self.first_step(setting) + setting.steps_after


def all_arms(setting: Setting) -> list[Arm]:
    """Every arm, in the order in which they are trained."""
    config = setting.config
    warmup = config.schedule.warmup_steps or max(1, setting.steps_after // 10)
    stretched = ("--train.total_steps", str(config.train.total_steps + setting.at))
    redrawn = ("--validation.tokens", str(_VALIDATION_FACTOR * config.validation.tokens))
    rewarmed = ("--schedule.rewarm_at_step", str(setting.at), "--schedule.rewarm_steps")
    return [
        Arm(FULL_ARM, "Full restore", "Everything is restored.", keeps_bits=True),
        Arm(
            "moments",
            "Moments lost",
            "Weights only; the schedule and the data go on, the optimizer's moments begin at zero.",
            restore=NO_MOMENTS,
        ),
        Arm(
            "warmup",
            "Moments lost, new warm-up",
            f"As before, and the learning rate rises anew over {warmup} steps.",
            restore=NO_MOMENTS,
            words=(*rewarmed, str(warmup)),
        ),
        Arm(
            "data",
            "Data order restarted",
            "The optimizer and the schedule go on; the data begin anew, with what was seen first.",
            restore="weights,optimizer,schedule",
        ),
        Arm(
            "validation",
            "Other validation set",
            "Everything is restored; the loss is measured on twice the text, as the authors' "
            "script does on two GPUs in place of one.",
            words=redrawn,
            has_other_text=True,
        ),
        Arm(
            "schedule",
            "Schedule stretched",
            f"Everything is restored; total_steps grows by {setting.at}, as the authors' script "
            "does at a restart (max_steps + start_step).",
            words=stretched,
        ),
        Arm(
            RANKS_ARM,
            "One rank, then two",
            "Everything is restored, on two processes in place of one.",
            ranks=2,
            keeps_bits=True,
        ),
        Arm(
            "lowbit",
            "Moments in 8 bits",
            "Everything is restored; the moments are held in 8 bits from there on.",
            words=("--optimizer.name", "adamw8bit"),
        ),
        Arm(
            "restart",
            "All anew but the weights",
            "Weights only; optimizer, schedule with its warm-up, and data begin anew.",
            restore="weights",
        ),
        Arm(
            "authors",
            "What the authors did",
            "Moments lost, the schedule stretched and the other validation set together.",
            restore=NO_MOMENTS,
            words=(*stretched, *redrawn),
            has_other_text=True,
        ),
    ]


def choose_arms(
    setting: Setting, *, only: str | None, num_gpus: int
) -> tuple[list[Arm], dict[str, str]]:
    """The arms that are trained, and why others are not.

    Args:
        setting: of the laboratory.
        only: names with commas between; None: all that this machine can.
        num_gpus: of this machine.

    Returns:
        The arms in their order, the full one always among them; and by name the reason why one
        cannot be.

    Raises:
        UsageError: a name is no arm, or an arm was asked for that cannot be.
    """
    arms = {arm.name: arm for arm in all_arms(setting)}
    named = list(arms) if only is None else [word.strip() for word in only.split(",")]
    if strangers := [name for name in named if name not in arms]:
        raise UsageError(f"there is no arm {strangers[0]!r}", hint=f"arms: {', '.join(arms)}")
    reasons = {name: _absence(arms[name], setting, num_gpus) for name in named}
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    if only is not None and left_out:
        name, reason = next(iter(left_out.items()))
        raise UsageError(f"the arm {name} cannot be trained: {reason}")
    chosen = {FULL_ARM, *named} - set(left_out)
    return [arm for arm in arms.values() if arm.name in chosen], left_out


def arms_begun(setting: Setting) -> list[Arm]:
    """The arms that the laboratory's folder has a run of."""
    return [
        arm
        for arm in all_arms(setting)
        if any(setting.run(arm.name, seed=seed).is_dir() for seed in setting.seeds)
    ]


def _absence(arm: Arm, setting: Setting, num_gpus: int) -> str | None:
    """Why an arm cannot be trained here; None where it can."""
    config = setting.config
    if arm.ranks > 1 and config.train.lanes < arm.ranks:
        return f"train.lanes is {config.train.lanes}, so there is one rank at most"
    if arm.ranks > max(num_gpus, 1) and num_gpus:
        return "there is one GPU"
    if "adamw8bit" in arm.words:
        section = config.optimizer.model_copy(update={"name": "adamw8bit"})
        if config.optimizer.name == "adamw8bit":
            return "the recipe has moments of 8 bits itself"
        try:
            check_optimizer(section)
        except MilepostError as error:
            return f"{error.message}; {error.hint}"
    if "--validation.tokens" in arm.words:
        return _too_little_validation(config)
    return None


def _too_little_validation(config: Config) -> str | None:
    wanted = _VALIDATION_FACTOR * config.validation.tokens
    shards = open_run_data(config).validation
    available = 0 if shards is None else shards.num_tokens - 1
    if available >= wanted:
        return None
    return (
        f"the validation set has {available:,} target tokens, twice validation.tokens are "
        f"{wanted:,}"
    )
