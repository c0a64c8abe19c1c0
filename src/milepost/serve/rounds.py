"""Rounds: the way of each rater through the completions of a run, and what is on record of it.

ratings.jsonl is the truth, so that a reload, a restart, two windows and two servers agree.
Nothing that leads to a step, a sample's id or the run goes out: the page knows a presentation
by a key that only this run's id opens.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from milepost.core.errors import UsageError
from milepost.evaluation.rating_plan import Presentation
from milepost.runs.ratings import CRITERIA, HIGHEST_SCORE, LOWEST_SCORE, RatingRecord
from milepost.serve.rating_log import RatingLog, SampleScores

LONGEST_NAME_CHARACTERS = 80


class NotInRoundError(UsageError):
    """The round has no presentation of this key."""


class RatedElsewhereError(UsageError):
    """Since the page read them the scores were changed by another window.

    Attributes:
        scores: on record now.
    """

    def __init__(self, scores: dict[str, int]) -> None:
        super().__init__(
            "this completion was rated in another window meanwhile, with other scores",
            hint="these are the scores on record: change them or go on",
        )
        self.scores = scores


@dataclass(frozen=True)
class Progress:
    """How far a rater is.

    Attributes:
        rater: the name as it is on record.
        total: presentations of the round, those shown twice counted twice.
        rated: of these, with a score for every criterion.
        next: key of the presentation to go on with; None: all are rated.
        last: key of the last presentation.
    """

    rater: str
    total: int
    rated: int
    next: str | None
    last: str


@dataclass(frozen=True)
class Place:
    """One presentation as the page may know it.

    Attributes:
        key: its name in addresses.
        position: 1 for the first.
        scores: on record, by criterion; some or none where it is not rated yet.
        previous: key of the one before; None at the first.
        next: key of the one after it; at the last one of a presentation that is not rated, None
            where all others are.
    """

    key: str
    position: int
    prompt: str
    completion: str
    scores: dict[str, int]
    previous: str | None
    next: str | None


class Rounds:
    """The rounds of all raters of one run. Safe to use from several threads.

    Args:
        log: ratings.jsonl.
        plan: what a rater of this name sees, in order; at least one presentation.
        secret: what keys are made with, the same at every start.
        now: the time of day, UTC, ISO 8601.
    """

    def __init__(
        self,
        log: Path,
        *,
        plan: Callable[[str], Sequence[Presentation]],
        secret: str,
        now: Callable[[], str],
    ) -> None:
        self._log = RatingLog(log)
        self._plan = plan
        self._secret = secret
        self._now = now
        self._plans: dict[str, dict[str, Presentation]] = {}
        self._saved: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def so_far(self) -> list[Progress]:
        """How far the people are who have rated this run, first come first.

        Raises:
            StorageError: the log cannot be read.
        """
        with self._lock:
            # A name that was written by hand may hold anything; it is not for a terminal.
            names = [name for name in self._log.people() if name.isprintable()]
            return [self._progress(name) for name in names]

    def open(self, name: str) -> Progress:
        """Begins or continues the round of a person.

        Args:
            name: as it was typed; one that is on record in other letters (ada, Ada) is the same.

        Raises:
            UsageError: the name is empty, too long, not printable or that of a model.
            StorageError: the log cannot be read.
        """
        with self._lock:
            return self._progress(self._known_name(name))

    def place(self, rater: str, key: str) -> Place:
        """One presentation with the scores that are on record.

        Raises:
            NotInRoundError: there is none of this key.
            StorageError: the log cannot be read.
        """
        with self._lock:
            rater = self._known_name(rater)
            plan = self._plan_of(rater)
            shown = _at(plan, key)
            keys = list(plan)
            number = keys.index(key)
            scores = self._log.scores(rater)
            return Place(
                key=key,
                position=number + 1,
                prompt=shown.prompt,
                completion=shown.completion,
                scores=dict(scores.get((shown.sample_id, shown.repeat), {})),
                previous=keys[number - 1] if number > 0 else None,
                next=_after(plan, key, scores),
            )

    def save(
        self, rater: str, key: str, *, scores: Mapping[str, int], seen: Mapping[str, int]
    ) -> Progress:
        """Records the scores of one presentation, those that are not on record already.

        Args:
            rater: the name that `open` gave.
            key: of the presentation.
            scores: 0 to 10 for each of the six criteria.
            seen: the scores that the page took to be on record.

        Returns:
            How far the rater is; its `next` is what comes after this presentation.

        Raises:
            UsageError: a criterion is missing or unknown, or a score is not 0 to 10.
            NotInRoundError: there is no presentation of this key.
            RatedElsewhereError: others than the seen ones are on record; nothing is written.
            StorageError: not all could be written; the same call again writes the rest.
        """
        _check_scores(scores)
        with self._lock:
            rater = self._known_name(rater)
            plan = self._plan_of(rater)
            shown = _at(plan, key)
            recorded = dict(self._log.scores(rater).get((shown.sample_id, shown.repeat), {}))
            for criterion, score in recorded.items():
                if score not in (seen.get(criterion), scores[criterion]):
                    raise RatedElsewhereError(recorded)
            changed = [name for name in CRITERIA if recorded.get(name) != scores[name]]
            for criterion in changed:
                self._append(shown, rater, criterion=criterion, score=scores[criterion])
            if changed:
                self._saved.setdefault(rater, set()).add(key)
            return self._progress(rater, after=key)

    def saved_now(self) -> dict[str, tuple[int, Progress]]:
        """By rater: how many presentations were rated or changed here, and how far that is."""
        with self._lock:
            return {
                rater: (len(keys), self._progress(rater)) for rater, keys in self._saved.items()
            }

    def _append(self, shown: Presentation, rater: str, *, criterion: str, score: int) -> None:
        self._log.append(
            RatingRecord(
                sample_id=shown.sample_id,
                rater=rater,
                rater_kind="person",
                criterion=criterion,
                score=score,
                repeat=shown.repeat,
                time=self._now(),
            )
        )

    def _progress(self, rater: str, *, after: str | None = None) -> Progress:
        plan = self._plan_of(rater)
        scores = self._log.scores(rater)
        unrated = [key for key, shown in plan.items() if not _is_rated(shown, scores)]
        following = unrated[0] if unrated else None
        return Progress(
            rater=rater,
            total=len(plan),
            rated=len(plan) - len(unrated),
            next=following if after is None else _after(plan, after, scores),
            last=list(plan)[-1],
        )

    def _known_name(self, name: str) -> str:
        name = checked_name(name)
        folded = name.casefold()
        if folded in {model.casefold() for model in self._log.models()}:
            raise UsageError(
                f"{name!r} is the name of a model that judged this run", hint="give another name"
            )
        people = self._log.people()
        if name in people:
            return name
        return next((known for known in people if known.casefold() == folded), name)

    def _plan_of(self, rater: str) -> dict[str, Presentation]:
        if rater not in self._plans:
            self._plans[rater] = {self._key(rater, shown): shown for shown in self._plan(rater)}
        return self._plans[rater]

    def _key(self, rater: str, shown: Presentation) -> str:
        content = "\x1f".join((rater, shown.sample_id, str(shown.repeat)))
        return hmac.new(
            self._secret.encode(), content.encode(errors="surrogatepass"), hashlib.sha256
        ).hexdigest()[:16]


def checked_name(name: str) -> str:
    """A rater's name in one spelling: no space around it, composed letters.

    Raises:
        UsageError: it is empty, too long or not printable.
    """
    name = " ".join(unicodedata.normalize("NFC", name).split())
    if not 1 <= len(name) <= LONGEST_NAME_CHARACTERS or not name.isprintable():
        raise UsageError(
            f"a rater's name has 1 to {LONGEST_NAME_CHARACTERS} printable characters,"
            f" {name[:LONGEST_NAME_CHARACTERS]!r} is none",
            hint="give a name or initials, such as Ada",
        )
    return name


def _check_scores(scores: Mapping[str, int]) -> None:
    missing = [name for name in CRITERIA if name not in scores]
    if missing:
        raise UsageError(f"there is no score for {', '.join(missing)}")
    for criterion, score in scores.items():
        if criterion not in CRITERIA:
            raise UsageError(
                f"{criterion!r} is no criterion", hint=f"there are {', '.join(CRITERIA)}"
            )
        if not LOWEST_SCORE <= score <= HIGHEST_SCORE:
            raise UsageError(
                f"the score {score} for {criterion} is not {LOWEST_SCORE} to {HIGHEST_SCORE}"
            )


def _at(plan: Mapping[str, Presentation], key: str) -> Presentation:
    if key not in plan:
        raise NotInRoundError("this completion is no longer in your round")
    return plan[key]


def _is_rated(shown: Presentation, scores: SampleScores) -> bool:
    return len(scores.get((shown.sample_id, shown.repeat), ())) == len(CRITERIA)


def _after(
    plan: Mapping[str, Presentation],
    key: str,
    scores: SampleScores,
) -> str | None:
    """The presentation after one; after the last the first other one that is not rated."""
    keys = list(plan)
    number = keys.index(key)
    if number + 1 < len(keys):
        return keys[number + 1]
    open_ones = (k for k in keys if k != key and not _is_rated(plan[k], scores))
    return next(open_ones, None)
