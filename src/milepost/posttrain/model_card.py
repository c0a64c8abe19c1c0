"""The model card of an export: README.md with what the run's records say, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from milepost import __version__
from milepost.config.schema import LoraSection, ModelSection
from milepost.core.units import format_count
from milepost.planner.cost import count_parameters
from milepost.posttrain.parity import Parity
from milepost.posttrain.run_facts import RunFacts

Rows = list[tuple[str, str]]


def model_card(
    name: str,
    *,
    model: ModelSection,
    facts: RunFacts | None,
    source_sha256: str,
    adapter: str | None,
    parity: Parity,
    library: str,
    usage: str,
) -> str:
    """The card in Markdown, with the metadata that the hub reads on top.

    Args:
        name: of the export.
        model: the architecture.
        facts: of the run; None for a model that is of none.
        source_sha256: identifies the model that was exported.
        adapter: the adapter that is in the weights, or comes with them; None: none.
        parity: how the export was checked.
        library: the hub's name of the library that loads it.
        usage: Markdown that shows how it is used.
    """
    parts = [
        _metadata(library),
        f"# {_plain(name)}",
        _first_words(model, facts),
        usage,
        *_how_to_begin(facts, library=library),
        _table("Architecture", _architecture(model)),
        *([] if facts is None else [_table(*_training(facts)), _scores(facts)]),
        _table("This export", _export(parity, source_sha256=source_sha256, adapter=adapter)),
        "## License\n\nNot stated. Whoever publishes this model chooses one, with a look at the "
        "terms of its data.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(library: str) -> str:
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [llama, milepost]"]
    return "\n".join(["---", *lines, "---"])


def _first_words(model: ModelSection, facts: RunFacts | None) -> str:
    size = f"A LLaMA of {format_count(count_parameters(model).total)} parameters"
    if facts is None:
        return f"{size}. Where it was trained, no record says."
    last, lineage = facts.manifest.config.train.total_steps, facts.manifest.lineage
    run = f"the run `{_plain(facts.name)}`"
    if not facts.is_trained:
        what = "as it was taken from another model (see below)" if lineage else "of random weights"
        return f"{size}, {what}, before any training in {run} of Milepost."
    how = "from another model (see below)" if lineage else "from random weights"
    return f"{size}, step {facts.step:,} of {last:,} of {run}, which Milepost trained {how}."


def _how_to_begin(facts: RunFacts | None, *, library: str) -> list[str]:
    """What a reader of the model must know of the beginning of a text; of a stranger's nothing."""
    if facts is None or not facts.is_trained:
        return []
    if "base_sha256" in facts.manifest.lineage:
        return [
            "It was tuned on conversations in the form of its chat template: put a question to it "
            "in that form."
        ]
    if library == "gguf":  # whose metadata says it to programs
        return []
    return [
        "In training the end-of-text token stands before each document: put it before a text "
        "that has nothing before it."
    ]


def _architecture(model: ModelSection) -> Rows:
    heads = f"{model.num_attention_heads}, of {model.head_dim}; "
    return [
        ("layers", str(model.num_hidden_layers)),
        ("width", f"{model.hidden_size}, feed-forward {model.intermediate_size}"),
        ("query heads", heads + f"{model.num_key_value_heads} key/value heads"),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("context", f"{model.max_position_embeddings:,} tokens"),
        ("rotary base", f"{model.rope_theta:g}"),
        ("head and embedding", "one matrix" if model.tie_word_embeddings else "two matrices"),
    ]


def _training(facts: RunFacts) -> tuple[str, Rows]:
    """The title and rows of what is on record; settings are of no account before any training."""
    manifest, config = facts.manifest, facts.manifest.config
    rate, schedule = config.optimizer.learning_rate, config.schedule
    settings = [
        ("recipe", manifest.recipe),
        ("tokens seen", "unknown" if facts.tokens_seen is None else f"{facts.tokens_seen:,}"),
        ("global batch", f"{config.train.global_batch_tokens:,} tokens"),
        ("row", f"{config.data.sequence_length:,} tokens"),
        ("optimizer", f"{config.optimizer.name}, learning rate {rate:g}, {schedule.name}"),
        ("warm-up", f"{schedule.warmup_steps:,} steps"),
        ("what was trained", _trained_part(config.lora)),
        ("precision", config.train.precision),
        ("seed", str(config.run.seed)),
        ("trained on", "; ".join(facts.devices) or "unknown"),
        ("data fingerprint", manifest.data_fingerprint or "unknown"),
    ]
    identity = [
        ("tokenizer SHA-256", manifest.tokenizer_sha256),
        ("run", manifest.run_id),
    ]
    lineage = [(f"lineage: {name}", value) for name, value in _flat(manifest.lineage)]
    if not facts.is_trained:
        return "Origin", identity + lineage
    return "Training", settings + identity + lineage


def _trained_part(lora: LoraSection) -> str:
    if lora.rank is None:
        return "all weights"
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"


def _flat(values: dict[str, Any], prefix: str = "") -> Rows:
    """Nested values as rows; of a path on the maker's machine the last parts only."""
    rows: Rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif value not in (None, []):
            parts = PurePath(str(value)).parts
            text = "/".join(parts[-3:]) if PurePath(str(value)).is_absolute() else str(value)
            rows.append((f"{prefix}{name}", text))
    return rows


def _scores(facts: RunFacts) -> str:
    lines = ["| measured | shots | items | value |", "|---|---|---|---|"]
    if facts.validation is not None:
        loss, bits = facts.validation.get("loss_nats"), facts.validation.get("bits_per_byte")
        if loss is not None:
            lines.append(f"| validation loss | | | {loss:.4f} nats per token |")
        if bits is not None:
            lines.append(f"| validation | | | {bits:.4f} bits per byte |")
    for record in facts.scores:
        for metric, value in sorted(record.get("metrics", {}).items()):
            lines.append(_score_line(record, metric, value))
    if len(lines) == 2:
        return "## Scores\n\nNone are on record for this step."
    return "\n".join(["## Scores", "", "Of this step, as they are on record.", "", *lines])


def _score_line(record: dict[str, Any], metric: str, value: dict[str, Any]) -> str:
    shown = value.get("value")
    number = "unknown" if shown is None else f"{shown:.4f}"
    if value.get("stderr") is not None:
        number += f" ± {value['stderr']:.4f}"
    what = _plain(f"{record.get('benchmark')} {metric}")
    items = f"{record.get('n')}"
    if record.get("limit") is not None and record.get("limit") == record.get("n"):
        items = f"the first {items}"
    return f"| {what} | {record.get('num_fewshot')} | {items} | {number} |"


def _export(parity: Parity, *, source_sha256: str, adapter: str | None) -> Rows:
    rows = [
        ("weights", parity.dtype),
        ("checked", parity.in_words()),
        ("made from", f"the model with the SHA-256 {source_sha256}"),
        ("made with", f"Milepost {__version__}"),
    ]
    return rows if adapter is None else [*rows, ("adapter", adapter)]


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _plain(text: str) -> str:
    """One line that ends no cell of a table and begins no markup."""
    line = " ".join(text.split())
    for character in "\\|`<[*":
        line = line.replace(character, f"\\{character}")
    return line
