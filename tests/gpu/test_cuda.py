"""What only a CUDA device can show: kernels, determinism, and that nothing waits for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from milepost.config.recipe import config_from_toml, load_recipe
from milepost.config.schema import Config
from milepost.data.batch import Batch
from milepost.distributed.devices import count_gpus
from milepost.distributed.launch import launch
from milepost.distributed.world import World
from milepost.inference.engine import complete
from milepost.model.attention import document_mask
from milepost.model.init import initialize
from milepost.model.llama import Llama
from milepost.model.loss import training_loss
from milepost.train.gradients import LaneGradients
from milepost.train.objective import build_objective
from milepost.train.optimizer import build_optimizer
from milepost.train.precision import DTYPES, make_deterministic
from milepost.train.step import FIRST_LOSS_SCALE, LossScale, Stepper
from tests.tiny_models import random_ids, tiny_model, tiny_tokenizer
from tests.training import (
    TINY_RECIPE,
    events,
    logged_steps,
    train_here,
    weights_sha256,
    write_recipe,
)

DEVICE = torch.device("cuda", 0)
VOCAB_SIZE = 512  # of TINY_RECIPE
LAST_STEP = 30

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """As `milepost train` sets it, and undone for the tests after."""
    # Read by cuBLAS when it starts; the command line sets it for its processes.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch._dynamo.reset()
    make_deterministic(device=DEVICE)
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


def new_stepper(config: Config) -> tuple[Llama, Stepper]:
    model = Llama(config.model)
    initialize(model, config=config.model, seed=1)
    model.to(DEVICE)
    scale = FIRST_LOSS_SCALE if config.train.precision == "float16" else 1.0
    stepper = Stepper(
        build_objective(model, config=config, end_of_text_id=0),
        optimizer=build_optimizer(model, config=config.optimizer),
        gradients=LaneGradients(model),
        config=config,
        world=World(rank=0, size=1, device=DEVICE),
        loss_scale=LossScale(scale),
    )
    return model, stepper


def train(config: Config, *, num_updates: int) -> tuple[list[tuple[str, str]], torch.Tensor]:
    """Losses and norms as hex, and all weights, after updates with two batches in turn."""
    torch._dynamo.reset()
    model, stepper = new_stepper(config)
    shape = (config.rows_per_step, config.data.sequence_length + 1)
    batches = [
        random_ids(*shape, seed=seed, vocab_size=config.model.vocab_size).numpy().astype("uint32")
        for seed in (1, 2)
    ]
    numbers = []
    for update in range(num_updates):
        result = stepper.run_step(
            Batch.of_tokens(batches[update % 2]), learning_rate=3e-3, stop_requested=lambda: False
        )
        numbers.append((result.loss_nats.hex(), result.grad_norm.hex()))
    return numbers, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_a_tiny_model_learns_and_two_runs_have_the_same_bits(
    precision: str, compiled: str, recompute: str
) -> None:
    overrides = ["--train.precision", precision, "--train.compile", compiled]
    overrides += ["--train.recompute", recompute]
    config = config_from_toml(TINY_RECIPE, overrides=overrides, source="the tiny recipe")
    numbers, weights = train(config, num_updates=40)
    again, weights_again = train(config, num_updates=40)
    assert numbers == again
    assert torch.equal(weights, weights_again)
    first, last = float.fromhex(numbers[0][0]), float.fromhex(numbers[-1][0])
    assert last < first - 1.0, "two batches in turn are learned by heart"


@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("microbatch_rows", [1, 4])
def test_the_papers_shapes_give_the_same_bits_twice(compiled: str, microbatch_rows: int) -> None:
    overrides = ["--model.num_hidden_layers", "2", "--train.global_batch_tokens", "8192"]
    overrides += ["--train.compile", compiled, "--train.microbatch_rows", str(microbatch_rows)]
    config = load_recipe("dmas-1.7b", overrides=overrides)
    numbers, weights = train(config, num_updates=4)
    again, weights_again = train(config, num_updates=4)
    assert numbers == again
    assert torch.equal(weights, weights_again)


def test_the_compiler_is_told_not_to_measure_what_changes_bits() -> None:
    from torch._inductor import config as inductor_config

    assert torch.are_deterministic_algorithms_enabled()
    assert inductor_config.deterministic


def test_the_launcher_counts_the_gpus_and_its_cpu_ranks_see_none(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert count_gpus() == torch.cuda.device_count()
    assert launch(["doctor", "--json"], ranks=1, on_gpus=False) == 0
    assert torch.cuda.get_device_name(DEVICE) not in capfd.readouterr().out


@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_restored_run_has_the_bits_of_one_that_went_through(
    precision: str, compiled: str, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path)
    overrides = ("--train.precision", precision, "--train.compile", compiled)
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    train_here(recipe, through, tiny_data, *overrides)
    torch._dynamo.reset()  # a run that goes on is another process
    train_here(recipe, stopped, tiny_data, *overrides, "--train.stop_at_step", "15")
    torch._dynamo.reset()
    train_here(recipe, stopped, tiny_data, *overrides)

    assert logged_steps(stopped) == logged_steps(through)
    assert weights_sha256(stopped, LAST_STEP) == weights_sha256(through, LAST_STEP)
    validations = [
        [(event["step"], event["loss_nats"].hex()) for event in events(run, "validation")]
        for run in (through, stopped)
    ]
    assert set(validations[0]) <= set(validations[1])
    for segment in events(stopped, "segment_started"):
        assert segment["device"] == torch.cuda.get_device_name(DEVICE)
        assert segment["exactness"] == "exact"


def test_steps_run_again_are_compared_and_equal(tiny_data: Path, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    overrides = ("--train.precision", "bfloat16", "--train.compile", "true")
    train_here(recipe, run, tiny_data, *overrides, "--train.stop_at_step", "14")
    # What a kill between two saves leaves: steps in the history after the newest checkpoint.
    newest = run / "checkpoints" / "step-00000014"
    newest.rename(tmp_path / "lost")
    torch._dynamo.reset()
    train_here(recipe, run, tiny_data, *overrides)
    replayed = events(run, "replayed")[-1]
    assert replayed["compared"] == replayed["equal"] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_never_waits_for_the_device(dtype: torch.dtype) -> None:
    hidden = torch.randn(70, 64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(VOCAB_SIZE + 1, 64, generator=torch.Generator().manual_seed(2))
    targets = random_ids(70, vocab_size=VOCAB_SIZE + 1)
    targets[3] = -1
    on_device = [
        hidden.to(DEVICE, dtype).clone().requires_grad_(),
        weight.to(DEVICE).clone().requires_grad_(),
        targets.to(DEVICE),
    ]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, nats_N = training_loss(*on_device, scale=0.5, chunk_rows=32)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    exact_hidden = hidden.to(dtype).float().clone().requires_grad_()
    exact_weight = weight.to(dtype).float().clone().requires_grad_()
    logits = F.linear(exact_hidden, exact_weight)
    expected = 0.5 * F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    expected.backward()
    # Logits of 16 bits are off by up to 2^-8 (bfloat16) of their size, about 30 at most.
    rtol = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(loss.cpu(), expected, rtol=rtol, atol=0)
    assert nats_N[3] == 0
    for found, wanted in ((on_device[0], exact_hidden), (on_device[1], exact_weight)):
        apart = (found.grad.cpu().float() - wanted.grad).norm() / wanted.grad.norm()
        assert apart < 10 * rtol
    assert torch.are_deterministic_algorithms_enabled(), "as it was before"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_causal_attention_with_shared_heads_runs_in_the_flash_kernel(dtype: torch.dtype) -> None:
    model = tiny_model().to(DEVICE)
    ids = random_ids(2, 32).to(DEVICE)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        model(ids, compute_dtype=dtype).float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_mask", [True, False])
def test_no_attention_holds_all_scores(dtype: torch.dtype, has_mask: bool) -> None:
    model = tiny_model().to(DEVICE)
    ids = random_ids(2, 32).to(DEVICE)
    mask = document_mask(ids, end_of_text_id=3) if has_mask else None
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused):
        model(ids, compute_dtype=dtype, mask=mask).float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.model.parameters())


def test_float32_logits_are_those_of_the_cpu() -> None:
    ids = random_ids(3, 40)
    on_cpu = tiny_model()
    expected = F.linear(on_cpu(ids), on_cpu.head_weight)
    on_gpu = tiny_model().to(DEVICE)
    found = F.linear(on_gpu(ids.to(DEVICE)), on_gpu.head_weight)
    # Sums of 32 terms in another order; without TF32.
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_greedy_completions_are_those_of_the_cpu(tmp_path: Path) -> None:
    tokenizer, prompts = tiny_tokenizer(tmp_path), ["The state", "", "the people of the union, and"]
    expected = complete(tiny_model(), tokenizer, prompts, max_new_tokens=12)
    found = complete(tiny_model().to(DEVICE), tokenizer, prompts, max_new_tokens=12)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_drawn_completions_are_the_same_twice(precision: str, tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(tmp_path), tiny_model().to(DEVICE)
    texts = [
        complete(
            model,
            tokenizer,
            ["The state", "of the union"],
            max_new_tokens=20,
            temperature=1.0,
            top_p=0.9,
            seed=7,
            compute_dtype=DTYPES[precision],
        )
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert all(completion.token_ids for completion in texts[0])
