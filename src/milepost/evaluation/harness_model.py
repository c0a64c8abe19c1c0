"""A model as lm-evaluation-harness sees one. Imports the harness, so only `harness` imports it.

Tokens are those of the harness's own `hf` model, but for one thing: text that looks like a
control token stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from milepost.core.errors import UsageError
from milepost.distributed.world import World
from milepost.evaluation.packing import Pair
from milepost.evaluation.scoring import PairScore, score_pairs
from milepost.inference.engine import continue_likeliest, decoder_beside
from milepost.model.llama import Llama
from milepost.text.tokenizer import Tokenizer

_ROWS_AT_ONCE = 16

Request = tuple[Any, list[int], list[int]]
"""What was asked, tokens of the context, tokens of the target."""


class HarnessModel(TemplateLM):
    """Log-likelihoods from the scoring engine, greedy texts from the KV cache.

    Every rank must be asked the same; each gets every answer.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, *, compute_dtype: torch.dtype, world: World
    ) -> None:
        super().__init__()
        self._llama = model
        self._text = tokenizer
        self._compute_dtype = compute_dtype
        self._milepost_world = world
        self._stop_ids: dict[tuple[str, ...], frozenset[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self._text.end_of_text_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self._text.beginning_id

    @property
    def max_length(self) -> int:
        """Most tokens of a forward pass."""
        return self._llama.config.max_position_embeddings

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which the harness keeps requests."""
        return self._text.sha256

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Ids of a text, with what the tokenizer's template puts around it unless refused."""
        ids = self._text.encode(string)
        if add_special_tokens is False:
            return ids
        before, after = self._text.ids_around
        return [*before, *ids, *after]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context's length that do not overlap."""
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        found = iter(self._score([pair for of_text in windows for pair in of_text]))
        return [sum(next(found).loglikelihood for _ in of_text) for of_text in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        found = self._score([(context, target) for _, context, target in requests])
        return [(score.loglikelihood, score.is_greedy) for score in found]

    def _score(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[PairScore]:
        return score_pairs(
            self._llama,
            [self._fit(context, target) for context, target in asked],
            compute_dtype=self._compute_dtype,
            world=self._milepost_world,
        )

    def _fit(self, context_ids: list[int], target_ids: list[int]) -> Pair:
        """Long contexts lose their beginning, as the harness's own models do it."""
        if not 0 < len(target_ids) <= self.max_length:
            raise UsageError(
                f"an answer has {len(target_ids)} tokens, the model's context {self.max_length}",
                hint="leave this task out, or take a model with a longer context",
            )
        num_kept = self.max_length + 1 - len(target_ids)  # the last token is only predicted
        return Pair(tuple(context_ids[-num_kept:]), tuple(target_ids))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to a stop string; every rank makes all of them.

        Raises:
            UsageError: a task asks for sampling.
        """
        wishes = [_Wish(place, request.args, self) for place, request in enumerate(requests)]
        texts = [""] * len(wishes)
        decoder = decoder_beside(
            self._llama, compute_dtype=self._compute_dtype, vocab_size=self._text.vocab_size
        )
        for batch in _batches(wishes):
            found = continue_likeliest(
                decoder,
                self._text,
                [wish.prompt_ids for wish in batch],
                max_new_tokens=batch[0].max_new_tokens,
                stop_ids=self._ids_that_stop(batch[0].stops),
                compute_dtype=self._compute_dtype,
            )
            for wish, ids in zip(batch, found, strict=True):
                texts[wish.place] = wish.cut(self._text.decode(ids))
        return texts

    def _ids_that_stop(self, stops: tuple[str, ...]) -> frozenset[int]:
        """Tokens that begin with a stop string: nothing of them or after them is wanted.

        Kept by stops: to find them the whole vocabulary is decoded.
        """
        if stops not in self._stop_ids:
            ids = range(self._text.vocab_size if stops else 0)
            begin = (i for i in ids if self._text.decode([i]).startswith(stops))
            self._stop_ids[stops] = frozenset(begin)
        return self._stop_ids[stops]


class _Wish:
    """One text to be made.

    Attributes:
        place: among the requests.
        prompt_ids: cut from the left so that the new tokens fit.
        max_new_tokens: most of them.
        stops: what ends the text and is not part of it.
    """

    def __init__(self, place: int, asked: tuple[str, dict[str, Any]], model: HarnessModel) -> None:
        prompt, raw = asked
        settings: dict[str, Any] = dict(normalize_gen_kwargs(raw, model.max_gen_toks))
        if settings.get("do_sample"):
            raise UsageError(
                "this task samples its texts, only greedy ones are made here",
                hint="take a task of log-likelihoods, or lm_eval itself with --model hf",
            )
        context = model.max_length
        self.place = place
        self.stops = tuple(stop for stop in settings["until"] if stop)
        self.max_new_tokens = min(settings["max_gen_toks"], context - 1)
        ids = model.tok_encode(prompt) or [model.prefix_token_id]
        self.prompt_ids = ids[-(context - self.max_new_tokens) :]

    def cut(self, text: str) -> str:
        """The text up to the first stop string."""
        for stop in self.stops:
            text = text.split(stop)[0]
        return text


def _batches(wishes: Sequence[_Wish]) -> list[list[_Wish]]:
    """Wishes with the same settings and of similar length, some at once."""
    batches: list[list[_Wish]] = []
    for wish in sorted(wishes, key=lambda w: (w.stops, w.max_new_tokens, -len(w.prompt_ids))):
        last = batches[-1] if batches else []
        same = last and (last[0].stops, last[0].max_new_tokens) == (wish.stops, wish.max_new_tokens)
        if not same or len(last) == _ROWS_AT_ONCE:
            batches.append([])
        batches[-1].append(wish)
    return batches
