"""Run folders as `milepost finetune` leaves them, by the real writers, without training."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from milepost.config.recipe import load_recipe
from milepost.evaluation.text_quality import text_quality
from milepost.runs.answers import Answer, Answers, write_answers
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import RunManifest, write_run_manifest
from milepost.runs.records import SampleRecord, append_sample
from tests.made_runs import RUN_ID, MadeRun

STEPS = 40
BASE = "/models/first/checkpoints/step-00000800"
ADAPTER = hashlib.sha256(b"adapter").hexdigest()

Said = tuple[str, int, bool]
"""A text, its number of tokens, and whether the model stopped by itself."""

USUAL: dict[str, tuple[Said, Said]] = {
    "Who was the first president?": ((" of the of the", 256, False), (" Washington.", 3, True)),
    "What is Congress?": ((" States", 1, True), (" A house of two chambers.", 7, True)),
}


def make_finetuning(
    folder: Path, *words: str, conversations: dict[str, Any] | None = None, is_scored: bool = True
) -> MadeRun:
    """A run folder with a manifest and no events yet.

    Args:
        folder: of the run.
        words: overrides of the recipe.
        conversations: the ledger of its lineage.
        is_scored: whether conversations are held out.
    """
    made = {"finetune.base": BASE, "finetune.data": "/data/alpaca.jsonl"}
    made |= {"train.total_steps": str(STEPS), "run.name": "tuned"}
    usual = [word for name, value in made.items() for word in (f"--{name}", value)]
    account = {"trained": 900, "held_out": 20, "rows": 930, "used": 920}
    account |= {"left_out": {"too_long": 8, "no_answer": 2}, "listed": [{"line": 7}]}
    layout = RunLayout(folder)
    manifest = RunManifest(
        run_id=RUN_ID,
        created="2026-02-05T08:59:58.120Z",
        config=load_recipe("sft-alpaca", overrides=[*usual, *words]),
        recipe="sft-alpaca",
        data_fingerprint=hashlib.sha256(b"trained").hexdigest(),
        validation_fingerprint=hashlib.sha256(b"held out").hexdigest() if is_scored else None,
        tokenizer_sha256=hashlib.sha256(b"tokenizer").hexdigest(),
        environment={"milepost": "0.1.0", "packages": {"torch": "2.13.0"}},
        lineage={
            "base": BASE,
            "base_sha256": hashlib.sha256(b"base").hexdigest(),
            "base_step": 800,
            "conversations": account if conversations is None else conversations,
        },
    )
    write_run_manifest(layout, manifest)
    return MadeRun(layout, STEPS)


def tune(made: MadeRun, *, is_scored: bool = True) -> None:
    """All steps in one segment: the training loss falls from 2.25 to 1.2, the held-out to 1.5."""
    made.start()
    for step in range(STEPS + 1):
        if step:
            loss = 2.25 + (1.2 - 2.25) * (step - 1) / (STEPS - 1)
            told = made.step_fields(step) | {"loss_nats": loss, "tokens_seen": 1000 * step}
            made.append("step", after_seconds=0.25, **told)
        if is_scored and step % 10 == 0:
            held_out = 2.3 - 0.02 * step
            bits = {"bits_per_byte": 1.0, "tokens": 1234, "seconds": 0.5}
            made.append("validation", after_seconds=0.5, step=step, loss_nats=held_out, **bits)
    made.append("checkpoint_saved", step=STEPS, sha256=ADAPTER, bytes=1000, seconds=0.1)
    made.end("done", step=STEPS, training_seconds=10.0)


def answer(made: MadeRun, said: dict[str, tuple[Said, Said]], *, step: int = STEPS) -> None:
    """Both models' answers, in samples.jsonl and in compare.json."""
    answers = []
    for question, (before, after) in said.items():
        of_base = _record(question, before, step=0, adapter=None)
        of_tuned = _record(question, after, step=step, adapter=ADAPTER)
        for record in (of_base, of_tuned):
            append_sample(made.layout.samples, record)
        answers.append(Answer(question, of_base.as_line(), of_tuned.as_line()))
    write_answers(made.layout.answers, Answers("a key", step, tuple(answers)))


def make_answered_finetuning(folder: Path, *words: str) -> MadeRun:
    """A fine-tuning that is done, with the usual answers."""
    made = make_finetuning(folder, *words)
    tune(made)
    answer(made, USUAL)
    return made


def _record(question: str, said: Said, *, step: int, adapter: str | None) -> SampleRecord:
    completion, num_tokens, has_stopped = said
    token_ids = [7] * num_tokens
    return SampleRecord(
        step=step,
        adapter=adapter,
        prompt=f"USER: {question} ASSISTANT:",
        completion=completion,
        token_ids=token_ids,
        decoding={
            "max_new_tokens": 256,
            "temperature": 0.0,
            "top_k": None,
            "top_p": None,
            "template": "vicuna-1.1",
            "stopped": "end_of_text" if has_stopped else "max_new_tokens",
        },
        seed=1337,
        quality=asdict(text_quality(token_ids)),
    )
