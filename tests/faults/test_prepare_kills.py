"""A preparation that is killed before and after each of its writes goes on to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milepost.core.errors import DataError
from milepost.data import assemble, blocks, pieces, preparation, tokenize
from milepost.data import prepare as prepare_module
from milepost.data.shards import open_prepared
from tests.sources import content_of, numbered, run

WRITES: tuple[tuple[Any, str], ...] = (
    (prepare_module, "write_json"),
    (preparation, "write_json"),
    (preparation, "write_atomically"),
    (pieces, "write_json"),
    (tokenize, "write_json"),
    (assemble, "write_json"),
    (assemble, "_write_file"),
    (Path, "unlink"),
)

OPTIONS: dict[str, Any] = {"tokenizer": "train:270", "val_fraction": 0.2, "workers": 1}


class Killed(BaseException):
    """Nothing catches it: the work ends here, as by a kill."""


class Killer:
    """Kills at one of all the moments before and after a write."""

    def __init__(self, moment: int) -> None:
        self._left = moment

    def _pass(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Killed

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self._pass()
            done = work(*arguments, **options)
            self._pass()
            return done

        return watched


def tear(out: Path) -> None:
    """What a kill leaves of a file that was being written in place."""
    for path in out.glob("*.tokens"):
        if not (out / ".partial" / "shards" / f"{path.stem}.json").exists():
            path.write_bytes(path.read_bytes()[:-3] + b"torn")


@pytest.mark.usefixtures("no_fsync")
def test_a_kill_at_any_write_is_gone_on_from_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 600)
    monkeypatch.setattr(blocks, "READ_BYTES", 200)
    monkeypatch.setattr(assemble, "SHARD_TOKENS", 150)
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        numbered(tmp_path / "texts" / f"{name}.jsonl", count=40)
    run(tmp_path / "texts", tmp_path / "whole", **OPTIONS)
    whole = content_of(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".tokens")]) >= 3
    killed = 0
    for moment in range(1, 1000):
        out = tmp_path / f"out{moment}"
        with monkeypatch.context() as patch:
            killer = Killer(moment)
            for place, name in WRITES:
                patch.setattr(place, name, killer.around(getattr(place, name)))
            try:
                run(tmp_path / "texts", out, **OPTIONS)
            except Killed:
                killed += 1
            else:
                break
        if not (out / "manifest.json").exists():
            tear(out)
            with pytest.raises(DataError, match="holds no prepared data"):
                open_prepared(out)
        run(tmp_path / "texts", out, **OPTIONS)
        assert content_of(out) == whole, f"after a kill at moment {moment}"
    assert killed > 60
