"""Float8 beside bfloat16: the rate at full size in turns, and the loss curves of a smaller model.

The rate is that of the product's own step with the recipe's weights and batches. The curves begin
with the same weights and see the same batches; `--data` is used for both, made-up words without.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from milepost.data.shards import PreparedData, open_prepared
from milepost.train.pretraining import RunningText
from milepost.train.schedule import learning_rate
from on_gpu.measured_steps import measure_steps
from on_gpu.setting import (
    Setting,
    made_up_data,
    new_model,
    new_optimizer,
    new_stepper,
    open_loader,
    open_setting,
    show_row,
    tell,
)

QUESTION = "how much faster is float8, and is the loss the same?"
RECIPE = "dmas-1.7b"
STEPS = 5
DEFAULTS = ("train.global_batch_tokens=131072", "train.precision=bfloat16")
CURVE_DEFAULTS = ("train.global_batch_tokens=65536", "train.precision=bfloat16")
COMPARED_STEPS = 50
MADE_UP_BATCHES = 60
KINDS = ("none", "tensorwise", "rowwise")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, and the curves."""
    parser.add_argument("--kinds", nargs="+", choices=KINDS[1:], default=list(KINDS[1:]))
    parser.add_argument(
        "--rounds", type=int, default=2, help="turns of the rate; 0: none; default: 2"
    )
    parser.add_argument("--curve-recipe", default="llama-124m", help="default: llama-124m")
    parser.add_argument("--curve-steps", type=int, default=300, help="0: no curves; default: 300")
    parser.add_argument(
        "--curve-override", action="append", default=[], metavar="SECTION.KEY=VALUE"
    )


def answer(arguments: argparse.Namespace) -> int:
    """A row a kind and round, one with the ratios, one a curve, one with their differences."""
    kinds = ["none", *arguments.kinds]
    if arguments.rounds:
        setting = open_setting(arguments, defaults=DEFAULTS)
        _compare_rates(setting, kinds=kinds, arguments=arguments)
    if arguments.curve_steps:
        steps = arguments.curve_steps
        own = (f"train.total_steps={steps}", f"schedule.warmup_steps={steps // 10}")
        words = argparse.Namespace(**vars(arguments))
        words.recipe, words.override = arguments.curve_recipe, arguments.curve_override
        setting = open_setting(words, defaults=(*CURVE_DEFAULTS, *own))
        _compare_curves(setting, kinds=kinds, steps=steps)
    return 0


def _compare_rates(setting: Setting, *, kinds: list[str], arguments: argparse.Namespace) -> None:
    data = setting.open_data()
    model = new_model(setting.config, device=setting.device)
    optimizer = new_optimizer(model, config=setting.config)
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    with open_loader(setting, data=data) as loader:
        for _ in range(arguments.rounds):
            for kind in kinds:
                config = setting.with_train(float8=kind)
                stepper = new_stepper(
                    model,
                    optimizer=optimizer,
                    config=config,
                    world=setting.world,
                    end_of_text_id=data.end_of_text_id,
                )
                measured = measure_steps(
                    stepper,
                    RunningText(loader),
                    config=config,
                    steps=arguments.steps,
                    setting=setting,
                )
                del stepper  # its buffers, before the next one's
                rates[kind].append(measured["tokens_per_second"])
                show_row("float8", setting=setting, float8=kind, **measured)
    medians = {kind: statistics.median(found) for kind, found in rates.items()}
    show_row(
        "float8-rates",
        setting=setting,
        tokens_per_second=medians,
        ratio_to_bfloat16={kind: medians[kind] / medians["none"] for kind in kinds},
    )


def _compare_curves(setting: Setting, *, kinds: list[str], steps: int) -> None:
    if setting.data_folder is None:
        folder = made_up_data(setting.folder, config=setting.config, num_batches=MADE_UP_BATCHES)
        setting = replace(setting, data_folder=folder)
    assert setting.data_folder is not None
    data = open_prepared(setting.data_folder)
    curves = {}
    for kind in kinds:
        curves[kind] = _curve(setting, kind=kind, steps=steps, data=data)
        show_row("float8-curve", setting=setting, float8=kind, losses_nats=curves[kind])
    compared = min(COMPARED_STEPS, steps)
    tails = {kind: statistics.mean(losses[-compared:]) for kind, losses in curves.items()}
    show_row(
        "float8-curves",
        setting=setting,
        compared_steps=compared,
        mean_of_last_losses_nats=tails,
        difference_nats={kind: tails[kind] - tails["none"] for kind in kinds},
        largest_difference_nats={
            kind: max(abs(a - b) for a, b in zip(losses, curves["none"], strict=True))
            for kind, losses in curves.items()
        },
    )


def _curve(setting: Setting, *, kind: str, steps: int, data: PreparedData) -> list[float]:
    config = setting.with_train(float8=kind)
    model = new_model(config, device=setting.device)
    stepper = new_stepper(
        model,
        optimizer=new_optimizer(model, config=config),
        config=config,
        world=setting.world,
        end_of_text_id=data.end_of_text_id,
    )
    losses = []
    with open_loader(setting, data=data) as loader:
        batches = RunningText(loader)
        for step in range(steps):
            result = stepper.run_step(
                batches.batch(step),
                learning_rate=learning_rate(step, config=config),
                stop_requested=lambda: False,
            )
            losses.append(result.loss_nats)
            if step % 50 == 0 or step == steps - 1:
                tell(f"float8 {kind}: update {step}: loss {losses[-1]:.4f}")
    return losses
