"""Run folders as the trainer writes them, with a kill and a resume, by the real writers."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milepost.config.recipe import load_recipe
from milepost.core.files import append_json_line, write_atomically
from milepost.runs.evaluations import EvaluationStore
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import RunManifest, write_run_manifest
from milepost.runs.records import SampleRecord, append_sample

PROMPTS = ("Fellow citizens of the Senate,", "The state of our Union is")
STEP_SECONDS = 0.25
BATCH_TOKENS = 8192

RUN_ID = "0f3a9c51d2e84b77"

WRITTEN = (
    (0, " ggmentsAR the the obs<b>,,,\n\n\n\n\n of of"),
    (100, " and the of the United States, and the and the public of the States."),
    (200, " the Government of the United States has been made to the Congress, and the"),
    (400, " and of the House of Representatives: I have the honor to lay before you the"),
    (
        10**9,
        " it is with great satisfaction that I report to you that the year has been one of peace.",
    ),
)


@dataclass
class MadeRun:
    """A run folder in the making, with a clock of its own."""

    layout: RunLayout
    total_steps: int
    seed: int = 1
    clock: datetime.datetime = datetime.datetime(2026, 1, 5, 9, 0, tzinfo=datetime.UTC)
    segment: int = 0
    rng: random.Random = field(default_factory=random.Random)

    def append(self, kind: str, *, after_seconds: float = 0.0, **fields: Any) -> None:
        """One event, `after_seconds` after the one before."""
        self.clock += datetime.timedelta(seconds=after_seconds)
        time = self.clock.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        EventWriter(self.layout.events, self.segment).append(kind, **({"time": time} | fields))

    def start(self, *, restored_step: int | None = None, **fields: Any) -> None:
        """A new segment, a minute after whatever was last."""
        self.segment += 1
        usual = {
            "ranks": 2,
            "threads": 1,
            "device": "cpu",
            "devices": ["a plain processor"] * 2,
            "versions": {"torch": "2.13.0", "milepost": "0.1.0"},
            "restored_step": restored_step,
            "restored": "nothing" if restored_step is None else "full",
            "exactness": "exact",
            "reason": "one thread a rank, deterministic kernels",
            "compile": False,
            "precision": "float32",
            "host": "bench",
        }
        self.append("segment_started", after_seconds=60, **(usual | fields))

    def train(self, first: int, last: int, **fields: Any) -> None:
        """Steps first to last, with what is due on the way."""
        for step in range(first, last + 1):
            self.append("step", after_seconds=STEP_SECONDS, **(self.step_fields(step) | fields))
            if step % 100 == 0 or step == self.total_steps:
                self.validate(step)
                self.save(step)
                self.sample(step)

    def step_fields(self, step: int) -> dict[str, Any]:
        """What a step logs: a function of the step, as exact resume demands."""
        rng = random.Random(f"{self.seed}/{step}")
        warmup = min(1.0, step / 50)
        decay = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.total_steps))
        return {
            "step": step,
            "data_step": step - 1,
            "loss_nats": 2.6 + 5.7 * math.exp(-step / 90) + rng.gauss(0, 0.06),
            "grad_norm": 0.35 + 2.2 * math.exp(-step / 60) + abs(rng.gauss(0, 0.07)),
            "learning_rate": 3e-3 * warmup * decay,
            "tokens_seen": step * BATCH_TOKENS,
            "tokens_per_second": BATCH_TOKENS / STEP_SECONDS * rng.uniform(0.93, 1.03),
            "step_seconds": STEP_SECONDS,
            "mfu_fraction": None,
            "batch_sha256": hashlib.sha256(str(step).encode()).hexdigest(),
            "loss_scale": 65536.0,
            "repeats": 0,
        }

    def validate(self, step: int) -> None:
        """A validation event."""
        loss = 2.7 + 5.62 * math.exp(-step / 95)
        bits = {"bits_per_byte": loss / math.log(2) / 3.6}
        told = {"step": step, "loss_nats": loss, "tokens": 131072, "seconds": 1.5} | bits
        self.append("validation", after_seconds=1.5, **told)

    def save(self, step: int) -> None:
        """A checkpoint event, and one of the train state that retention drops."""
        sha256 = hashlib.sha256(f"checkpoint {step}".encode()).hexdigest()
        told = {"step": step, "sha256": sha256, "bytes": 41_562_112, "seconds": 0.4}
        self.append("checkpoint_saved", after_seconds=0.4, **told)
        if step > 200:
            self.append("train_state_dropped", step=step - 200)

    def sample(self, step: int) -> None:
        """A completion of each prompt, with its pointer."""
        written = next(text for before, text in WRITTEN if step <= before)
        for prompt in PROMPTS:
            record = SampleRecord(
                step=step,
                adapter=None,
                prompt=prompt,
                completion=written,
                token_ids=[1, 2, 3],
                decoding={"max_new_tokens": 64, "temperature": 0.0, "top_k": None, "top_p": None},
                seed=0,
            )
            append_sample(self.layout.samples, record)
            self.append("sample", step=step, sample_id=record.sample_id)

    def evaluate(self, step: int, benchmark: str, *, acc: float, **fields: Any) -> None:
        """A record and its items; acc_norm is a tenth higher where the set has it."""
        items = gzip.compress(b"", mtime=0)
        key = hashlib.sha256(f"{step} {benchmark} {fields}".encode()).hexdigest()
        file = EvaluationStore(self.layout.root).items_file(key)
        write_atomically(file, items)
        n = fields.get("n", 1000)
        metrics = {"acc": {"value": acc, "stderr": math.sqrt(acc * (1 - acc) / (n - 1))}}
        if benchmark not in ("boolq", "boolq_reasoned", "winogrande"):
            metrics["acc_norm"] = {"value": 1.1 * acc, "stderr": 0.015}
        usual = {
            "v": 1,
            "key": key,
            "run_id": RUN_ID,
            "checkpoint_sha256": hashlib.sha256(f"checkpoint {step}".encode()).hexdigest(),
            "step": step,
            "tokens_seen": step * BATCH_TOKENS,
            "benchmark": benchmark,
            "protocol": f"{benchmark}-1",
            "num_fewshot": 0,
            "limit": None,
            "data_sha256": hashlib.sha256(benchmark.encode()).hexdigest(),
            "dtype": "float32",
            "device": "cpu",
            "n": n,
            "metrics": metrics,
            "chance": 0.5 if benchmark.startswith(("boolq", "piqa", "winogrande")) else 0.25,
            "majority": 0.6217 if benchmark.startswith("boolq") else 0.268,
            "num_truncated": 0,
            "items": f"items/{file.name}",
            "items_sha256": hashlib.sha256(items).hexdigest(),
            "seconds": 12.5,
        }
        append_json_line(self.layout.evaluations, usual | fields)

    def replay(self, first: int, last: int, *, differing: tuple[int, ...] = ()) -> None:
        """What a resumed segment says when it has caught up."""
        compared = last - first + 1
        equal = compared - len(differing)
        told = {"compared": compared, "equal": equal, "differing_steps": list(differing)}
        self.append("replayed", from_step=first, to_step=last, **told)

    def end(self, reason: str, *, step: int, training_seconds: float) -> None:
        """The segment's end."""
        self.append("segment_ended", reason=reason, step=step, training_seconds=training_seconds)


def make_run(folder: Path, *, total_steps: int = 1000, name: str = "") -> MadeRun:
    """A run folder with a manifest and no events yet."""
    words = ["--train.total_steps", str(total_steps), "--data.path", "data/sotu"]
    words += ["--schedule.warmup_steps", str(min(50, total_steps))]
    words += ["--samples.prompts", str([*PROMPTS]), "--samples.every_steps", "100"]
    layout = RunLayout(folder)
    manifest = RunManifest(
        run_id=RUN_ID,
        created="2026-01-05T08:59:58.120Z",
        config=load_recipe("demo", overrides=[*words, "--run.name", f'"{name}"']),
        recipe="demo",
        data_fingerprint=hashlib.sha256(b"train").hexdigest(),
        validation_fingerprint=hashlib.sha256(b"validation").hexdigest(),
        tokenizer_sha256=hashlib.sha256(b"tokenizer").hexdigest(),
        environment={
            "milepost": "0.1.0",
            "python": "3.11.7",
            "platform": "Linux-6.1-x86_64",
            "cpu": "a plain processor",
            "cores": 2,
            "memory_bytes": 8 << 30,
            "packages": {"torch": "2.13.0", "numpy": "2.4.6", "transformers": None},
        },
    )
    write_run_manifest(layout, manifest)
    return MadeRun(layout, total_steps)


def make_killed_and_resumed_run(folder: Path, *, name: str = "") -> MadeRun:
    """1,000 steps: killed after step 437, resumed at 400, 37 steps run again, done."""
    made = make_run(folder, name=name)
    made.start()
    made.validate(0)
    made.sample(0)
    made.train(1, 437)
    made.start(restored_step=400)
    made.train(401, 437)
    made.replay(401, 437)
    made.train(438, 1000)
    made.end("done", step=1000, training_seconds=150.0)
    return made
