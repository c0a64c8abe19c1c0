"""Any task of lm-evaluation-harness, scored by this program's engine.

The harness comes with `pip install 'milepost[eval]'`; nothing of it is imported before it is
asked for. It seeds the global random streams, so this is not for the middle of a training.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from milepost.core.errors import UsageError
from milepost.distributed.world import World
from milepost.model.llama import Llama
from milepost.text.tokenizer import Tokenizer


def run_harness(
    model: Llama,
    tokenizer: Tokenizer,
    *,
    tasks: Sequence[str],
    limit: int | None,
    num_fewshot: int | None,
    compute_dtype: torch.dtype,
    world: World,
    include_path: Path | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns; every rank must call.

    The harness keeps it from processes whose LOCAL_RANK is not 0; these get an empty result.

    Args:
        model: on any device; its weights are only read.
        tokenizer: of the model.
        tasks: names of the harness's tasks, groups or tags.
        limit: the first so many items of each; None: all.
        num_fewshot: solved items before each question; None: as the task says.
        compute_dtype: of the forward pass.
        world: of this process.
        include_path: a folder with further tasks as the harness's YAML files.
        log_samples: whether the result holds every item.

    Raises:
        UsageError: the harness is not installed, or has no such task; a task asks for sampling.
        DivergedError: the model's logits are not finite.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            f"lm-evaluation-harness is not installed: {error}",
            hint="pip install 'milepost[eval]'",
        ) from error
    from milepost.evaluation.harness_model import HarnessModel

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        _check_task(name, known=manager.all_tasks)
    result = lm_eval.simple_evaluate(
        HarnessModel(model, tokenizer, compute_dtype=compute_dtype, world=world),
        tasks=list(tasks),
        limit=limit,
        num_fewshot=num_fewshot,
        task_manager=manager,
        log_samples=log_samples,
    )
    return dict(result or {})


def _check_task(name: str, *, known: Sequence[str]) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=1)
    raise UsageError(
        f"lm-evaluation-harness has no task {name!r}",
        hint=f"did you mean {close[0]}?" if close else "`lm_eval ls tasks` lists its tasks",
    )
