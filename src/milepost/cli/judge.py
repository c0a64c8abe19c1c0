"""`milepost judge`: a model behind an OpenAI-compatible endpoint rates a run's completions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from milepost.core import console

if TYPE_CHECKING:
    from milepost.evaluation.judge import Judge, Judging
    from milepost.evaluation.judge_client import ChatServer
    from milepost.evaluation.rating_plan import Presentation
    from milepost.runs.layout import RunLayout

DEFAULT_KEY_NAME = "OPENAI_API_KEY"
NO_KEY = "none"
"""Sent where no key is set: a server on one's own machine takes any."""


@dataclass(frozen=True)
class Options:
    """What a person asks for, beside the run and the judge.

    Parameters
    ----------
    base_url
        The server, such as https://api.openai.com/v1; needed unless --replay is given.
    api_key_env
        Environment variable that holds the server's key. Default: OPENAI_API_KEY, where it is set.
    steps
        Rate samples of these steps only: all, latest, every:N, or steps such as 100,200.
    limit
        At most so many samples, evenly over the steps, the same as `milepost rate` takes.
    prices
        Of a million tokens in and out, such as 2.50,10, so that the cost is counted.
    max_cost
        Stop before this is exceeded; needs --prices. Each command counts for itself.
    concurrency
        Questions under way at once.
    timeout_seconds
        How long one reply may take.
    max_reply_tokens
        Where a reply is cut off; models that think aloud need more.
    replay
        A file of recorded replies to read in the place of a server; nothing is sent.
    json
        One JSON document on stdout.
    """

    base_url: str | None = None
    api_key_env: str | None = None
    steps: str | None = None
    limit: int | None = None
    prices: str | None = None
    max_cost: float | None = None
    concurrency: int = 4
    timeout_seconds: float = 120.0
    max_reply_tokens: int = 1024
    replay: Path | None = None
    json: Annotated[bool, Parameter(negative="")] = False


def judge(
    run: Path,
    *,
    model: str,
    options: Annotated[Options, Parameter(name="*")] = Options(),
) -> None:
    """Have a model behind an OpenAI-compatible endpoint rate the completions of a run.

    It does what people do on the page of `milepost rate`: it sees prompt and completion without
    step or model, in a shuffled order, each twice, and scores the same six criteria from 0 to 10.
    The report shows its scores apart from those of people, and how far they agree.

    Scores go to ratings.jsonl, raw replies to judge/replies.jsonl in the run. What was answered
    once is not asked again: a command that was stopped goes on where it was.

    Example: `milepost judge runs/demo --base-url http://localhost:8000/v1 --model qwen3-8b`

    Parameters
    ----------
    run
        The run folder, with samples.
    model
        The judge, as its server names it; this is the rater's name too.
    """
    import asyncio

    from milepost.cli.judge_tables import as_json, say_what_was_done, show_scores
    from milepost.core.files import exclusive_lock
    from milepost.evaluation.judge import Judge
    from milepost.evaluation.judge_cost import Budget, parse_prices
    from milepost.evaluation.judge_replies import ReplyLog
    from milepost.runs.events import utc_now
    from milepost.runs.layout import RunLayout

    _check(options)
    layout = RunLayout(run)
    plan = _plan(layout, model=model, options=options)
    server = _server(options)
    prices = None if options.prices is None else parse_prices(options.prices)
    budget = Budget(prices=prices, limit=options.max_cost)
    with exclusive_lock(layout.judge / ".lock", what=f"the judge of {run}"):
        replies = ReplyLog(options.replay or layout.judge / "replies.jsonl")
        if replies.num_bad_lines:
            console.warn(f"{replies.path}: {replies.num_bad_lines} lines cannot be read")
        rater = Judge(
            model,
            server=server,
            replies=replies,
            ratings=layout.ratings,
            budget=budget,
            now=utc_now,
        )
        due = rater.unrated(plan)
        _say_what_is_due(plan, due, layout=layout)
        was_stopped = asyncio.run(_work(rater, server, due, concurrency=options.concurrency))
    told = rater.progress
    if options.json:
        console.show_json(
            as_json(
                told, layout=layout, model=model, num_due=len(due), budget=budget, server=server
            )
        )
    else:
        show_scores(layout, model=model)
    say_what_was_done(told, budget=budget, server=server, path=replies.path)
    _end(told, num_left=len(due) - told.num_done, was_stopped=was_stopped, path=replies.path)


def _check(options: Options) -> None:
    from milepost.core.errors import UsageError

    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit {options.limit} leaves nothing to rate", hint="give 1 or more")
    if not 1 <= options.concurrency <= 256:
        raise UsageError(f"--concurrency {options.concurrency} is not 1 to 256")
    if not 0 < options.timeout_seconds < float("inf"):
        raise UsageError(f"--timeout-seconds {options.timeout_seconds:g} is not above 0")
    if options.max_reply_tokens < 64:
        raise UsageError(
            f"--max-reply-tokens {options.max_reply_tokens} is too few for six scores",
            hint="give 64 or more",
        )
    if options.max_cost is not None and options.prices is None:
        raise UsageError(
            "--max-cost needs prices to count by",
            hint="give those of a million tokens in and out, such as --prices 2.50,10",
        )
    if options.max_cost is not None and not options.max_cost >= 0:
        raise UsageError(f"--max-cost {options.max_cost:g} is not 0 or more")


def _plan(layout: RunLayout, *, model: str, options: Options) -> list[Presentation]:
    """Every sample twice, in the judge's own order."""
    from milepost.core.errors import DataError, UsageError
    from milepost.evaluation.rating_plan import rating_plan, sample_steps
    from milepost.runs.manifest import read_run_manifest
    from milepost.runs.ratings import read_ratings
    from milepost.runs.records import read_samples

    read_run_manifest(layout)
    samples, num_bad = read_samples(layout.samples)
    if num_bad:
        console.warn(f"{layout.samples}: {num_bad} lines cannot be read and are left out")
    if not rating_plan(samples, seed=model, fraction_repeated=0):
        raise DataError(
            f"{layout.root} has no samples to rate",
            hint=f"milepost sample {layout.root} --steps all records some",
        )
    ratings, _ = read_ratings(layout.ratings)
    if any(record.rater == model and record.rater_kind == "person" for record in ratings):
        raise UsageError(
            f"a person rated this run under the name {model!r}",
            hint="have the server call the judge something else; one name is one rater",
        )
    wanted = sample_steps(samples, text=options.steps)
    return rating_plan(samples, seed=model, fraction_repeated=1, limit=options.limit, steps=wanted)


def _server(options: Options) -> ChatServer | None:
    """The server to ask; None where recorded replies stand in."""
    from milepost.core.errors import DataError, UsageError
    from milepost.evaluation.judge_client import ChatServer
    from milepost.runs.events import utc_now

    base_url, replay = options.base_url, options.replay
    if replay is not None:
        if base_url is not None:
            raise UsageError("--replay and --base-url do not go together", hint="give one of them")
        if not replay.is_file():
            raise DataError(f"{replay} is not a file of recorded replies")
        return None
    if base_url is None:
        raise UsageError(
            "no server is given",
            hint="--base-url URL asks one, --replay FILE reads recorded replies",
        )
    if not _is_address(base_url):
        raise UsageError(
            f"--base-url {base_url!r} is no address", hint="such as http://localhost:8000/v1"
        )
    if base_url.rstrip("/").endswith("/chat/completions"):
        raise UsageError(
            "--base-url has the path of a single request",
            hint=f"give {base_url.rstrip('/').removesuffix('/chat/completions')}",
        )
    return ChatServer(
        base_url,
        api_key=_api_key(base_url, name=options.api_key_env),
        timeout_seconds=options.timeout_seconds,
        max_reply_tokens=options.max_reply_tokens,
        now=utc_now,
    )


def _is_address(text: str) -> bool:
    """Whether a text is an address as the client takes it."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text)
        has_place = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    is_plain = text.isprintable() and " " not in text
    return has_place and is_plain and text.startswith(("http://", "https://"))


def _api_key(base_url: str, *, name: str | None) -> str:
    import os
    from urllib.parse import urlsplit

    from milepost.core.errors import UsageError

    key = os.environ.get(name or DEFAULT_KEY_NAME)
    if key:
        return key
    if name is not None or urlsplit(base_url).hostname == "api.openai.com":
        raise UsageError(
            f"the environment variable {name or DEFAULT_KEY_NAME} is not set",
            hint="put the server's key in it, or name another variable with --api-key-env",
        )
    return NO_KEY


async def _work(
    rater: Judge,
    server: ChatServer | None,
    unrated: list[Presentation],
    *,
    concurrency: int,
) -> bool:
    """Rates what is left; returns whether a stop was asked for.

    The first Ctrl-C lets the replies that are under way come in, as they are paid for; the second
    leaves at once.
    """
    import asyncio
    import contextlib
    import signal

    if not unrated:
        return False
    loop, work = asyncio.get_running_loop(), asyncio.current_task()
    assert work is not None
    stops: list[int] = []

    def stop(signum: int) -> None:
        stops.append(signum)
        if len(stops) > 1:
            work.cancel()
            return
        rater.stop()
        console.say("stopping: waiting for the replies under way; Ctrl-C again leaves at once")

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop, signum)
    try:
        with console.progress("judging", total=len(unrated)) as bar:

            def tell(progress: Judging) -> None:
                bar.update(progress.num_done, note=_note(progress))

            if server is not None:
                await server.reach()
            await rater.rate(unrated, concurrency=concurrency, tell=tell)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        if server is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await server.close()
    return bool(stops)


def _note(progress: Judging) -> str:
    return f"{len(progress.failures)} without scores" if progress.failures else ""


def _say_what_is_due(
    plan: list[Presentation], unrated: list[Presentation], *, layout: RunLayout
) -> None:
    num_samples = sum(p.repeat == 0 for p in plan)
    console.say(
        f"{layout.root}: {num_samples} samples, each twice: {len(unrated)} ratings to do,"
        f" {len(plan) - len(unrated)} on record"
    )


def _end(told: Judging, *, num_left: int, was_stopped: bool, path: Path) -> None:
    """Raises what makes the exit code say that not all is done."""
    from milepost.core.errors import MilepostError, StopRequested

    if told.missing:
        for presentation in told.missing:
            console.say(
                f"  no reply: sample {presentation.sample_id}, repeat {presentation.repeat}"
            )
        raise MilepostError(
            f"{path} lacks {len(told.missing)} of the replies",
            hint="replies are found by model, sample, repeat and the exact question; with"
            " --base-url they are asked for",
        )
    if was_stopped:
        raise StopRequested(
            f"stopped on request; {num_left} ratings are left, for the same command"
        )
    if told.is_budget_spent:
        console.say(f"stopped before --max-cost is exceeded; {num_left} ratings are left")
    if told.failures and not told.num_rated:
        raise MilepostError("no reply could be used", hint=f"read the replies in {path}")
