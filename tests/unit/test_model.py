"""Initial weights, compilation once for all blocks, Hugging Face configs."""

from __future__ import annotations

import pytest
import torch

from milepost.core.errors import UsageError
from milepost.model.huggingface import hf_config, model_section_from_hf
from milepost.model.init import initialize
from milepost.model.llama import Llama, run_block
from milepost.model.loss import training_loss
from tests.tiny_models import random_ids, tiny_model, tiny_section


def _train(model: Llama, *, steps: int, block, compute_dtype) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, targets = random_ids(2, 16), random_ids(2, 16, seed=3)
    losses = []
    for _ in range(steps):
        hidden = model(ids, compute_dtype=compute_dtype, run_block=block)
        loss, _ = training_loss(
            hidden.flatten(0, 1), model.head_weight, targets.flatten(), scale=1 / 32, chunk_rows=32
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_the_block_compiles_once_for_all_layers_and_steps(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block = torch.compile(run_block, dynamic=False, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = _train(
            tiny_model(num_hidden_layers=4), steps=3, block=block, compute_dtype=torch.bfloat16
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    plain = _train(
        tiny_model(num_hidden_layers=4), steps=3, block=run_block, compute_dtype=torch.bfloat16
    )
    # Fused code rounds to bfloat16 at other places.
    assert compiled == pytest.approx(plain, abs=2e-2)
    assert compiled[2] < compiled[0]
    torch._dynamo.reset()


def test_initial_values_depend_on_seed_and_name_only() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = tiny_model(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    deeper = tiny_model(seed=3, num_hidden_layers=3)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, deeper.get_parameter(name)), name
    other = tiny_model(seed=4)
    assert not torch.equal(first.head_weight, other.head_weight)
    layer = first.model.layers
    assert not torch.equal(layer[0].mlp.up_proj.weight, layer[1].mlp.up_proj.weight)


def test_initial_values_have_the_right_spread() -> None:
    for kind, factor in (("plain", 1.0), ("depth_scaled", 0.5)):
        config = tiny_section(
            hidden_size=128, num_hidden_layers=2, initializer_range=0.02, residual_init=kind
        )
        model = Llama(config)
        initialize(model, config=config, seed=1)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                assert parameter.eq(1).all()
                continue
            scaled = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 * (factor if scaled else 1.0)
            # 6,144 or more draws: the standard deviation's own error is below 1 %.
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_state_holds_parameters_only_and_a_tied_model_has_no_head() -> None:
    tied, untied = tiny_model(tie_word_embeddings=True), tiny_model()
    assert set(untied.state_dict()) == {name for name, _ in untied.named_parameters()}
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"lm_head.weight"}
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert all(parameter.dtype == torch.float32 for parameter in tied.parameters())


def _config(**changes) -> dict:
    return hf_config(tiny_section(), end_of_text_id=5, dtype="float32") | changes


def test_hugging_face_config_reads_back_in_both_ways() -> None:
    section = tiny_section(rope_theta=12345.0, rms_norm_eps=1e-6, tie_word_embeddings=True)
    config = hf_config(section, end_of_text_id=5, dtype="bfloat16")
    assert config["bos_token_id"] == config["eos_token_id"] == 5
    for absent in ((), ("rope_theta",), ("rope_parameters",), ("head_dim",)):
        kept = {key: value for key, value in config.items() if key not in absent}
        assert model_section_from_hf(kept) == section, absent


def test_fields_that_are_left_out_have_the_values_of_transformers() -> None:
    sizes = ("model_type", "vocab_size", "hidden_size", "intermediate_size")
    sizes += ("num_hidden_layers", "num_attention_heads")
    section = model_section_from_hf({key: _config()[key] for key in sizes})
    assert section.num_key_value_heads == section.num_attention_heads
    assert (section.rope_theta, section.rms_norm_eps) == (10000.0, 1e-6)
    assert section.max_position_embeddings == 2048 and not section.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', only llama can be read"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            "rope_parameters.rope_type is 'llama3', only default can be read",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5",
        ),
        ({"rope_theta": 7.0}, "rope_theta is 7.0, only rope_parameters.rope_theta 500000.0"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', only an object"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"head_dim": 16}, "head_dim is 16, only hidden_size / heads = 8"),
        ({"num_attention_heads": 5}, "num_attention_heads: 5 heads do not divide hidden_size 32"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 key/value heads do not divide 4"),
        ({"vocab_size": "280"}, "vocab_size is '280'"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
        ({"sliding_window": 128}, "sliding_window is 128"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is 'set'"),
    ],
)
def test_what_milepost_does_not_do_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        model_section_from_hf(_config(**changes))
    assert message in caught.value.message
    assert caught.value.hint


def test_a_missing_size_is_named() -> None:
    config = _config()
    del config["intermediate_size"]
    with pytest.raises(UsageError, match=r"config\.json has no intermediate_size"):
        model_section_from_hf(config)


def test_weights_drawn_in_their_place_have_the_bits_of_those_drawn_beside_it() -> None:
    in_place, beside = tiny_model(), tiny_model().double()
    for model in (in_place, beside):
        initialize(model, config=model.config, seed=3)
    pairs = zip(in_place.parameters(), beside.parameters(), strict=True)
    assert all(torch.equal(one, other.float()) for one, other in pairs)
    assert in_place.model.embed_tokens.weight.std() > 0
