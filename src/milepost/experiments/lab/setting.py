"""What one laboratory is made of: its recipe, where it restarts, and where everything lies.

All of it is checked here, before anything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from milepost.config.recipe import differences, load_recipe
from milepost.config.schema import Config
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.files import read_json, write_atomically, write_json
from milepost.data.run_data import open_run_data
from milepost.trajectory.provenance import recipe_toml

SCHEMA_VERSION = 1
STEPS_AFTER = 300
"""Updates after the restart, where nobody says otherwise and the recipe has as many."""

FEWEST_STEPS_AFTER = 20
MAX_SEEDS = 10
"""As far as the quantiles of `measures` go."""
_PLAN, _RECIPE = "lab.json", "recipe.toml"
PARENT = "parent"
"""The name of the run that was never interrupted, among those of the arms."""


@dataclass(frozen=True)
class Setting:
    """One laboratory.

    Attributes:
        out: its folder.
        name: what the person called the recipe.
        config: of the parents, but for the seed.
        at: the step of the checkpoint that every arm begins with.
        steps_after: updates after it.
        num_seeds: parents, with seeds in a row from the recipe's own.
    """

    out: Path
    name: str
    config: Config
    at: int
    steps_after: int
    num_seeds: int

    @property
    def last_step(self) -> int:
        """Where the parents end."""
        return self.at + self.steps_after

    @property
    def seeds(self) -> list[int]:
        """Of the parents, in their order."""
        return [self.config.run.seed + number for number in range(self.num_seeds)]

    @property
    def recipe(self) -> Path:
        """The recipe file that every run of the laboratory is made with."""
        return self.out / _RECIPE

    @property
    def plan(self) -> Path:
        """What the folder is the laboratory of."""
        return self.out / _PLAN

    @property
    def report(self) -> Path:
        """The page."""
        return self.out / "report" / "index.html"

    def run(self, name: str, *, seed: int) -> Path:
        """The run folder of an arm, or of the parent."""
        return self.out / f"seed-{seed}" / name


def make_setting(
    config: Config,
    *,
    name: str,
    out: Path,
    at: int,
    steps_after: int | None,
    num_seeds: int,
) -> Setting:
    """A laboratory that can be run.

    Raises:
        UsageError: the numbers do not go together with the recipe; the message says how they may.
        DataError: there is no data, or the validation set is too small for its arms.
    """
    if config.is_finetuning:
        raise UsageError(
            f"recipe {name} tunes a model that is there already",
            hint="give a recipe that pretrains, such as lab",
        )
    total = config.train.total_steps
    after = min(STEPS_AFTER, total - at) if steps_after is None else steps_after
    if not 1 <= num_seeds <= MAX_SEEDS:
        raise UsageError(f"--seeds is {num_seeds}", hint=f"give 1 to {MAX_SEEDS}")
    if at < 1 or at >= total:
        raise UsageError(
            f"--at {at} is not inside the run, which has {total} steps (train.total_steps)",
            hint=f"give a step from 1 to {total - FEWEST_STEPS_AFTER}, or a longer run",
        )
    if after < FEWEST_STEPS_AFTER or at + after > total:
        raise UsageError(
            f"--at {at} with {after} steps after it does not fit into the run's {total} steps, "
            f"or leaves fewer than {FEWEST_STEPS_AFTER} to look at",
            hint="choose an earlier --at, other --steps-after, or a longer --train.total_steps",
        )
    for field, every in (
        ("checkpoint.every_steps", config.checkpoint.every_steps),
        ("validation.every_steps", config.validation.every_steps),
    ):
        if at % every:
            near = max(every, round(at / every) * every)
            raise UsageError(
                f"--at {at} is not a multiple of {field} {every}",
                hint=f"give --at {near}, or --{field} with a divisor of {at}",
            )
    open_run_data(config)
    section = config.train.model_copy(update={"stop_at_step": None})
    return Setting(
        out.resolve(), name, config.model_copy(update={"train": section}), at, after, num_seeds
    )


def open_folder(setting: Setting) -> None:
    """Makes the laboratory's folder, or refuses one that is of something else.

    Raises:
        UsageError: it holds another laboratory, or other things.
        StorageError: it cannot be written.
    """
    if setting.plan.exists():
        _refuse_another(setting)
    elif any(entry for entry in setting.out.iterdir() if entry.name != ".lock"):
        raise UsageError(f"{setting.out} holds something else", hint="choose a new --out")
    write_atomically(setting.recipe, recipe_toml(setting.config))
    plan = {"v": SCHEMA_VERSION, "recipe": setting.name}
    write_json(setting.plan, plan | {"at": setting.at, "steps_after": setting.steps_after})


def read_setting(out: Path) -> Setting:
    """The laboratory that a folder holds, with the seeds that have begun.

    Raises:
        UsageError: it holds none.
        CheckpointError: its plan is damaged.
    """
    plan_file = out / _PLAN
    if not plan_file.is_file():
        raise UsageError(
            f"{out} is not the folder of a laboratory: it has no {_PLAN}",
            hint="give the folder that was named with --out",
        )
    plan = read_json(plan_file, error=CheckpointError)
    config = load_recipe(str(out / _RECIPE))
    try:
        name, at, steps_after = str(plan["recipe"]), int(plan["at"]), int(plan["steps_after"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{plan_file} lacks {error}") from error
    setting = Setting(out.resolve(), name, config, at, steps_after, num_seeds=MAX_SEEDS)
    begun = [
        n
        for n, seed in enumerate(setting.seeds, start=1)
        if setting.run(PARENT, seed=seed).is_dir()
    ]
    return replace(setting, num_seeds=max(begun, default=1))


def _refuse_another(setting: Setting) -> None:
    """More seeds and arms may come into a folder later; nothing else may change."""
    found = read_json(setting.plan, error=CheckpointError)
    plan = found if isinstance(found, dict) else {}
    lines = [
        f"  {field}: there {old!r}, here {new!r}"
        for field, old, new in differences(load_recipe(str(setting.recipe)), setting.config)
        if field != "data.path"  # they may be moved; their fingerprints guard them
    ]
    for name in ("at", "steps_after"):
        if plan.get(name) != getattr(setting, name):
            option = f"--{name.replace('_', '-')}"
            lines.append(f"  {option}: there {plan.get(name)!r}, here {getattr(setting, name)!r}")
    if lines:
        raise UsageError(
            f"{setting.out} is another laboratory\n" + "\n".join(lines),
            hint="choose another --out, or give the recipe and settings it was begun with",
        )
