"""What every question shares: arguments, the resolved config, data, the parts of a step, rows."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from milepost.config.recipe import load_recipe
from milepost.config.schema import Config
from milepost.core.console import say
from milepost.core.environment import code_version
from milepost.core.files import strict
from milepost.data.loader import Loader
from milepost.data.prepare import prepare
from milepost.data.shards import PreparedData, open_prepared
from milepost.distributed.world import World
from milepost.model.init import initialize
from milepost.model.llama import Llama
from milepost.planner.cost import flops_per_token
from milepost.planner.duration import gpu_of_device
from milepost.runs.events import utc_now
from milepost.train.exactness import machine_facts
from milepost.train.gradients import LaneGradients
from milepost.train.objective import build_objective
from milepost.train.optimizer import build_optimizer
from milepost.train.precision import make_deterministic
from milepost.train.resolving import resolve_config
from milepost.train.step import FIRST_LOSS_SCALE, LossScale, Stepper

GPT2_VOCAB_SIZE = 50257


def has_gpu() -> bool:
    """Whether torch can use a CUDA device."""
    return torch.cuda.is_available()


def add_shared_arguments(parser: argparse.ArgumentParser, *, recipe: str, steps: int) -> None:
    """The arguments that every question takes."""
    parser.add_argument("--recipe", default=recipe, help=f"default: {recipe}")
    parser.add_argument("--steps", type=int, default=steps, help=f"default: {steps}")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="set a field of the recipe; may be given again",
    )
    parser.add_argument("--data", type=Path, help="prepared data; default: made-up words")
    parser.add_argument("--folder", type=Path, help="where data and runs lie; default: temporary")
    parser.add_argument(
        "--allow-cpu", action="store_true", help="run without a GPU, as a rehearsal"
    )


@dataclass(frozen=True)
class Setting:
    """What a question is asked about.

    Attributes:
        config: of the recipe and the overrides, nothing left at "auto".
        overrides: as `milepost train` takes them, the question's own first.
        world: one rank on the GPU, or on the CPU as a rehearsal.
        folder: for data and runs.
    """

    config: Config
    recipe: str
    overrides: tuple[str, ...]
    world: World
    folder: Path
    data_folder: Path | None

    @property
    def device(self) -> torch.device:
        """Where tensors lie."""
        return self.world.device

    def open_data(self) -> PreparedData:
        """The data that was given, or made-up words that are prepared now."""
        if self.data_folder is not None:
            return open_prepared(self.data_folder)
        return open_prepared(made_up_data(self.folder, config=self.config))

    def with_train(self, **changes: Any) -> Config:
        """The config with other fields of [train]."""
        train = self.config.train.model_copy(update=changes)
        return self.config.model_copy(update={"train": train})


def open_setting(arguments: argparse.Namespace, *, defaults: tuple[str, ...] = ()) -> Setting:
    """Reads the shared arguments.

    Args:
        arguments: of the command line.
        defaults: the question's own overrides, "section.key=value"; the command line's win.

    Raises:
        UsageError: the recipe or an override is wrong.
    """
    overrides = tuple(f"--{word}" for word in (*defaults, *arguments.override))
    config = load_recipe(arguments.recipe, overrides=overrides)
    device = torch.device("cuda", 0) if has_gpu() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    return Setting(
        config=resolve_config(config, device=device, ranks=1),
        recipe=arguments.recipe,
        overrides=overrides,
        world=World(rank=0, size=1, device=device),
        folder=arguments.folder or Path(tempfile.mkdtemp(prefix="milepost-gpu-")),
        data_folder=arguments.data,
    )


def made_up_data(folder: Path, *, config: Config, num_batches: int = 2) -> Path:
    """Prepared documents of random words, enough for the global batches; made once a folder."""
    size = config.model.vocab_size
    num_words = num_batches * config.train.global_batch_tokens + 2 * config.data.sequence_length
    out = folder / f"words-{size}-{num_words}"
    source = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(5000)]
    text = folder / f"{out.name}.jsonl"
    if not text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        num_documents = 64
        with text.open("w") as file:
            for _ in range(num_documents):
                words = source.choices(vocabulary, k=num_words // num_documents + 1)
                file.write(json.dumps({"text": " ".join(words)}) + "\n")
    tokenizer = "gpt2" if size == GPT2_VOCAB_SIZE else f"train:{size}"
    prepare([text], out=out, tokenizer=tokenizer, workers=1)
    return out


def open_loader(setting: Setting, *, data: PreparedData) -> Loader:
    """The training batches of the setting's config."""
    config = setting.config
    return Loader(
        data.train,
        seed=config.run.seed,
        sequence_length=config.data.sequence_length,
        rows_per_step=config.rows_per_step,
    )


def new_model(config: Config, *, device: torch.device) -> Llama:
    """Initial weights of the run's seed, on the device."""
    model = Llama(config.model)
    initialize(model, config=config.model, seed=config.run.seed)
    return model.to(device)


def new_stepper(
    model: Llama,
    *,
    optimizer: torch.optim.Optimizer,
    config: Config,
    world: World,
    end_of_text_id: int,
) -> Stepper:
    """The product's own step for a config; compiled code of an earlier one is forgotten."""
    torch._dynamo.reset()
    if config.train.deterministic:
        make_deterministic(device=world.device)
    else:
        torch.use_deterministic_algorithms(False)
    scale = FIRST_LOSS_SCALE if config.train.precision == "float16" else 1.0
    return Stepper(
        build_objective(model, config=config, end_of_text_id=end_of_text_id),
        optimizer=optimizer,
        gradients=LaneGradients(model),
        config=config,
        world=world,
        loss_scale=LossScale(scale),
    )


def new_optimizer(model: Llama, *, config: Config) -> torch.optim.Optimizer:
    """The product's own optimizer."""
    return build_optimizer(model, config=config.optimizer)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_share(config: Config, *, tokens_per_second: float, device: torch.device) -> float | None:
    """Share of the GPU's dense bfloat16 peak; None where the peak is not known."""
    if device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    if gpu is None:
        return None
    length = config.data.sequence_length
    work = flops_per_token(config.model, sequence_length=length, lora=config.lora)
    return tokens_per_second * work / gpu.bf16_flops


def show_row(question: str, *, setting: Setting, **measured: Any) -> dict[str, Any]:
    """Prints one result as a JSON line on stdout, with all that it depends on."""
    row = {
        "question": question,
        "time": utc_now(),
        **machine_facts(device=setting.device),
        "code": code_version(),
        "command": " ".join(sys.argv),
        "recipe": setting.recipe,
        "overrides": list(setting.overrides),
        **measured,
    }
    print(json.dumps(strict(row)), flush=True)
    return row


def tell(text: str) -> None:
    """Talk on stderr."""
    say(text)
