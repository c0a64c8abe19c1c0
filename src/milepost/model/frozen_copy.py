"""A model beside a model, to compute with in another form while the first stays as it is."""

from __future__ import annotations

import copy

import torch
from torch import nn

from milepost.model.llama import Llama


def frozen_copy(model: Llama, dtype: torch.dtype) -> Llama:
    """The same model with its matrices in a dtype, none of which wants a gradient.

    Matrices that are in that dtype already are shared with `model`, and so are the norms' vectors
    and rotary tables, which stay float32. So the copy is good until `model` changes.
    """
    replaced: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        values = parameter.detach()
        values = values if values.ndim == 1 else values.to(dtype)
        replaced[id(parameter)] = nn.Parameter(values, requires_grad=False)
    return copy.deepcopy(model, replaced)
