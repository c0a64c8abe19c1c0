"""What a run shows of itself while it trains: validation loss and samples."""

from __future__ import annotations

from collections.abc import Callable

from milepost.checkpoint.state import Progress
from milepost.config.schema import Config
from milepost.core.console import say
from milepost.core.errors import UsageError
from milepost.data.loader import sequential_rows
from milepost.data.shards import PreparedData, ShardSet
from milepost.distributed.world import World
from milepost.evaluation.samples import record_samples
from milepost.evaluation.validation import ValidationSet, validate
from milepost.model.llama import Llama
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout
from milepost.text.tokenizer import Tokenizer
from milepost.train.objective import LOSS_CHUNK_ROWS
from milepost.train.precision import DTYPES


def open_validation_set(
    shards: ShardSet, *, config: Config, data: PreparedData, tokenizer: Tokenizer
) -> ValidationSet:
    """The fixed rows that are scored, and the bytes their targets stand for.

    Raises:
        DataError: there is not one target token.
    """
    inputs, targets = sequential_rows(
        shards,
        sequence_length=config.data.sequence_length,
        max_tokens=config.validation.tokens,
    )
    return ValidationSet(
        inputs=inputs,
        targets=targets,
        num_bytes=tokenizer.count_bytes(targets[targets >= 0]),
        document_separator=data.end_of_text_id if config.data.document_attention else None,
    )


def make_validation(
    model: Llama,
    *,
    rows: ValidationSet,
    config: Config,
    world: World,
    events: EventWriter | None,
    stop_requested: Callable[[], bool],
) -> Callable[[Progress], bool]:
    """The periodic validation; every rank calls it, the main rank records it.

    Where a stop is asked for it is given up, which it says with True; the next segment makes up
    for it.
    """

    def run_validation(progress: Progress) -> bool:
        result = validate(
            model,
            rows=rows,
            microbatch_rows=config.train.rows_of_forward,
            compute_dtype=DTYPES[config.train.precision],
            chunk_rows=LOSS_CHUNK_ROWS,
            world=world,
            stop_requested=stop_requested,
        )
        if events is None or result is None:
            return result is None
        events.append(
            "validation",
            step=progress.step,
            loss_nats=result.loss_nats,
            bits_per_byte=result.bits_per_byte,
            tokens=result.num_tokens,
            seconds=result.seconds,
        )
        bits = result.bits_per_byte
        shown = "" if bits is None else f"  {bits:.4f} bits per byte"
        say(f"step {progress.step}  validation loss {result.loss_nats:.4f}{shown}")
        return False

    return run_validation


def make_sampling(
    model: Llama,
    *,
    tokenizer: Tokenizer,
    config: Config,
    layout: RunLayout,
    events: EventWriter,
) -> Callable[[Progress], None]:
    """The periodic completions of the recipe's prompts; the main rank's work.

    Raises:
        UsageError: a prompt leaves no room in the context.
    """
    context = config.model.max_position_embeddings
    for prompt in config.samples.prompts:
        num_tokens = 1 + len(tokenizer.encode(prompt))  # the end-of-text token stands before it
        if num_tokens >= context:
            raise UsageError(
                f"samples.prompts: {prompt[:40]!r} takes {num_tokens} tokens, the context "
                f"(model.max_position_embeddings) has {context}",
                hint="shorten the prompt",
            )

    def run_sampling(progress: Progress) -> None:
        records = record_samples(
            model,
            tokenizer,
            config.samples.prompts,
            step=progress.step,
            path=layout.samples,
            max_new_tokens=config.samples.max_new_tokens,
            temperature=config.samples.temperature,
            top_k=config.samples.top_k,
            seed=config.run.seed,
            compute_dtype=DTYPES[config.train.precision],
        )
        for record in records:
            events.append("sample", step=progress.step, sample_id=record.sample_id)

    return run_sampling
