"""Where the time of an update goes: by kind of kernel, the share that the GPU idles, and waits.

`--steps` updates are profiled after two that are not. A kernel belongs to the part of the step it
runs in (the loss, the sum of lanes, the optimizer), else to the kind that its name tells. How often
the host waits for the device is counted in one more update, by torch's own watch.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from milepost.data.batch import Batch
from milepost.train import objective
from milepost.train.gradients import LaneGradients
from milepost.train.schedule import learning_rate
from on_gpu.setting import (
    Setting,
    new_model,
    new_optimizer,
    new_stepper,
    open_loader,
    open_setting,
    show_row,
    tell,
    wait,
)

QUESTION = "where does the time of a step go, and does the host wait for the device?"
RECIPE = "dmas-1.7b"
STEPS = 2
DEFAULTS = ("train.global_batch_tokens=65536",)
LONGEST_SHOWN = 15
PART = "part: "

_KINDS = (
    ("attention", ("flash", "fmha", "attention", "sdpa", "attn")),
    ("products", ("gemm", "nvjet", "cutlass", "_mm", "::mm", "addmm", "linear", "matmul", "xmma")),
    ("copies", ("memcpy", "memset", "copy", "fill", "zero_")),
    ("norms, rotary, SwiGLU and the like", ("triton", "elementwise", "reduce", "mul", "add")),
)
"""The first kind with one of these in the kernel's name, small letters."""

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Span(NamedTuple):
    """One kernel, or one part of the step, on the device's clock in microseconds."""

    name: str
    start: float
    end: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing besides the shared arguments."""


def answer(arguments: argparse.Namespace) -> int:
    """One row."""
    setting = open_setting(arguments, defaults=DEFAULTS)
    data = setting.open_data()
    config = setting.config
    model = new_model(config, device=setting.device)
    stepper = new_stepper(
        model,
        optimizer=new_optimizer(model, config=config),
        config=config,
        world=setting.world,
        end_of_text_id=data.end_of_text_id,
    )
    with open_loader(setting, data=data) as loader:
        rows = loader.batch(0)

    def update() -> None:
        rate = learning_rate(0, config=config)
        stepper.run_step(Batch.of_tokens(rows), learning_rate=rate, stop_requested=lambda: False)

    with _named_parts():
        for _ in range(2):
            update()
        wait(setting.device)
        activities = [ProfilerActivity.CPU]
        if setting.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiled:
            for _ in range(arguments.steps):
                update()
            wait(setting.device)
    kernels, parts = _spans(profiled.events(), setting=setting)
    table = time_by_group(kernels, parts=parts)
    for group, seconds in table.items():
        tell(f"{seconds / arguments.steps * 1000:10.2f} ms a step  {group}")
    show_row(
        "profile",
        setting=setting,
        precision=config.train.precision,
        float8=config.train.float8,
        microbatch_rows=config.train.microbatch_rows,
        tokens_per_step=config.train.global_batch_tokens,
        seconds_a_step={group: s / arguments.steps for group, s in table.items()},
        longest_kernels=_longest(kernels, steps=arguments.steps),
        **_waits(profiled.events(), kernels, update, setting=setting, steps=arguments.steps),
    )
    return 0


def time_by_group(kernels: Sequence[Span], *, parts: Sequence[Span]) -> dict[str, float]:
    """Seconds by part of the step or else by kind of kernel, the longest first."""
    found: dict[str, float] = defaultdict(float)
    ordered = sorted(parts, key=lambda part: part.start)
    place = 0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        while place < len(ordered) and ordered[place].end <= kernel.start:
            place += 1
        is_inside = place < len(ordered) and ordered[place].start <= kernel.start
        group = ordered[place].name if is_inside else kind_of(kernel.name)
        found[group] += (kernel.end - kernel.start) / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    small = kernel.lower()
    return next((kind for kind, words in _KINDS if any(w in small for w in words)), "other")


def idle_share(kernels: Sequence[Span]) -> float:
    """Share of the time from the first kernel to the end of the last in which none ran."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    busy, reached = 0.0, ordered[0].start
    for kernel in ordered:
        busy += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    return 1 - busy / (reached - ordered[0].start)


def _spans(events: Sequence[Any], *, setting: Setting) -> tuple[list[Span], list[Span]]:
    """(kernels, parts); on the CPU operators stand for kernels, without what they call."""
    device = torch.autograd.DeviceType.CUDA
    if setting.device.type != "cuda":
        device = torch.autograd.DeviceType.CPU
    kernels, parts = [], []
    for event in events:
        if event.device_type != device:
            continue
        span = Span(event.name, event.time_range.start, event.time_range.end)
        if event.name.startswith(PART):
            parts.append(span._replace(name=event.name.removeprefix(PART)))
        elif setting.device.type != "cuda":
            kernels.append(span._replace(end=span.start + event.self_cpu_time_total))
        elif not getattr(event, "is_user_annotation", False):
            kernels.append(span)
    return kernels, parts


def _longest(kernels: Sequence[Span], *, steps: int) -> list[dict[str, Any]]:
    total: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for kernel in kernels:
        total[kernel.name] += (kernel.end - kernel.start) / 1e6 / steps
        calls[kernel.name] += 1
    names = sorted(total, key=lambda name: -total[name])[:LONGEST_SHOWN]
    return [
        {"name": name[:200], "seconds_a_step": total[name], "calls_a_step": calls[name] / steps}
        for name in names
    ]


def _waits(
    events: Sequence[Any],
    kernels: Sequence[Span],
    update: Callable[[], None],
    *,
    setting: Setting,
    steps: int,
) -> dict[str, Any]:
    """Idle share and waits of a GPU; None on the CPU, which neither idles so nor is waited for."""
    if setting.device.type != "cuda":
        return {"idle_share": None, "waits_a_step": None, "synchronizations": None}
    runtime = [event for event in events if event.name in _WAITS]
    with _counted_synchronizations() as told:
        update()
    return {
        "idle_share": idle_share(kernels),
        "waits_a_step": len(runtime) / steps,
        "synchronizations": told,
    }


@contextlib.contextmanager
def _counted_synchronizations() -> Iterator[list[str]]:
    """The places where torch makes the host wait in the block, as often as it does."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for found in caught:
        if "synchronizing" in str(found.message):
            places.append(f"{found.filename.rpartition('/')[2]}:{found.lineno}")


@contextlib.contextmanager
def _named_parts() -> Iterator[None]:
    """Names the loss, the sum of lanes and the optimizer's update in what is profiled."""

    def named(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*values: Any, **options: Any) -> Any:
            with record_function(PART + name):
                return work(*values, **options)

        return wrapped

    places: list[tuple[Any, str, str]] = [
        (objective, "training_loss", "head and loss"),
        (LaneGradients, "end_lane", "lanes"),
        (LaneGradients, "sum_all", "lanes"),
        (torch.optim.AdamW, "step", "optimizer"),
    ]
    before = [getattr(holder, attribute) for holder, attribute, _ in places]
    for (holder, attribute, name), work in zip(places, before, strict=True):
        setattr(holder, attribute, named(name, work))
    try:
        yield
    finally:
        for (holder, attribute, _), work in zip(places, before, strict=True):
            setattr(holder, attribute, work)
