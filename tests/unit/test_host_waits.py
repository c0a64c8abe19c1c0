"""The host does not wait for the device inside a step, but once for the loss and once for the norm.

On `meta` there is nothing to read: whatever the host wants to know of a tensor, or takes to
another device, raises. It takes the path of a GPU wherever the code asks for the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from milepost.config.recipe import load_recipe
from milepost.config.schema import Config
from milepost.data.batch import Batch
from milepost.distributed.world import World
from milepost.model.llama import Llama
from milepost.model.loss import training_loss
from milepost.train.gradients import LaneGradients
from milepost.train.objective import build_objective
from milepost.train.optimizer import build_optimizer
from milepost.train.step import LossScale, Stepper
from tests.tiny_models import random_ids, tiny_model
from tests.training import write_recipe

META = torch.device("meta")
READS = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "unique"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    recipe = write_recipe(tmp_path_factory.mktemp("recipe"))
    words = ("--train.precision", "bfloat16", "--data.path", "unused")
    return load_recipe(str(recipe), overrides=words)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("has_documents", [False, True])
def test_nothing_of_forward_backward_and_sums_is_read_by_the_host(
    config: Config, precision: str, recompute: str, has_documents: bool
) -> None:
    changes = {"precision": precision, "recompute": recompute}
    train = config.train.model_copy(update=changes)
    with META:
        model = Llama(config.model)
        ids = torch.zeros(2, 32, dtype=torch.int64)
    changed = config.model_copy(update={"train": train})
    objective = build_objective(model, config=changed, end_of_text_id=0)
    gradients = LaneGradients(model)
    for _ in range(2):
        gradients.begin_lane()
        loss, _ = objective(ids, ids, 0.1, ids if has_documents else None)
        loss.backward()
        gradients.end_lane()
    flat = gradients.sum_all(world=World(rank=0, size=1, device=META))
    assert torch.linalg.vector_norm(flat).device == META
    with pytest.raises(RuntimeError):
        float(loss.detach())  # what this test rests on


def test_a_loss_that_is_frozen_behind_reads_nothing_either() -> None:
    with META:
        hidden = torch.zeros(8, 32, dtype=torch.bfloat16, requires_grad=True)
        head, targets = torch.zeros(50, 32), torch.zeros(8, dtype=torch.int64)
    loss, _ = training_loss(hidden, head, targets, scale=1.0, chunk_rows=4)
    loss.backward()
    assert hidden.grad is not None and hidden.grad.device == META


class _Reads(TorchDispatchMode):
    """Counts what the host reads of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [4, 16])
def test_a_whole_update_reads_as_often_with_many_microbatches_as_with_few(
    config: Config, rows: int
) -> None:
    model = tiny_model()

    def objective(
        inputs: torch.Tensor, targets: torch.Tensor, scale: float, documents: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The forward pass and the loss are asked on `meta`: on the CPU the loss does read.
        loss = sum(parameter.sum() for parameter in model.parameters()) * scale
        assert isinstance(loss, torch.Tensor)
        return loss, torch.zeros(targets.shape)

    stepper = Stepper(
        objective,
        optimizer=build_optimizer(model, config=config.optimizer),
        gradients=LaneGradients(model),
        config=config,
        world=World(rank=0, size=1, device=torch.device("cpu")),
        loss_scale=LossScale(),
    )
    tokens = random_ids(rows, 33).numpy().astype(np.uint32)
    reads = _Reads()
    for _ in range(2):
        reads.count = 0
        with reads:
            stepper.run_step(
                Batch.of_tokens(tokens), learning_rate=1e-3, stop_requested=lambda: False
            )
    # The norm, and the flag that asks for a stop, which lies on the host by then.
    assert reads.count == 2
