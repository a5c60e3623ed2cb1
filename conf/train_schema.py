"""What `moexpand train` can be told, part by part; the layout and the number formats are those of other commands too."""

from dataclasses import dataclass

from omegaconf import MISSING

from moexpand.conf.data_schema import Data
from moexpand.conf.fields import key, part, words
from moexpand.conf.launch_schema import Launch, Sweep
from moexpand.conf.model_schema import Model

GRADIENTS = ("topk", "ste", "default_vector")
MOMENTS = ("reset", "copy", "scale")
DISPATCHERS = ("alltoall", "allgather", "grouped_allgather")


@dataclass
class Run:
    dir: str = key(MISSING, "folder of the run; a folder that holds a checkpoint is gone on from")
    resume: str = key(
        "auto",
        "auto: from the newest valid checkpoint; exact: the newest or nothing; never: refuse a folder with checkpoints",
        ("auto", "exact", "never"),
    )


@dataclass
class Train:
    steps: int = key(100, "optimiser steps in all", within="[1, inf)")
    global_batch: int = key(8, "packed sequences a step, over all ranks", within="[1, inf)")
    micro_batch: int = key(1, "packed sequences a forward pass on one data-parallel rank", within="[1, inf)")
    seq_length: int = key(1024, "tokens of a packed sequence", within="[1, inf)")


@dataclass
class Optim:
    lr: float = key(1e-3, "peak learning rate", within="[0, inf)")
    min_lr: float = key(0.0, "learning rate at the end of the decay", within="[0, inf)")
    schedule: str = key("wsd", "wsd (warm-up, stable, decay), cosine or constant", ("wsd", "cosine", "constant"))
    warmup_steps: int = key(0, "steps of linear warm-up", within="[0, inf)")
    decay_steps: int = key(0, "steps of the final linear decay of wsd", within="[0, inf)")
    weight_decay: float = key(0.1, "AdamW weight decay of matrices (norms have none)", within="[0, inf)")
    beta1: float = key(0.9, "AdamW beta1", within="[0, 1)")
    beta2: float = key(0.95, "AdamW beta2", within="[0, 1)")
    eps: float = key(1e-8, "AdamW epsilon", within="(0, inf)")
    clip_grad: float = key(1.0, "largest gradient norm; 0 turns clipping off", within="[0, inf)")
    moments: str = key(
        "reset", "Adam's moments at step 0: reset (zero), or those of the parent's run: copy, or scale (by copies)", MOMENTS
    )
    moments_from: str | None = key(None, "run folder of the parent, whose newest checkpoint has the moments")


@dataclass
class Router:
    gradient: str = key(
        "ste",
        "gradient of the router: topk (plain), ste (straight-through) or default_vector (dense, by mean outputs of experts)",
        GRADIENTS,
    )
    temperature: float = key(1.0, "temperature of the straight-through surrogate", within="(0, inf)")
    normalised: bool = key(False, "scale the gradient of ste to the magnitude of topk")
    default_decay: float = key(0.9, "decay a step of the mean outputs of default_vector", within="[0, 1)")
    lr_multiplier: float = key(1.0, "learning rate of the routers over that of all else", within="[0, inf)")
    warmup_steps: int = key(0, "steps over which lr_multiplier grows from 0", within="[0, inf)")
    freeze: bool = key(False, "keep the routers' weights")


@dataclass
class Vision:
    freeze: list[str] = words("parts that stay: tower, projector (the mergers into the decoder), decoder")
    tower_lr: float = key(1.0, "learning rate of the tower over that of the decoder", within="[0, inf)")
    projector_lr: float = key(1.0, "learning rate of the projector over that of the decoder", within="[0, inf)")
    warmup_steps: int = key(0, "first steps, in which tower and projector alone learn and the decoder stays", within="[0, inf)")


@dataclass
class TimeSeries:
    freeze: bool = key(False, "keep the encoder's weights")
    lr: float = key(1.0, "learning rate of the encoder over that of the decoder", within="[0, inf)")


@dataclass
class Balance:
    coefficient: float = key(1e-3, "weight of the Switch balance loss of each layer", within="[0, inf)")
    group_coefficient: float = key(0.0, "weight of the same loss inside the groups of each layer", within="[0, inf)")
    scope: str = key("micro", "balance of one micro-batch, or against the load of the whole previous step", ("micro", "global"))
    z_loss: float = key(0.0, "weight of the router z-loss of each layer", within="[0, inf)")
    layers: list[str] = words("factors of the three weights in single layers, such as [0-3x4,47x0.5]")
    selection_bias: bool = key(False, "give every router a bias for the choice alone (loss-free balancing)")
    bias_rate: float = key(0.0, "change of the selection bias a step, in units of a score", within="[0, inf)")


@dataclass
class Parallel:
    expert: int = key(1, "expert-parallel ranks (EP)", within="[1, inf)")
    tensor: int = key(1, "tensor-parallel ranks (TP); more than one turns sequence parallelism on", within="[1, inf)")
    expert_tensor: int = key(1, "tensor-parallel ranks inside an expert (ETP)", within="[1, inf)")
    pipeline: int = key(1, "pipeline stages (PP)", within="[1, inf)")
    first_layers: int = key(0, "layers of the first pipeline stage; 0: as many as each other stage", within="[0, inf)")
    last_layers: int = key(0, "layers of the last pipeline stage; 0: as many as each other stage", within="[0, inf)")
    interleave: int = key(1, "parts of a pipeline stage that lie apart in the model (interleaved schedule)", within="[1, inf)")
    context: int = key(1, "context-parallel ranks (CP)", within="[1, inf)")
    dispatcher: str = key("alltoall", "how tokens reach experts on other ranks", DISPATCHERS)
    recompute: str = key("none", "activations to compute again in the backward pass", ("none", "selective", "full"))
    overlap: bool = key(False, "communicate gradients, weights and stages' outputs while computing")
    timeout_seconds: float = key(600.0, "longest wait for another rank", within="(0, inf)")


@dataclass
class Precision:
    name: str = key("fp32", "fp32 or bf16 (fp32 master weights and moments in both)", ("fp32", "bf16"))


@dataclass
class Save:
    every: int = key(0, "steps between checkpoints; 0 saves at the end alone", within="[0, inf)")
    keep: int = key(2, "newest checkpoints to keep", within="[1, inf)")
    keep_every: int = key(0, "keep those of every so many steps as well; 0 none", within="[0, inf)")
    keep_best: int = key(0, "keep so many with the lowest held-out loss as well", within="[0, inf)")
    asynchronous: bool = key(True, "copy the states to main memory and write them while training goes on")
    on_failure: str = key(
        "stop", "when a checkpoint cannot be written: stop, or continue with those that there are", ("stop", "continue")
    )


@dataclass
class Guard:
    spikes: str = key(
        "skip", "a step whose loss or gradient norm leaps up: skip it, warn and take it, or off", ("skip", "warn", "off")
    )
    deviations: float = key(10.0, "how far above the median is a leap, in robust standard deviations", within="(0, inf)")
    window: int = key(128, "steps that median and deviation are taken over", within="[8, inf)")
    begin: int = key(32, "steps to have seen before a leap is one", within="[8, inf)")
    stop_after: int = key(8, "skipped steps in a row after which the run stops without saving", within="[1, inf)")


@dataclass
class Watchdog:
    seconds: float = key(300.0, "longest time without progress of a rank before the job ends; 0: no limit", within="[0, inf)")


@dataclass
class Evaluate:
    every: int = key(0, "steps between evaluations on held-out samples; 0 evaluates never", within="[0, inf)")
    batches: int = key(8, "packed sequences an evaluation", within="[1, inf)")
    parent: str | None = key(None, "folder of the parent, evaluated once on the same samples: a line to compare with")


@dataclass
class Track:
    wandb: str = key("offline", "online, offline or off", ("online", "offline", "off"))
    project: str = key("moexpand", "W&B project")
    name: str | None = key(None, "W&B run name; not given: the run folder's name")
    group: str | None = key(None, "W&B group, such as that of a sweep")
    routing_every: int = key(10, "steps between looks at the routers and at the time of each phase; 0 never", within="[0, inf)")
    siblings_every: int = key(100, "steps between comparisons of experts with one parent; 0 never", within="[0, inf)")
    sibling_outputs: int = key(0, "tokens on which the siblings' outputs are compared as well", within="[0, inf)")


@dataclass
class TrainCommand:
    """Train a checkpoint (or a fresh model) on shards."""

    checkpoint: str | None = key(None, "Hugging Face folder to start from; not given: fresh weights of the shape in `model`")
    expand: str | None = key(
        None, "plan by which `checkpoint`, a parent, is expanded while it is loaded; no child folder is needed"
    )
    seed: int = key(0, "seed of fresh weights and of the order of samples", within="[0, 4294967295]")
    engine: str = key("megatron", "training engine", ("megatron",))
    plain: bool = key(False, "plain lines even on a terminal")
    debug: bool = key(False, "print tracebacks")
    run: Run = part(Run, "the run folder")
    model: Model = part(Model, "shape of a model trained from scratch")
    train: Train = part(Train, "length and batch")
    optim: Optim = part(Optim, "AdamW and its schedule")
    router: Router = part(Router, "how the routers learn")
    balance: Balance = part(Balance, "auxiliary losses")
    vision: Vision = part(Vision, "how a vision tower learns")
    time_series: TimeSeries = part(TimeSeries, "how an encoder of time series learns")
    parallel: Parallel = part(Parallel, "layout over ranks")
    data: Data = part(Data, "shards")
    precision: Precision = part(Precision, "number formats")
    launch: Launch = part(Launch, "how workers start")
    sweep: Sweep = part(Sweep, "which points --multirun starts")
    save: Save = part(Save, "checkpoints")
    guard: Guard = part(Guard, "steps that are not taken")
    watchdog: Watchdog = part(Watchdog, "ranks that hang")
    evaluate: Evaluate = part(Evaluate, "held-out loss during training")
    track: Track = part(Track, "W&B and telemetry")
