"""Instruction data from the hub, with the real client against a local server of its shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.hub_server import COMMIT, HubServer

ROWS = [{"instruction": f"Say {number}.", "input": "", "output": str(number)} for number in (1, 2)]
FILES = {
    "README.md": b"# a dataset",
    "data/alpaca.json": json.dumps(ROWS).encode(),
    "data/more.jsonl": json.dumps(ROWS[0]).encode() + b"\n",
}

READ = """
import sys, tempfile
from milepost.posttrain.instructions import read_conversations
conversations, ledger = read_conversations(sys.argv[1])
for one in conversations:
    print(one.source, one.line, one.messages[1].content)
print(ledger.summary())
"""


def test_a_name_on_the_hub_is_read_and_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    with HubServer(dict(FILES)) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "hf-home"),
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
            "TMPDIR": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", READ, "hf://datasets/owner/name"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    place = f"hf://datasets/owner/name@{COMMIT}/data"
    assert done.stdout.splitlines() == [
        f"{place}/alpaca.json 1 1",
        f"{place}/alpaca.json 2 2",
        f"{place}/more.jsonl 1 1",
        "3 of 3 rows used",
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("milepost-")] == []
