"""`milepost plan`: what a recipe costs, before anything is spent."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from milepost.config.recipe import load_recipe
from milepost.config.schema import Config
from milepost.core.console import show, show_json
from milepost.core.errors import UsageError
from milepost.core.units import format_bytes, format_count, format_duration
from milepost.planner.choice import settle
from milepost.planner.cost import (
    ParameterCount,
    count_parameters,
    count_trained,
    flops_per_token,
    run_tokens,
)
from milepost.planner.disk import DiskEstimate, estimate_disk
from milepost.planner.duration import GPUS, DurationEstimate, Gpu, estimate_duration, find_gpu
from milepost.planner.memory import (
    DeviceKind,
    MemoryEstimate,
    estimate_memory,
    host_bytes,
    largest_microbatch_rows,
    save_copy_bytes,
)


@dataclass(frozen=True)
class _Plan:
    """Everything that is worked out for one recipe.

    Attributes:
        config: with what memory decides in place of "auto".
        asked: the config as it was given.
    """

    config: Config
    asked: Config
    gpu: Gpu | None
    num_gpus: int
    device: DeviceKind
    parameters: ParameterCount
    memory: MemoryEstimate
    disk: DiskEstimate
    duration: DurationEstimate | None
    max_microbatch_rows: int | None
    max_microbatch_rows_with_recompute: int | None


def plan(
    recipe: str,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    gpu: str | None = None,
    gpus: int = 1,
    device: Literal["gpu", "cpu"] = "gpu",
    tokens_per_second: float | None = None,
    json: bool = False,
) -> None:
    """Say what a recipe costs before anything is spent.

    Parameters, FLOPs and disk are counted; memory and time are estimates, and say so. Fields of
    the recipe can be changed with `--section.key VALUE`.

    Example: `milepost plan dmas-1.7b --gpu a6000 --gpus 2 --train.microbatch_rows 8`

    Args:
        recipe: A packaged recipe's name, or the path of a .toml file.
        overrides: Changes of the recipe, --section.key VALUE.
        gpu: Which GPU, such as a6000, h100, rtx4090; without it, hours on all that are known.
        gpus: How many of them; with --device cpu the ranks.
        device: What is trained on; on a CPU memory is the resident set of the main rank.
        tokens_per_second: A measured speed, all devices together, in place of the assumed one.
        json: Write one JSON document.
    """
    if gpus < 1:
        raise UsageError(f"--gpus {gpus} is not a number of GPUs", hint="give 1 or more")
    if gpu is not None and device == "cpu":
        raise UsageError(
            f"--gpu {gpu} is no CPU", hint="leave out --gpu, or leave out --device cpu"
        )
    if tokens_per_second is not None and not 0 < tokens_per_second < float("inf"):
        raise UsageError(
            f"--tokens-per-second {tokens_per_second} is not a speed", hint="give a number above 0"
        )
    config = load_recipe(recipe, overrides=overrides)
    worked_out = _work_out(
        config,
        gpu=None if gpu is None else find_gpu(gpu),
        num_gpus=gpus,
        device=device,
        tokens_per_second=tokens_per_second,
    )
    if json:
        show_json({"recipe": recipe} | _as_json(worked_out))
    else:
        show("\n".join(_as_text(recipe, worked_out)))


def _work_out(
    asked: Config,
    *,
    gpu: Gpu | None,
    num_gpus: int,
    device: DeviceKind,
    tokens_per_second: float | None,
) -> _Plan:
    config = settle(asked, ranks=num_gpus, memory_bytes=None if gpu is None else gpu.memory_bytes)

    def largest(recompute: str | int) -> int | None:
        if gpu is None:
            return None
        train = config.train.model_copy(update={"recompute": recompute})
        changed = config.model_copy(update={"train": train})
        return largest_microbatch_rows(changed, ranks=num_gpus, memory_bytes=gpu.memory_bytes)

    return _Plan(
        config=config,
        asked=asked,
        gpu=gpu,
        num_gpus=num_gpus,
        device=device,
        parameters=count_parameters(config.model),
        memory=estimate_memory(config, ranks=num_gpus, device=device),
        disk=estimate_disk(config),
        duration=estimate_duration(
            config, gpu=gpu, num_gpus=num_gpus, tokens_per_second=tokens_per_second
        ),
        max_microbatch_rows=largest(config.train.recompute),
        max_microbatch_rows_with_recompute=largest("block"),
    )


def _as_json(worked_out: _Plan) -> dict[str, Any]:
    config, gpu, duration = worked_out.config, worked_out.gpu, worked_out.duration
    counted = worked_out.parameters
    per_token = flops_per_token(
        config.model, sequence_length=config.data.sequence_length, lora=config.lora
    )
    total_bytes = worked_out.memory.total_bytes
    return {
        "parameters": asdict(counted)
        | {"total": counted.total, "trainable": count_trained(config)}
        | {"non_embedding": counted.non_embedding},
        "tokens": run_tokens(config),
        "steps": config.last_step,
        "flops_per_token": per_token,
        "total_flops": per_token * run_tokens(config),
        "gpu": None if gpu is None else asdict(gpu),
        "gpus": worked_out.num_gpus,
        "device": worked_out.device,
        "memory_per_rank": asdict(worked_out.memory) | {"total_bytes": total_bytes},
        "host_bytes_per_rank": host_bytes(config),
        "save_copy_bytes": save_copy_bytes(config),
        "microbatch_rows": config.train.microbatch_rows,
        "recompute": config.train.recompute,
        "fits": None if gpu is None else total_bytes <= gpu.memory_bytes,
        "max_microbatch_rows": worked_out.max_microbatch_rows,
        "max_microbatch_rows_with_recompute": worked_out.max_microbatch_rows_with_recompute,
        "disk": asdict(worked_out.disk),
        "time": None
        if duration is None
        else asdict(duration) | {"total_seconds": duration.total_seconds},
    }


def _as_text(recipe: str, worked_out: _Plan) -> list[str]:
    sections = (
        ("model", _model_rows(worked_out)),
        ("training", _training_rows(worked_out)),
        ("memory of one rank, estimated", _memory_rows(worked_out)),
        ("disk", _disk_rows(worked_out.config, disk=worked_out.disk)),
        ("time of all steps, estimated", _time_rows(worked_out)),
    )
    where = "" if worked_out.gpu is None else f" on {worked_out.num_gpus} x {worked_out.gpu.name}"
    lines = [f"plan of {recipe}{where}"]
    for title, rows in sections:
        lines += ["", title]
        lines += [f"  {name:<28} {value:>16}   {note}".rstrip() for name, value, note in rows]
    return lines


_Row = tuple[str, str, str]


def _model_rows(worked_out: _Plan) -> list[_Row]:
    counted, lora = worked_out.parameters, worked_out.config.lora
    head = f"{counted.head:,}" if counted.head else "tied"
    rows = [
        ("parameters", f"{counted.total:,}", "all of them trainable"),
        ("  embedding", f"{counted.embedding:,}", ""),
        ("  head", head, "" if counted.head else "the embedding again"),
        ("  attention", f"{counted.attention:,}", ""),
        ("  feed-forward", f"{counted.feed_forward:,}", ""),
        ("  norms", f"{counted.norms:,}", ""),
        ("not of the vocabulary", f"{counted.non_embedding:,}", ""),
    ]
    if lora.rank is None:
        return rows
    rows[0] = ("parameters", f"{counted.total:,}", "none of them trainable")
    num_trained = count_trained(worked_out.config)
    return [*rows, ("LoRA's additions", f"{num_trained:,}", f"trainable, rank {lora.rank}")]


def _training_rows(worked_out: _Plan) -> list[_Row]:
    config = worked_out.config
    per_token = flops_per_token(
        config.model, sequence_length=config.data.sequence_length, lora=config.lora
    )
    multiplying = format_count(worked_out.parameters.multiplying)
    step_tokens = config.train.global_batch_tokens
    factor, rest = 6, "and causal attention"
    if config.lora.rank is not None:
        factor, rest = 4, "6 x the additions, and causal attention"
    return [
        (
            "steps",
            f"{config.last_step:,}",
            f"of {step_tokens:,} tokens, {config.rows_per_step} rows",
        ),
        ("tokens", f"{run_tokens(config):,}", format_count(run_tokens(config))),
        ("FLOPs a token", f"{per_token:.3e}", f"{factor} x {multiplying} weights, {rest}"),
        ("FLOPs, all steps", f"{per_token * run_tokens(config):.2e}", ""),
    ]


def _memory_rows(worked_out: _Plan) -> list[_Row]:
    memory, train = worked_out.memory, worked_out.config.train
    lanes = train.lanes // worked_out.num_gpus
    precision = "planned as bfloat16" if train.precision == "auto" else train.precision
    moments = "8 bits" if worked_out.config.optimizer.name == "adamw8bit" else "float32"
    rows = [
        ("weights", format_bytes(memory.weights_bytes), "float32"),
        (
            "gradients",
            format_bytes(memory.gradients_bytes),
            "float32, 1 lane"
            if lanes == 1
            else f"float32, {lanes.bit_length()} x for {lanes} lanes",
        ),
        ("AdamW", format_bytes(memory.optimizer_bytes), f"two moments, {moments}"),
        ("casts of the weights", format_bytes(memory.casts_bytes), precision),
        (
            "activations",
            format_bytes(memory.activations_bytes),
            _microbatch_in_words(worked_out),
        ),
        ("working buffers", format_bytes(memory.working_bytes), "of the step's largest stage"),
        ("process", format_bytes(memory.process_bytes), "context and libraries, roughly"),
    ]
    if worked_out.device == "cpu":
        saved = format_bytes(memory.save_bytes)
        return [
            *rows,
            (
                "holes in the heap",
                format_bytes(memory.holes_bytes),
                "with our launcher's allocator",
            ),
            ("copy for the saves", saved, "main rank, from its first save on"),
            ("total", format_bytes(memory.total_bytes), "resident"),
        ]
    copy = format_bytes(save_copy_bytes(worked_out.config))
    if worked_out.gpu is None:
        return [
            *rows,
            ("total", format_bytes(memory.total_bytes), "fits? give --gpu"),
            ("copy for the saves", copy, "main rank, on top; of a GPU run in the host's memory"),
        ]
    has_bytes = worked_out.gpu.memory_bytes
    fits = "fits" if memory.total_bytes <= has_bytes else "DOES NOT FIT"
    host = format_bytes(host_bytes(worked_out.config))
    return [
        *rows,
        ("total", format_bytes(memory.total_bytes), f"of {format_bytes(has_bytes)}: {fits}"),
        ("largest microbatch", *_rows_that_fit(worked_out.max_microbatch_rows)),
        (
            '  with recompute = "block"',
            *_rows_that_fit(worked_out.max_microbatch_rows_with_recompute),
        ),
        ("memory of the host", host, "a rank, while a checkpoint is read back"),
        ("  copy for the saves", copy, "main rank, after that and always"),
    ]


def _microbatch_in_words(worked_out: _Plan) -> str:
    config, asked = worked_out.config, worked_out.asked.train
    rows, num_blocks = config.train.rows_of_forward, config.model.num_hidden_layers
    words = f"microbatch of {rows} rows"
    if asked.microbatch_rows == "auto":
        words = f"at most {rows} rows, measured at the start"
    if config.num_recomputed_blocks:
        words += f", {config.num_recomputed_blocks} of {num_blocks} blocks recomputed"
    if asked.recompute == "auto":
        words += " (auto)" if config.num_recomputed_blocks else ", none recomputed (auto)"
    return words


def _rows_that_fit(rows: int | None) -> tuple[str, str]:
    if rows is None:
        return "none", "not one row fits"
    return f"{rows} rows", f"--train.microbatch_rows {rows}"


def _disk_rows(config: Config, *, disk: DiskEstimate) -> list[_Row]:
    rows = [
        (
            "a checkpoint's weights",
            format_bytes(disk.weights_bytes),
            f"on each of {disk.num_checkpoints} checkpoints",
        ),
        (
            "a train state",
            format_bytes(disk.train_state_bytes),
            f"on {disk.num_train_states} of them",
        ),
        ("log and samples", format_bytes(disk.history_bytes), "roughly"),
        ("the run", format_bytes(disk.run_bytes), f"{format_bytes(disk.peak_bytes)} at the peak"),
    ]
    if config.is_finetuning:  # conversations are read as they are
        return rows
    shards = format_bytes(disk.data_bytes)
    return [*rows, ("the data", shards, "shards for one pass over fresh tokens")]


def _time_rows(worked_out: _Plan) -> list[_Row]:
    if worked_out.duration is None:
        return _time_on_every_gpu(worked_out)
    duration = worked_out.duration
    hours = f"{duration.total_seconds / 3600:,.1f} hours, " if duration.total_seconds > 3600 else ""
    speed = "as given"
    if duration.assumed_mfu_fraction is not None and worked_out.gpu is not None:
        speed = (
            f"ASSUMED: {duration.assumed_mfu_fraction:.0%} of the dense bf16 peak, "
            f"{worked_out.gpu.bf16_flops / 1e12:g} TFLOP/s a GPU"
        )
    return [
        ("tokens a second", f"{duration.tokens_per_second:,.0f}", speed),
        ("training", format_duration(duration.training_seconds), ""),
        ("validation", format_duration(duration.validation_seconds), "forward passes only"),
        (
            "together",
            format_duration(duration.total_seconds),
            f"{hours}without saving and sampling",
        ),
    ]


def _time_on_every_gpu(worked_out: _Plan) -> list[_Row]:
    """Without a GPU or a speed: the hours on each GPU of the table."""
    rows: list[_Row] = [("here", "unknown", "give --gpu, or --tokens-per-second as measured")]
    for gpu in GPUS:
        duration = estimate_duration(
            worked_out.config, gpu=gpu, num_gpus=worked_out.num_gpus, tokens_per_second=None
        )
        if duration is not None and duration.assumed_mfu_fraction is not None:
            fits = worked_out.memory.total_bytes <= gpu.memory_bytes
            note = (
                f"ASSUMED: {duration.assumed_mfu_fraction:.0%} of {gpu.bf16_flops / 1e12:g} TFLOP/s"
            )
            rows.append(
                (
                    f"{worked_out.num_gpus} x {gpu.name}",
                    format_duration(duration.total_seconds),
                    note if fits else f"{note}; does not fit its memory",
                )
            )
    return rows
