"""The command line: finds the verb, runs it, turns errors into messages and exit codes.

Verbs are named by import path, so that `--help` loads none of them.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from keyword import iskeyword

from cyclopts import App, CycloptsError

from milepost import __version__
from milepost.core.console import open_closed_streams, say, say_error
from milepost.core.errors import (
    LEFT_AT_ONCE_EXIT_CODE,
    MilepostError,
    StorageError,
    UsageError,
)

VERBS = {
    "demo": "The whole road in miniature on the CPU, in a few minutes.",
    "train": "Start a run, or continue it exactly.",
    "finetune": "Tune a model on conversations, or continue such a run exactly.",
    "verify": "Check a run's checkpoints, and prove that it can be continued exactly.",
    "evaluate": "Score checkpoints on benchmarks.",
    "sample": "Let checkpoints continue a text.",
    "probe": "Show what a small change of a prompt does to a model.",
    "chat": "Talk with a model in the terminal.",
    "serve": "Serve a model to programs that speak OpenAI's API.",
    "rate": "Serve a page where people rate completions blind.",
    "judge": "Have a model behind an endpoint rate completions, as people do.",
    "report": "Write the trajectory report of a run.",
    "export": "Write a model for other programs: Hugging Face, GGUF.",
    "import": "Make a run of a Hugging Face LLaMA folder.",
    "plan": "Say what a recipe costs before anything is spent.",
    "doctor": "Say what this machine has and what will be used.",
}

DATA_VERBS = {
    "prepare": "Turn documents into shards of token ids.",
    "inspect": "Show what is in the shards, and which documents a step saw.",
}

LAB_VERBS = {
    "resume": "Measure what a restart costs, and which part of it costs what.",
    "report": "Write the report of a laboratory as far as it is.",
}

TAKE_OVERRIDES = ("train", "finetune", "import", "lab", "plan")
"""Verbs that take `--section.key VALUE`."""


def build_app(words: Sequence[str] = ()) -> App:
    """The application with every verb.

    Args:
        words: the command line. A verb in it shows the help of its own docstring; for the others
            the line given here stands in, so that nothing is imported.
    """
    app = App(
        name="milepost",
        help="Pretrain a LLaMA from scratch, exactly, and see every mile of the way.",
        version=__version__,
        help_format="markdown",
    )
    for verb, text in VERBS.items():
        name = f"{verb}_" if iskeyword(verb) else verb
        app.command(f"milepost.cli.{name}:{name}", name=verb, help=None if verb in words else text)
    data = App(name="data", help="Prepare and inspect data.")
    for verb, text in DATA_VERBS.items():
        data.command(f"milepost.cli.data:{verb}", name=verb, help=None if verb in words else text)
    app.command(data)
    lab = App(name="lab", help="Experiments that are more than one run.")
    for verb, text in LAB_VERBS.items():
        lab.command(f"milepost.cli.lab:{verb}", name=verb, help=None if verb in words else text)
    app.command(lab)
    return app


def run(words: Sequence[str]) -> int:
    """Runs one command line; returns the exit code.

    Args:
        words: the words after the program's name; `--debug` anywhere shows tracebacks.
    """
    debug = "--debug" in words
    given = list(words)
    words = _overrides_last([word for word in words if word != "--debug"])
    try:
        verb, arguments, unparsed = build_app(words).parse_args(
            words, exit_on_error=False, print_error=False
        )
        # A verb that starts itself anew, once for each rank, asks for its own command line.
        command_line = {"words": given} if "words" in unparsed else {}
        verb(*arguments.args, **arguments.kwargs, **command_line)
    except CycloptsError as error:
        known = words and words[0] in {*VERBS, "data", "lab"}
        program = f"milepost {words[0]}" if known else "milepost"
        say_error(UsageError(str(error), hint=f"see {program} --help"))
        return UsageError.exit_code
    except MilepostError as error:
        if debug:
            traceback.print_exc()
        if error.message:
            say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        say("left at once")
        return LEFT_AT_ONCE_EXIT_CODE
    except (OSError, MemoryError, ImportError) as error:
        plain = _refused_by_the_system(error)
        if plain is None:
            raise
        if debug:
            traceback.print_exc()
        say_error(plain)
        return plain.exit_code
    return 0


def _overrides_last(words: list[str]) -> list[str]:
    """A command line with each `--section.key VALUE` behind the words that name no field.

    So they may stand anywhere: cyclopts takes an option that it does not know only behind the
    last of the arguments that it does.
    """
    if not words or words[0] not in TAKE_OVERRIDES:
        return words
    parts: tuple[list[str], list[str]] = ([], [])
    is_field, awaits_value = False, False
    for word in words:
        if not awaits_value or word.startswith("--"):
            name, equals, _ = word.partition("=")
            is_field = name.startswith("--") and "." in name
            awaits_value = is_field and not equals
        else:
            awaits_value = False
        parts[is_field].append(word)
    return [*parts[0], *parts[1]]


def _refused_by_the_system(error: Exception) -> MilepostError | None:
    """What a file, a limit or the memory of this machine says no to; None for anything else.

    The last net: where a failure can be named with its place, it is named there.
    """
    hint = "--debug anywhere in the command shows where"
    if isinstance(error, OSError):
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        return StorageError(": ".join([*places, reason]), hint=hint)
    no_room = ("failed to map segment", "cannot allocate memory")
    if isinstance(error, MemoryError) or any(text in str(error).lower() for text in no_room):
        return MilepostError(
            f"out of memory: {error}".removesuffix(": "),
            hint="free some, or allow this process more (ulimit -v, the container's limit)",
        )
    return None


def main() -> None:
    """Entry point of the `milepost` command."""
    open_closed_streams()
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by whoever started us
            stream.flush()
    # Interpreter teardown of torch and process groups can crash after the work is done.
    os._exit(code) if "torch" in sys.modules else sys.exit(code)


if __name__ == "__main__":
    main()
