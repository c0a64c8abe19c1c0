"""A made-up run as long as the paper's, for benchmarks/report.py; every file as Milepost writes it.

45,000 steps with a restart that loses the optimizer's state, a checkpoint each 100 steps, each
scored on the seven benchmarks with every item, samples at each checkpoint and ratings of some.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from milepost.config.recipe import load_recipe
from milepost.core.files import append_json_line, write_atomically
from milepost.evaluation.text_quality import text_quality
from milepost.runs.evaluations import Conditions, EvaluationRecord, EvaluationStore, Weights
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import RunManifest, write_run_manifest
from milepost.runs.ratings import CRITERIA, RatingRecord, append_rating
from milepost.runs.records import SampleRecord

NUM_STEPS = 45_000
EVERY_STEPS = 100
RESTARTS = (8_750, 10_250)
"""Killed there; the first is restored without the optimizer's state."""
TOKENS_PER_STEP = 524_288
RUN_ID = "0f3a9c51d2e84b77"
STARTED = datetime.datetime(2026, 1, 5, 9, 0, tzinfo=datetime.UTC)

BENCHMARKS = {
    "hellaswag": (10_042, 4, 0.25, 0.55),
    "arc_easy": (2_376, 4, 0.25, 0.58),
    "arc_challenge": (1_172, 4, 0.22, 0.33),
    "piqa": (1_838, 2, 0.5, 0.73),
    "winogrande": (1_267, 2, 0.5, 0.56),
    "openbookqa": (500, 4, 0.25, 0.36),
    "boolq": (3_270, 2, 0.5, 0.58),
}
"""Items, choices, accuracy at the start and at the end."""
WITHOUT_NORM = ("boolq", "winogrande")
NUM_ITEM_FILES = 4
"""Different items files a benchmark; checkpoints take them in turns, as bytes of real size."""

WORDS = ("the", "pyramids", "of", "giza", "were", "built", "by", "many", "hands", "over", "years")
NUM_RATED = 10
RATERS = (("first rater", "person"), ("second rater", "person"), ("a-model", "model"))


def make_run(folder: Path) -> None:
    """Writes the run; the same bytes each time.

    Args:
        folder: made anew.
    """
    layout = RunLayout(folder)
    rng = np.random.default_rng(1)
    write_run_manifest(layout, _manifest())
    lines = (json.dumps(event, separators=(",", ":")) for event in _events(rng))
    write_atomically(layout.events, "\n".join(lines) + "\n")
    _write_samples(layout, rng)
    _write_evaluations(layout, rng)


def _manifest() -> RunManifest:
    words = ["--train.total_steps", str(NUM_STEPS), "--samples.every_steps", str(EVERY_STEPS)]
    return RunManifest(
        run_id=RUN_ID,
        created=_time(0),
        config=load_recipe("dmas-1.7b", overrides=words),
        recipe="dmas-1.7b",
        data_fingerprint=hashlib.sha256(b"train").hexdigest(),
        validation_fingerprint=hashlib.sha256(b"validation").hexdigest(),
        tokenizer_sha256=hashlib.sha256(b"tokenizer").hexdigest(),
        environment={"milepost": "0.1.0", "python": "3.11.7", "cpu": "made up", "packages": {}},
    )


def _events(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    noise = rng.normal(size=(4, NUM_STEPS + 1))
    segment = 0
    for step in range(NUM_STEPS + 1):
        if step in (0, *RESTARTS):
            segment += 1
            yield _started(segment, step)
        if step > 0:
            yield _step(step, segment, noise[:, step])
        if step % 250 == 0:
            loss = _loss(step) + 0.01 * noise[3, step]
            bits = {"bits_per_byte": loss / math.log(2) / 4.4}
            said = {"step": step, "loss_nats": loss, "tokens": 10_485_760, "seconds": 90.0}
            yield _event("validation", step, segment, **said, **bits)
        if step % EVERY_STEPS == 0 and step > 0:
            said = {"sha256": _checkpoint_sha256(step), "bytes": 3_431_903_232, "seconds": 11.0}
            yield _event("checkpoint_saved", step, segment, step=step, **said)
            yield _event("train_state_dropped", step, segment, step=max(EVERY_STEPS, step - 200))
    said = {"reason": "done", "step": NUM_STEPS, "training_seconds": 2.5 * NUM_STEPS}
    yield _event("segment_ended", NUM_STEPS, segment, **said)


def _started(segment: int, step: int) -> dict[str, Any]:
    is_first, is_bare = segment == 1, segment == 2
    return _event(
        "segment_started",
        step,
        segment,
        ranks=1 + segment % 2,
        threads=8,
        device="NVIDIA RTX A6000",
        devices=["NVIDIA RTX A6000"] * (1 + segment % 2),
        versions={"torch": "2.13.0", "milepost": "0.1.0"},
        restored_step=None if is_first else step,
        restored="nothing" if is_first else "weights" if is_bare else "full",
        exactness="approximate" if is_bare else "exact",
        reason="no train state" if is_bare else "deterministic kernels",
        compile=True,
        precision="bfloat16",
        host="made-up",
    )


def _step(step: int, segment: int, noise: np.ndarray) -> dict[str, Any]:
    since = step - RESTARTS[0]
    bump = 0.8 * math.exp(-since / 400) if since >= 0 else 0.0
    speed = (1 + segment % 2) * 21_000 * (1 + 0.02 * float(noise[2]))
    return _event(
        "step",
        step,
        segment,
        step=step,
        data_step=step - 1,
        loss_nats=_loss(step) + bump + 0.04 * float(noise[0]),
        grad_norm=0.3 + 2 * math.exp(-step / 900) + bump + 0.03 * abs(float(noise[1])),
        learning_rate=6e-4 * min(1.0, step / 715),
        tokens_seen=step * TOKENS_PER_STEP,
        tokens_per_second=speed,
        step_seconds=TOKENS_PER_STEP / speed,
        mfu_fraction=0.38 + 0.002 * float(noise[2]),
        batch_sha256=hashlib.sha256(str(step).encode()).hexdigest(),
        loss_scale=None,
        repeats=0,
    )


def _event(kind: str, at_step: int, segment: int, **fields: Any) -> dict[str, Any]:
    return {"v": 1, "kind": kind, "time": _time(at_step), "segment": segment} | fields


def _time(step: int) -> str:
    time = STARTED + datetime.timedelta(seconds=25 * step)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _loss(step: int) -> float:
    return 2.2 + 8.0 * (step + 60) ** -0.32


def _checkpoint_sha256(step: int) -> str:
    return hashlib.sha256(f"checkpoint {step}".encode()).hexdigest()


def _write_samples(layout: RunLayout, rng: np.random.Generator) -> None:
    prompts, lines, rated = _manifest().config.samples.prompts, [], []
    for step in range(EVERY_STEPS, NUM_STEPS + 1, EVERY_STEPS):
        for prompt in prompts:
            ids = rng.integers(0, len(WORDS), 64).tolist()
            record = SampleRecord(
                step=step,
                adapter=None,
                prompt=prompt,
                completion=" " + " ".join(WORDS[place] for place in ids),
                token_ids=ids,
                decoding={"max_new_tokens": 64, "temperature": 0.0, "top_k": None, "top_p": None},
                seed=0,
                quality=asdict(text_quality(ids)),
            )
            lines.append(json.dumps(record.as_line()))
            if step % (NUM_STEPS // NUM_RATED) == 0:
                rated.append(record)
    write_atomically(layout.samples, "\n".join(lines) + "\n")
    for record in rated:
        for rater, kind in RATERS:
            _rate(layout, record, rater, kind, rng)


def _rate(
    layout: RunLayout, record: SampleRecord, rater: str, kind: Any, rng: np.random.Generator
) -> None:
    for criterion in CRITERIA:
        score = int(np.clip(3 + 4 * (record.step or 0) / NUM_STEPS + rng.normal(0, 1), 0, 10))
        append_rating(
            layout.ratings,
            RatingRecord(record.sample_id, rater, kind, criterion, score, 0, _time(NUM_STEPS)),
        )


def _write_evaluations(layout: RunLayout, rng: np.random.Generator) -> None:
    """Real items for the first checkpoints of each benchmark; the others' files are copies."""
    store = EvaluationStore(layout.root)
    steps = range(EVERY_STEPS, NUM_STEPS + 1, EVERY_STEPS)
    for benchmark, (n, num_choices, first, last) in BENCHMARKS.items():
        gold, made = rng.integers(0, num_choices, n), []
        for number, step in enumerate(steps):
            accuracy = first + (last - first) * (1 - math.exp(-3 * step / NUM_STEPS))
            record = _record(benchmark, step, n, accuracy, rng)
            if len(made) < NUM_ITEM_FILES:
                share = first + (last - first) * number / NUM_ITEM_FILES
                items = _items(benchmark, gold, num_choices, share, rng)
                made.append(store.add(record, items))
                continue
            line = made[number % NUM_ITEM_FILES]
            file = store.items_file(record.key)
            shutil.copyfile(store.items_file(line["key"]), file)
            pointer = {"items": f"items/{file.name}", "items_sha256": line["items_sha256"]}
            append_json_line(store.log, record.as_line() | pointer)


def _items(
    benchmark: str, gold: np.ndarray, num_choices: int, accuracy: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    n = len(gold)
    likelihoods = rng.normal(-60, 20, (n, num_choices))
    is_right = rng.random(n) < accuracy
    chosen = np.where(is_right, gold, (gold + 1) % num_choices)
    return [
        {
            "id": f"{benchmark}-{number}",
            "gold": int(gold[number]),
            "loglikelihoods": likelihoods[number].tolist(),
            "chosen": int(chosen[number]),
            "chosen_norm": None if benchmark in WITHOUT_NORM else int(chosen[number]),
        }
        for number in range(n)
    ]


def _record(
    benchmark: str, step: int, n: int, accuracy: float, rng: np.random.Generator
) -> EvaluationRecord:
    metrics: dict[str, dict[str, float | None]] = {}
    for name in ("acc",) if benchmark in WITHOUT_NORM else ("acc", "acc_norm"):
        value = rng.binomial(n, accuracy) / n
        metrics[name] = {"value": value, "stderr": math.sqrt(value * (1 - value) / (n - 1))}
    return EvaluationRecord(
        weights=Weights(_checkpoint_sha256(step), RUN_ID, step, step * TOKENS_PER_STEP),
        conditions=Conditions(
            benchmark=benchmark,
            protocol=f"{benchmark}-1",
            num_fewshot=0,
            limit=None,
            data_sha256=hashlib.sha256(benchmark.encode()).hexdigest(),
            dtype="bfloat16",
        ),
        n=n,
        metrics=metrics,
        chance=1 / BENCHMARKS[benchmark][1],
        majority=0.6217 if benchmark == "boolq" else 1.05 / BENCHMARKS[benchmark][1],
        num_truncated=0,
        device="NVIDIA RTX A6000",
        ranks=1,
        seconds=120.0,
        milepost="0.1.0",
        time=_time(step),
    )
