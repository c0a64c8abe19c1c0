"""The harness scores a model through the API as it scores the same folder by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.api_server import ApiServer
from tests.tiny_models import tiny_model, write_model_folder

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason='the harness\'s client of servers wants "lm-eval[api]"')

pytestmark = pytest.mark.long

CONTEXT = 64
ATOL = 1e-4
"""float32 in another order of operations."""

TEXT = "The state of the union is strong, and the people of the states are the union. "
PAIRS = [
    ("The state of", " the union"),
    ("The people", " are strong, and the union is"),
    ("", "The union."),
    ("A long one: " + TEXT * 3, " the states."),
    ("Is the union strong? é", " yes ü"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model_folder(folder, tiny_model(max_position_embeddings=CONTEXT))
    return folder


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=number)  # type: ignore[arg-type]
        for number, one in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    # Through a server it leaves room for a new token, and does not count the last input apart.
    return HFLM(pretrained=str(folder), device="cpu", batch_size=1, max_length=CONTEXT - 2)


def through(server: ApiServer, folder: Path, **options: Any) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        model="tiny",
        tokenizer=str(folder),
        base_url=f"{server.base_url}/completions",
        tokenizer_backend="huggingface",
        max_length=CONTEXT,
        max_retries=1,
        **options,
    )


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"num_concurrent": 3}])
def test_loglikelihoods_and_greedy_flags_are_equal(folder, local, options) -> None:
    asked = instances("loglikelihood", *PAIRS)
    expected = local.loglikelihood(asked)
    with ApiServer(folder, most_waiting=20) as server:
        found = through(server, folder, **options).loglikelihood(asked)
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=ATOL)


def test_a_rolling_loglikelihood_is_equal(folder, local) -> None:
    asked = instances("loglikelihood_rolling", (TEXT * 4,), ("The union.",))
    with ApiServer(folder) as server:
        found = through(server, folder).loglikelihood_rolling(asked)
    assert found == pytest.approx(local.loglikelihood_rolling(asked), abs=10 * ATOL)


def test_generations_are_equal(folder, local) -> None:
    settings = {"until": ["union"], "max_gen_toks": 12, "do_sample": False}
    asked = instances("generate_until", ("The state", settings), ("A people", dict(settings)))
    with ApiServer(folder) as server:
        found = through(server, folder).generate_until(asked)
    assert found == local.generate_until(asked)
