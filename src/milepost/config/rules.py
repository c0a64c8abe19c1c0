"""Rules that span fields: each looks at plain values and says what is wrong, with a hint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Values = dict[str, Any]
"""Dotted field name to value; fields that are missing or out of form are absent."""


class Problem(NamedTuple):
    """One thing that is wrong with a recipe."""

    where: str
    what: str
    hint: str


def broken_rules(values: Values) -> list[Problem]:
    """Every rule that the values break; a rule whose fields are absent is silent."""
    problems: list[Problem] = []
    for needed, rule in _RULES:
        if all(name in values for name in needed):
            found = rule(*(values[name] for name in needed))
            if found is not None:
                problems.append(found)
    return problems


def _heads_divide_width(hidden: int, heads: int) -> Problem | None:
    if hidden % heads:
        return Problem(
            "model.num_attention_heads",
            f"{heads} heads do not divide hidden_size {hidden}",
            f"choose a divisor of {hidden}, such as {_nearest_divisor(hidden, heads)}",
        )
    if hidden // heads % 2:
        return Problem(
            "model.num_attention_heads",
            f"a head of {hidden // heads} is odd, rotary positions need an even size",
            "choose hidden_size / num_attention_heads even",
        )
    return None


def _kv_heads_divide_heads(heads: int, kv_heads: int) -> Problem | None:
    if heads % kv_heads == 0:
        return None
    return Problem(
        "model.num_key_value_heads",
        f"{kv_heads} key/value heads do not divide {heads} query heads",
        f"choose a divisor of {heads}, such as {_nearest_divisor(heads, kv_heads)}",
    )


def _row_fits_context(length: int, context: int, template: str | None) -> Problem | None:
    if length <= context:
        return None
    hint = f"set data.sequence_length to at most {context}"
    if template is None:  # of a fine-tuning the architecture is given
        hint += ", or raise model.max_position_embeddings"
    return Problem(
        "data.sequence_length",
        f"rows of {length} tokens exceed max_position_embeddings {context}",
        hint,
    )


def _batch_is_whole_rows(batch: int, length: int) -> Problem | None:
    if batch % length == 0:
        return None
    rows = max(1, round(batch / length))
    return Problem(
        "train.global_batch_tokens",
        f"{batch} tokens are not a whole number of rows of {length}",
        f"set it to a multiple of {length}, such as {rows * length}",
    )


def _rows_fill_lanes(
    batch: int, length: int, lanes: int, microbatch: int | Literal["auto"]
) -> Problem | None:
    rows = batch // length
    least = 1 if microbatch == "auto" else microbatch
    unit = lanes * least
    if batch % length or (rows and rows % unit == 0):
        return None
    return Problem(
        "train.lanes" if microbatch == "auto" else "train.microbatch_rows",
        f"{rows} rows a step cannot be dealt to {lanes} lanes in microbatches of {least}",
        f"rows a step must be a multiple of lanes x microbatch_rows = {unit}; "
        f"train.global_batch_tokens = {max(1, round(rows / unit)) * unit * length} would do",
    )


def _recomputed_blocks_exist(recompute: str | int, num_blocks: int) -> Problem | None:
    if isinstance(recompute, str) or recompute <= num_blocks:
        return None
    return Problem(
        "train.recompute",
        f"{recompute} is above model.num_hidden_layers {num_blocks}",
        'choose "block" for all of them, or fewer',
    )


def _float8_is_bfloat16(kind: str, precision: str) -> Problem | None:
    if kind == "none" or precision in ("auto", "bfloat16"):
        return None
    return Problem(
        "train.float8",
        f"{kind} needs the precision bfloat16, train.precision is {precision}",
        'set train.precision to "bfloat16", or train.float8 to "none"',
    )


def _float8_fits_rows(kind: str, length: int) -> Problem | None:
    if kind == "none" or length % 16 == 0:
        return None
    near = max(16, round(length / 16) * 16)
    return Problem(
        "train.float8",
        f"float8 products need rows of a multiple of 16 tokens, data.sequence_length is {length}",
        f'set data.sequence_length to {near}, or train.float8 to "none"',
    )


def _lanes_are_a_tree(lanes: int) -> Problem | None:
    if lanes & (lanes - 1) == 0:
        return None
    return Problem(
        "train.lanes", f"{lanes} is not a power of two", "choose 1, 2, 4, 8 ... (default 2)"
    )


def _stop_within_total(stop: int | None, total: int) -> Problem | None:
    if stop is None or stop <= total:
        return None
    return Problem(
        "train.stop_at_step",
        f"{stop} lies beyond total_steps {total}",
        "stop_at_step only stops; raise train.total_steps for a longer schedule",
    )


def _warmup_within_total(warmup: int, total: int) -> Problem | None:
    if warmup <= total:
        return None
    return Problem(
        "schedule.warmup_steps",
        f"a warm-up of {warmup} steps is longer than total_steps {total}",
        f"choose at most {total}",
    )


def _min_below_max(low: float, high: float) -> Problem | None:
    if low <= high:
        return None
    return Problem(
        "schedule.min_learning_rate",
        f"{low:g} is above optimizer.learning_rate {high:g}",
        f"choose at most {high:g}",
    )


def _decay_belongs_to_wsd(name: str, decay: int | None, warmup: int, total: int) -> Problem | None:
    if name == "warmup_stable_decay":
        if decay is None:
            return Problem(
                "schedule.decay_steps",
                "warmup_stable_decay needs the length of its decay",
                f"set schedule.decay_steps, such as {max(1, total // 5)}",
            )
        if warmup + decay > total:
            return Problem(
                "schedule.decay_steps",
                f"warm-up {warmup} and decay {decay} exceed total_steps {total}",
                f"choose at most {max(0, total - warmup)}",
            )
    elif decay is not None:
        return Problem(
            "schedule.decay_steps",
            f"the schedule {name} has no decay_steps",
            "remove it, or set schedule.name to warmup_stable_decay",
        )
    return None


def _rewarm_is_whole(begin: int | None, length: int, total: int) -> Problem | None:
    if (begin is None) != (length == 0):
        given, lacks = ("rewarm_at_step", "rewarm_steps")[:: 1 if length == 0 else -1]
        return Problem(
            f"schedule.{given}",
            f"a second warm-up needs schedule.{lacks} too",
            "set both, or neither",
        )
    if begin is not None and begin >= total:
        return Problem(
            "schedule.rewarm_at_step",
            f"step {begin} is not before total_steps {total}",
            f"choose at most {total - 1}",
        )
    return None


def _samples_have_prompts(every: int | None, prompts: tuple[str, ...]) -> Problem | None:
    if every is None or prompts:
        return None
    return Problem(
        "samples.prompts", "samples.every_steps is set but there are no prompts", "give prompts"
    )


def _skips_have_a_limit(nonfinite: str, spike: str, limit: int) -> Problem | None:
    if limit > 0 or (nonfinite != "skip" and spike != "skip"):
        return None
    return Problem(
        "guards.max_skips_in_a_row",
        f'0 leaves nothing to guards.{"nonfinite" if nonfinite == "skip" else "spike"} = "skip"',
        'choose at least 1, or set guards.nonfinite to "stop" and guards.spike to "warn"',
    )


def _rollbacks_have_a_limit(spike: str, limit: int) -> Problem | None:
    if spike != "rollback" or limit > 0:
        return None
    return Problem(
        "guards.max_rollbacks",
        '0 leaves nothing to guards.spike = "rollback"',
        'choose at least 1, or set guards.spike to "warn" or "skip"',
    )


def _checkpoints_suit_rollbacks(
    spike: str, every: int, window: int, patience: int
) -> Problem | None:
    if spike != "rollback":
        return None
    if every > window:
        return Problem(
            "checkpoint.every_steps",
            f"a rollback would undo up to {every} steps, guards.spike_window knows {window}",
            f"choose at most {window}, or a longer guards.spike_window",
        )
    if patience > every:
        return Problem(
            "guards.spike_patience",
            f"{patience} spikes in a row may lie over several checkpoints, one every {every} steps",
            f"choose at most checkpoint.every_steps = {every}",
        )
    return None


def _patience_leaves_a_level(spike: str, patience: int, window: int) -> Problem | None:
    # Spikes that were applied are in the window: half of it would be the level.
    if spike != "rollback" or 2 * patience < window:
        return None
    return Problem(
        "guards.spike_patience",
        f"{patience} spikes in a row fill half of guards.spike_window = {window}",
        f"choose at most {(window - 1) // 2}, or a longer window",
    )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def _lora_tunes(rank: int | None, template: str | None) -> Problem | None:
    if rank is None or template is not None:
        return None
    return Problem(
        "lora.rank",
        "LoRA adds to a model that is there already, and this recipe pretrains one",
        f"leave it out, or tune a model: milepost finetune MODEL --lora.rank {rank}",
    )


_RULES: tuple[tuple[tuple[str, ...], Callable[..., Problem | None]], ...] = (
    (("model.hidden_size", "model.num_attention_heads"), _heads_divide_width),
    (("model.num_attention_heads", "model.num_key_value_heads"), _kv_heads_divide_heads),
    (
        ("data.sequence_length", "model.max_position_embeddings", "finetune.template"),
        _row_fits_context,
    ),
    (("train.global_batch_tokens", "data.sequence_length"), _batch_is_whole_rows),
    (
        (
            "train.global_batch_tokens",
            "data.sequence_length",
            "train.lanes",
            "train.microbatch_rows",
        ),
        _rows_fill_lanes,
    ),
    (("train.recompute", "model.num_hidden_layers"), _recomputed_blocks_exist),
    (("train.float8", "train.precision"), _float8_is_bfloat16),
    (("train.float8", "data.sequence_length"), _float8_fits_rows),
    (("train.lanes",), _lanes_are_a_tree),
    (("lora.rank", "finetune.template"), _lora_tunes),
    (("train.stop_at_step", "train.total_steps"), _stop_within_total),
    (("schedule.warmup_steps", "train.total_steps"), _warmup_within_total),
    (("schedule.min_learning_rate", "optimizer.learning_rate"), _min_below_max),
    (
        (
            "schedule.name",
            "schedule.decay_steps",
            "schedule.warmup_steps",
            "train.total_steps",
        ),
        _decay_belongs_to_wsd,
    ),
    (
        ("schedule.rewarm_at_step", "schedule.rewarm_steps", "train.total_steps"),
        _rewarm_is_whole,
    ),
    (("samples.every_steps", "samples.prompts"), _samples_have_prompts),
    (
        ("guards.nonfinite", "guards.spike", "guards.max_skips_in_a_row"),
        _skips_have_a_limit,
    ),
    (("guards.spike", "guards.max_rollbacks"), _rollbacks_have_a_limit),
    (
        (
            "guards.spike",
            "checkpoint.every_steps",
            "guards.spike_window",
            "guards.spike_patience",
        ),
        _checkpoints_suit_rollbacks,
    ),
    (("guards.spike", "guards.spike_patience", "guards.spike_window"), _patience_leaves_a_level),
)
