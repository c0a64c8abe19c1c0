"""A model rates a run's completions, as people do: blind, shuffled, each completion twice.

Every reply is on record before its scores are, and every score as soon as it is known. So whatever
stops the work, the same command goes on where it was and pays for nothing twice.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from milepost.core.errors import MilepostError
from milepost.evaluation.judge_client import RefusedError
from milepost.evaluation.judge_cost import Budget, BudgetSpentError
from milepost.evaluation.judge_prompt import (
    corrected,
    judge_messages,
    order_of_criteria,
    read_scores,
)
from milepost.evaluation.judge_replies import Question, Reply, ReplyLog
from milepost.evaluation.rating_plan import Presentation
from milepost.runs.ratings import CRITERIA, RatingRecord, append_rating, read_ratings

NUM_TRIES = 2
"""Questions about one presentation: the second says what was wrong with the first reply."""

REFUSALS_WITHOUT_AN_ANSWER = 3
"""After so many refusals and no answer the server refuses everything."""


class Server(Protocol):
    """Who answers questions that are not on record."""

    async def ask(self, question: Question) -> Reply:
        """Answers one question; raises `RefusedError` for what it does not answer."""

    def largest_request(self, question: Question) -> tuple[int, int]:
        """Most tokens that the question and its reply can have."""


@dataclass(frozen=True)
class Failure:
    """A presentation without scores.

    Attributes:
        problem: why, in words.
    """

    sample_id: str
    repeat: int
    problem: str


@dataclass
class Judging:
    """How far the judge is.

    Attributes:
        num_rated: presentations whose scores were recorded now.
        num_asked: questions that the server answered.
        num_from_record: replies that were on record.
        num_retries: requests that failed and were sent again.
        served_models: what the server calls the model that answered, to replies.
        failures: presentations without usable reply.
        missing: presentations whose reply is not in the file to be replayed.
        is_budget_spent: whether the limit of the cost ended the work.
    """

    num_rated: int = 0
    num_asked: int = 0
    num_from_record: int = 0
    num_retries: int = 0
    served_models: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    missing: list[Presentation] = field(default_factory=list)
    is_budget_spent: bool = False

    @property
    def num_done(self) -> int:
        """Presentations that are behind it, whatever came out."""
        return self.num_rated + len(self.failures) + len(self.missing)


class Judge:
    """One model that rates one run."""

    def __init__(
        self,
        model: str,
        *,
        server: Server | None,
        replies: ReplyLog,
        ratings: Path,
        budget: Budget,
        now: Callable[[], str],
    ) -> None:
        """Nothing is asked yet.

        Args:
            model: as the server names it; the rater's name.
            server: who answers; None: only what is on record counts.
            replies: where replies are looked up, and kept.
            ratings: ratings.jsonl.
            budget: what may be spent.
            now: the time in UTC, ISO 8601.
        """
        self.progress = Judging()
        self._model = model
        self._server = server
        self._replies = replies
        self._ratings = ratings
        self._budget = budget
        self._now = now
        self._is_stopping = False

    def unrated(self, plan: Sequence[Presentation]) -> list[Presentation]:
        """What this judge has not scored wholly yet, in order.

        Raises:
            StorageError: ratings.jsonl cannot be read.
        """
        records, _ = read_ratings(self._ratings)
        scores = Counter(
            (record.sample_id, record.repeat)
            for record in records
            if record.rater == self._model and record.rater_kind == "model"
        )
        return [p for p in plan if scores[p.sample_id, p.repeat] < len(CRITERIA)]

    def stop(self) -> None:
        """Lets what is under way come in and asks nothing more."""
        self._is_stopping = True

    async def rate(
        self,
        presentations: Sequence[Presentation],
        *,
        concurrency: int,
        tell: Callable[[Judging], None],
    ) -> None:
        """Rates them all, several at a time.

        Args:
            presentations: as `unrated` gives them.
            concurrency: questions under way at once.
            tell: called after each with how far it is.

        Raises:
            MilepostError: the server is away or refuses everything; what came in is recorded.
            StorageError: a reply or a score could not be written.
        """
        waiting = iter(presentations)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(presentations))):
                    group.create_task(self._work(waiting, tell))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _work(self, waiting: Iterator[Presentation], tell: Callable[[Judging], None]) -> None:
        for presentation in waiting:
            try:
                await self._rate_one(presentation)
            except BudgetSpentError:
                self.progress.is_budget_spent = True
                self.stop()
            tell(self.progress)
            if self._is_stopping:
                return

    async def _rate_one(self, presentation: Presentation) -> None:
        messages = judge_messages(presentation, model=self._model)
        order = order_of_criteria(presentation, model=self._model)
        problem = ""
        for _ in range(NUM_TRIES):
            question = Question(
                self._model, messages, order, presentation.repeat, presentation.sample_id
            )
            try:
                reply = await self._reply(question)
            except RefusedError as refusal:
                self._refused(presentation, str(refusal))
                return
            if reply is None:
                self.progress.missing.append(presentation)
                return
            scores = reply.problem or read_scores(reply.text)
            if isinstance(scores, dict):
                self._record(presentation, scores)
                return
            problem = scores
            messages = corrected(messages, reply=reply.text, problem=problem, order=order)
        self._fail(presentation, problem)

    async def _reply(self, question: Question) -> Reply | None:
        """What is on record, else what the server answers, which is then on record."""
        recorded = self._replies.get(question)
        if self._server is None:
            self.progress.num_from_record += recorded is not None
            return recorded
        most_tokens = self._server.largest_request(question)
        if recorded is not None and not _can_be_longer(recorded, most_tokens[1]):
            self.progress.num_from_record += 1
            return recorded
        set_aside = await self._budget.set_aside(most_tokens)
        reply: Reply | None = None
        try:
            reply = await self._server.ask(question)
            self._replies.append(question, reply)
        finally:
            await self._budget.settle(set_aside, reply=reply)
        self.progress.num_asked += 1
        self.progress.num_retries += reply.retries
        self.progress.served_models[str(reply.completion.get("model") or "unknown")] += 1
        return reply

    def _record(self, presentation: Presentation, scores: dict[str, int]) -> None:
        time = self._now()
        for criterion in CRITERIA:
            record = RatingRecord(
                sample_id=presentation.sample_id,
                rater=self._model,
                rater_kind="model",
                criterion=criterion,
                score=scores[criterion],
                repeat=presentation.repeat,
                time=time,
            )
            append_rating(self._ratings, record)
        self.progress.num_rated += 1

    def _refused(self, presentation: Presentation, words: str) -> None:
        self._fail(presentation, f"the server refused it: {words}")
        if self.progress.num_asked == 0 and (
            len(self.progress.failures) >= REFUSALS_WITHOUT_AN_ANSWER
        ):
            raise MilepostError(
                f"the server refuses every question: {words}",
                hint="check --model: it has to take temperature 0 and a chat with a system message",
            )

    def _fail(self, presentation: Presentation, problem: str) -> None:
        self.progress.failures.append(Failure(presentation.sample_id, presentation.repeat, problem))


def _can_be_longer(reply: Reply, longest_tokens: int) -> bool:
    """Whether a reply was cut off where it would not be now; then it is asked for again."""
    return reply.cut_at_tokens is not None and reply.cut_at_tokens < longest_tokens
