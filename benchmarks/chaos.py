"""Random faults against one real run for some minutes, then: is it the run that had none?

`python benchmarks/chaos.py --minutes 20` trains a tiny model as the packaged recipes train theirs
(bfloat16, compiled), on 1, 2 or more ranks, and kills, stops, freezes and damages it again and
again. What it trains on is made up. Then the run is finished in peace and compared with a run
that nothing happened to: every number of every step that was ever logged, and the last weights
and moments, to the last bit. One JSON row on stdout; ends with 1 if anything is not equal, a
checkpoint was lost that nobody damaged, or a segment hung.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_faults import (
    RUNNING,
    Segment,
    damage_newest,
    good_checkpoints,
    num_step_events,
    tear_history,
)

from milepost.core.console import say, show_json
from milepost.core.environment import code_version
from milepost.core.files import read_json_lines, sha256_of_file
from milepost.data.prepare import prepare
from milepost.runs.events import utc_now
from milepost.runs.layout import RunLayout

RECIPE = """
[data]
sequence_length = 32
[model]
vocab_size = 512
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64
[train]
global_batch_tokens = 256
microbatch_rows = 2
total_steps = 1000000
precision = "bfloat16"
compile = true
[optimizer]
learning_rate = 3e-3
[schedule]
warmup_steps = 50
[checkpoint]
every_steps = 20
keep_train_state = 4
[validation]
every_steps = 50
tokens = 600
[guards]
collective_timeout_seconds = 20
"""
COMPARED = ("loss_nats", "grad_norm", "learning_rate", "batch_sha256", "tokens_seen", "data_step")
PEACEFUL_STEPS = 40
"""Trained after the last fault."""
LEFT_ALONE = "nothing"
DISK_BYTES = 1 << 30


@dataclass
class Campaign:
    """One run and what is done to it.

    Attributes:
        damaged: steps of checkpoints that were damaged on purpose and not yet set aside.
        lost: what a segment should have gone on from and did not.
    """

    layout: RunLayout
    words: list[str]
    rank_choices: list[int]
    source: random.Random
    running_faults: list[str]
    fake_clock: Path | None
    talk: Path
    counts: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    damaged: set[int] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)

    @property
    def num_starts(self) -> int:
        """Segments that came to train."""
        return len(self._events("segment_started"))

    def disturb(self) -> None:
        """One segment with a fault, and what may happen to its files afterwards."""
        environment = dict(os.environ)
        if self.fake_clock is not None and self.source.random() < 0.2:
            environment |= {"LD_PRELOAD": str(self.fake_clock)}
            environment |= {"FAKETIME": self.source.choice(["+1y", "-1y", "+3d", "-2h"])}
            self.counts["clock_jump"] += 1
        good = good_checkpoints(self.layout, damaged=self.damaged)
        num_starts = self.num_starts
        with self._segment(environment) as segment:
            self._wait(segment)
            name = LEFT_ALONE
            if segment.process.poll() is None:
                name = self.source.choice(self.running_faults)
                self.counts[name] += 1
                RUNNING[name](segment, self.source)
            self.codes[f"{name}: {segment.end()}"] += 1
        self._check_start(num_starts, expected=good[-1] if good else None)
        self._disturb_files()

    @contextlib.contextmanager
    def _segment(self, environment: dict[str, str]) -> Iterator[Segment]:
        ranks = str(self.source.choice(self.rank_choices))
        num_steps_before = num_step_events(self.layout)
        with self.talk.open("ab") as talk:
            process = subprocess.Popen(
                [*self.words, "--run", str(self.layout.root), "--ranks", ranks],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=talk,
                start_new_session=True,
            )
        segment = Segment(process, self.layout, num_steps_before)
        try:
            yield segment
        finally:
            segment.signal_all(9)
            process.wait()

    def _wait(self, segment: Segment) -> None:
        """Until any moment of the start, or until some steps are done."""
        if self.source.random() < 0.3:
            time.sleep(self.source.uniform(0.5, 12.0))
            return
        wanted = self.source.randint(1, 150)
        while segment.process.poll() is None and segment.num_steps() < wanted:
            time.sleep(0.05)
        time.sleep(self.source.uniform(0.0, 0.1))

    def _events(self, kind: str) -> list[dict[str, Any]]:
        events, _ = read_json_lines(self.layout.events)
        return [event for event in events if event["kind"] == kind]

    def _check_start(self, num_starts: int, *, expected: int | None) -> None:
        for start in self._events("segment_started")[num_starts:]:
            if start["restored_step"] != expected:
                self.lost.append(f"{expected}, went on from {start['restored_step']}")
        # Set aside, and saved once more when training came to that step again.
        self.damaged -= {event["step"] for event in self._events("checkpoint_quarantined")}

    def _disturb_files(self) -> None:
        how = None
        if self.source.random() < 0.25:
            how = damage_newest(self.layout, self.source, damaged=self.damaged)
        elif self.source.random() < 0.25:
            how = tear_history(self.layout, self.source)
        if how is not None:
            self.counts[how] += 1


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=20.0, help="of faults; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the faults; default: 0")
    parser.add_argument("--lanes", type=int, default=2, help="most ranks; default: 2")
    parser.add_argument("--folder", type=Path, help="kept afterwards; default: a temporary one")
    given = parser.parse_args(words)
    with contextlib.ExitStack() as stack:
        folder = given.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.mkdir(parents=True, exist_ok=True)
        disk = folder / "disk"
        disk.mkdir()
        has_disk = stack.enter_context(small_disk(disk))
        row = run_campaign(given, folder=folder, disk=disk, has_disk=has_disk)
    show_json({**row, "command": shlex.join(["python", "benchmarks/chaos.py", *words])})
    return 0 if row["equal"] and not row["lost_checkpoints"] and not row["hung"] else 1


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """Mounts a file system of its own at `place`; False where that is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    is_mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    if not is_mounted:
        say("no full disk: mounting a small one needs root")
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def run_campaign(
    given: argparse.Namespace, *, folder: Path, disk: Path, has_disk: bool
) -> dict[str, Any]:
    """The faults, the peaceful end, the comparison; the row."""
    command = prepare_command(folder, lanes=given.lanes)
    fake_clock = find_fake_clock()
    if fake_clock is None:
        say("no clock jumps: faketime is not installed")
    campaign = Campaign(
        layout=RunLayout(disk / "run"),
        words=command,
        rank_choices=[n for n in (1, 2, 4, 8) if given.lanes % n == 0],
        source=random.Random(given.seed),
        running_faults=[name for name in RUNNING if has_disk or name != "fill_disk"],
        fake_clock=fake_clock,
        talk=folder / "talk.txt",
    )
    started, hung = time.monotonic(), []
    while (minutes := (time.monotonic() - started) / 60) < given.minutes:
        try:
            campaign.disturb()
        except TimeoutError as error:
            hung.append(str(error))
        done = sum(campaign.counts.values())
        say(f"{minutes:.1f} of {given.minutes:g} min, {done} faults: {dict(campaign.counts)}")
    root, reference = campaign.layout.root, RunLayout(folder / "undisturbed")
    last = max(steps(campaign.layout), default=0) + PEACEFUL_STEPS
    finish(command, root, last=last, ranks=min(2, given.lanes))
    say(f"finished in peace at step {last}; now the run that nothing happens to")
    finish(command, reference.root, last=last, ranks=1)
    logged = steps(campaign.layout)
    unequal = unequal_steps(logged, steps(reference), last=last)
    has_equal_state = hashes(campaign.layout, last) == hashes(reference, last)
    return {
        "benchmark": "chaos",
        "time": utc_now(),
        "version": code_version(),
        "minutes": given.minutes,
        "seed": given.seed,
        "lanes": given.lanes,
        "faults": dict(sorted(campaign.counts.items())),
        "exit_codes": dict(sorted(campaign.codes.items())),
        "restarts": campaign.num_starts - 1,
        "last_step": last,
        "steps_run_again": sum(map(len, logged.values())) - len(logged),
        "lost_checkpoints": campaign.lost,
        "hung": hung,
        "tracebacks": campaign.talk.read_text(errors="replace").count("Traceback"),
        "unequal_steps": unequal,
        "weights_and_moments_equal": has_equal_state,
        "equal": has_equal_state and not unequal,
    }


def prepare_command(folder: Path, *, lanes: int) -> list[str]:
    """Made-up data and a recipe for it; the command line without run and ranks."""
    source = random.Random(1)
    lengths = [source.randint(2, 7) for _ in range(400)]
    vocabulary = ["".join(source.choices("etaoinshrdlu", k=length)) for length in lengths]
    for name, num_documents in (("train", 60), ("validation", 4)):
        (folder / name).mkdir()
        for number in range(num_documents):
            text = " ".join(source.choices(vocabulary, k=400))
            (folder / name / f"{number:03d}.txt").write_text(text)
    prepare(
        [folder / "train"],
        out=folder / "data",
        tokenizer="train:512",
        val_sources=[folder / "validation"],
        workers=1,
    )
    recipe = folder / "chaos.toml"
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "milepost.cli.main", "train", str(recipe)]
    return [*command, "--data.path", str(folder / "data"), "--train.lanes", str(lanes)]


def find_fake_clock() -> Path | None:
    """The library that shifts the clock of a process, where it is installed."""
    if shutil.which("faketime") is None:
        return None
    return next(Path("/usr/lib").rglob("faketime/libfaketimeMT.so.1"), None)


def finish(command: list[str], run: Path, *, last: int, ranks: int) -> None:
    """Trains to step `last` with nothing happening."""
    words = ["--run", str(run), "--ranks", str(ranks), "--train.stop_at_step", str(last)]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"chaos: a peaceful segment ended with {done.returncode}\n{done.stderr}")


def steps(layout: RunLayout) -> dict[int, list[tuple[Any, ...]]]:
    """Step to its numbers, floats as hex, once for each time it was logged."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    events, _ = read_json_lines(layout.events)
    for event in events:
        if event["kind"] == "step":
            values = (event[name] for name in COMPARED)
            numbers = tuple(v.hex() if isinstance(v, float) else v for v in values)
            found.setdefault(event["step"], []).append(numbers)
    return found


def unequal_steps(
    logged: dict[int, list[tuple[Any, ...]]],
    expected: dict[int, list[tuple[Any, ...]]],
    *,
    last: int,
) -> list[int]:
    """Steps that are missing or that were ever logged with other numbers than expected."""
    return [
        step
        for step in range(1, last + 1)
        if step not in logged or set(logged[step]) != set(expected[step])
    ]


def hashes(layout: RunLayout, step: int) -> list[str]:
    """Of the weights and the moments."""
    folder = layout.checkpoint(step)
    names = ("model.safetensors", "train_state/optimizer.safetensors")
    return [sha256_of_file(folder / name) for name in names]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
