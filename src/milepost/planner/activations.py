"""What a forward pass leaves behind for the backward pass, counted tensor by tensor.

The counts are those of the tensors that autograd was seen to save, compiled and not, on a CPU;
tests hold them against it. D: width, F: that of the feed-forward, N heads of size H, of which
G have keys and values, T: the row's length.
"""

from __future__ import annotations

from milepost.config.schema import Config
from milepost.planner.cost import count_additions, count_parameters

FLOAT32_BYTES = 4
COMPUTE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
"""Bytes of a computed number; "auto" is planned as bfloat16, which it is on recent GPUs."""


def is_planned_compiled(config: Config) -> bool:
    """Whether blocks are compiled; "auto" is planned as if they were, as on GPUs and long runs."""
    return config.train.compile is not False


def block_bytes_per_token(config: Config, *, on_cpu: bool) -> int:
    """Bytes a token that one block saves, its share of the row's mask too."""
    model, width = config.model, COMPUTE_BYTES[config.train.precision]
    kept = width * _block_numbers(config, on_cpu=on_cpu)
    if width != FLOAT32_BYTES and not is_planned_compiled(config):
        # A norm by itself keeps its input, and that over its root mean square, in float32.
        kept += FLOAT32_BYTES * model.hidden_size * (2 if config.lora.rank else 4)
    if _has_mask(config):  # added to the scores in the compute dtype, made anew in each block
        kept += width * config.data.sequence_length
    log_sums_and_roots = model.num_attention_heads + 2
    return kept + FLOAT32_BYTES * log_sums_and_roots


def _block_numbers(config: Config, *, on_cpu: bool) -> int:
    """Numbers a token in the compute dtype that one block saves.

    Compiled: its input and the residual stream after attention, what each norm gives, queries and
    the attention's output (6 D), gate, up and their product (3 F). Not compiled: silu of the gate
    besides (4 F); in 16 bits no input (4 D), in float32 what each norm divides (8 D).
    """
    model, is_wide = config.model, COMPUTE_BYTES[config.train.precision] == FLOAT32_BYTES
    if is_planned_compiled(config):
        numbers = 6 * model.hidden_size + 3 * model.intermediate_size
    else:
        of_norms = (4 if config.lora.rank else 6) if is_wide else 2
        numbers = (of_norms + 2) * model.hidden_size + 4 * model.intermediate_size
    has_mask = _has_mask(config)
    if on_cpu and (has_mask or config.train.precision not in ("bfloat16", "auto")):
        numbers += model.hidden_size  # torch's kernel: heads before positions, and after
    # Heads share keys and values without copies in 16 bits without a mask.
    num_heads = model.num_key_value_heads
    if is_wide or has_mask:
        num_heads = model.num_attention_heads
    numbers += 2 * num_heads * model.head_dim
    return numbers + (config.lora.rank or 0) * len(config.lora.targets)


def _has_mask(config: Config) -> bool:
    """Whether attention stays inside documents, as in every fine-tuning."""
    return config.is_finetuning or config.data.document_attention


def block_casts_bytes(config: Config) -> int:
    """16-bit copies of one block's float32 weights, which its backward pass needs."""
    width = COMPUTE_BYTES[config.train.precision]
    if width == FLOAT32_BYTES:
        return 0
    counted = count_parameters(config.model)
    in_blocks = counted.attention + counted.feed_forward
    in_blocks += count_additions(config.model, lora=config.lora)
    return width * in_blocks // config.model.num_hidden_layers


def final_norm_bytes(config: Config, *, tokens: int) -> int:
    """The last norm's, which is not compiled: input and quotient in float32, and the result."""
    width = COMPUTE_BYTES[config.train.precision]
    in_float32 = 1 if config.lora.rank else 2
    return tokens * config.model.hidden_size * (FLOAT32_BYTES * in_float32 + width)


def backward_bytes(config: Config, *, tokens: int) -> int:
    """What the backward pass of a block takes beside all that is saved, at its peak.

    That is behind the last product: the gradients of its result (D) and of the feed-forward's
    inner numbers (F, twice where it is not compiled), and of one weight.
    """
    model, width = config.model, COMPUTE_BYTES[config.train.precision]
    times = 1 if is_planned_compiled(config) else 2
    of_weight = 0 if config.lora.rank else model.hidden_size * model.intermediate_size
    inner = tokens * width * (model.hidden_size + times * model.intermediate_size)
    return inner + FLOAT32_BYTES * of_weight
