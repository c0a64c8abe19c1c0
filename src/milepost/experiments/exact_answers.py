"""Questions with one right answer, put to the base of a fine-tuning and to the tuned model.

A question is right where the answer equals the expected one, letter by letter, the likeliest
token each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from milepost.checkpoint.store import read_checkpoint_manifest
from milepost.config.schema import Config
from milepost.core.console import progress
from milepost.core.files import sha256_of_json
from milepost.experiments.address_questions import AddressQuestions, Question
from milepost.inference.engine import continue_likeliest, decoder_beside
from milepost.inference.load import LoadedModel, load_model
from milepost.posttrain.finetuning import question_ids
from milepost.posttrain.instructions import read_conversations, split_held_out
from milepost.runs.exact_answers import (
    ExactAnswer,
    ExactAnswers,
    read_exact_answers,
    write_exact_answers,
)
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import read_run_manifest
from milepost.runs.steps import available_steps
from milepost.text.chat_template import load_template
from milepost.train.precision import DTYPES

TRAINED = "trained"
OTHER_WORDS = "in other words"
NEVER_ASKED = "never asked"

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Asked:
    """A question, and what the tuned model had seen of it.

    Attributes:
        group: TRAINED; OTHER_WORDS: the fact was trained, in other wordings of the question only;
            NEVER_ASKED: no conversation holds the fact.
    """

    group: str
    question: Question


def choose_questions(questions: AddressQuestions, *, data: Path, fraction: float) -> list[Asked]:
    """At most one question a fact and group, so that those of a group are of different facts.

    Args:
        questions: all of them.
        data: the given ones, as `milepost finetune` reads them.
        fraction: finetune.held_out_fraction; which questions that holds out is asked of the
            function that holds them out.

    Raises:
        DataError: the file cannot be read.
    """
    conversations, _ = read_conversations(str(data))
    trained, held_out = (
        {conversation.messages[0].content for conversation in part}
        for part in split_held_out(conversations, fraction=fraction)
    )
    # A fact whose wordings are all held out was never trained, and is in no group.
    known = [fact for fact in questions.given if any(q.text in trained for q in fact)]
    return [
        *_one_a_fact(TRAINED, known, texts=trained),
        *_one_a_fact(OTHER_WORDS, known, texts=held_out),
        *_one_a_fact(NEVER_ASKED, questions.never_asked, texts=None),
    ]


def _one_a_fact(
    group: str, facts: Sequence[Sequence[Question]], *, texts: set[str] | None
) -> list[Asked]:
    """The first wording of each fact that is among the texts, beginning with another each time."""
    chosen = []
    for place, fact in enumerate(facts):
        start = place % len(fact)
        turned = [*fact[start:], *fact[:start]]
        fitting = [question for question in turned if texts is None or question.text in texts]
        chosen += [Asked(group, question) for question in fitting[:1]]
    return chosen


def count_exact_answers(run: Path, asked: Sequence[Asked]) -> ExactAnswers:
    """Lets base and tuned model answer, and records it; what is on record is read back.

    Args:
        run: folder of a fine-tuning with a checkpoint.
        asked: groups one after the other.

    Raises:
        CheckpointError: base or checkpoint is damaged, or the record.
        StorageError: the record cannot be written.
    """
    layout = RunLayout(run)
    manifest = read_run_manifest(layout)
    step = available_steps(layout)[-1]
    head = read_checkpoint_manifest(layout.checkpoint(step), run_id=manifest.run_id, step=step)
    key = sha256_of_json(
        {
            "base": manifest.lineage["base_sha256"],
            "files": head["files"],
            "asked": [asdict(one) for one in asked],
            "max_new_tokens": manifest.config.finetune.max_new_tokens,
        }
    )
    known = read_exact_answers(layout.exact_answers)
    if known is not None and known.key == key:
        return known
    torch.set_num_threads(1)  # the same bits each time; two wait for each other on a busy machine
    texts = [one.question.text for one in asked]
    base = load_model(Path(manifest.config.finetune.base))
    before = _answers(base, texts, what="ask before", config=manifest.config)
    tuned = load_model(run, step=step)
    after = _answers(tuned, texts, what="ask after", config=manifest.config)
    answers = tuple(
        ExactAnswer(
            group=one.group,
            kind=one.question.kind,
            question=one.question.text,
            expected=one.question.answer,
            before=of_base,
            after=of_tuned,
        )
        for one, of_base, of_tuned in zip(asked, before, after, strict=True)
    )
    found = ExactAnswers(key, step, answers)
    write_exact_answers(layout.exact_answers, found)
    return found


def _answers(loaded: LoadedModel, texts: Sequence[str], *, what: str, config: Config) -> list[str]:
    """A model's answer to each question, in batches of fixed rows, so that bits stay."""
    assert config.finetune.template is not None
    template, tokenizer = load_template(config.finetune.template), loaded.tokenizer
    dtype = DTYPES[config.train.precision]
    decoder = decoder_beside(loaded.model, compute_dtype=dtype, vocab_size=tokenizer.vocab_size)
    answers: list[str] = []
    with progress(what, total=len(texts)) as bar:
        for start in range(0, len(texts), _ROWS_AT_ONCE):
            batch = texts[start : start + _ROWS_AT_ONCE]
            written = continue_likeliest(
                decoder,
                tokenizer,
                [question_ids(text, template=template, tokenizer=tokenizer) for text in batch],
                max_new_tokens=config.finetune.max_new_tokens,
                compute_dtype=dtype,
            )
            answers += [tokenizer.decode(ids).strip() for ids in written]
            bar.update(len(answers))
    return answers
