"""Milepost's scoring beside lm-evaluation-harness, on the same answers of the same model.

Both are started once a dtype and take turns: first the harness tries its batch sizes on a part
of the items, then each scores all of them `--rounds` times. The medians count. What is timed is
the scoring of token ids that are ready; the time that each takes to make them is beside it. One
JSON row a benchmark and dtype on stdout, talk on stderr.

`python benchmarks/evaluate.py --data-dir DIR [--limit 256] [--model FOLDER]`
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from milepost.core.console import say, say_error
from milepost.core.environment import code_version
from milepost.core.errors import MilepostError
from milepost.core.files import strict
from milepost.distributed.launch import KEEP_FREED_MEMORY
from milepost.distributed.place import RENDEZVOUS_VARIABLE, read_place
from milepost.runs.events import utc_now

BATCH_SIZES = (1, 4, 8, 16, 32, 64)
"""Not "auto": on a CPU it starts from 64 rows of the model's whole context and never learns that
memory has run out: the kernel ends it. Where it lived it was the slowest of all."""

THREADS = 2
TRIAL_SHARE = 4
"""The harness tries its batch sizes on one item in so many."""


def main(words: Sequence[str]) -> int:
    """Runs the comparison, or is one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="rows of the benchmarks")
    parser.add_argument("--model", type=Path, help="default: corpus-30m's shape, random weights")
    parser.add_argument("--benchmarks", nargs="+", default=["hellaswag", "boolq"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--limit", type=int, default=256, help="items; default: 256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=sorted(ARMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    try:
        if arguments.arm is not None:
            return _work(arguments)
        with tempfile.TemporaryDirectory(prefix="milepost-evaluate-") as folder:
            arguments.model = arguments.model or make_model(Path(folder))
            for dtype in arguments.dtypes:
                _compare(arguments, dtype=dtype)
    except MilepostError as error:
        say_error(error)
        return error.exit_code
    return 0


def make_model(folder: Path) -> Path:
    """A Hugging Face folder of corpus-30m's shape with the weights a run begins with."""
    from safetensors.torch import save_file

    from milepost.config.recipe import load_recipe
    from milepost.model.huggingface import hf_config, hf_generation_config
    from milepost.model.init import initialize
    from milepost.model.llama import Llama
    from milepost.text.tokenizer import load_tokenizer

    section = load_recipe("corpus-30m", overrides=()).model
    tokenizer = load_tokenizer("gpt2")
    end = tokenizer.end_of_text_id
    model = Llama(section)
    initialize(model, config=section, seed=1)
    config = hf_config(section, end_of_text_id=end, dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    generation = hf_generation_config(end_of_text_id=end)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _compare(arguments: argparse.Namespace, *, dtype: str) -> None:
    with contextlib.ExitStack() as stack:
        theirs = stack.enter_context(_processes("lm-eval", arguments, dtype=dtype))
        ours = stack.enter_context(_processes("milepost", arguments, dtype=dtype))
        for benchmark in arguments.benchmarks:
            _compare_on(benchmark, ours, theirs, arguments=arguments, dtype=dtype)


Ask = Callable[[dict[str, Any]], dict[str, Any]]


def _compare_on(
    benchmark: str, ours: Ask, theirs: Ask, *, arguments: argparse.Namespace, dtype: str
) -> None:
    trials = {}
    for size in BATCH_SIZES:
        asked = {"benchmark": benchmark, "batch_size": size, "every": TRIAL_SHARE}
        trials[size] = theirs(asked)["items_per_second"]
        say(f"{dtype} {benchmark}: lm-eval at batch size {size}: {trials[size]:.1f} items/s")
    best = max(trials, key=lambda size: trials[size])
    asked = {"benchmark": benchmark, "batch_size": best, "every": 1}
    ours(asked | {"every": TRIAL_SHARE})
    found: dict[str, list[dict[str, Any]]] = {"milepost": [], "lm-eval": []}
    for _ in range(arguments.rounds):
        for name, ask in (("lm-eval", theirs), ("milepost", ours)):
            found[name].append(ask(asked))
            say(f"{dtype} {benchmark}: {name}: {found[name][-1]['items_per_second']:.1f} items/s")
    rates = {
        name: statistics.median(answer["items_per_second"] for answer in answers)
        for name, answers in found.items()
    }
    pairs = zip(found["milepost"][0]["scores"], found["lm-eval"][0]["scores"], strict=True)
    row = {
        "question": "evaluate",
        "time": utc_now(),
        "code": code_version(),
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "threads_of_each": THREADS,
        "benchmark": benchmark,
        "dtype": dtype,
        "items": found["milepost"][0]["items"],
        "items_per_second": rates,
        "ratio": rates["milepost"] / rates["lm-eval"],
        "all_items_per_second": {
            name: [answer["items_per_second"] for answer in answers]
            for name, answers in found.items()
        },
        "seconds_to_make_token_ids": {
            name: answers[0]["encode_seconds"] for name, answers in found.items()
        },
        "lm_eval_batch_size": best,
        "lm_eval_trials": trials,
        "largest_difference_nats": max(abs(a - b) for a, b in pairs),
    }
    print(json.dumps(strict(row)), flush=True)


@contextlib.contextmanager
def _processes(arm: str, arguments: argparse.Namespace, *, dtype: str) -> Iterator[Ask]:
    """The processes of an arm, and a function that asks them and waits for the answer."""
    num_ranks = THREADS if arm == "milepost" else 1
    words = ["--arm", arm, "--dtypes", dtype, "--model", str(arguments.model)]
    words += ["--data-dir", str(arguments.data_dir), "--limit", str(arguments.limit)]
    with tempfile.TemporaryDirectory(prefix="milepost-evaluate-") as folder:
        shared = {
            **os.environ,
            "OMP_NUM_THREADS": str(THREADS // num_ranks),
            "GLIBC_TUNABLES": KEEP_FREED_MEMORY,  # the harness gains by it too
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": folder,
        }
        if arm == "milepost":
            shared |= {
                "WORLD_SIZE": str(num_ranks),
                RENDEZVOUS_VARIABLE: f"{folder}/rendezvous",
            }
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, *words],
                env=shared | ({"RANK": str(rank)} if arm == "milepost" else {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_ranks)
        ]

        def ask(question: dict[str, Any]) -> dict[str, Any]:
            for rank in ranks:
                assert rank.stdin is not None
                rank.stdin.write(json.dumps(question) + "\n")
                rank.stdin.flush()
            answers = [rank.stdout.readline() for rank in ranks if rank.stdout is not None]
            if not all(answers):
                raise MilepostError(f"{arm} ended early; what it said stands above")
            return json.loads(answers[0])

        try:
            yield ask
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


def _work(arguments: argparse.Namespace) -> int:
    """One process of an arm: a question a line on stdin, an answer a line on stdout."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        answer = ARMS[arguments.arm](arguments, stack)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=sys.__stdout__, flush=True)
    return 0


def _milepost(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Ask:
    from milepost.distributed.world import join_world
    from milepost.evaluation.scoring import score_items

    place = read_place(os.environ)
    assert place is not None, "started by _processes"
    world = stack.enter_context(join_world(place, device_type="cpu", timeout_seconds=600))
    items_of, model = _items_and_model(arguments)

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        items, seconds = items_of(asked["benchmark"])
        items = items[:: asked["every"]]
        started = time.perf_counter()
        found = score_items(
            model, items, compute_dtype=getattr(torch, arguments.dtypes[0]), world=world
        )
        assert found is not None, "nobody asked for a stop"
        seconds_of_scoring = time.perf_counter() - started
        scores = [value for values in found for value in values]
        return _answer(items, scores, seconds_of_scoring, seconds)

    return answer


def _lm_eval(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Ask:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(str(arguments.model), device="cpu", dtype=arguments.dtypes[0], batch_size=1)
    items_of, _ = _items_and_model(arguments)
    encode_seconds: dict[str, float] = {}

    def encoded(benchmark: str, pairs: list[tuple[list[int], list[int]]]) -> float:
        """How long the harness takes to make the same ids from text."""
        texts = [tuple(map(harness.tokenizer.decode, pair)) for pair in pairs]
        requests = [Instance("loglikelihood", {}, text, 0) for text in texts]
        score, harness._loglikelihood_tokens = harness._loglikelihood_tokens, lambda *a, **k: []
        started = time.perf_counter()
        harness.loglikelihood(requests, disable_tqdm=True)
        harness._loglikelihood_tokens = score
        return time.perf_counter() - started

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        benchmark = asked["benchmark"]
        items = items_of(benchmark)[0][:: asked["every"]]
        pairs = [(list(c.context_ids), list(c.target_ids)) for i in items for c in i.choices]
        if asked["every"] == 1 and benchmark not in encode_seconds:
            encode_seconds[benchmark] = encoded(benchmark, pairs)
        harness.batch_size_per_gpu = asked["batch_size"]
        requests = [((str(number), ""), *pair) for number, pair in enumerate(pairs)]
        started = time.perf_counter()
        found = harness._loglikelihood_tokens(requests, disable_tqdm=True)
        seconds = time.perf_counter() - started
        return _answer(items, [value for value, _ in found], seconds, encode_seconds.get(benchmark))

    return answer


ARMS = {"milepost": _milepost, "lm-eval": _lm_eval}


def _items_and_model(arguments: argparse.Namespace) -> tuple[Callable[[str], Any], Any]:
    """(benchmark -> its items and the seconds it took to make them, the model)."""
    from milepost.evaluation.benchmarks import open_benchmark
    from milepost.inference.load import load_model

    loaded = load_model(arguments.model)
    ready: dict[str, Any] = {}

    def items_of(benchmark: str) -> Any:
        if benchmark not in ready:
            started = time.perf_counter()
            item_set = open_benchmark(
                benchmark,
                tokenizer=loaded.tokenizer,
                context_length=loaded.model.config.max_position_embeddings,
                data_dir=arguments.data_dir,
                limit=arguments.limit,
            )
            ready[benchmark] = (item_set.items, time.perf_counter() - started)
        return ready[benchmark]

    return items_of, loaded.model


def _answer(
    items: Sequence[Any], scores: list[float], seconds: float, encode_seconds: float | None
) -> dict[str, Any]:
    return {
        "items": len(items),
        "items_per_second": len(items) / seconds,
        "scores": scores,
        "encode_seconds": encode_seconds,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
