"""Before and after: the same questions answered by the base and by the tuned model.

As the paper's Table V, with what it leaves out: how long each answer is and whether it stopped
by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any

import torch

from milepost.checkpoint.store import ADAPTER_FILE, read_checkpoint_manifest
from milepost.config.schema import Config, FinetuneSection
from milepost.core.console import say, show
from milepost.core.files import sha256_of_json
from milepost.evaluation.text_quality import text_quality
from milepost.inference.adapter_files import is_adapter
from milepost.inference.load import FoundModel, LoadedModel, find_model, load_found, load_model
from milepost.inference.sampling import Decoding
from milepost.inference.stream import END_OF_TEXT, stream_tokens
from milepost.posttrain.finetuning import question_ids
from milepost.runs.answers import Answer, Answers, length_in_words, read_answers, write_answers
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import read_run_manifest
from milepost.runs.records import SampleRecord, append_sample
from milepost.runs.steps import available_steps
from milepost.text.chat_template import Message, load_template
from milepost.text.tokenizer import Tokenizer
from milepost.train.precision import DTYPES

GAP = "  "
MOST_LINES = 12
"""Lines of an answer in the table; the record has all of it."""


def compare_answers(run: Path, *, config: Config) -> list[Answer]:
    """Lets base and tuned model answer the recipe's questions, and records it.

    What the same models have answered before is read back.

    Args:
        run: folder of a fine-tuning with a checkpoint.
        config: as the person gave it; questions and the place of the base count.

    Returns:
        For each question the answer before and the answer after.

    Raises:
        CheckpointError: base or checkpoint is damaged, or what was recorded before.
        StorageError: nothing can be written.
    """
    layout = RunLayout(run)
    section = config.finetune
    manifest = read_run_manifest(layout)
    step = available_steps(layout)[-1]
    folder = layout.checkpoint(step)
    head = read_checkpoint_manifest(folder, run_id=manifest.run_id, step=step)
    key = sha256_of_json(
        {
            "base": manifest.lineage["base_sha256"],
            "files": head["files"],
            "questions": section.questions,
            "max_new_tokens": section.max_new_tokens,
        }
    )
    known = read_answers(layout.answers)
    if known is not None and known.key == key:
        return list(known.answers)
    say(f"both models answer {len(section.questions)} questions")
    ask = _Questions(manifest.config, section=section, seed=config.run.seed)
    base, device = Path(section.base), _device()
    before = ask.answer(load_model(base, device=device), step=0, adapter=None)
    # The base may lie at another place by now than the adapter says.
    tuned = find_model(base, adapter=folder) if is_adapter(folder) else FoundModel(folder)
    adapter = head["files"].get(ADAPTER_FILE, {}).get("sha256")
    after = ask.answer(load_found(tuned, device=device), step=step, adapter=adapter)
    for record in [*before, *after]:
        append_sample(layout.samples, record)
    answers = [
        Answer(question, of_base.as_line(), of_tuned.as_line())
        for question, of_base, of_tuned in zip(section.questions, before, after, strict=True)
    ]
    write_answers(layout.answers, Answers(key, step, tuple(answers)))
    return answers


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Questions:
    """The questions of a run, to be put to one model after the other.

    Args:
        config: of the run's manifest, in which nothing is "auto".
        section: with the questions.
        seed: for the record; nothing is drawn.
    """

    def __init__(self, config: Config, *, section: FinetuneSection, seed: int) -> None:
        assert config.finetune.template is not None
        self._template = load_template(config.finetune.template)
        self._precision = config.train.precision
        self._section = section
        self._seed = seed

    def answer(self, loaded: LoadedModel, *, step: int, adapter: str | None) -> list[SampleRecord]:
        """What a model answers, the likeliest token each time."""
        tokenizer, questions = loaded.tokenizer, self._section.questions
        steps = stream_tokens(
            loaded.model,
            [question_ids(q, template=self._template, tokenizer=tokenizer) for q in questions],
            Decoding(self._section.max_new_tokens, temperature=0.0, top_k=None, top_p=None),
            end_ids=frozenset({tokenizer.end_of_text_id}),
            vocab_size=tokenizer.vocab_size,
            compute_dtype=DTYPES[self._precision],
        )
        ids: list[list[int]] = [[] for _ in questions]
        stopped = [""] * len(questions)
        for new in (token for step_tokens in steps for token in step_tokens):
            if new.stopped != END_OF_TEXT:
                ids[new.row].append(new.token_id)
            stopped[new.row] = new.stopped or ""
        return [
            SampleRecord(
                step=step,
                adapter=adapter,
                prompt=self._prompt(question, tokenizer=tokenizer),
                completion=tokenizer.decode(token_ids),
                token_ids=token_ids,
                decoding=self._decoding(why),
                seed=self._seed,
                quality=asdict(text_quality(token_ids)),
            )
            for question, token_ids, why in zip(questions, ids, stopped, strict=True)
        ]

    def _prompt(self, question: str, *, tokenizer: Tokenizer) -> str:
        end = tokenizer.decode([tokenizer.end_of_text_id])
        messages = [Message("user", question)]
        return self._template.render(messages, add_generation_prompt=True, eos=end)

    def _decoding(self, stopped: str) -> dict[str, Any]:
        return {
            "max_new_tokens": self._section.max_new_tokens,
            "temperature": 0.0,
            "top_k": None,
            "top_p": None,
            "bos": False,  # as in training the prompt begins with the template's first word
            "dtype": self._precision,
            "template": self._template.name,
            "stopped": stopped,
        }


def show_answers(answers: Sequence[Answer]) -> None:
    """A table for people, both answers of a question side by side."""
    if not answers:
        return
    width = (get_terminal_size((100, 24)).columns - 2 * len(GAP)) // 3
    show("")
    _show_row("question", "before", "after", width=width)
    show("-" * (3 * width + 2 * len(GAP)))
    for answer in answers:
        before, after = (_plain(a["completion"]) for a in (answer.before, answer.after))
        _show_row(_plain(answer.question), before, after, width=width)
        before, after = (f"[{length_in_words(a)}]" for a in (answer.before, answer.after))
        _show_row("", before, after, width=width)
        show("")


def _show_row(*cells: str, width: int) -> None:
    columns = [wrap(cell, width, max_lines=MOST_LINES, placeholder=" ...") for cell in cells]
    for parts in zip_longest(*columns, fillvalue=""):
        show(GAP.join(f"{part:<{width}}" for part in parts).rstrip())


def _plain(text: str) -> str:
    """The text on one line; a model can write bytes that steer a terminal."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    return " ".join(words) or "(nothing)"
