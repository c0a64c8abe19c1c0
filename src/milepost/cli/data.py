"""`milepost data prepare` and `milepost data inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from milepost.core.errors import DataError, UsageError

if TYPE_CHECKING:
    from milepost.data.prepare import PrepareSummary
    from milepost.data.shards import PreparedData, ShardSet
    from milepost.data.trace import TracedBatch, TracedRow
    from milepost.text.tokenizer import Tokenizer

SHOWN_DOCUMENTS = 5
SHOWN_TOKENS = 12
SHOWN_SOURCES = 10


def prepare(
    *sources: str,
    out: Path,
    tokenizer: str = "gpt2",
    text_field: str = "text",
    val: Annotated[list[str] | None, Parameter(negative="")] = None,
    val_fraction: float | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Turn documents into shards of token ids, ready to train on.

    Sources are read in the order given, the files of a folder by path. The same sources and
    options give the same bytes on any number of cores; a call that was stopped goes on when it
    is repeated.

    Example: `milepost data prepare texts/ --out data/mine --val-fraction 0.01`

    Args:
        sources: Files or folders of .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet, or
            hf://datasets/owner/name[@revision]/path-or-pattern.
        out: The folder to make.
        tokenizer: gpt2, the path of a tokenizer.json (or its folder), or train:VOCAB_SIZE.
        text_field: Key or column of the text.
        val: A source of validation text, in the sources or beside them; may be repeated.
        val_fraction: Or this share of the documents, chosen by the hash of their text.
        skip_bad: Drop documents that cannot be used, count and list them, instead of refusing.
        workers: Processes. Default: one a core.
        json: Print one JSON document on stdout: counts, fingerprints and drops.
    """
    from dataclasses import asdict

    from milepost.core.console import show, show_json
    from milepost.data.prepare import prepare as prepare_data

    if not sources:
        raise UsageError(
            "no source is given", hint="name files, folders or an hf://datasets/... path"
        )
    summary = prepare_data(
        sources,
        out=out,
        tokenizer=tokenizer,
        text_field=text_field,
        val_fraction=val_fraction,
        val_sources=val or (),
        skip_bad=skip_bad,
        workers=workers,
    )
    _say_summary(summary)
    if json:
        show_json(asdict(summary))
    else:
        show(str(summary.out))


def _say_summary(summary: PrepareSummary) -> None:
    from milepost.core.console import say
    from milepost.core.units import format_duration

    if summary.was_done:
        say(f"{summary.out} was prepared from these sources before: nothing to do")
    num_bytes = 0
    for name, split in (("train", summary.train), ("validation", summary.validation)):
        if split is not None:
            num_bytes += split["num_bytes"]
            say(
                f"{name}: {split['num_documents']:,} documents, {split['num_tokens']:,} tokens, "
                f"{split['num_bytes']:,} bytes, "
                f"{split['num_bytes'] / split['num_tokens']:.2f} bytes a token"
            )
    for reason, count in summary.dropped.items():
        say(f"dropped: {count:,} {reason}")
    if summary.dropped:
        say(f"the first of each reason are listed in {summary.out / 'dropped.jsonl'}")
    if not summary.was_done:
        speed = f", {num_bytes / 1e6 / max(summary.seconds, 1e-3):.1f} MB/s"
        speed = "" if summary.was_continued else speed  # of a part nothing can be said
        say(f"took {format_duration(summary.seconds)}{speed}")


def inspect(
    folder: Path,
    *,
    step: int | None = None,
    row: int | None = None,
    run: Path | None = None,
    seed: int | None = None,
    rows_per_step: int | None = None,
    sequence_length: int | None = None,
    json: bool = False,
) -> None:
    """Show what prepared data holds, or which documents a step saw.

    Example: `milepost data inspect runs/first --step 100 --row 0`

    Args:
        folder: Prepared data, or a run folder (its data is then meant).
        step: The update whose rows are shown: the rows that update number STEP was made from.
        row: Show the text of this row of the step, counted from 0.
        run: The run whose step is meant, where FOLDER is the data.
        seed: Seed of the order, where no run is named.
        rows_per_step: Rows of a global batch, where no run is named.
        sequence_length: Tokens of a row, where no run is named.
        json: Print one JSON document on stdout.
    """
    from milepost.core.console import show, show_json
    from milepost.data.shards import is_prepared, open_prepared

    if row is not None and step is None:
        raise UsageError("--row is given without --step", hint="name the step too: --step N")
    if run is None and not is_prepared(folder) and (folder / "events.jsonl").exists():
        folder, run = _data_of(folder), folder
    data = open_prepared(folder)
    if step is None:
        document = _describe(data)
        lines = _description_lines(document)
    else:
        options = {"seed": seed, "rows_per_step": rows_per_step, "sequence_length": sequence_length}
        batch, event = _trace(data, step=step, run=run, options=options)
        document = _step_values(step, batch, event)
        if row is None:
            lines = _step_lines(document)
        else:
            tokenizer = data.tokenizer()
            document = document | {"rows": [_row_with_text(document, batch, row, tokenizer)]}
            lines = _row_lines(document["rows"][0])
    if json:
        show_json(document)
    else:
        show("\n".join(lines))


def _data_of(run: Path) -> Path:
    from milepost.runs.layout import RunLayout
    from milepost.runs.manifest import read_run_manifest

    path = Path(read_run_manifest(RunLayout(run)).config.data.path)
    if not path.is_dir():
        raise DataError(
            f"the data of {run} lay in {path}, where nothing is",
            hint=f"name its place: milepost data inspect DATA --run {run} --step N",
        )
    return path


def _trace(
    data: PreparedData, *, step: int, run: Path | None, options: dict[str, int | None]
) -> tuple[TracedBatch, dict[str, Any] | None]:
    """The batch that update `step` was made from, and the run's event of it."""
    from milepost.data.trace import trace_batch

    if step < 1:
        raise UsageError(f"there is no step {step}", hint="steps are counted from 1")
    event = None
    if run is not None:
        event, options = _from_run(data, step=step, run=run, options=options)
    missing = [name for name, value in options.items() if value is None]
    if missing:
        names = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise UsageError(
            f"a step is not defined by the data alone: {names} missing",
            hint="name the run with --run, or give what is missing",
        )
    values = {name: value for name, value in options.items() if value is not None}
    for name, value in values.items():
        if name != "seed" and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is below 1", hint="at least 1")
    data_step = event["data_step"] if event else step - 1
    return trace_batch(data.train, data_step=data_step, **values), event


def _from_run(
    data: PreparedData, *, step: int, run: Path, options: dict[str, int | None]
) -> tuple[dict[str, Any] | None, dict[str, int | None]]:
    from milepost.runs.events import read_history
    from milepost.runs.layout import RunLayout
    from milepost.runs.manifest import read_run_manifest
    from milepost.runs.overrides import config_with_overrides

    given = [name for name, value in options.items() if value is not None]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(f"{names}: given beside a run, which says it", hint="leave it out")
    layout = RunLayout(run)
    manifest = read_run_manifest(layout)
    if manifest.data_fingerprint != data.train.fingerprint:
        raise DataError(
            f"{data.folder} is not the data of {run}: its fingerprint is "
            f"{data.train.fingerprint[:12]}, the run's {manifest.data_fingerprint[:12]}",
            hint="name the folder that the run was trained on",
        )
    history = read_history(layout.events)
    event = history.latest_by_step("step").get(step)
    if event is not None and not isinstance(event.get("data_step"), int):
        event = None
    segment = None if event is None else event["segment"]
    config = config_with_overrides(manifest.config, history=history, until_segment=segment)
    return event, {
        "seed": config.run.seed,
        "rows_per_step": config.rows_per_step,
        "sequence_length": config.data.sequence_length,
    }


def _describe(data: PreparedData) -> dict[str, Any]:
    tokenizer = data.tokenizer()
    manifest = data.manifest
    splits = {"train": data.train, "validation": data.validation}
    return {
        "folder": data.folder,
        "dtype": manifest["dtype"],
        "tokenizer": manifest["tokenizer"],
        "splits": {
            name: shards and _describe_split(shards, tokenizer) for name, shards in splits.items()
        },
        "dropped": manifest["dropped"],
        "sources": manifest["sources"],
    }


def _describe_split(shards: ShardSet, tokenizer: Tokenizer) -> dict[str, Any]:
    documents = []
    for document in shards.documents_between(0, shards.num_tokens):
        count = min(document.end - document.start, SHOWN_TOKENS)
        ids = shards.read(document.start, count).tolist()
        documents.append(
            {
                "name": document.name,
                "source": document.source,
                "line": document.line,
                "tokens": document.end - document.start,
                "first_token_ids": ids,
                "first_text": tokenizer.decode(ids),
            }
        )
        if len(documents) == SHOWN_DOCUMENTS:
            break
    return {
        "fingerprint": shards.fingerprint,
        "documents": shards.num_documents,
        "tokens": shards.num_tokens,
        "bytes": shards.num_bytes,
        "shards": [
            {"name": s.tokens.name, "tokens": s.num_tokens, "documents": s.num_documents}
            for s in shards.shards
        ],
        "first_documents": documents,
    }


def _description_lines(values: dict[str, Any]) -> list[str]:
    tokenizer = values["tokenizer"]
    lines = [
        f"{values['folder']}: tokenizer {tokenizer['name']} of {tokenizer['vocab_size']:,} "
        f"tokens, ids as {values['dtype']}"
    ]
    for name, split in values["splits"].items():
        if split is None:
            lines += ["", f"{name}: none"]
            continue
        lines += [
            "",
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
            f"{split['bytes']:,} bytes",
            f"  fingerprint {split['fingerprint']}",
        ]
        lines += [
            f"  {shard['name']}  {shard['tokens']:,} tokens, {shard['documents']:,} documents"
            for shard in split["shards"]
        ]
        lines.append("  first documents:")
        for document in split["first_documents"]:
            lines.append(f"    {document['name']}  {document['tokens']:,} tokens")
            lines.append(f"      {document['first_token_ids']}")
            lines.append(f"      {document['first_text']!r}")
    dropped = [f"{reason} {count:,}" for reason, count in values["dropped"].items()]
    lines += ["", "dropped: " + (", ".join(dropped) or "nothing")]
    names = [f"  {s['name']}  {s['size_bytes']:,} bytes, {s['use']}" for s in values["sources"]]
    lines += [f"sources: {len(names)} files", *names[:SHOWN_SOURCES]]
    if len(names) > SHOWN_SOURCES:
        lines.append(f"  ... and {len(names) - SHOWN_SOURCES:,} more")
    return lines


def _step_values(step: int, batch: TracedBatch, event: dict[str, Any] | None) -> dict[str, Any]:
    logged = event.get("batch_sha256") if event else None
    return {
        "step": step,
        "data_step": batch.data_step,
        "batch_sha256": batch.batch_sha256,
        "equals_logged_batch": None if logged is None else logged == batch.batch_sha256,
        "rows": [_row_values(row) for row in batch.rows],
    }


def _row_values(row: TracedRow) -> dict[str, Any]:
    return {
        "row": row.row,
        "row_id": row.row_id,
        "first_token": row.start,
        "documents": [
            {
                "name": span.document.name,
                "source": span.document.source,
                "line": span.document.line,
                "position": span.position,
                "tokens": span.num_tokens,
            }
            for span in row.spans
        ],
    }


def _row_with_text(
    values: dict[str, Any], batch: TracedBatch, row: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    if not 0 <= row < len(batch.rows):
        raise UsageError(
            f"step {values['step']} has no row {row}", hint=f"rows are 0 to {len(batch.rows) - 1}"
        )
    traced = batch.rows[row]
    parts = [
        tokenizer.decode(traced.token_ids[span.position : span.position + span.num_tokens])
        for span in traced.spans
    ]
    documents = [
        document | {"text": text}
        for document, text in zip(values["rows"][row]["documents"], parts, strict=True)
    ]
    return values["rows"][row] | {"token_ids": traced.token_ids, "documents": documents}


def _step_lines(values: dict[str, Any]) -> list[str]:
    said = {None: "not logged", True: "equal to the logged one", False: "NOT the logged one"}
    lines = [
        f"step {values['step']} was made from data_step {values['data_step']}",
        f"batch sha256 {values['batch_sha256']} ({said[values['equals_logged_batch']]})",
        "",
        f"{'row':>5}  {'tokens':>7}  {'at':>6}  document (source:line)",
    ]
    for row in values["rows"]:
        for number, document in enumerate(row["documents"]):
            shown = str(row["row"]) if number == 0 else ""
            lines.append(
                f"{shown:>5}  {document['tokens']:>7}  {document['position']:>6}  "
                f"{_full_name(document)}"
            )
    return lines


def _full_name(document: dict[str, Any]) -> str:
    place = f"{document['source']}:{document['line']}"
    return place if document["name"] == place else f"{document['name']} ({place})"


def _row_lines(row: dict[str, Any]) -> list[str]:
    lines = [f"row {row['row']}: tokens {row['first_token']:,} and on, of the training shards"]
    for document in row["documents"]:
        lines += ["", f"--- {_full_name(document)}, {document['tokens']} tokens", document["text"]]
    return lines
