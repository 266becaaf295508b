"""Configuration of a training run: every field is an argument of `python -m imf.train`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from imf.io import check_names
from imf.mean_flow.methods import METHODS, network_of
from imf.model.config import TOKENS, AdaptedConfig, IMFConfig, check_guidance
from imf.objective.draws import MAX_LOG_POWER, Guidance
from imf.program import MOST_THREADS

# 8 x 8 images in patches of 2 x 2: 16 patch tokens, and 5 condition tokens, one for each condition.
# Residual branches need not grow from zero, and rows of large error count in full (norm_p = 0): so in 1,000
# steps samples of a class come to vary nearly as the data do. See docs/ablations.md.
DIGITS_NETWORK = IMFConfig(
    input_size=8,
    patch_size=2,
    in_channels=1,
    hidden_size=96,
    depth=5,
    num_heads=2,
    aux_head_depth=4,
    mlp_ratio=8 / 3,
    num_classes=10,
    class_tokens=1,
    omega_tokens=1,
    interval_tokens=1,
    time_tokens=1,
    residual_scale=1.0,
)

# Options that may change when a run is resumed: they leave the weights alone, say when to stop, or only warn.
RESUMABLE = {
    "runs", "steps", "omega", "t_min", "t_max", "threads", "device",
    "log_every", "sample_every", "checkpoint_every", "keep_checkpoints", "figures", "extractor",
    "tensorboard", "wandb",
    "sharding", "compile", "checkpointing", "cuda_graphs",
}  # fmt: skip
ROUNDING = ("sharding", "compile", "checkpointing", "cuda_graphs")  # those that only change the last bits
NETWORK_OPTIONS = (
    "patch_size",
    "hidden_size",
    "depth",
    "num_heads",
    "aux_head_depth",
    "mlp_ratio",
    *TOKENS,
    "residual_scale",
)

MOST_FP32 = torch.finfo(torch.float32).max

Bound = tuple[str, Callable[[Any], bool]]  # text for messages, and whether a value is within


def _at_most(most: int) -> Bound:
    return f"at most {most}", lambda x: x <= most


AT_LEAST_0: Bound = ("at least 0", lambda x: x >= 0)
AT_LEAST_1: Bound = ("at least 1", lambda x: x >= 1)
ABOVE_0: Bound = ("above 0", lambda x: x > 0)
SHARE: Bound = ("in [0, 1]", lambda x: 0 <= x <= 1)
ABOVE_0_TO_1: Bound = ("in (0, 1]", lambda x: 0 < x <= 1)
BELOW_1: Bound = ("in [0, 1)", lambda x: 0 <= x < 1)
FINITE: Bound = ("finite in fp32", lambda x: abs(x) <= MOST_FP32)  # NaN is not
STEPS: Bound = _at_most(2**40)  # all that is counted in steps; micro-batches then fit in 64 bits
BELOW_2_63: Bound = ("below 2 ** 63", lambda x: x < 2**63)
PLAIN_NAME: Bound = ("a plain folder name", lambda x: x not in (".", "..") and not set(x) & set("/\\\0"))


def _option(default: Any, text: str, *bounds: Bound, choices: tuple[str, ...] = ()) -> Any:
    if choices:
        bounds = ((f"one of {', '.join(choices)}", lambda x: x in choices),)
    elif isinstance(default, float):
        bounds = (FINITE, *bounds)
    return field(default=default, metadata={"help": text, "choices": choices or None, "bounds": bounds})


@dataclass(frozen=True)
class TrainConfig:
    """Options of a run; with the code, versions and thread count they decide every bit of the result.

    Raises: ValueError, naming the argument, for a value out of range or of another type.
    """

    method: str = _option("imf", "objective and form of the network; sizes stay", choices=tuple(METHODS))
    data: str = _option("digits", "digits, or a folder that imf.data.prepare wrote")
    flip: bool = _option(False, "flip images left to right at random whenever one is read; not latents")
    name: str = _option("", "name of the run; empty: the data set's, numbered when taken", PLAIN_NAME)
    runs: str = _option("runs", "folder that holds the runs")
    init_from: str = _option("", "initial weights: a run's folder or a checkpoint; empty: random ones")

    steps: int = _option(1000, "optimizer steps", AT_LEAST_1, STEPS)
    batch_size: int = _option(128, "images per optimizer step", AT_LEAST_1, _at_most(2**20))
    accumulate: int = _option(1, "micro-batches per step, whose gradients are averaged", AT_LEAST_1)
    lr: float = _option(4e-3, "peak learning rate of AdamW", ABOVE_0)
    warmup_steps: int = _option(50, "steps of linear warm-up from learning rate 0", AT_LEAST_0, STEPS)
    decay: str = _option("cosine", "how the learning rate ends", choices=("constant", "linear", "cosine"))
    decay_fraction: float = _option(1.0, "share of the steps, at the end, that decay to 0", ABOVE_0_TO_1)
    beta1: float = _option(0.9, "AdamW: decay of the first moment", BELOW_1)
    beta2: float = _option(0.95, "AdamW: decay of the second moment", BELOW_1)
    eps: float = _option(1e-8, "AdamW: epsilon", ABOVE_0)
    weight_decay: float = _option(0.0, "AdamW: decoupled weight decay", AT_LEAST_0)
    ema_decay: float = _option(0.99, "decay of the moving average of the weights, after its warm-up", BELOW_1)
    ema_warmup: float = _option(10.0, "decay at step t is at most (1 + t) / (ema_warmup + t)", AT_LEAST_1)

    fm_fraction: float = _option(0.5, "share of rows with r = t, plain flow matching", SHARE)
    r0_fraction: float = _option(
        0.25, "share of rows with r = 0, all the way to data as one step goes", SHARE
    )
    norm_p: float = _option(0.0, "power of the adaptive weight; 0: none, every row counts alike", AT_LEAST_0)
    norm_eps: float = _option(0.01, "what is added to a row's error in that weight", ABOVE_0)
    drop_probability: float = _option(0.1, "probability that a row's label is dropped", SHARE)
    time_mean: float = _option(-0.4, "t and r are sigmoid of a normal variable of this mean; of lsd uniform")
    time_std: float = _option(1.6, "and this standard deviation", AT_LEAST_0)
    omega_max: float = _option(2.0, "guidance scales are drawn from [1, omega_max]", AT_LEAST_1)
    omega_exponent: float = _option(3.0, "with density proportional to omega ** -omega_exponent")
    fixed_omega: float = _option(1.0, "methods without omega as an input: weight of v_t in their guidance")
    fixed_kappa: float = _option(0.2, "and of v_c; the guidance scale is fixed_omega / (1 - fixed_kappa)")
    fixed_t_min: float = _option(0.0, "start of the interval of that guidance")
    fixed_t_max: float = _option(1.0, "end of the interval of that guidance")

    seed: int = _option(0, "seed of initial weights, data order, draws and samples", AT_LEAST_0, BELOW_2_63)
    precision: str = _option(
        "auto", "of GEMMs and attention; auto: as the processor is fast", choices=("auto", "fp32", "bf16")
    )
    backend: str = _option(
        "auto",
        "kernels; auto: the first that can run",
        choices=("auto", "reference", "cpu", "triton", "cuda", "flash"),
    )
    device: str = _option("auto", "auto, cpu, cuda or cuda:<index>; auto: cuda where there is one")
    sharding: str = _option(
        "ddp", "under torchrun; ddp: a copy of all in each process, fsdp: a part", choices=("ddp", "fsdp")
    )
    max_patches: int = _option(
        0, "where above 0: patches are as small as cuts images into at most so many", AT_LEAST_0
    )
    compile: bool = _option(False, "compile the blocks of the network by torch.compile")
    checkpointing: bool = _option(False, "keep no activations inside blocks: backward recomputes them")
    cuda_graphs: bool = _option(False, "replay steps as CUDA graphs: on GPUs, without fsdp")
    threads: int = _option(0, "CPU threads; 0: as PyTorch chooses", AT_LEAST_0, _at_most(MOST_THREADS))

    omega: float = _option(1.3, "guidance scale of samples while and after training, where an input")
    t_min: float = _option(0.2, "start of the guidance interval of these samples")
    t_max: float = _option(0.8, "end of the guidance interval of these samples")

    log_every: int = _option(10, "steps between lines of metrics.jsonl", AT_LEAST_1, STEPS)
    sample_every: int = _option(100, "steps between sample grids; 0: none while training", AT_LEAST_0, STEPS)
    checkpoint_every: int = _option(100, "steps between checkpoints; 0: only the last", AT_LEAST_0, STEPS)
    keep_checkpoints: int = _option(2, "checkpoints kept, the newest first", AT_LEAST_1)
    figures: int = _option(
        1000, "samples that are scored at each checkpoint; 0: none", AT_LEAST_0, _at_most(2**20)
    )
    extractor: str = _option("auto", "what scores them: pixels, network, or a file as of imf.evaluate")
    tensorboard: bool = _option(True, "write TensorBoard events in addition to metrics.jsonl")
    wandb: str = _option("", "project of Weights & Biases to log to as well; empty: none")

    network: IMFConfig | AdaptedConfig = DIGITS_NETWORK

    def __post_init__(self) -> None:
        for option in fields(self):
            name, value, kind = option.name, getattr(self, option.name), type(option.default)
            kinds = {float: (int, float), IMFConfig: (IMFConfig, AdaptedConfig)}.get(kind, kind)
            fits = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
            _require(fits, name, f"of type {kind.__name__}", value)
            for wanted, within in option.metadata.get("bounds", ()):
                _require(within(value), name, wanted, value)
            if kind is float:
                object.__setattr__(self, name, float(value))  # an integer may exceed what tensors take
        log_power = (1 - self.omega_exponent) * math.log(self.omega_max)
        small = f"such that omega_max ** (1 - omega_exponent) is at most e ** {MAX_LOG_POWER}"
        divisor = f"a divisor of the batch size {self.batch_size}"
        for name, fits, wanted in (
            ("accumulate", self.batch_size % self.accumulate == 0, divisor),
            ("r0_fraction", self.r0_fraction + self.fm_fraction <= 1, "at most 1 with fm_fraction"),
            ("omega_exponent", log_power <= MAX_LOG_POWER, small),
        ):
            _require(fits, name, wanted, getattr(self, name))
        check_guidance(self.omega, self.t_min, self.t_max)
        try:
            _ = self.fixed_guidance
        except ValueError as error:
            name, _, rest = str(error).removeprefix("Guidance: ").partition(" ")
            flag = f"--fixed-{name.replace('_', '-')}"
            raise ValueError(f"fixed_{name} ({flag}) {rest}") from error
        method, network = METHODS[self.method], self.network
        if isinstance(network, AdaptedConfig):
            wanted = (
                "imf, or mf without a v-head and with fixed guidance: an adapted network decides the rest"
            )
            plain = network.form == "fixed" and not network.has_v_head
            _require(self.method == "imf" or (self.method == "mf" and plain), "method", wanted, self.method)
            return
        if method.flow_map:
            micro_batch = self.micro_batch_size
            n_fm = int(micro_batch * self.fm_fraction)
            both = f"such that the {micro_batch} images of a micro-batch have rows with r = t and others"
            for name, fits, wanted in (
                ("norm_p", self.norm_p == 0, "0, as its loss has no adaptive weight,"),
                ("fixed_t_min", self.fixed_t_min == 0, "0, as its guidance has no interval,"),
                ("fixed_t_max", self.fixed_t_max == 1, "1, as its guidance has no interval,"),
                ("fm_fraction", 0 < n_fm < micro_batch, both),
                ("time_std", method.times != "gap" or self.time_std > 0, "above 0"),
            ):
                _require(fits, name, f"{wanted} for the method {self.method}", getattr(self, name))
        depth = network.aux_head_depth
        for name, form in method.form.items():
            got = getattr(self.network, name)
            _require(got == form, f"network.{name}", f"{form!r} for the method {self.method}", got)
        if not method.v_head or method.block == "plain":
            wanted = f"{'at least 1' if method.v_head else '0'} for the method {self.method}"
            _require((depth > 0) == method.v_head, "aux_head_depth", wanted, depth)

    @property
    def fixed_guidance(self) -> Guidance:
        """Guidance that a network without ω as an input is trained for."""
        return Guidance(self.fixed_omega, self.fixed_kappa, self.fixed_t_min, self.fixed_t_max)

    @property
    def sampling(self) -> dict[str, Any]:
        """Guidance of samples, by its names in `imf.generate`; none where it is no input of the network."""
        inputs = self.network
        t_min, t_max = (self.t_min, self.t_max) if inputs.interval_input else (0.0, 1.0)
        return {"omega": self.omega if inputs.omega_input else 1.0, "t_min": t_min, "t_max": t_max}

    @property
    def micro_batch_size(self) -> int:
        """Images per forward and backward pass."""
        return self.batch_size // self.accumulate

    @staticmethod
    def is_due(every: int, step: int) -> bool:
        """Whether what happens `every` steps (0: never) follows step `step`."""
        return every > 0 and step % every == 0

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint follows step `step`: every `checkpoint_every`, and the last."""
        return self.is_due(self.checkpoint_every, step) or step == self.steps

    @property
    def draws(self) -> dict[str, Any]:
        """Arguments of `imf.objective.draws.Draws.sample` that stay the same from step to step."""
        inputs = self.network
        return {
            "fm_fraction": self.fm_fraction,
            "r0_fraction": self.r0_fraction,
            "drop_probability": self.drop_probability,
            "times": METHODS[self.method].times,
            "interval": inputs.interval_input,
            "mean": self.time_mean,
            "std": self.time_std,
            "omega_max": self.omega_max if inputs.omega_input else 1.0,
            "omega_exponent": self.omega_exponent,
        }


def learning_rate(config: TrainConfig, step: int) -> float:
    """Returns the learning rate of step `step` (from 0): linear warm-up from 0, constant, decay to 0."""
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    # `left` falls from 1, where the decay begins, towards 0, which the step after the last would have.
    left = min(1.0, (config.steps - step) / (config.decay_fraction * config.steps))
    decay = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[config.decay]
    return config.lr * warmup * decay


def ema_decay(config: TrainConfig, step: int) -> float:
    """Returns the decay of the moving average at step `step` (from 0): small at first."""
    return min(config.ema_decay, (1 + step) / (config.ema_warmup + step))


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Undoes `dataclasses.asdict`; ValueError for a name that is unknown or missing."""
    check_names(values, [x.name for x in fields(TrainConfig)])
    network = values["network"]
    kind = AdaptedConfig if isinstance(network, Mapping) and "custom" in network else IMFConfig
    check_names(network, [x.name for x in fields(kind)], "network.")
    return TrainConfig(**{**values, "network": kind(**network)})


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the options whose values differ: name -> (old, new); the network's as `network.<name>`."""
    pairs = {x.name: (getattr(old, x.name), getattr(new, x.name)) for x in fields(old)}
    a, b = map(asdict, pairs.pop("network"))
    pairs |= {f"network.{name}": (a.get(name), b.get(name)) for name in a}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def add_arguments(parser: argparse.ArgumentParser, defaults: TrainConfig | None = None) -> None:
    """Adds one argument per option, absent from the result unless given; --help shows the defaults."""
    defaults = defaults or TrainConfig()
    training = [option.name for option in fields(defaults) if option.name != "network"]
    sizes = "network (the data decide input size, channels and classes, the method all else)"
    for title, config, names in (
        ("training", defaults, training),
        (sizes, defaults.network, NETWORK_OPTIONS),
    ):
        group = parser.add_argument_group(title)
        for name in names:
            default, about = getattr(config, name), config.__dataclass_fields__[name].metadata
            kind, choices = type(default), about.get("choices")
            how: dict[str, Any] = {"type": kind, "choices": choices}
            if kind is bool:
                how = {"action": argparse.BooleanOptionalAction}
            elif not choices:
                how["metavar"] = kind.__name__.upper()
            shown = f"{default:g}" if kind is float else default if default != "" else "''"
            text = f"{about.get('help', 'see imf.model.config.IMFConfig')} (default: {shown})"
            group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **how)


def with_arguments(config: TrainConfig, arguments: argparse.Namespace) -> TrainConfig:
    """Returns `config` with the arguments that were given; ValueError, naming it, if one is out of range."""
    given, values = vars(arguments), asdict(config)
    if "patch_size" in given:
        values["max_patches"] = 0
    values.update({name: given[name] for name in values if name in given})
    if values["method"] != config.method and isinstance(config.network, IMFConfig):
        values["network"] = asdict(network_of(values["method"], config.network))
    network = values["network"]
    network.update({name: given[name] for name in network if name in given})
    patch = network.get("patch_size", 0)  # which a network of one's own need not have
    if patch > 0 and network["input_size"] % patch:
        network["input_size"] = patch  # the data decide it, and whether the patches divide it
    return from_dict(values)


def _require(condition: bool, name: str, wanted: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{name} (--{name.replace('_', '-')}) must be {wanted}, got {got!r}")
