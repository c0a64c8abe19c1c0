"""One update: lanes, clipping, the float16 loss scale, and what a refused update leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from milepost.config.recipe import config_from_toml
from milepost.config.schema import Config
from milepost.core.errors import DivergedError
from milepost.data.batch import Batch
from milepost.distributed.world import World
from milepost.model.init import initialize
from milepost.model.llama import Llama
from milepost.train.gradients import LaneGradients
from milepost.train.objective import build_objective
from milepost.train.optimizer import build_optimizer, moments_by_name
from milepost.train.step import STEPS_TO_DOUBLE_SCALE, LossScale, Stepper, StepResult
from tests.training import TINY_RECIPE

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
ROWS, LENGTH = 8, 32


def tiny_config(*overrides: str) -> Config:
    return config_from_toml(TINY_RECIPE, overrides=overrides, source="the tiny recipe")


def made_up_batch(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 512, (ROWS, LENGTH + 1)).astype(np.uint32)


class Bench:
    """A tiny model, its optimizer and its stepper."""

    def __init__(
        self,
        *overrides: str,
        scale: LossScale | None = None,
    ) -> None:
        self.config = tiny_config(*overrides)
        self.model = Llama(self.config.model)
        initialize(self.model, config=self.config.model, seed=3)
        self.optimizer = build_optimizer(self.model, config=self.config.optimizer)
        self.objective = build_objective(self.model, config=self.config, end_of_text_id=0)
        self.stepper = Stepper(
            self.objective,
            optimizer=self.optimizer,
            gradients=LaneGradients(self.model),
            config=self.config,
            world=WORLD,
            loss_scale=scale or LossScale(),
        )

    def update(self, batch: np.ndarray | None = None, *, learning_rate: float = 1e-3) -> StepResult:
        return self.stepper.run_step(
            Batch.of_tokens(made_up_batch() if batch is None else batch),
            learning_rate=learning_rate,
            stop_requested=lambda: False,
        )

    def state(self) -> dict[str, torch.Tensor]:
        moments, num_updates = moments_by_name(self.model, optimizer=self.optimizer)
        state = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        state |= {name: tensor.clone() for name, tensor in moments.items()}
        return state | {"updates": torch.tensor(num_updates)}


def assert_equal_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def whole_batch_gradients(bench: Bench, batch: np.ndarray) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss, all rows in one forward pass, by plain autograd."""
    ids = torch.from_numpy(batch.astype(np.int64))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    bench.model.zero_grad()
    loss, _ = bench.objective(inputs, targets, 1 / targets.numel())
    loss.backward()
    return {name: p.grad.clone() for name, p in bench.model.named_parameters()}


def gradients_of(bench: Bench) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in bench.model.named_parameters()}


@pytest.mark.parametrize(("lanes", "microbatch"), [(1, 8), (1, 2), (2, 1), (4, 2), (8, 1)])
def test_gradients_of_lanes_are_those_of_one_big_batch(lanes: int, microbatch: int) -> None:
    bench = Bench(
        *("--train.lanes", str(lanes), "--train.microbatch_rows", str(microbatch)),
        *("--optimizer.clip_grad_norm", "1e6"),
    )
    expected = whole_batch_gradients(bench, made_up_batch())
    result = bench.update()
    found = gradients_of(bench)
    for name in expected:
        # The same float32 terms in another order: 24 bits, gradients below 0.1.
        torch.testing.assert_close(found[name], expected[name], atol=1e-7, rtol=1e-4)
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_clipping_is_that_of_torch(limit: float) -> None:
    bench = Bench("--optimizer.clip_grad_norm", str(limit))
    before = whole_batch_gradients(bench, made_up_batch())
    norm = torch.nn.utils.clip_grad_norm_(bench.model.parameters(), limit)
    assert (float(norm) > limit) == (limit < 1)
    expected = gradients_of(bench)
    assert any(not torch.equal(before[name], expected[name]) for name in before) == (limit < 1)
    result = bench.update()
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-5), "the norm before clipping"
    found = gradients_of(bench)
    for name in expected:
        # torch divides by the norm + 1e-6.
        torch.testing.assert_close(found[name], expected[name], atol=1e-7, rtol=1e-4)


def test_the_loss_is_the_mean_over_the_whole_batch() -> None:
    bench = Bench()
    ids = torch.from_numpy(made_up_batch().astype(np.int64))
    hidden = bench.model(ids[:, :-1])
    logits = torch.nn.functional.linear(hidden, bench.model.head_weight)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert bench.update().loss_nats == pytest.approx(expected.item(), rel=1e-6)


def sum_of_lanes(values: list[float]) -> float:
    model = torch.nn.Linear(1, 1, bias=False)
    gradients = LaneGradients(model)
    for value in values:
        gradients.begin_lane()
        model.weight.grad.fill_(value)
        gradients.end_lane()
    flat = gradients.sum_all(world=WORLD)
    assert model.weight.grad.data_ptr() == flat.data_ptr(), "the optimizer sees the sum"
    return float(flat)


def test_lanes_are_summed_in_a_tree() -> None:
    # (1e8 + 1) + (-1e8 + 1) is 0 in float32; one after the other would give 1.
    assert sum_of_lanes([1e8, 1.0, -1e8, 1.0]) == 0.0
    assert sum_of_lanes([1e8, -1e8, 1.0, 1.0]) == 2.0
    assert sum_of_lanes([7.0]) == 7.0


@pytest.mark.parametrize("num_lanes", [2, 8, 32])
def test_the_tree_of_lanes_by_hand(num_lanes: int) -> None:
    values = np.random.default_rng(5).normal(0, 1e4, num_lanes).astype(np.float32)
    level = list(values)
    while len(level) > 1:
        level = [level[i] + level[i + 1] for i in range(0, len(level), 2)]
    assert sum_of_lanes([float(v) for v in values]) == float(level[0])


def float16_bench(scale: LossScale) -> Bench:
    return Bench("--train.precision", "float16", scale=scale)


def test_an_overflow_halves_the_scale_and_repeats_the_same_batch() -> None:
    # 2^27 / 256 targets is 2^19, far above float16's 65504.
    bench = float16_bench(LossScale(2.0**27, steps_at_scale=1999))
    result = bench.update()
    assert result.num_repeats >= 3
    scale = bench.stepper.loss_scale
    assert scale == LossScale(2.0 ** (27 - result.num_repeats), steps_at_scale=1)
    assert math.isfinite(result.grad_norm)

    quiet = float16_bench(LossScale(scale.value))
    assert quiet.update().num_repeats == 0
    assert_equal_states(bench.state(), quiet.state())


def test_the_scale_does_not_show_in_loss_and_norm() -> None:
    results = [float16_bench(LossScale(2.0**power)).update() for power in (8, 14)]
    assert results[0].loss_nats == results[1].loss_nats, "the forward pass does not see it"
    # float16 has 11 bits; a power of two moves only what is subnormal.
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-2)
    float32 = Bench().update()
    assert results[1].grad_norm == pytest.approx(float32.grad_norm, rel=2e-2)


@pytest.mark.parametrize(
    ("steps_before", "expected"),
    [
        (STEPS_TO_DOUBLE_SCALE - 2, LossScale(1024.0, STEPS_TO_DOUBLE_SCALE - 1)),
        (STEPS_TO_DOUBLE_SCALE - 1, LossScale(2048.0, 0)),
    ],
)
def test_the_scale_doubles_after_a_long_quiet(steps_before: int, expected: LossScale) -> None:
    bench = float16_bench(LossScale(1024.0, steps_before))
    bench.update()
    assert bench.stepper.loss_scale == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_precisions_have_no_scale(precision: str) -> None:
    bench = Bench("--train.precision", precision, scale=LossScale(1.0, STEPS_TO_DOUBLE_SCALE))
    bench.update()
    assert bench.stepper.loss_scale == LossScale(1.0, STEPS_TO_DOUBLE_SCALE)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_loss_that_is_not_finite_is_refused_at_once(precision: str) -> None:
    bench = Bench(
        "--train.precision", precision, scale=LossScale(1.0 + 3 * (precision == "float16"))
    )
    bench.update()
    with torch.no_grad():
        bench.model.head_weight.fill_(3e38)
    before, scale = bench.state(), bench.stepper.loss_scale.value
    with pytest.raises(DivergedError) as caught:
        bench.update()
    assert "not finite; the update was refused and the weights are as they were" in str(
        caught.value
    )
    assert_equal_states(before, bench.state())
    assert bench.stepper.loss_scale.value == scale, "a lower scale would not help"


@pytest.mark.parametrize(("precision", "num_calls"), [("float32", 1), ("float16", 3)])
def test_a_norm_that_stays_infinite_is_refused(precision: str, num_calls: int) -> None:
    bench = Bench(
        *("--train.precision", precision, "--train.lanes", "1", "--train.microbatch_rows", "8"),
        scale=LossScale(4.0 if precision == "float16" else 1.0),
    )
    bench.update()
    before, scale = bench.state(), bench.stepper.loss_scale.copy()
    calls = []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("inf")

    bench.model.model.norm.weight.register_hook(overflow)
    with pytest.raises(DivergedError, match="gradient norm"):
        bench.update()
    assert len(calls) == num_calls, "float16 halves 4 to 2 to 1, then gives up"
    assert bench.stepper.loss_scale == scale, "what is refused leaves no trace"
    assert_equal_states(before, bench.state())


def test_an_update_after_a_refused_one_is_as_if_nothing_had_happened() -> None:
    disturbed, quiet = Bench(), Bench()
    handle = disturbed.model.model.norm.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(DivergedError):
        disturbed.update(made_up_batch(seed=9))
    handle.remove()
    for bench in (disturbed, quiet):
        bench.update()
    assert_equal_states(disturbed.state(), quiet.state())
