"""The planner: counts are held against the paper and torch, estimates against their formulas."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from milepost.cli.doctor import FIRST_UNTRIED_TORCH, OLDEST_TORCH, doctor
from milepost.cli.main import run
from milepost.config.recipe import load_recipe, packaged_recipes
from milepost.config.schema import Config
from milepost.core.errors import UsageError
from milepost.core.units import GIBIBYTE
from milepost.planner.cost import (
    count_additions,
    count_parameters,
    count_trained,
    flops_per_token,
    run_tokens,
    trained_sizes,
)
from milepost.planner.disk import estimate_disk
from milepost.planner.duration import GPUS, estimate_duration, find_gpu, gpu_of_device
from milepost.planner.memory import (
    GPU_PROCESS_BYTES,
    LOSS_CHUNK_ROWS,
    LOWBIT_UPDATE_NUMBERS,
    LOWBIT_UPDATE_NUMBERS_CPU,
    estimate_memory,
    host_bytes,
    largest_microbatch_rows,
    moment_bytes,
    save_copy_bytes,
)

ROOT = Path(__file__).resolve().parents[2]
DMAS_PARAMETERS = 1_715_951_616


def recipe(name: str, *overrides: str) -> Config:
    return load_recipe(name, overrides=overrides)


def test_the_papers_model_has_the_papers_number_of_parameters() -> None:
    counted = count_parameters(recipe("dmas-1.7b").model)
    assert counted.total == DMAS_PARAMETERS
    assert counted.embedding == counted.head == 50257 * 2048
    assert counted.multiplying == DMAS_PARAMETERS - 50257 * 2048 - counted.norms
    assert counted.non_embedding == DMAS_PARAMETERS - 2 * 50257 * 2048


@pytest.mark.parametrize("name", ["demo", "corpus-30m", "llama-124m", "dmas-1.7b"])
def test_counted_parameters_are_those_that_the_model_has(name: str) -> None:
    torch = pytest.importorskip("torch")
    from milepost.model.llama import Llama

    model_section = recipe(name).model
    with torch.device("meta"):
        model = Llama(model_section)
    counted = count_parameters(model_section)
    assert counted.total == sum(p.numel() for p in model.parameters())
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert counted.norms == norms


def test_a_tied_head_is_counted_once_but_multiplies() -> None:
    tied = count_parameters(recipe("corpus-30m").model)
    untied = count_parameters(recipe("corpus-30m", "--model.no-tie_word_embeddings").model)
    assert tied.head == 0
    assert untied.total - tied.total == untied.head == tied.embedding
    assert tied.multiplying == untied.multiplying


def test_flops_of_the_papers_model() -> None:
    flops = flops_per_token(recipe("dmas-1.7b").model, sequence_length=1024)
    assert flops == 6 * 1_612_875_776 + 6 * 36 * 2048 * 1024
    assert f"{flops:.3e}" == "1.013e+10"


def test_a_run_that_stops_early_costs_only_its_steps() -> None:
    config = recipe("dmas-1.7b", "--train.stop_at_step", "50")
    assert run_tokens(config) == 50 * 524_288
    assert estimate_disk(config).num_checkpoints == 1


def test_weights_gradients_and_moments_are_counted_exactly() -> None:
    one, two = (estimate_memory(recipe("dmas-1.7b"), ranks=ranks) for ranks in (1, 2))
    assert one.weights_bytes == 4 * DMAS_PARAMETERS
    assert one.optimizer_bytes == 8 * DMAS_PARAMETERS
    assert one.gradients_bytes == 2 * 4 * DMAS_PARAMETERS
    assert two.gradients_bytes == 4 * DMAS_PARAMETERS


@pytest.mark.parametrize(
    ("lanes", "ranks", "buffers"), [(1, 1, 1), (2, 1, 2), (4, 1, 3), (8, 2, 3)]
)
def test_a_rank_has_one_gradient_buffer_a_level_of_its_lanes(
    lanes: int, ranks: int, buffers: int
) -> None:
    config = recipe("demo", "--train.lanes", str(lanes), "--train.microbatch_rows", "1")
    total = count_parameters(config.model).total
    assert estimate_memory(config, ranks=ranks).gradients_bytes == buffers * 4 * total


def test_activations_grow_with_the_microbatch_and_shrink_with_recompute() -> None:
    config = recipe("dmas-1.7b")
    one = estimate_memory(config, microbatch_rows=1).activations_bytes
    four = estimate_memory(config, microbatch_rows=4).activations_bytes
    assert four == 4 * one
    recomputed = recipe("dmas-1.7b", "--train.recompute", "block")
    assert estimate_memory(recomputed, microbatch_rows=4).activations_bytes < four / 5


def test_float32_needs_no_casts_and_twice_the_activations() -> None:
    half = estimate_memory(recipe("llama-124m", "--train.precision", "bfloat16"))
    full = estimate_memory(recipe("llama-124m", "--train.precision", "float32"))
    assert half.casts_bytes > 0
    assert full.casts_bytes == 0
    assert 1.9 * half.activations_bytes < full.activations_bytes <= 2 * half.activations_bytes


def test_a_restart_holds_the_model_and_a_train_state_in_the_hosts_memory() -> None:
    assert host_bytes(recipe("dmas-1.7b")) == 16 * DMAS_PARAMETERS


@pytest.mark.parametrize(("weights_dtype", "num_bytes"), [("float32", 12), ("bfloat16", 14)])
def test_saves_keep_a_copy_of_the_train_state_in_the_hosts_memory(
    weights_dtype: str, num_bytes: int
) -> None:
    config = recipe("dmas-1.7b", "--checkpoint.weights_dtype", weights_dtype)
    assert save_copy_bytes(config) == num_bytes * DMAS_PARAMETERS


def test_the_total_is_the_sum_of_the_parts() -> None:
    memory = estimate_memory(recipe("demo"))
    parts = [memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes]
    parts += [memory.casts_bytes, memory.activations_bytes, memory.working_bytes]
    parts += [memory.holes_bytes, memory.save_bytes, memory.process_bytes]
    assert memory.process_bytes == GPU_PROCESS_BYTES
    assert memory.total_bytes == sum(parts)


def test_the_largest_microbatch_fits_and_the_next_does_not() -> None:
    config, memory_bytes = recipe("dmas-1.7b"), find_gpu("h100").memory_bytes
    rows = largest_microbatch_rows(config, ranks=1, memory_bytes=memory_bytes)
    assert rows is not None
    assert estimate_memory(config, microbatch_rows=rows).total_bytes <= memory_bytes
    assert estimate_memory(config, microbatch_rows=2 * rows).total_bytes > memory_bytes
    assert largest_microbatch_rows(config, ranks=1, memory_bytes=8 * GIBIBYTE) is None


def test_lanes_that_the_gpus_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match="2 lanes cannot be dealt to 4 GPUs") as caught:
        estimate_memory(recipe("demo"), ranks=4)
    assert caught.value.hint == "use 1 or 2 GPUs, or --train.lanes 4"


def test_disk_follows_the_retention() -> None:
    disk = estimate_disk(recipe("dmas-1.7b"))
    assert (disk.num_checkpoints, disk.num_train_states) == (435, 2)
    assert disk.train_state_bytes == 12 * DMAS_PARAMETERS
    assert disk.weights_bytes - 2 * DMAS_PARAMETERS < 10 << 20
    always_bytes = 435 * disk.weights_bytes + disk.history_bytes
    assert disk.run_bytes == always_bytes + 2 * disk.train_state_bytes
    assert disk.peak_bytes == always_bytes + 3 * disk.train_state_bytes
    assert disk.data_bytes == 2 * 43_500 * 524_288
    more = estimate_disk(recipe("dmas-1.7b", "--checkpoint.keep_train_state_every_steps", "10000"))
    assert more.num_train_states == 2 + 4
    full = estimate_disk(recipe("dmas-1.7b", "--checkpoint.weights_dtype", "float32"))
    assert full.train_state_bytes == 8 * DMAS_PARAMETERS


@pytest.mark.parametrize(
    ("every", "stop", "checkpoints"), [(100, 0, 1), (100, 99, 1), (100, 100, 1), (100, 101, 2)]
)
def test_a_checkpoint_stands_at_each_interval_and_at_the_end(
    every: int, stop: int, checkpoints: int
) -> None:
    config = recipe(
        "demo", "--checkpoint.every_steps", str(every), "--train.stop_at_step", str(stop)
    )
    assert estimate_disk(config).num_checkpoints == checkpoints


def test_time_is_work_over_the_assumed_share_of_the_peak() -> None:
    config = recipe("dmas-1.7b")
    estimate = estimate_duration(config, gpu=find_gpu("a6000"), num_gpus=2)
    assert estimate is not None
    assert estimate.assumed_mfu_fraction == 0.4
    assert estimate.tokens_per_second == pytest.approx(2 * 154.8e12 * 0.4 / 10_130_239_488)
    assert estimate.training_seconds == pytest.approx(43_500 * 524_288 / estimate.tokens_per_second)
    assert estimate.validation_seconds == pytest.approx(
        175 * 10_485_760 / 3 / estimate.tokens_per_second
    )


def test_a_given_speed_stands_above_the_table_and_nothing_known_gives_nothing() -> None:
    config = recipe("corpus-30m")
    given = estimate_duration(config, gpu=find_gpu("h100"), tokens_per_second=4096)
    assert given is not None
    assert given.assumed_mfu_fraction is None
    tokens = config.train.total_steps * config.train.global_batch_tokens
    assert given.training_seconds == tokens / 4096
    assert estimate_duration(config, gpu=None) is None


def test_an_unknown_gpu_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match="there is no GPU 'rtx4080'") as caught:
        find_gpu("rtx4080")
    assert caught.value.hint is not None
    assert "did you mean rtx4090?" in caught.value.hint
    assert all(gpu.name in caught.value.hint for gpu in GPUS)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("name", ["demo", "corpus-30m", "llama-124m", "sft-alpaca"])
def test_planned_moments_are_those_that_an_optimizer_has(name: str, optimizer: str) -> None:
    torch = pytest.importorskip("torch")
    from milepost.model.llama import Llama
    from milepost.model.lora import add_lora
    from milepost.train.lowbit import code_bytes, is_coded

    config = recipe(name, "--optimizer.name", optimizer)
    with torch.device("meta"):
        model = Llama(config.model)
        if config.lora.rank:
            lora = config.lora.model_dump(exclude={"rank"})
            add_lora(model, rank=config.lora.rank, seed=1, **lora)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sorted(sizes) == sorted(trained_sizes(config))
    has_codes = optimizer == "adamw8bit"
    wanted = sum(code_bytes(n) if has_codes and is_coded(n) else 4 * n for n in sizes)
    assert moment_bytes(config) == wanted
    # 384 x 50,257 is no multiple of 256: the largest tensor of corpus-30m stays float32.
    assert is_coded(max(sizes)) == (name != "corpus-30m")


def test_lora_trains_its_additions_and_keeps_what_they_need() -> None:
    config = recipe("sft-alpaca")
    assert count_additions(config.model, lora=config.lora) == 160_432_128  # section IV.B
    assert count_trained(config) == 160_432_128
    whole_words = ("--lora.rank", "none", "--optimizer.name", "adamw")
    whole = recipe("sft-alpaca", *whole_words)
    assert count_trained(whole) == DMAS_PARAMETERS
    needed, of_whole = estimate_memory(config), estimate_memory(whole)
    assert needed.weights_bytes == of_whole.weights_bytes + 4 * 160_432_128
    assert needed.gradients_bytes == 2 * 4 * 160_432_128  # a buffer a level of two lanes
    with_scales = 160_432_128 + 4 * 160_432_128 // 256
    assert needed.optimizer_bytes == 2 * (with_scales + 36 * 14 * 1024)  # two tensors a projection
    assert of_whole.optimizer_bytes == 8 * DMAS_PARAMETERS
    assert estimate_disk(config).train_state_bytes == needed.optimizer_bytes
    stored = [
        recipe("sft-alpaca", "--train.recompute", "none", *words) for words in ((), whole_words)
    ]
    ours, theirs = map(estimate_memory, stored)
    tokens, layers = 4 * 1024, 36
    assert ours.activations_bytes - theirs.activations_bytes == tokens * layers * 2 * 128 * 7
    assert ours.casts_bytes - theirs.casts_bytes == 2 * 160_432_128
    sizes = {"sequence_length": 1024}
    whole_flops = flops_per_token(config.model, **sizes)
    flops = flops_per_token(config.model, **sizes, lora=config.lora)
    multiplying = count_parameters(config.model).multiplying
    assert whole_flops - flops == 2 * multiplying - 6 * 160_432_128


def test_devices_are_known_by_the_drivers_exact_name() -> None:
    known = gpu_of_device("NVIDIA H100 80GB HBM3")
    assert known is not None
    assert known.name == "h100"
    assert gpu_of_device("NVIDIA GeForce RTX 4080") is None


def test_the_papers_tuning_fits_24_gigabytes_with_room_and_has_its_32_times_16() -> None:
    config = recipe("sft-alpaca")
    rows = config.train.microbatch_rows
    assert (rows, config.rows_per_step // rows) == (4, 16)  # about 8 conversations to a row
    assert estimate_memory(config).total_bytes < 12 * GIBIBYTE
    stored = estimate_memory(recipe("sft-alpaca", "--train.recompute", "none")).total_bytes
    memory_bytes = find_gpu("rtx4090").memory_bytes
    assert 0.9 * memory_bytes < stored < memory_bytes  # no room to speak of


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_has_a_plan_and_says_what_it_is_for(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", name, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["recipe"] == name
    assert planned["fits"] is None
    text = (ROOT / "src/milepost/recipes" / f"{name}.toml").read_text(encoding="utf-8")
    for word in ("Purpose", "Hardware", "Time"):
        assert f"{word}: " in text


def test_the_plan_of_the_paper_says_what_is_counted_and_what_is_assumed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["plan", "dmas-1.7b", "--gpu", "a6000"]) == 0
    text = capsys.readouterr().out
    assert "1,715,951,616" in text
    assert re.search(r"total +\S+ GiB +of 47.4 GiB: fits", text)
    assert "ASSUMED: 40% of the dense bf16 peak, 154.8 TFLOP/s a GPU" in text
    assert run(["plan", "dmas-1.7b", "--gpu", "rtx4090"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert run(["plan", "dmas-1.7b"]) == 0
    text = capsys.readouterr().out
    assert all(f"1 x {gpu.name} " in text for gpu in GPUS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus 0 is not a number of GPUs"),
        (["--gpus", "3"], "2 lanes cannot be dealt to 3 GPUs"),
        (["--tokens-per-second", "-1"], "--tokens-per-second -1.0 is not a speed"),
        (["--gpu", "abacus"], "there is no GPU 'abacus'"),
        (["--train.lane", "4"], "did you mean train.lanes?"),
        (["--gpux", "h100"], "unexpected argument '--gpux'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_a_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "demo", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_numbers_that_stand_in_two_places_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest, above = (".".join(map(str, v)) for v in (OLDEST_TORCH, FIRST_UNTRIED_TORCH))
    assert f"torch>={lowest},<{above}" in project["dependencies"]
    source = (ROOT / "src/milepost/train/objective.py").read_text(encoding="utf-8")
    assert f"LOSS_CHUNK_ROWS = {LOSS_CHUNK_ROWS}\n" in source


def test_planned_pieces_of_an_update_are_those_that_it_takes() -> None:
    pytest.importorskip("torch")
    from milepost.train.lowbit import UPDATE_NUMBERS

    at_once = {"cpu": LOWBIT_UPDATE_NUMBERS_CPU, "cuda": LOWBIT_UPDATE_NUMBERS}
    assert at_once == UPDATE_NUMBERS


def test_the_doctor_says_what_will_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    doctor(json=True)
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {"milepost", "python", "cpu", "memory", "disk", "hub", "torch"} <= set(checks)
    assert "offline is fine" in checks["hub"]["found"]
    for check in checks.values():
        assert (check["status"] == "warning") == (check["hint"] is not None)
    doctor()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "warning ", "         hint: ")) for line in lines)


def test_the_doctor_does_without_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    doctor(json=True)
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["torch"]["status"] == "warning"
    assert "cannot be imported" in checks["torch"]["found"]
    assert "precision auto" not in checks
