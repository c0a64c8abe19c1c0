"""How fast data is encoded, prepared, opened and loaded, beside what others take for it.

    python benchmarks/data.py --source DIR
    python benchmarks/data.py --source DIR --questions prepare --megabytes 4000

The texts of DIR (anything `milepost data prepare` reads; 100 MB of prose or more) are encoded by
each encoder in turns, prepared from Parquet and from compressed JSON lines with two workers, and
mapped by Hugging Face's datasets. One JSON row a result on stdout, talk on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_inputs import FORMS, texts_of, write_inputs, write_sparse_shards
from data_work import ENCODERS

from milepost.config.recipe import load_recipe
from milepost.core.console import say, say_error
from milepost.core.environment import code_version, cpu_name
from milepost.core.errors import MilepostError
from milepost.core.files import strict
from milepost.data.loader import Loader
from milepost.data.shards import open_prepared
from milepost.runs.events import utc_now

WORK = Path(__file__).with_name("data_work.py")
PEERS = ("tokenizers", "tiktoken")
RECIPE = "dmas-1.7b"
TOKENS_PER_SECOND = 53_700
"""Of the training that must not wait: 55 % of an H100's peak in bf16 for the recipe, the goal."""

MEASURED = (
    "bytes",
    "tokens",
    "seconds",
    "parent_cpu_seconds",
    "worker_cpu_seconds",
    "assembling_seconds",
    "assembling_cpu_seconds",
)

WANTED_TOKENS = 20_000_000_000
WANTED_CORES = 16
WANTED_RATE = 60.0
"""MB a second: what an encoder was to make on one core."""

ORDER_TOKENS = 10**10
OPEN_BYTES = 100 * 10**9


class Bench:
    """One series of measurements: its folder, its inputs and its rows."""

    def __init__(self, arguments: argparse.Namespace, *, folder: Path) -> None:
        self._folder = folder
        self._turns = arguments.turns
        self._seconds = arguments.seconds
        say(f"reading {arguments.source}")
        self._texts = texts_of(arguments.source)
        say(f"writing {arguments.megabytes} MB as {' and '.join(FORMS)}")
        self._inputs = write_inputs(self._texts, folder=folder, megabytes=arguments.megabytes)
        small = arguments.small_megabytes
        self._small_inputs = write_inputs(self._texts, folder=folder, megabytes=small)
        self._encoder_rate: float | None = None
        self._distinct_bytes = sum(len(text.encode()) for text in self._texts)

    def encoders(self) -> None:
        """Each encoder on one core, by processor time; the same ids from each."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ENCODERS}
        for turn in range(self._turns):
            for name in _turned(list(ENCODERS), turn):
                words = ["encode", name, self._inputs["parquet"], self._seconds]
                found[name].append(_work(words, "megabytes_per_cpu_second"))
        tiktoken = _median(found["tiktoken"], "megabytes_per_cpu_second")
        self._encoder_rate = _median(found["milepost"], "megabytes_per_cpu_second")
        for rows in found.values():
            rate = _median(rows, "megabytes_per_cpu_second")
            self._show(
                "encoders",
                **rows[-1] | {"megabytes_per_cpu_second": rate},
                all_rates=[row["megabytes_per_cpu_second"] for row in rows],
                times_tiktoken=rate / tiktoken,
                is_same=rows[-1]["ids_sha256"] == found["tiktoken"][-1]["ids_sha256"],
            )

    def prepare(self) -> None:
        """The whole preparation from both forms, then by calculation what was asked for."""
        found: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
        small: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
        self._prepared(self._small_inputs[FORMS[0]])  # not counted: the first reads the programs
        for turn in range(self._turns):
            for form in _turned(list(FORMS), turn):
                small[form].append(self._prepared(self._small_inputs[form]))
                found[form].append(self._prepared(self._inputs[form]))
        for form, rows in found.items():
            middle = sorted(rows, key=lambda row: row["megabytes_per_second"])[len(rows) // 2]
            more = {k: _median(rows, k) - _median(small[form], k) for k in MEASURED}
            # A few megabytes may take longer than more of them: then nothing can be said.
            rate = more["bytes"] / 1e6 / more["seconds"] if more["seconds"] > 0 else None
            self._show(
                "prepare",
                form=form,
                distinct_bytes=self._distinct_bytes,
                **middle,
                started_megabytes_per_second=rate,
                of_wanted_rate=_ratio(rate, WANTED_RATE),
                of_encoder_rate=_ratio(rate, self._encoder_rate),
                all_rates=[row["megabytes_per_second"] for row in rows],
                peak_bytes_of_small=_median(small[form], "peak_bytes"),
            )
            self._show("prepare, calculated", form=form, **_calculated(more))

    def _prepared(self, source: Path) -> dict[str, Any]:
        return _work(["prepare", source, self._empty("prepared")], "megabytes_per_second")

    def peers(self) -> None:
        """What Hugging Face's datasets takes for a part of the same texts."""
        for name in PEERS:
            cache = self._empty("cache")
            row = _work(
                ["peer", name, self._small_inputs["parquet"], cache], "megabytes_per_second"
            )
            self._show("peers", **row)

    def open(self) -> None:
        """Opening shards of 100 GB, which are holes."""
        write_sparse_shards(self._empty("sparse"), num_bytes=OPEN_BYTES)
        rows = [_work(["open", self._folder / "sparse"], "open_seconds") for _ in range(3)]
        middle = sorted(rows, key=lambda row: row["open_seconds"])[1]
        self._show("open", **middle, all_seconds=[row["open_seconds"] for row in rows])

    def order(self) -> None:
        """Where rows of 10^10 tokens lie, by calculation instead of a table."""
        row = _work(["order", ORDER_TOKENS], "microseconds_per_row")
        self._show("order", **row)

    def loader(self) -> None:
        """What the batches of the recipe take of its steps, read at once and read ahead."""
        config = load_recipe(RECIPE, overrides=())
        out = self._folder / "prepared"
        if not out.is_dir():
            self._prepared(self._inputs["parquet"])
        step_seconds = config.train.global_batch_tokens / TOKENS_PER_SECOND
        with Loader(
            open_prepared(out).train,
            seed=1,
            sequence_length=config.data.sequence_length,
            rows_per_step=config.rows_per_step,
        ) as loader:
            read = _seconds(lambda count: [loader.batch(s) for s in range(count)], 9) / 9
            ahead = []
            for step in range(100, 109):
                ahead.append(_seconds(loader.batch, step))
                time.sleep(min(step_seconds, 1.0))
        waited = statistics.median(ahead[1:])
        self._show(
            "loader",
            recipe=RECIPE,
            batch_tokens=config.train.global_batch_tokens,
            assumed_tokens_per_second=TOKENS_PER_SECOND,
            step_seconds=step_seconds,
            read_seconds=read,
            read_fraction=read / step_seconds,
            waited_seconds=waited,
            waited_fraction=waited / step_seconds,
        )

    def _empty(self, name: str) -> Path:
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _show(self, question: str, **measured: Any) -> None:
        row = {
            "question": question,
            "time": utc_now(),
            "device": cpu_name(),
            "cores": os.cpu_count(),
            "code": code_version(),
            "command": " ".join(sys.argv),
            **measured,
        }
        print(json.dumps(strict(row)), flush=True)


def _calculated(more: dict[str, float]) -> dict[str, Any]:
    """How long the wanted tokens take on the wanted cores: nothing is measured.

    One core reads and hands over while the others encode; what is assembled after that is not
    shared out.

    Args:
        more: what a large preparation took more than a small one: work without its start.
    """
    times = WANTED_TOKENS / more["tokens"]
    reading = (more["parent_cpu_seconds"] - more["assembling_cpu_seconds"]) * times
    encoding = more["worker_cpu_seconds"] * times / (WANTED_CORES - 1)
    assembling = more["assembling_seconds"] * times
    return {
        "of_tokens": WANTED_TOKENS,
        "of_cores": WANTED_CORES,
        "reading_seconds": reading,
        "encoding_seconds": encoding,
        "assembling_seconds": assembling,
        "minutes": (max(reading, encoding) + assembling) / 60,
    }


def _work(words: list[Any], shown: str) -> dict[str, Any]:
    """The row of one process of `data_work.py`."""
    command = [sys.executable, str(WORK), *map(str, words)]
    # Not what the console of this process is: a bar of progress would be drawn and cost.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MilepostError(f"{words[0]} {words[1]} failed: {done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    say(f"{words[0]} {Path(str(words[1])).name}: {shown} {row[shown]:.3g}")
    return row


def _turned(names: list[str], turn: int) -> list[str]:
    """Each turn begins with another one."""
    place = turn % len(names)
    return names[place:] + names[:place]


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def _ratio(rate: float | None, other: float | None) -> float | None:
    return rate / other if rate and other else None


def _seconds(work: Callable[[int], Any], number: int) -> float:
    started = time.perf_counter()
    work(number)
    return time.perf_counter() - started


QUESTIONS: dict[str, Callable[[Bench], None]] = {
    "encoders": Bench.encoders,
    "prepare": Bench.prepare,
    "peers": Bench.peers,
    "open": Bench.open,
    "order": Bench.order,
    "loader": Bench.loader,
}


def main(words: list[str]) -> int:
    """Answers the questions; returns the exit code."""
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="texts: a file or folder")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--megabytes", type=int, default=1000, help="to prepare; default: 1000")
    parser.add_argument(
        "--small-megabytes", type=int, default=64, help="for the peers and the start; default: 64"
    )
    parser.add_argument("--seconds", type=float, default=4, help="of an encoder; default: 4")
    parser.add_argument("--turns", type=int, default=3, help="of each; default: 3")
    parser.add_argument("--folder", type=Path, help="for inputs and results; default: temporary")
    arguments = parser.parse_args(words)
    try:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="data-") as folder:
            bench = Bench(arguments, folder=Path(folder))
            for question in arguments.questions:
                QUESTIONS[question](bench)
    except MilepostError as error:
        say_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
