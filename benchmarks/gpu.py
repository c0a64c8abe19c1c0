"""The GPU programme: one command a question, each under ten minutes on one H100.

`python benchmarks/gpu.py QUESTION --help` says what a question takes; benchmarks/README.md
lists them. Results are JSON rows on stdout, talk goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys

from on_gpu import (
    certificate,
    contender,
    evaluate,
    finetune,
    float8,
    llama_124m,
    parity,
    peers,
    profile,
    resume,
    step,
    tests,
)
from on_gpu.setting import add_shared_arguments, has_gpu

from milepost.core.console import say, say_error
from milepost.core.errors import MilepostError

QUESTIONS = {
    "tests": tests,
    "step": step,
    "profile": profile,
    "float8": float8,
    "resume": resume,
    "certificate": certificate,
    "evaluate": evaluate,
    "finetune": finetune,
    "parity": parity,
    "peers": peers,
    "contender": contender,
    "llama-124m": llama_124m,
}


def main(words: list[str]) -> int:
    """Answers one question; returns the exit code."""
    # As `milepost train` does: read by cuBLAS when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__)
    questions = parser.add_subparsers(dest="question", required=True)
    for name, module in QUESTIONS.items():
        question = questions.add_parser(name, help=module.QUESTION, description=module.__doc__)
        add_shared_arguments(question, recipe=module.RECIPE, steps=module.STEPS)
        module.add_arguments(question)
    arguments = parser.parse_args(words)
    if not arguments.allow_cpu and not has_gpu():
        say("error: torch sees no CUDA device here; --allow-cpu runs the same on the CPU")
        return 2
    try:
        return QUESTIONS[arguments.question].answer(arguments)
    except MilepostError as error:
        say_error(error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
