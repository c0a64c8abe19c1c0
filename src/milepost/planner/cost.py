"""Parameters, FLOPs and tokens, counted from a config."""

from __future__ import annotations

from dataclasses import dataclass

from milepost.config.schema import Config, LoraSection, ModelSection


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by the part they lie in, each tensor counted once.

    Attributes:
        embedding: the token embedding, [V, D].
        head: the output matrix, [V, D]; 0 where it is the embedding.
        attention: q, k, v and o projections of all blocks.
        feed_forward: gate, up and down projections of all blocks.
        norms: gains of all norms.
        multiplying: weights that a token is multiplied with in a forward pass. A lookup in the
            embedding multiplies nothing; a tied head does.
    """

    embedding: int
    head: int
    attention: int
    feed_forward: int
    norms: int
    multiplying: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.non_embedding + self.head

    @property
    def non_embedding(self) -> int:
        """What the vocabulary's size does not change."""
        return self.attention + self.feed_forward + self.norms


def count_parameters(model: ModelSection) -> ParameterCount:
    """Parameters of a LLaMA, exactly."""
    width, layers = model.hidden_size, model.num_hidden_layers
    kv_width = model.num_key_value_heads * model.head_dim
    vocabulary = model.vocab_size * width
    attention = layers * (2 * width * width + 2 * width * kv_width)
    feed_forward = layers * 3 * width * model.intermediate_size
    return ParameterCount(
        embedding=vocabulary,
        head=0 if model.tie_word_embeddings else vocabulary,
        attention=attention,
        feed_forward=feed_forward,
        norms=(2 * layers + 1) * width,
        multiplying=attention + feed_forward + vocabulary,
    )


def count_additions(model: ModelSection, *, lora: LoraSection) -> int:
    """Parameters of LoRA's additions, rank x (in + out) a projection (Hu et al. 2021, section 4);
    0 where all weights are trained."""
    return model.num_hidden_layers * sum(_additions_of_block(model, lora))


def _additions_of_block(model: ModelSection, lora: LoraSection) -> list[int]:
    shapes = _projections(model)
    rank = lora.rank or 0
    return [rank * size for target in lora.targets for size in shapes[target]]


def _projections(model: ModelSection) -> dict[str, tuple[int, int]]:
    """Numbers in and out of the projections of a block."""
    width, kv_width = model.hidden_size, model.num_key_value_heads * model.head_dim
    ffn_width = model.intermediate_size
    return {
        "q_proj": (width, width),
        "k_proj": (width, kv_width),
        "v_proj": (width, kv_width),
        "o_proj": (width, width),
        "gate_proj": (width, ffn_width),
        "up_proj": (width, ffn_width),
        "down_proj": (ffn_width, width),
    }


def trained_sizes(config: Config) -> list[int]:
    """Numbers of each tensor that is trained: LoRA's additions, or all of the model's."""
    model = config.model
    if config.lora.rank:
        return model.num_hidden_layers * _additions_of_block(model, config.lora)
    norms = [model.hidden_size] * (2 * model.num_hidden_layers + 1)
    matrices = [num_in * num_out for num_in, num_out in _projections(model).values()]
    tables = [model.vocab_size * model.hidden_size] * (1 if model.tie_word_embeddings else 2)
    return tables + model.num_hidden_layers * matrices + norms


def count_trained(config: Config) -> int:
    """Parameters that are trained: LoRA's additions, or all of the model's."""
    return sum(trained_sizes(config))


def flops_per_token(
    model: ModelSection, *, sequence_length: int, lora: LoraSection | None = None
) -> int:
    """FLOPs of training on one token, forward and backward, nothing computed twice.

    6 a weight that multiplies: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1), of which
    the 2 for the weight's own gradient fall away where LoRA leaves it as it is. Causal
    attention sees T / 2 positions on average; scores and their product with the values are
    2 x 2 x D x T/2 FLOPs a layer forward, three times that with the backward pass (Chowdhery et
    al. 2022, appendix B, halved for the causal mask).
    """
    attention = 6 * model.num_hidden_layers * model.hidden_size * sequence_length
    multiplying = count_parameters(model).multiplying
    additions = count_additions(model, lora=lora) if lora else 0
    return (4 * multiplying + 6 * additions if additions else 6 * multiplying) + attention


def run_tokens(config: Config) -> int:
    """Target tokens a run trains on."""
    return config.last_step * config.train.global_batch_tokens
