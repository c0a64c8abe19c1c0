"""The rating page as a web application: routes in, JSON out, errors as messages.

What a rater may not know (step, sample, run) is not here to be sent: see `rounds`.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr
from starlette.exceptions import HTTPException

from milepost.core import console
from milepost.core.errors import MilepostError, StorageError, UsageError
from milepost.core.page_text import for_pages
from milepost.runs.ratings import HIGHEST_SCORE, LOWEST_SCORE, RUBRIC
from milepost.serve.local import keep_local
from milepost.serve.rounds import NotInRoundError, Place, RatedElsewhereError, Rounds

_OWN = files("milepost.serve") / "pages"

PAGES = {
    "/": (_OWN / "rate.html", "text/html; charset=utf-8"),
    "/palette.css": (
        files("milepost.trajectory") / "templates" / "palette.css",
        "text/css; charset=utf-8",
    ),
    "/rate.css": (_OWN / "rate.css", "text/css; charset=utf-8"),
    "/rate.js": (_OWN / "rate.js", "text/javascript; charset=utf-8"),
    "/server.js": (_OWN / "server.js", "text/javascript; charset=utf-8"),
    "/kept.js": (_OWN / "kept.js", "text/javascript; charset=utf-8"),
}
"""Address to file and media type."""


class Name(BaseModel):
    """Who wants to rate."""

    model_config = ConfigDict(extra="forbid")
    rater: StrictStr


class Scores(BaseModel):
    """The scores of one presentation, and those that the page took to be on record."""

    model_config = ConfigDict(extra="forbid")
    rater: StrictStr
    scores: dict[StrictStr, StrictInt]
    seen: dict[StrictStr, StrictInt]


def build_app(rounds: Rounds, *, rater: str | None = None) -> FastAPI:
    """The application.

    Args:
        rounds: what is rated.
        rater: who rates; None: the page asks.
    """
    app = FastAPI(title="Milepost", openapi_url=None, docs_url=None, redoc_url=None)
    keep_local(app)
    _add_pages(app)
    _add_error_messages(app)

    @app.get("/api/start")
    def start() -> dict[str, Any]:
        return {
            "rater": rater,
            "raters": [progress.rater for progress in rounds.so_far()],
            "criteria": [asdict(criterion) for criterion in RUBRIC],
            "lowest": LOWEST_SCORE,
            "highest": HIGHEST_SCORE,
        }

    @app.post("/api/rounds")
    def open_round(name: Name) -> dict[str, Any]:
        return asdict(rounds.open(name.rater))

    @app.get("/api/presentations/{key}")
    def presentation(key: str, rater: str) -> dict[str, Any]:
        return _for_the_page(rounds.place(rater, key))

    @app.post("/api/presentations/{key}")
    def save(key: str, given: Scores) -> dict[str, Any]:
        return asdict(rounds.save(given.rater, key, scores=given.scores, seen=given.seen))

    return app


def _for_the_page(place: Place) -> dict[str, Any]:
    texts = {"prompt": place.prompt, "completion": place.completion}
    return asdict(place) | {name: for_pages(t) for name, t in texts.items()}


def _add_pages(app: FastAPI) -> None:
    for address, (file, media_type) in PAGES.items():
        content = file.read_bytes()

        def page(content: bytes = content, media_type: str = media_type) -> Response:
            return Response(content, media_type=media_type)

        app.add_api_route(address, page, methods=["GET"], response_model=None)


def _add_error_messages(app: FastAPI) -> None:
    """Every answer that is no success is one JSON object: error, and a hint where there is one."""

    @app.exception_handler(StorageError)
    def disk_failed(request: Request, error: StorageError) -> JSONResponse:
        # The path names the run, which is for the terminal only.
        console.say_error(error)
        reason = error.message.rpartition(": ")[2]
        message = f"the scores cannot be read or written: {reason}"
        hint = "see to it where the page was started"
        return JSONResponse({"error": message, "hint": hint}, status_code=507)

    @app.exception_handler(MilepostError)
    def known(request: Request, error: MilepostError) -> JSONResponse:
        more = {"scores": error.scores} if isinstance(error, RatedElsewhereError) else {}
        content = {"error": error.message, "hint": error.hint} | more
        return JSONResponse(content, status_code=_status(error))

    @app.exception_handler(RequestValidationError)
    def bad_form(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors()
        )
        # A key of the form may be half a character, which UTF-8 has no bytes for.
        plain = for_pages(problems)
        return JSONResponse({"error": plain, "hint": None}, status_code=422)

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail), "hint": None}, error.status_code)


def _status(error: MilepostError) -> int:
    if isinstance(error, NotInRoundError):
        return 404
    if isinstance(error, RatedElsewhereError):
        return 409
    return 422 if isinstance(error, UsageError) else 500
