"""What a run is made of: the model, its quantization, the adapter, the data and the training settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NoReturn

from graft.adapters.base import AdapterConfig, config_classes
from graft.config import Settings
from graft.data.config import DataConfig
from graft.errors import ConfigError
from graft.quant.config import QuantizationConfig
from graft.sections import variants
from graft.training.contradictions import check_objective, check_run
from graft.training.presets import check_filled_in, fill_in
from graft.training.sizes import check_paging

MOST_EPOCHS = 1e9
"""More passes than any run makes; far beyond it a number of steps is no exact number any more."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    SHORTHAND = "name"

    name: str = "builtin"
    """A directory, a Hugging Face hub id, or "builtin" for the small model that comes with graft."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the base computes in; null takes float32 for float32 checkpoints, else bfloat16. What is
    trained is kept in float32."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the trainable tensors are fitted to the data."""

    learning_rate: float | None = None
    """Peak learning rate; null takes 2e-4 for adapters and 2e-5 for full fine-tuning."""
    num_epochs: float = 1.0
    """Passes over the training data."""
    max_steps: int | None = None
    """Optimizer steps; overrides num_epochs."""
    batch_size: int = 8
    """Rows in one forward pass; with packing a row holds max_length tokens of several samples."""
    gradient_accumulation_steps: int = 1
    """Forward passes for one optimizer step."""
    lr_scheduler: Literal["cosine", "linear", "constant", "cosine_with_restarts", "wsd", "inverse_sqrt"] = (
        "cosine"
    )
    """Shape of the learning rate after the warm-up; wsd stays at the peak and falls in the last steps."""
    warmup_ratio: float | None = None
    """Share of the steps in which the learning rate rises from zero; null takes 0.03 where warmup_steps is
    null too."""
    warmup_steps: int | None = None
    """Steps of warm-up, in place of warmup_ratio."""
    min_lr_ratio: float = 0.0
    """The learning rate at the end, as a share of the peak (not for constant and inverse_sqrt)."""
    num_cycles: int | None = None
    """Cosines in a row of cosine_with_restarts; null takes 2."""
    decay_ratio: float | None = None
    """Share of the steps, at the end, in which wsd falls; null takes 0.2."""
    lora_plus_ratio: float = 1.0
    """Learning rate of lora_B over that of the rest (LoRA+, which finds 16 good)."""
    embedding_learning_rate: float | None = None
    """Peak learning rate of embeddings, of the output head and of modules_to_save; null takes the others'."""
    lora_A_learning_rate: float | None = None  # noqa: N815 - the tensor's name
    """Peak learning rate of lora_A; null takes the others'."""
    lora_B_learning_rate: float | None = None  # noqa: N815
    """Peak learning rate of lora_B, in place of lora_plus_ratio."""
    magnitude_learning_rate: float | None = None
    """Peak learning rate of magnitude vectors (DoRA); null takes the others'."""
    head_learning_rate: float | None = None
    """Peak learning rate of an output or classification head; null takes that of embeddings."""
    optimizer: Literal["adamw", "adamw_8bit", "sgd", "lion"] = "adamw"
    """The update rule; adamw_8bit keeps two bytes for each trained number where adamw keeps eight."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only, and not on embeddings."""
    head_weight_decay: float | None = None
    """Weight decay of matrices of an output or classification head; null takes weight_decay."""
    embedding_weight_decay: float | None = None
    """Weight decay of embeddings; null takes none, and weight_decay for adapters on them."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of AdamW's second moment."""
    sgd_momentum: float = 0.0
    """Decay of sgd's sum of gradients."""
    lion_beta1: float = 0.9
    """Weight of lion's momentum against the gradient, in the sign."""
    lion_beta2: float = 0.99
    """Decay of lion's momentum."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    group_max_grad_norm: float = 0.0
    """Before that the gradients of each group (lora_A, lora_B, magnitude vectors, embeddings, heads,
    modules_to_save, the rest) are scaled down to this norm; 0 turns it off."""
    optimizer_memory: int | str | None = None
    """Memory for the optimizer's state where it trains, such as 64MB; the rest is paged, and the steps stay
    the same: from a device to the host's memory, from the host's memory to a file. null keeps all of it."""
    optimizer_host_memory: int | str | None = None
    """With a device: the host's memory for what is paged from it, the rest of which goes to a file; null
    takes as much as is needed."""
    optimizer_spill: str | None = None
    """Directory of that file, which has no name and is gone with the process; null takes the run's."""
    seed: int = 0
    """Seeds adapter initialisation, data order and dropout."""
    gradient_checkpointing: bool | Literal["none", "full"] | int = False
    """Recompute blocks in the backward pass: "full" (or true) all of them, for less memory and about a
    quarter more time; a number n every n-th block; "none" (or false) no block."""
    activation_offload: bool | str = False
    """What the backward pass needs waits elsewhere: from a device in the host's memory, from the host's
    memory in a file of the run's directory or of the one named here. The steps stay the same."""
    mlp_tile: int | None = None
    """For long rows: tokens that a gated MLP works on at a time; its inner tensors are made again in the
    backward pass. 1024 or more is fast; null takes all tokens at once."""
    eval_steps: int | None = None
    """Evaluate every so many steps; null evaluates at the end of each epoch and of the run."""
    save_steps: int | None = None
    """Save a checkpoint every so many steps; null saves at the end of each epoch and of the run."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the best ones are kept besides."""
    keep_best_checkpoints: int = 1
    """Checkpoints with the lowest evaluation losses kept, the best one by early_stopping_min_delta among
    them; more than one needs evaluation data."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations without improvement; needs evaluation data."""
    early_stopping_min_delta: float = 0.0
    """What counts as an improvement of the evaluation loss."""
    load_best_at_end: bool | None = None
    """Write out the checkpoint with the lowest evaluation loss; null does so when early stopping is on."""
    max_nonfinite_steps: int = 5
    """Steps in a row with a NaN or infinite loss or gradient, each skipped, before the run stops."""
    loss: Literal["cross_entropy", "dpo", "ipo"] = "cross_entropy"
    """What is minimized; dpo and ipo learn from preferences (a chosen and a rejected answer), with the base
    under the adapter as the reference."""
    dpo_beta: float = 0.1
    """How strongly dpo and ipo are tied to the base: the reward is beta times the log-ratio."""
    dpo_label_smoothing: float = 0.0
    """Share of preferences that dpo takes to be the wrong way round."""
    recovery_steps: int = 0
    """After training on a quantized base: so many steps more on the dense base that it was made from."""
    recovery_learning_rate: float | None = None
    """Peak learning rate of these steps; null takes a tenth of the run's."""
    loss_spike_threshold: float | None = 6.0
    """A loss so many robust standard deviations above the median of the 64 before it is logged with the
    places of its samples; null logs none."""
    deterministic: bool = False
    """Use operations that give the same bits in every run, and refuse a model that needs another one."""
    audit: Literal["sampled", "full", "none"] = "sampled"
    """Checks that every tensor learns, that the output changes and that the base does not; "full" reads every
    byte of the base at the start and the end instead of samples."""
    log_steps: int = 10
    """A line on the console every so many steps, where it is not a terminal."""
    spectrum_steps: int | None = None
    """Measure the singular values of each adapter update every so many steps, and at the end; 0 never; null
    ten times in the run, at least 20 steps apart."""
    trackers: tuple[str, ...] = ()
    """Where the figures are sent besides the run directory: tensorboard, wandb, mlflow, or
    package.module:Class for one of your own."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        at_least = {
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "keep_checkpoints": 1,
            "keep_best_checkpoints": 1,
            "max_nonfinite_steps": 1,
            "log_steps": 1,
            "weight_decay": 0,
            "max_grad_norm": 0,
            "group_max_grad_norm": 0,
            "early_stopping_min_delta": 0,
            "min_lr_ratio": 0,
            "seed": 0,
            "recovery_steps": 0,
        }
        optional = {
            "max_steps": 1,
            "eval_steps": 1,
            "save_steps": 1,
            "early_stopping_patience": 1,
            "warmup_steps": 0,
            "warmup_ratio": 0,
            "num_cycles": 1,
            "head_weight_decay": 0,
            "embedding_weight_decay": 0,
            "spectrum_steps": 0,
        }
        for name, lowest in (at_least | optional).items():
            value = getattr(self, name)
            if value is not None and not lowest <= value < float("inf"):
                _refuse(name, value, f"at least {lowest}, and finite")
        if self.seed >= 2**63:
            _refuse("seed", self.seed, "below 2**63")
        positive = ("num_epochs", "adam_epsilon", "learning_rate", "decay_ratio", "dpo_beta")
        for name in (*positive, "recovery_learning_rate", "loss_spike_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                _refuse(name, value, "above 0")
        if self.num_epochs > MOST_EPOCHS:
            _refuse("num_epochs", self.num_epochs, f"at most {MOST_EPOCHS:g}; or give training.max_steps")
        for name in ("warmup_ratio", "min_lr_ratio", "decay_ratio", "adam_beta1", "adam_beta2"):
            top = 1.0 if name.endswith("ratio") else 1.0 - 1e-12  # a moment that forgets nothing has no end
            value = getattr(self, name)
            if value is not None and not 0 <= value <= top:
                _refuse(name, value, f"from 0 to {'1' if top == 1 else 'below 1'}")
        _check_schedule(self)
        _check_optimizer(self)
        check_objective(self)
        _check_memory(self)


ACTS_ON = {
    "min_lr_ratio": ("cosine", "linear", "cosine_with_restarts", "wsd"),
    "num_cycles": ("cosine_with_restarts",),
    "decay_ratio": ("wsd",),
}
"""The shapes of the learning rate that a field has a part in."""


def _check_schedule(config: TrainingConfig) -> None:
    for name, shapes in ACTS_ON.items():
        if getattr(config, name) and config.lr_scheduler not in shapes:
            wanted = f"left out with the {config.lr_scheduler} lr_scheduler; it acts on {', '.join(shapes)}"
            _refuse(name, getattr(config, name), wanted)
    if config.warmup_ratio is not None and config.warmup_steps is not None:
        ratio, steps = config.warmup_ratio, config.warmup_steps
        raise ConfigError(
            f"training.warmup_ratio = {ratio!r} and training.warmup_steps = {steps!r}",
            where="training.warmup_steps",
            fix="both set the length of the warm-up: leave one out (null)",
        )
    for name in ("warmup_ratio", "warmup_steps"):
        if config.lr_scheduler == "inverse_sqrt" and getattr(config, name) == 0:
            _refuse(name, 0, "above 0 with inverse_sqrt, which falls on the scale of its warm-up")
    if (config.warmup_ratio or 0) + (config.decay_ratio or 0) > 1 + 1e-9:
        _refuse("decay_ratio", config.decay_ratio, f"at most 1 - warmup_ratio ({config.warmup_ratio})")


OPTIMIZERS_OF = {
    "adam_beta1": ("adamw", "adamw_8bit"),
    "adam_beta2": ("adamw", "adamw_8bit"),
    "adam_epsilon": ("adamw", "adamw_8bit"),
    "sgd_momentum": ("sgd",),
    "lion_beta1": ("lion",),
    "lion_beta2": ("lion",),
}
"""The optimizers that a field has a part in."""


RATES = (
    "embedding_learning_rate",
    "head_learning_rate",
    "lora_A_learning_rate",
    "lora_B_learning_rate",
    "magnitude_learning_rate",
)
"""Learning rates of groups of tensors."""


def _check_optimizer(config: TrainingConfig) -> None:
    if config.optimizer not in ("adamw", "adamw_8bit", "sgd", "lion"):
        _refuse("optimizer", config.optimizer, "adamw, adamw_8bit, sgd or lion")
    for name, optimizers in OPTIMIZERS_OF.items():
        value = getattr(config, name)
        if config.optimizer not in optimizers and value != getattr(TrainingConfig, name):
            wanted = f"left out with {config.optimizer}; it acts on {', '.join(optimizers)}"
            _refuse(name, value, wanted)
    for name in ("sgd_momentum", "lion_beta1", "lion_beta2"):
        if not 0 <= getattr(config, name) <= 1.0 - 1e-12:
            _refuse(name, getattr(config, name), "from 0 to below 1")
    for name in ("lora_plus_ratio", *RATES):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            _refuse(name, value, "above 0, and finite")
    if config.lora_B_learning_rate is not None and config.lora_plus_ratio != 1:
        _refuse(
            "lora_plus_ratio", config.lora_plus_ratio, "left out with lora_B_learning_rate: both set one rate"
        )
    check_paging(config.optimizer_memory, config.optimizer_host_memory, config.optimizer_spill)
    if config.learning_rate is None and config.optimizer in ("sgd", "lion"):
        _refuse("learning_rate", None, f"given with {config.optimizer}: the usual ones are AdamW's")


def _check_memory(config: TrainingConfig) -> None:
    choice = config.gradient_checkpointing
    named = isinstance(choice, bool) or choice in ("none", "full")
    if not named and (not isinstance(choice, int) or choice < 1):
        _refuse("gradient_checkpointing", choice, '"none", "full", true, false or a number of blocks from 1')
    if config.activation_offload == "":
        _refuse("activation_offload", "", "true, false or a directory")
    if config.mlp_tile is not None and config.mlp_tile < 1:
        _refuse("mlp_tile", config.mlp_tile, "a number of tokens from 1, or left out")


def _refuse(name: str, value: object, wanted: str) -> NoReturn:
    raise ConfigError(f"training.{name} = {value!r}", where=f"training.{name}", fix=f"it must be {wanted}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One fine-tuning run, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The base model."""
    quantization: QuantizationConfig | None = None
    """How the base's linear layers are stored; null leaves them as they are."""
    adapter: AdapterConfig | None = field(default=None, metadata=variants(config_classes, "lora"))
    """What is trained, by its method; null trains the whole model."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is trained on."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How."""
    task: Literal["generation", "classification"] = "generation"
    """What the model is trained for; classification puts a head over the classes of rows with a text and a
    label in the place of the output head."""
    preset: str | None = None
    """Fills in what is left out with values that are good for a kind of task: classification, generation,
    instruction, domain or preference."""
    output: str = "runs/latest"
    """The run directory."""

    @staticmethod
    def fill_in(settings: Settings) -> Settings:
        """Put in the values of a preset; `graft.config.build` does so before anything is checked."""
        return fill_in(settings)

    def __post_init__(self) -> None:
        """Check what no single section can see.

        Raises:
            ConfigError: Sections that contradict each other.
        """
        if self.quantization is not None and self.adapter is None:
            raise ConfigError(
                f"a base in {self.quantization.quant_type} cannot be trained whole: codes have no gradient",
                where="quantization",
                fix="add an adapter section (--method qlora), or remove quantization",
            )
        for name in (
            "lora_plus_ratio",
            "lora_A_learning_rate",
            "lora_B_learning_rate",
            "magnitude_learning_rate",
        ):
            value = getattr(self.training, name)
            if value != getattr(TrainingConfig, name) and self.adapter is None:
                raise ConfigError(
                    f"training.{name} = {value} without an adapter",
                    where=f"training.{name}",
                    fix="add an adapter section, or leave it out",
                )
        if self.training.spectrum_steps and self.adapter is None:
            raise ConfigError(
                f"training.spectrum_steps = {self.training.spectrum_steps} without an adapter",
                where="training.spectrum_steps",
                fix="add an adapter section, or leave it out",
            )
        check_filled_in(self)
        check_run(self)
        needy = ("early_stopping_patience", "early_stopping_min_delta", "load_best_at_end")
        for name in (*needy, "keep_best_checkpoints"):
            asked = getattr(self.training, name) not in (None, False, 0, getattr(TrainingConfig, name))
            if asked and not (self.data.eval or self.data.eval_fraction):
                raise ConfigError(
                    f"training.{name} needs an evaluation loss",
                    where=f"training.{name}",
                    fix="give data.eval or data.eval_fraction, or leave it out",
                )
