"""The API as a real server, asked by OpenAI's own client."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Generator, Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from milepost.api import answers
from milepost.api import app as api_app
from milepost.api.answers import Opened, Piece, Told
from milepost.core.errors import StorageError
from milepost.inference.engine import complete
from milepost.inference.load import LoadedModel, load_model
from milepost.runs.layout import RunLayout
from milepost.text.chat_template import Message, encode
from milepost.text.tokenizer import Tokenizer
from tests.api_server import CREATED, ApiServer
from tests.tiny_models import tiny_model, write_model_folder, write_tiny_run

CONTEXT = 400
WAIT_SECONDS = 30
KEY = "a-key-of-24-characters.."


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    root = tmp_path_factory.mktemp("runs") / "tiny"
    return write_tiny_run(root, 100, 200, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def server(layout: RunLayout) -> Iterator[ApiServer]:
    with ApiServer(layout.root) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: ApiServer) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def loaded(layout: RunLayout) -> LoadedModel:
    return load_model(layout.root)


def log_probabilities(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    """[T, V] float32: what the model says of the token after each of `ids`."""
    with torch.no_grad():
        hidden = loaded.model(torch.tensor([ids]))[0]
        logits = hidden @ loaded.model.head_weight[: loaded.tokenizer.vocab_size].T
    return logits.log_softmax(dim=1)


def test_the_models_are_the_run_and_its_checkpoints(client) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny:100", "tiny:200"]
    assert client.models.retrieve("tiny:100").id == "tiny:100"
    with pytest.raises(openai.NotFoundError, match=r"steps 100, 200") as caught:
        client.models.retrieve("tiny:150")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_new_checkpoint_is_offered_while_the_server_runs(tmp_path) -> None:
    layout = write_tiny_run(tmp_path / "growing", 1)
    with ApiServer(layout.root) as server:
        ask = server.client().completions.create
        assert ask(model="growing", prompt="The", max_tokens=1).model == "growing:1"
        write_tiny_run(tmp_path / "later", 2).checkpoint(2).rename(layout.checkpoint(2))
        assert ask(model="growing", prompt="The", max_tokens=1).model == "growing:2"
        assert ask(model="growing:1", prompt="The", max_tokens=1).model == "growing:1"


def test_what_is_one_model_has_one_name(layout, tmp_path) -> None:
    write_model_folder(tmp_path / "alone", tiny_model())
    for path, name in ((tmp_path / "alone", "alone"), (layout.checkpoint(100), "tiny:100")):
        with ApiServer(path) as server:
            client = server.client()
            assert [model.id for model in client.models.list()] == [name]
            assert client.completions.create(model=name, prompt="a", max_tokens=1).model == name
            with pytest.raises(openai.NotFoundError, match=f"this server has '{name}'"):
                client.completions.create(model="tiny", prompt="a")


@pytest.mark.parametrize("step", [100, 200])
def test_a_greedy_completion_is_that_of_milepost_sample(client, layout, step: int) -> None:
    of_step = load_model(layout.root, step=step)
    expected = complete(of_step.model, of_step.tokenizer, ["The", "A state"], max_new_tokens=9)
    reply = client.completions.create(
        model=f"tiny:{step}", prompt=["The", "A state"], max_tokens=9, temperature=0
    )
    assert [choice.text for choice in reply.choices] == [one.text for one in expected]
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert (reply.model, reply.object, reply.created) == (
        f"tiny:{step}",
        "text_completion",
        CREATED,
    )
    assert {choice.finish_reason for choice in reply.choices} == {"length"}
    num_prompt = sum(1 + len(of_step.tokenizer.encode(text)) for text in ("The", "A state"))
    assert reply.usage.prompt_tokens == num_prompt
    assert reply.usage.completion_tokens == 18
    assert reply.usage.total_tokens == num_prompt + 18


def test_a_text_and_its_token_ids_after_the_end_of_text_are_the_same_prompt(client, loaded) -> None:
    ids = [loaded.tokenizer.end_of_text_id, *loaded.tokenizer.encode("The union")]
    asked = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    texts = [
        client.completions.create(prompt=prompt, **asked).choices[0].text
        for prompt in ("The union", ids, [ids])
    ]
    assert len(set(texts)) == 1


def test_echo_with_logprobs_gives_what_a_harness_scores_with(client, loaded) -> None:
    ids = [5, 70, 260, 8, 8, 31]
    reply = client.completions.create(
        model="tiny", prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    scores = reply.choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(ids) + 1
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    expected = log_probabilities(loaded, ids)
    for place, (token, said, top) in enumerate(
        zip(ids[1:], scores.token_logprobs[1:], scores.top_logprobs[1:], strict=False)
    ):
        # Another order of sums than the engine's: float32, 2 layers.
        assert said == pytest.approx(float(expected[place, token]), abs=1e-4)
        assert max(top.values()) == pytest.approx(float(expected[place].max()), abs=1e-4)
        is_greedy = int(expected[place].argmax()) == token
        assert (said == max(top.values())) == is_greedy, "the harness compares them"
    assert scores.token_logprobs[-1] == max(scores.top_logprobs[-1].values())
    assert "".join(scores.tokens[:1]) == loaded.tokenizer.decode(ids[:1])


def test_the_end_of_a_text_is_a_token_of_the_scores(layout, tmp_path) -> None:
    """A harness drops the last score as that of the new token, whatever that is."""
    loaded = load_model(layout.root)
    end = loaded.tokenizer.end_of_text_id
    ids = next(
        [first, second]
        for first in range(280)
        for second, best in enumerate(_next_of_all(loaded, first))
        if best == end
    )
    with ApiServer(layout.root) as server:
        choice = (
            server.client()
            .completions.create(
                model="tiny", prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True
            )
            .choices[0]
        )
    assert choice.finish_reason == "stop"
    assert choice.text == loaded.tokenizer.decode(ids), "it is no part of the text"
    assert len(choice.logprobs.tokens) == 3
    assert choice.logprobs.tokens[-1] == loaded.tokenizer.decode([end])


def _next_of_all(loaded: LoadedModel, first: int) -> list[int]:
    """The likeliest token after `first` and each token of the vocabulary."""
    pairs = torch.tensor([[first, second] for second in range(280)])
    with torch.no_grad():
        return (loaded.model(pairs)[:, -1] @ loaded.model.head_weight.T).argmax(dim=1).tolist()


def test_echo_without_new_tokens_takes_a_prompt_as_long_as_the_context(client) -> None:
    asked = {"model": "tiny", "max_tokens": 0, "logprobs": 0, "echo": True}
    reply = client.completions.create(prompt=[7] * CONTEXT, **asked)
    assert len(reply.choices[0].logprobs.tokens) == CONTEXT
    assert reply.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match=f"has {CONTEXT + 1} tokens; .* {CONTEXT} "):
        client.completions.create(prompt=[7] * (CONTEXT + 1), **asked)


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[[7], [7] * CONTEXT])
    assert caught.value.code == "context_length_exceeded"
    assert f"prompt 2 has {CONTEXT} tokens; the model's context is {CONTEXT}" in str(caught.value)


def test_the_context_ends_a_completion_with_length(client) -> None:
    reply = client.completions.create(
        model="tiny", prompt=[7] * (CONTEXT - 3), max_tokens=50, temperature=0
    )
    assert reply.usage.completion_tokens <= 3
    assert reply.choices[0].finish_reason == "length"


def test_a_stop_text_ends_a_completion_and_is_no_part_of_it(client) -> None:
    asked = {"model": "tiny", "prompt": "The", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    cut = client.completions.create(stop=["not there", stop], **asked).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_seed_repeats_the_draws_and_n_are_different(client) -> None:
    def drawn(**changes: Any) -> list[str]:
        asked = {"model": "tiny", "prompt": "The", "max_tokens": 8, "n": 20, "seed": 5} | changes
        return [choice.text for choice in client.completions.create(**asked).choices]

    first = drawn()
    assert len(first) == 20 and len(set(first)) == 20
    assert drawn() == first
    assert set(drawn(seed=6)).isdisjoint(first)
    assert set(drawn(seed=None)).isdisjoint(drawn(seed=None))


def test_what_does_not_go_side_by_side_goes_one_after_the_other(client, monkeypatch) -> None:
    asked = {"model": "tiny", "prompt": ["The", "A", "Union"], "max_tokens": 9, "temperature": 0}
    together = client.completions.create(**asked)
    monkeypatch.setattr(answers, "POSITIONS_AT_ONCE", 1)
    one_by_one = client.completions.create(**asked)
    assert [c.text for c in one_by_one.choices] == [c.text for c in together.choices]
    assert [c.index for c in one_by_one.choices] == [0, 1, 2]
    assert one_by_one.usage == together.usage


def test_a_stream_adds_up_to_the_whole_reply(client) -> None:
    asked = {
        "model": "tiny", "prompt": ["The", "A"], "max_tokens": 30, "temperature": 0.9, "seed": 3,
        "n": 2, "logprobs": 2, "echo": True,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    texts, tokens, reasons = [""] * 4, [[] for _ in range(4)], [None] * 4
    for chunk in client.completions.create(
        stream=True, stream_options={"include_usage": True}, **asked
    ):
        usage = chunk.usage
        assert (chunk.model, chunk.object) == ("tiny:200", "text_completion")
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "nothing comes after the end"
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_a_chat_is_the_completion_of_its_template(client, loaded) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "The union."},
        {"role": "user", "content": "Why?"},
    ]
    ids = encode(
        [Message(**message) for message in messages],
        tokenizer=loaded.tokenizer,
        add_generation_prompt=True,
    ).ids.tolist()
    raw = client.completions.create(model="tiny", prompt=ids, max_tokens=12, temperature=0)
    asked = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
    chat = client.chat.completions.create(**asked)
    message = chat.choices[0].message
    assert (message.role, message.content) == ("assistant", raw.choices[0].text.lstrip())
    assert (chat.object, chat.usage.prompt_tokens) == ("chat.completion", len(ids))
    streamed = list(client.chat.completions.create(stream=True, **asked))
    assert streamed[0].choices[0].delta.role == "assistant"
    assert streamed[-1].choices[0].finish_reason == chat.choices[0].finish_reason
    texts = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert "".join(texts) == message.content


def test_a_chat_can_have_its_log_probabilities(client, loaded) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "A"}], "temperature": 0}
    tokens = (
        client.chat.completions.create(max_tokens=3, logprobs=True, top_logprobs=2, **asked)
        .choices[0]
        .logprobs.content
    )
    assert len(tokens) == 3
    for token in tokens:
        assert len(token.top_logprobs) == 2
        assert token.logprob == token.top_logprobs[0].logprob, "greedy takes the likeliest"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "assistant", "content": "I begin."}], "user and assistant take turns"),
        ([{"role": "user", "content": "a\0b"}], "NUL"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_refused(server, messages, reason) -> None:
    answer = server.post("/chat/completions", {"model": "tiny", "messages": messages})
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/completions", b"not JSON", 400),
        ("/completions", b"", 400),
        ("/completions", b"[" * 200_000, 400),
        ("/completions", b" " * (5 << 20), 413),
        ("/completions", {"model": "tiny", "prompt": "a", "max_tokens": -5}, 400),
        ("/completions", {"model": "tiny", "prompt": "a", "max_tokens": 10**30}, 400),
        ("/completions", {"model": "tiny", "prompt": [280]}, 400),
        ("/completions", {"model": "tiny", "prompt": [10**30]}, 400),
        ("/completions", {"model": "tiny", "prompt": "\ud800"}, 400),
        ("/completions", {"model": "tiny", "prompt": "x " * 100_000}, 400),
        ("/completions", {"model": "\ud800", "prompt": "a"}, 400),
        ("/completions", {"model": "../tiny", "prompt": "a"}, 404),
        ("/completions", {"model": "tiny:000200", "prompt": "a"}, 404),
        ("/chat/completions", {"model": "tiny", "messages": [{"role": "user"}]}, 400),
        ("/embeddings", {"model": "tiny", "input": "a"}, 404),
    ],
)
def test_bad_requests_get_errors_of_openais_shape_and_the_server_lives(
    server, client, path: str, body: Any, status: int
) -> None:
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices


def test_only_this_machine_is_answered_without_a_key(server) -> None:
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    assert server.post("/completions", ask, Host="evil.example").status_code == 421
    assert server.post("/completions", ask, Origin="http://evil.example").status_code == 403
    assert server.post("/completions", ask).status_code == 200


def test_with_a_key_whoever_has_it_is_answered(layout) -> None:
    with ApiServer(layout.root, key=KEY) as server:
        assert server.client(key=KEY).models.list().data
        for wrong in ("wrong", KEY + "x", KEY[:-1], "é"):
            headers = {"Authorization": f"Bearer {wrong}".encode()}
            answer = httpx.get(server.base_url + "/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(server.base_url + "/models").status_code == 401
        answer = server.post(
            "/completions", b"junk", Authorization=f"bearer {KEY}", Host="far.away"
        )
        assert answer.status_code == 400


class Gates:
    """Answers that tell a piece each time they are let, in place of a model's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.closed = threading.Semaphore(0)
        monkeypatch.setattr(api_app, "answer", self._answer)

    def _answer(self, *given: Any, **named: Any) -> Generator[Told, None, None]:
        try:
            yield Opened("tiny:200", "fp", 1)
            self.begun.release()
            while True:
                assert self.let.acquire(timeout=WAIT_SECONDS)
                yield Piece(0, "word ", num_tokens=1)
        finally:
            self.closed.release()

    def let_until_closed(self) -> None:
        """The worker is in a step; it looks whether anyone waits before each next one."""
        while not self.closed.acquire(timeout=0.01):
            self.let.release()


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Gates:
    return Gates(monkeypatch)


def _send(server: ApiServer, body: dict[str, Any]) -> socket.socket:
    """A client that has asked and can go away."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_SECONDS)
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(layout, gates, stream: bool) -> None:
    with ApiServer(layout.root, most_at_once=1, most_waiting=0) as server:
        ask = {"model": "tiny", "prompt": "a", "stream": stream}
        connection = _send(server, ask)
        assert gates.begun.acquire(timeout=WAIT_SECONDS)
        if stream:
            gates.let.release()
            assert b"200 OK" in connection.recv(100)
        full = server.post("/completions", ask)
        assert full.status_code == 429
        assert full.json()["error"]["code"] == "rate_limit_exceeded"
        assert "retry-after" in full.headers
        connection.close()
        gates.let_until_closed()
        again = _send(server, ask)
        assert gates.begun.acquire(timeout=WAIT_SECONDS)
        again.close()
        gates.let_until_closed()


def test_closing_ends_a_stream_with_an_error_that_clients_understand(layout, gates) -> None:
    with ApiServer(layout.root) as server:
        stream = server.client().completions.create(model="tiny", prompt="a", stream=True)
        gates.let.release()
        assert next(iter(stream)).choices[0].text == "word "
        server.worker.close()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        gates.let.release(10)


def test_a_checkpoint_that_is_damaged_is_told_without_its_place(tmp_path, capsys) -> None:
    layout = write_tiny_run(tmp_path / "damaged", 1, 2)
    weights = layout.checkpoint(1) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with ApiServer(layout.root) as server:
        answer = server.post("/completions", {"model": "damaged:1", "prompt": "a"})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "model_not_readable"
        assert str(tmp_path) not in answer.text
        assert str(weights) in capsys.readouterr().err
        assert server.client().completions.create(model="damaged", prompt="a").choices


def test_a_bug_in_an_answer_is_an_error_of_the_server_and_no_end(
    layout, monkeypatch, capsys
) -> None:
    def broken(*given: Any, **named: Any) -> Generator[Told, None, None]:
        raise ZeroDivisionError("a bug")
        yield

    with ApiServer(layout.root) as server:
        with monkeypatch.context() as patch:
            patch.setattr(api_app, "answer", broken)
            answer = server.post("/completions", {"model": "tiny", "prompt": "a"})
            assert answer.status_code == 500
            assert answer.json()["error"]["type"] == "server_error"
        assert "ZeroDivisionError: a bug" in capsys.readouterr().err
        assert server.client().completions.create(model="tiny", prompt="a").choices


def test_two_conversations_at_once_are_answered_as_if_alone(client) -> None:
    asked = {"model": "tiny", "max_tokens": 40, "temperature": 0}
    prompts = ["The", "A", "Union", "state"]
    alone = [client.completions.create(prompt=prompt, **asked) for prompt in prompts]
    found: dict[str, str] = {}

    def ask(prompt: str) -> None:
        found[prompt] = client.completions.create(prompt=prompt, **asked).choices[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert found == dict(zip(prompts, [one.choices[0].text for one in alone], strict=True))


def test_a_bound_on_new_tokens_is_no_reason_to_refuse_who_asks_for_none(layout) -> None:
    with ApiServer(layout.root, most_tokens=3) as server:
        client = server.client()
        reply = client.completions.create(model="tiny", prompt="The", temperature=0)
        assert reply.usage.completion_tokens == 3
        with pytest.raises(openai.BadRequestError, match="max_tokens is 4, this server makes at"):
            client.completions.create(model="tiny", prompt="The", max_tokens=4)


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_what_is_far_too_long_is_refused_without_being_encoded(
    server, monkeypatch, field: str
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: pytest.fail("it takes seconds"))
    text = "a" * 1_000_000
    path, value = "/completions", text
    if field == "messages":
        path, value = "/chat/completions", [{"role": "user", "content": text}]
    error = server.post(path, {"model": "tiny", field: value}).json()["error"]
    assert (error["param"], error["code"]) == (field, "context_length_exceeded")
    assert f"tokens; the model's context is {CONTEXT} tokens" in error["message"]
    assert "has at least " in error["message"]


def test_a_chat_that_leaves_no_room_names_its_messages(server) -> None:
    messages = [{"role": "user", "content": "z" * CONTEXT}]
    error = server.post("/chat/completions", {"model": "tiny", "messages": messages}).json()
    assert error["error"]["param"] == "messages"
    assert error["error"]["message"].startswith("the conversation has ")


def test_a_run_whose_checkpoints_went_away_is_said_to_have_none(tmp_path) -> None:
    layout = write_tiny_run(tmp_path / "gone", 1)
    with ApiServer(layout.root) as server:
        layout.checkpoint(1).rename(tmp_path / "elsewhere")
        error = server.post("/completions", {"model": "gone", "prompt": "a"}).json()["error"]
        assert error["message"].endswith("the run 'gone' has no checkpoint now")
        assert server.client().models.list().data == []


def test_an_error_that_names_a_folder_is_for_the_terminal_only(layout, monkeypatch, capsys) -> None:
    def broken(*given: Any, **named: Any) -> Generator[Told, None, None]:
        raise StorageError("cannot read /home/someone/runs/tiny")
        yield

    with ApiServer(layout.root) as server:
        monkeypatch.setattr(api_app, "answer", broken)
        answer = server.post("/completions", {"model": "tiny", "prompt": "a"})
        assert answer.status_code == 500 and "someone" not in answer.text
        assert "error: cannot read /home/someone/runs/tiny\n" in capsys.readouterr().err


def test_log_probabilities_of_a_prompt_are_those_of_transformers(layout, client, loaded) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(layout.checkpoint(200)).eval()
    ids = [loaded.tokenizer.end_of_text_id, *loaded.tokenizer.encode("The state of the union")]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].float().log_softmax(dim=1)
    scores = (
        client.completions.create(model="tiny", prompt=ids, max_tokens=0, logprobs=3, echo=True)
        .choices[0]
        .logprobs
    )
    own = [float(expected[place, token]) for place, token in enumerate(ids[1:])]
    # Float32 on both sides, other orders of sums.
    assert scores.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
    for place, top in enumerate(scores.top_logprobs[1:]):
        best = expected[place].topk(3).values.tolist()
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(best, abs=1e-4)
