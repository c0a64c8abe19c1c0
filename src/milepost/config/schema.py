"""The config: frozen models, one a recipe section; every field with its unit and range.

Model fields carry Hugging Face's config names. Rules that span fields lie in `rules.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1, le=2**40)]
StepCount = Annotated[int, Field(ge=0, le=2**40)]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Section(BaseModel):
    """What all sections share: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSection(Section):
    """[run]"""

    seed: int = Field(1337, ge=0, le=2**62, description="Seed of weights, order and samples.")
    name: str = Field("", max_length=200, description="A name for people; empty: the folder's.")


class DataSection(Section):
    """[data]"""

    path: str = Field("", description="Folder that `milepost data prepare` wrote.")
    sequence_length: int = Field(ge=2, le=2**20, description="Tokens of one training row.")
    document_attention: bool = Field(
        False, description="Keep attention inside a document instead of the whole row."
    )


class ModelSection(Section):
    """[model], with Hugging Face's names (LlamaConfig)."""

    vocab_size: int = Field(ge=2, le=2**24, description="Token ids; the tokenizer's own count.")
    hidden_size: int = Field(ge=2, le=2**17, description="Width D of the residual stream.")
    intermediate_size: int = Field(ge=1, le=2**19, description="Feed-forward width F.")
    num_hidden_layers: int = Field(ge=1, le=1024, description="Transformer blocks.")
    num_attention_heads: int = Field(ge=1, le=4096, description="Query heads N.")
    num_key_value_heads: int = Field(ge=1, le=4096, description="Key/value heads G.")
    max_position_embeddings: int = Field(ge=2, le=2**20, description="Longest context, tokens.")
    rms_norm_eps: float = Field(1e-5, gt=0, le=1e-1, description="Added to the mean square.")
    rope_theta: float = Field(500000.0, ge=1, le=1e12, description="Base of rotary frequencies.")
    tie_word_embeddings: bool = Field(False, description="One matrix for embedding and head.")
    hidden_act: Literal["silu"] = Field("silu", description="Feed-forward activation.")
    attention_bias: Literal[False] = Field(False, description="LLaMA has none.")
    mlp_bias: Literal[False] = Field(False, description="LLaMA has none.")
    attention_dropout: float = Field(0.0, ge=0, le=0, description="None, as the paper.")
    initializer_range: float = Field(0.02, gt=0, le=1, description="Std of initial weights.")
    residual_init: Literal["plain", "depth_scaled"] = Field(
        "plain", description="depth_scaled: o_proj and down_proj std / sqrt(2 layers) (GPT-2)."
    )

    @property
    def head_dim(self) -> int:
        """Head size H."""
        return self.hidden_size // self.num_attention_heads


class TrainSection(Section):
    """[train]"""

    global_batch_tokens: PositiveInt = Field(description="Target tokens of one update.")
    microbatch_rows: Annotated[int, Field(ge=1, le=2**20)] | Literal["auto"] = Field(
        description="Rows of one forward pass; auto: measured when the run is made."
    )
    lanes: int = Field(2, ge=1, le=1024, description="Groups of fixed summation order (D6).")
    total_steps: PositiveInt = Field(description="Updates that shape the schedule.")
    stop_at_step: StepCount | None = Field(None, description="Stop here; shapes nothing.")
    precision: Precision = Field("auto", description="Dtype of compute; weights stay float32.")
    compile: bool | Literal["auto"] = Field("auto", description="torch.compile of a block.")
    deterministic: bool = Field(True, description="Deterministic kernels, for exact resume.")
    recompute: Literal["none", "block", "auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        "none",
        description="Blocks whose activations the backward pass computes again: none, the first "
        "so many, all (block), or (auto) the fewest with which the run fits its memory.",
    )

    float8: Literal["none", "tensorwise", "rowwise"] = Field(
        "none", description="Products of the projections in float8, by torchao's kinds of scaling."
    )

    @property
    def rows_of_forward(self) -> int:
        """Rows of one forward pass, where "auto" is resolved."""
        assert self.microbatch_rows != "auto", '"auto" is resolved when a run is made'
        return self.microbatch_rows


class OptimizerSection(Section):
    """[optimizer]"""

    name: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="AdamW (Loshchilov and Hutter 2019); adamw8bit: 8-bit moments."
    )
    learning_rate: float = Field(gt=0, le=1e30, description="Highest learning rate.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), strict=False, description="Decay of first and second moments."
    )
    eps: float = Field(1e-8, gt=0, le=1, description="Added to the root of the second moment.")
    weight_decay: float = Field(0.1, ge=0, le=10, description="On tensors of 2+ dimensions.")
    clip_grad_norm: float | None = Field(
        1.0, gt=0, le=1e6, description="Largest L2 norm; none: gradients are not clipped."
    )


class ScheduleSection(Section):
    """[schedule]"""

    name: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = Field("cosine")
    warmup_steps: StepCount = Field(0, description="Linear warm-up, updates.")
    min_learning_rate: float = Field(0.0, ge=0, le=1e30, description="At the end of the decay.")
    decay_steps: StepCount | None = Field(
        None, description="warmup_stable_decay: length of the final decay, updates."
    )
    rewarm_at_step: StepCount | None = Field(
        None, description="A second warm-up begins here, as after a restart without moments."
    )
    rewarm_steps: StepCount = Field(0, description="Length of the second warm-up, updates.")


class CheckpointSection(Section):
    """[checkpoint]"""

    every_steps: PositiveInt = Field(100, description="Interval, updates; also at the end.")
    weights_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of model.safetensors; bfloat16 keeps masters in train_state."
    )
    keep_train_state: int = Field(2, ge=1, le=10**6, description="Newest train states kept.")
    keep_train_state_every_steps: PositiveInt | None = Field(
        None, description="Train states of these steps are kept for good."
    )


class ValidationSection(Section):
    """[validation]"""

    every_steps: PositiveInt = Field(250, description="Interval, updates; also at the end.")
    tokens: PositiveInt = Field(
        10_485_760, description="At most so many target tokens of the fixed validation set."
    )


class EvaluationSection(Section):
    """[evaluation]"""

    every_steps: PositiveInt | None = Field(None, description="Interval, updates; none: never.")
    tasks: tuple[Annotated[str, Field(min_length=1, max_length=100)], ...] = Field(
        ("hellaswag",), strict=False, description="Benchmarks that are scored while training."
    )
    limit: PositiveInt | None = Field(
        500, description="The first so many items of each benchmark; none: all."
    )
    data_dir: str = Field("", description="Folder of the benchmarks' rows; empty: the hub.")


class GuardsSection(Section):
    """[guards]"""

    nonfinite: Literal["stop", "skip"] = Field(
        "skip", description="A batch whose loss or gradient norm is not finite is never applied."
    )
    spike: Literal["off", "warn", "skip", "rollback"] = Field(
        "warn", description="What a loss far above those before it leads to."
    )
    spike_z: float = Field(
        6.0, gt=3, le=1000, description="Robust deviations above the window that are a spike."
    )
    spike_window: int = Field(
        128, ge=20, le=10_000, description="Losses of applied updates a loss is held against."
    )
    spike_patience: int = Field(
        3, ge=1, le=1000, description="Spikes in a row that lead to a rollback."
    )
    max_skips_in_a_row: int = Field(
        3, ge=0, le=1000, description="Batches skipped in a row; at the next one the run stops."
    )
    max_rollbacks: int = Field(
        3, ge=0, le=1000, description="Of the whole run; at the next one the run stops."
    )
    resume_drift_z: float | None = Field(
        3.0,
        gt=0,
        le=1000,
        description="Robust deviations of the first losses after a resume; none: no warning.",
    )
    loader_timeout_seconds: float = Field(
        600.0, ge=1, le=86_400, description="A batch that takes so long to read ends the run."
    )
    collective_timeout_seconds: float = Field(
        600.0, ge=5, le=86_400, description="A rank that waits so long for the others gives up."
    )


class SamplesSection(Section):
    """[samples]"""

    every_steps: PositiveInt | None = Field(None, description="Interval, updates; none: never.")
    prompts: tuple[Annotated[str, Field(min_length=1, max_length=10_000)], ...] = Field(
        (), strict=False, description="Fixed texts to be continued."
    )
    max_new_tokens: int = Field(64, ge=1, le=2**16, description="Tokens of one completion.")
    temperature: float = Field(0.0, ge=0, le=10, description="0: greedy.")
    top_k: int | None = Field(None, ge=1, le=2**24, description="Keep the k likeliest tokens.")


def _names(value: object) -> object:
    """A text of names with commas between, or "none", as their list, each name once."""
    if value == "none":
        return ()
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return names
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


class TrackingSection(Section):
    """[tracking]"""

    tools: Annotated[
        tuple[Literal["tensorboard", "trackio", "wandb"], ...], BeforeValidator(_names)
    ] = Field((), description="Live trackers that are sent the metrics as they happen.")
    project: str = Field(
        "milepost",
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="Where trackio and wandb collect runs; letters, digits, _ . -",
    )
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: nothing leaves this machine; wandb writes files."
    )
    every_steps: PositiveInt = Field(
        1, description="Send every so-many-th step; validation and scores always."
    )


class LoraSection(Section):
    """[lora], for `milepost finetune`; PEFT's names."""

    rank: int | None = Field(
        None, ge=1, le=2**14, description="Rank of the additions; none: all weights are trained."
    )
    alpha: float = Field(16.0, gt=0, le=1e6, description="Additions count alpha / rank times.")
    dropout: float = Field(0.0, ge=0, le=0, description="None, as the paper: exact resume.")
    targets: Annotated[tuple[LoraTarget, ...], BeforeValidator(_names), Field(min_length=1)] = (
        Field(
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            description="Projections that have additions.",
        )
    )


class FinetuneSection(Section):
    """[finetune], for `milepost finetune`."""

    template: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="Chat template: vicuna-1.1 or a .jinja file; none: the recipe pretrains.",
    )
    base: str = Field("", description="The model that is tuned; its hash is in the manifest.")
    data: str = Field("", description="Instructions: .json, .jsonl(.gz), .parquet or a hub name.")
    held_out_fraction: float = Field(
        0.02, ge=0, lt=1, description="Share of the conversations that is scored, never trained."
    )
    questions: tuple[Annotated[str, Field(min_length=1, max_length=10_000)], ...] = Field(
        (
            "Who invented the first practical light bulb?",
            "What are the Pyramids of Giza known for?",
        ),
        strict=False,
        description="Answered before and after; those of the paper's Table V.",
    )
    max_new_tokens: int = Field(256, ge=1, le=2**16, description="Tokens of one such answer.")


class Config(Section):
    """Everything a run is made of, as one frozen object."""

    run: RunSection = RunSection()  # type: ignore[call-arg]
    data: DataSection
    model: ModelSection
    train: TrainSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()  # type: ignore[call-arg]
    checkpoint: CheckpointSection = CheckpointSection()  # type: ignore[call-arg]
    validation: ValidationSection = ValidationSection()  # type: ignore[call-arg]
    evaluation: EvaluationSection = EvaluationSection()  # type: ignore[call-arg]
    samples: SamplesSection = SamplesSection()  # type: ignore[call-arg]
    guards: GuardsSection = GuardsSection()  # type: ignore[call-arg]
    tracking: TrackingSection = TrackingSection()  # type: ignore[call-arg]
    lora: LoraSection = LoraSection()  # type: ignore[call-arg]
    finetune: FinetuneSection = FinetuneSection()  # type: ignore[call-arg]

    @property
    def rows_per_step(self) -> int:
        """Rows of one global batch."""
        return self.train.global_batch_tokens // self.data.sequence_length

    @property
    def num_recomputed_blocks(self) -> int:
        """The first blocks, whose activations the backward pass computes again."""
        recompute, num_blocks = self.train.recompute, self.model.num_hidden_layers
        assert recompute != "auto", '"auto" is resolved when a run is made'
        if isinstance(recompute, str):
            return num_blocks if recompute == "block" else 0
        return recompute

    @property
    def is_finetuning(self) -> bool:
        """Whether the run tunes a model on conversations, in place of pretraining one."""
        return self.finetune.template is not None

    @property
    def last_step(self) -> int:
        """The step this run stops at."""
        stop = self.train.stop_at_step
        return self.train.total_steps if stop is None else min(stop, self.train.total_steps)
