"""`milepost chat`: talk with a model in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from milepost.core import console

if TYPE_CHECKING:
    from milepost.inference.chat_model import ChatModel


def chat(
    model: Path,
    *,
    adapter: Path | None = None,
    step: int | None = None,
    raw: Annotated[bool, Parameter(negative="")] = False,
    system: str | None = None,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float | None = 0.9,
    seed: int = 0,
    max_new_tokens: int = 256,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Talk with a model.

    Answers appear as they are written. Ctrl-C stops an answer, Ctrl-D ends; /help shows what
    else can be done on the way, such as /step 400 to go on with another checkpoint. Questions can
    also come through a pipe, one a line.

    A fine-tuned model is put its questions in the template it was tuned with, any other in
    Vicuna 1.1's; --raw has a model continue each text as it is, which is all a base model learned.

    Example: `milepost chat runs/alpaca --temperature 0`

    Parameters
    ----------
    model
        A run folder, a checkpoint folder, an adapter, or any Hugging Face LLaMA folder.
    adapter
        A fine-tuning run or a folder in PEFT's format, whose adapter is put on the model.
    step
        Which checkpoint of a run, of --adapter where that is one. Default: the latest.
    raw
        No template and no history: each line is a text that the model continues.
    system
        What the model is told before the conversation. Default: the template's own sentence.
    temperature
        0 takes the likeliest token each time; 1 draws from the model's own distribution.
    top_k
        Draw from the k likeliest tokens only.
    top_p
        Draw from the likeliest tokens that together have this probability.
    seed
        Of the random draws: the same conversation gets the same answers.
    max_new_tokens
        Most tokens of an answer.
    dtype
        Of the forward pass. Default: that of the model's file.
    json
        At the end, one JSON document on stdout with all questions and answers.
    """
    import torch

    from milepost.cli.chat_session import ChatSession
    from milepost.core.errors import UsageError
    from milepost.inference.chat_model import load_chat_model
    from milepost.inference.load import find_model, stepped
    from milepost.inference.stream import SamplingOptions

    if raw and system is not None:
        raise UsageError("--system needs a template", hint="leave --raw or --system out")

    def load(wanted: int | None) -> ChatModel:
        found = find_model(model, step=wanted, adapter=adapter)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_chat_model(found, dtype=dtype, device=device)

    session = ChatSession(
        load(step),
        SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed),
        is_raw=raw,
        is_silent=json,
        load=load,
        steps_of=stepped(model, adapter=adapter),
    )
    session.set_system(system)
    session.run()
    if json:
        console.show_json(session.record())
