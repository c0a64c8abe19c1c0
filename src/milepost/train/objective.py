"""What training minimizes: the cross-entropy of every next token that is a target."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from milepost.config.schema import Config
from milepost.model.attention import document_mask, mask_inside
from milepost.model.llama import Block, Llama, RunBlock, run_block
from milepost.model.loss import training_loss
from milepost.train.float8 import in_float8
from milepost.train.precision import DTYPES
from milepost.train.step import Objective

LOSS_CHUNK_ROWS = 1024
"""Rows whose logits exist at once; part of the numbers' last bits, so no setting."""


def build_objective(model: Llama, *, config: Config, end_of_text_id: int) -> Objective:
    """The training forward pass of one microbatch.

    Args:
        model: float32 masters.
        config: resolved; precision, compile and recompute are honored here.
        end_of_text_id: begins a document.
    """
    block = _block_runner(model, config=config)
    compute_dtype = DTYPES[config.train.precision]

    def objective(
        inputs_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        scale: float,
        documents_BT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = None
        if documents_BT is not None:
            mask = mask_inside(documents_BT)
        elif config.data.document_attention:
            mask = document_mask(inputs_BT, end_of_text_id=end_of_text_id)
        hidden_BTD = model(inputs_BT, compute_dtype=compute_dtype, mask=mask, run_block=block)
        loss, nats_N = training_loss(
            hidden_BTD.flatten(0, 1),
            model.head_weight,
            targets_BT.flatten(),
            scale=scale,
            chunk_rows=LOSS_CHUNK_ROWS,
        )
        return loss, nats_N.view_as(targets_BT)

    return objective


def _block_runner(model: Llama, *, config: Config) -> RunBlock:
    runner: RunBlock = run_block
    if config.train.compile:
        # Another shape would mean another graph and other bits: refuse it instead.
        torch._dynamo.config.error_on_recompile = True
        runner = torch.compile(run_block, dynamic=False, fullgraph=True)
    if config.train.float8 != "none":
        runner = in_float8(runner, model=model, kind=config.train.float8)
    if config.num_recomputed_blocks == 0:
        return runner
    # The first ones: when the backward pass comes to them, the others' activations are gone.
    recomputed = frozenset(model.model.layers[: config.num_recomputed_blocks])

    def run(
        block: Block,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        if block in recomputed:
            return checkpoint(runner, block, hidden, cos, sin, mask, use_reentrant=False)
        return runner(block, hidden, cos, sin, mask)

    return run
