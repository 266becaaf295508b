"""Everything that training changes, and the run that it belongs to."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imf import data, random
from imf.distributed import DistributedContext
from imf.evaluation.scores import Judge
from imf.mean_flow.methods import guidance_of
from imf.mean_flow.objective import Objective, objective
from imf.model.pretrained import PRECISIONS, Sampling
from imf.networks import build
from imf.objective.draws import Guidance
from imf.program import StopSignals
from imf.training.adamw import AdamW
from imf.training.config import TrainConfig
from imf.training.graphs import StepGraphs
from imf.training.log import Readback
from imf.training.parallel import local, wrap_for_training
from imf_kernels.backends.moving_average import MovingAverage


@dataclass
class State:
    """Everything that training changes; model and ema are one network with different weights.

    wrapped: the module that the objective calls, DDP around the model or the model itself.
    objective: called as objective(wrapped, x, y, draws).  guidance: of a method without ω as an input.
    found_inf: [] fp32 on the device, 0 until a loss or gradient is not finite, then 1 for good: from then on
        weights, moments and average stay as they are, so the host may learn of it some steps later.
    step: optimizer steps done.  graphs: its micro-steps as CUDA graphs, if asked for.  stream: captures them.
    terms: [3] fp32 on the device, loss, loss_u and loss_v of the micro-batches since the last step.
    """

    model: Any
    ema: Any
    wrapped: nn.Module
    objective: Objective
    guidance: Guidance | None
    optimizer: torch.optim.Optimizer
    found_inf: Tensor
    step: int = 0
    graphs: StepGraphs | None = None
    stream: torch.cuda.Stream | None = None

    def __post_init__(self) -> None:
        self.parameters = list(self.model.parameters())
        self.terms = torch.zeros(3, device=self.found_inf.device)
        # Of this process's shards.
        self.average = MovingAverage(*([local(p) for p in m.parameters()] for m in (self.ema, self.model)))


@dataclass
class Run:
    """A run's state and settings.

    precision: "fp32" or "bf16".  elapsed: seconds of training so far.  judge: of its samples, once there are.
    readback: terms of steps on their way to the host.  saved: step of the newest checkpoint.
    """

    folder: Path
    config: TrainConfig
    precision: str
    dataset: data.DataSet
    state: State
    context: DistributedContext = field(default_factory=DistributedContext)
    elapsed: float = 0.0
    signals: StopSignals = field(default_factory=StopSignals)
    judge: Judge | None = None
    readback: Readback = field(default_factory=Readback)

    def __post_init__(self) -> None:
        self.saved = self.state.step

    @property
    def network(self) -> Any:
        """The averaged network, which draws with the run's guidance and names of classes."""
        names = tuple(self.dataset.class_names)
        self.state.ema.sampling = Sampling(
            **self.config.sampling, class_names=names, autoencoder=self.dataset.autoencoder
        )
        return self.state.ema

    def batches(self) -> data.Batches:
        """Returns this process's batches, from the next step on."""
        return data.Batches(
            self.dataset,
            batch_size=self.config.micro_batch_size,
            seed=self.config.seed,
            first=self.state.step * self.config.accumulate,
            process=self.context.rank,
            processes=self.context.count,
            device=self.context.device,
            flip=self.config.flip,
        )


def initial_state(
    config: TrainConfig, precision: str, context: DistributedContext, network: nn.Module | None = None
) -> State:
    """Builds network, moving average and optimizer on this process's device, the same in every process.

    network: what is trained, in place; by default one of `config`, a function of the seed.
    """
    torch.manual_seed(random.key(config.seed, "weights"))
    model: Any = build(config.network) if network is None else network.train()  # type: ignore[arg-type]
    if network is not None:
        context.share(model.state_dict().values())
    model.compute_dtype = PRECISIONS[precision]
    if not (context.grouped and config.sharding == "fsdp"):  # which moves block by block, and only its part
        model.to(context.device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    graphs = config.cuda_graphs and context.device.type == "cuda"
    stream = torch.cuda.Stream(context.device) if graphs else None
    wrapped = wrap_for_training(
        model,
        ema,
        sharding=config.sharding if context.grouped else None,
        device=context.device,
        compile=config.compile,
        checkpointing=config.checkpointing,
        stream=stream,
    )
    found_inf = torch.zeros((), device=context.device)
    optimizer = AdamW(
        [p for p in model.parameters() if p.requires_grad],
        found_inf,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        capturable=graphs,
    )
    guidance = guidance_of(config.network, config.fixed_guidance)
    loss = objective(config.method, guidance, teacher=ema, norm_eps=config.norm_eps, norm_p=config.norm_p)
    return State(model, ema, wrapped, loss, guidance, optimizer, found_inf, stream=stream)
