"""Samples: completions of fixed prompts, recorded with everything that made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from milepost.evaluation.text_quality import text_quality
from milepost.inference.engine import complete
from milepost.model.llama import Llama
from milepost.runs.records import SampleRecord, append_sample
from milepost.text.tokenizer import Tokenizer

PAPER_PROMPTS = (
    "The Pyramids of Giza in Egypt are some of the oldest man-made structures in the world. "
    "Visitors often note",
    "The Mona Lisa, painted by Leonardo da Vinci, is one of the most famous artworks in the "
    "world. It is notable for",
    "The Battle of Hastings, a key event in English history, occurred in the year 1066. It "
    "resulted in significant changes to the ruling class of England. Following this battle",
)
"""The three prompts of the paper's Table III."""


def record_samples(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    step: int | None,
    adapter: str | None = None,
    path: Path | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
) -> list[SampleRecord]:
    """Completes each prompt and appends the samples to a log. One rank calls this.

    Args:
        model: on any device; its weights are only read.
        tokenizer: the one the model was trained with.
        prompts: texts.
        step: updates the model had seen; None for a model that is not of a run.
        adapter: hash of the adapter that is merged into it; None: there is none.
        path: samples.jsonl; None: nothing is written.
        max_new_tokens: see `inference.engine.complete`, as the rest.
        temperature: 0: greedy.
        top_k: only the k likeliest tokens.
        top_p: only the likeliest tokens that together have this probability.
        seed: of the random streams.
        compute_dtype: of the forward pass.

    Returns:
        The records, in the order of the prompts.

    Raises:
        UsageError: a setting is out of range, or a prompt leaves no room in the context.
        DivergedError: the logits are not finite.
        StorageError: a line could not be written.
    """
    completions = complete(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        compute_dtype=compute_dtype,
    )
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "bos": True,  # the end-of-text token stands before the prompt
        "dtype": str(compute_dtype).removeprefix("torch."),
    }
    records = [
        SampleRecord(
            step=step,
            adapter=adapter,
            prompt=completion.prompt,
            completion=completion.text,
            token_ids=completion.token_ids,
            decoding=settings | {"stopped": completion.stopped},
            seed=seed,
            quality=asdict(text_quality(completion.token_ids)),
        )
        for completion in completions
    ]
    if path is not None:
        for record in records:
            append_sample(path, record)
    return records
