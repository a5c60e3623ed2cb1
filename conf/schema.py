"""What every command can be told: one dataclass a command, one field a key, with type, default and a line of help.

`KEY = None` means "not given"; a key that must be given has the type `str` and the default MISSING.
"""

from dataclasses import dataclass

from omegaconf import MISSING

from moexpand.conf.data_schema import CalibrateData, Data, DataBuildCommand, DataIndexCommand, DataInspectCommand
from moexpand.conf.fields import key, part, words
from moexpand.conf.model_schema import Model, TimeSeriesModel, VisionModel

PLACEMENTS = (
    "quarters_spread",
    "block_spread",
    "halves_bits",
    "halves_tile",
    "random_balanced",
    "quarters",
    "block",
    "full_copy",
    "ranked",
    "usage",
    "map",
)
GRADIENTS = ("topk", "ste", "default_vector")
DISPATCHERS = ("alltoall", "allgather", "grouped_allgather")


# ---------------------------------------------------------------- train


@dataclass
class Run:
    dir: str = key(MISSING, "folder of the run; a folder that holds a checkpoint is gone on from")
    resume: str = key(
        "auto", "auto: from the newest valid checkpoint; exact: the newest or nothing; never: anew", ("auto", "exact", "never")
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
class Launch:
    name: str = key("local", "local starts the workers on this machine", ("local",))
    processes: int = key(1, "workers on this machine", within="[1, inf)")
    grace_seconds: float = key(60.0, "time that workers get to save after a signal", within="[0, inf)")
    dry_run: bool = key(False, "check everything, print the command and stop")


@dataclass
class Save:
    every: int = key(0, "steps between checkpoints; 0 saves at the end alone", within="[0, inf)")
    keep: int = key(2, "checkpoints to keep", within="[1, inf)")


@dataclass
class Evaluate:
    every: int = key(0, "steps between evaluations on held-out samples; 0 evaluates never", within="[0, inf)")
    batches: int = key(8, "packed sequences an evaluation", within="[1, inf)")


@dataclass
class Track:
    wandb: str = key("offline", "online, offline or off", ("online", "offline", "off"))
    project: str = key("moexpand", "W&B project")
    name: str | None = key(None, "W&B run name; not given: the run folder's name")
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
    save: Save = part(Save, "checkpoints")
    evaluate: Evaluate = part(Evaluate, "held-out loss during training")
    track: Track = part(Track, "W&B and telemetry")


# ---------------------------------------------------------------- checkpoints


@dataclass
class UpcycleCommand:
    """Expand a parent checkpoint into a child, streaming."""

    source: str = key(MISSING, "parent's Hugging Face folder")
    target: str = key(MISSING, "folder to write; must not exist")
    num_experts: int = key(512, "experts of the child's layers", within="[1, inf)")
    num_groups: int = key(8, "groups of the child's router", within="[1, inf)")
    placement: str = key("quarters_spread", "which parent each slot copies", PLACEMENTS)
    calibration: str | None = key(
        None, "folder written by `moexpand calibrate`; spreads experts that fire together, predicts step 0"
    )
    map: str | None = key(None, "JSON file of slot -> parent, for placement=map: one list, or one for every layer")
    usage: str | None = key(None, "JSON file of how often each parent is used, for placement=usage: one list, or one a layer")
    regroup: bool = key(False, "allow as many experts as the parent has: the same experts, routed in groups")
    init: str = key("copy", "copy, or drop: re-initialise a part of every copy's inner units (Drop-Upcycling)", ("copy", "drop"))
    drop_fraction: float = key(0.5, "part of the inner units that init=drop draws anew", within="(0, 1]")
    drop_shared: bool = key(True, "init=drop takes the same units in gate, up and down; false: units of their own in each")
    keep_first: bool = key(True, "the first copy of every parent stays exact, without noise or drop")
    router_noise: float | None = key(
        None,
        "noise on router rows, relative to the RMS of the row; not given: 0.05 for the _spread placements, 0 otherwise",
        within="[0, inf)",
    )
    expert_noise: float = key(0.0, "noise on expert matrices, relative to the RMS of the matrix", within="[0, inf)")
    router_dtype: str = key(
        "same", "same as the parent's, or float32 (for noise that the parent's dtype would swallow)", ("same", "float32")
    )
    seed: int = key(0, "seed of the recipe's random parts", within="[0, 4294967295]")
    experts_layout: str = key(
        "same",
        "tensors of the experts: same as the parent's, split (one an expert) or fused (stacked)",
        ("same", "split", "fused"),
    )
    tokenizer: str | None = key(None, "folder of the child's tokenizer, when its vocabulary differs from the parent's")
    vocab_size: int | None = key(None, "rows of the child's embedding and head; not given: the parent's", within="[1, inf)")
    vocab_map: str | None = key(
        None, "JSON file with the parent's token id (or null) of every id of the child, instead of two tokenizers"
    )
    max_shard_size: str = key("5GB", "largest output file")
    workers: int = key(0, "copying threads; 0 takes two a core, at most 16", within="[0, inf)")
    reflink: str = key(
        "auto", "auto lets equal copies share blocks where the file system can; never writes each", ("auto", "never")
    )
    resume: bool = key(False, "go on with an unfinished expansion of the same parameters, or help another host with it")
    dry_run: bool = key(False, "check everything and print the plan without writing")
    plan: str | None = key(None, "plan to follow, written by plan_out; it sets everything that shapes the child")
    plan_out: str | None = key(None, "write the plan to this JSON file")
    plain: bool = key(False, "plain lines even on a terminal")
    debug: bool = key(False, "print tracebacks")


@dataclass
class Measure:
    shards: str | None = key(None, "shards on which source and target are compared; not given: nothing is measured")
    tokens: int = key(16_384, "tokens to compare on; whole sequences, so a few less or more", within="[1, inf)")
    seq_length: int = key(1024, "tokens of a packed sequence", within="[2, inf)")


@dataclass
class ConvertCommand:
    """Make another kind of model of a checkpoint: text alone, Intern-S1-Pro's kind, other positions, a fresh tower."""

    source: str = key(MISSING, "Hugging Face folder")
    target: str = key(MISSING, "folder to write; must not exist")
    family: str = key(
        "same", "the target's kind: same, qwen3_moe (text alone) or interns1_pro", ("same", "qwen3_moe", "interns1_pro")
    )
    positions: str = key("same", "same, or fope: Fourier positions instead of rotary ones (interns1_pro)", ("same", "fope"))
    compensate: bool = key(True, "with fope: scale q_norm and k_norm so that what it leaves out counts in the scores as before")
    fope_init_factor: float = key(0.0, "with fope: width of the tables' noise; 0 is the identity", within="[0, inf)")
    fope_sep_head: bool = key(True, "with fope: a table for each key/value head, not one for all")
    rope_theta: float | None = key(None, "with fope: base of the frequencies; not given: the source's", within="(0, inf)")
    max_position_embeddings: int | None = key(
        None, "with fope: longest sequence, by which slow frequencies are left out; not given: the source's", within="[1, inf)"
    )
    tower: str = key("same", "same, or fresh: a new vision tower of the sizes in `vision`", ("same", "fresh"))
    vision: VisionModel = part(VisionModel, "sizes of a fresh tower")
    encoder: str = key("same", "time series: same, none, or fresh of the sizes in `time_series`", ("same", "none", "fresh"))
    time_series: TimeSeriesModel = part(TimeSeriesModel, "sizes of a fresh encoder of time series")
    seed: int = key(0, "seed of fresh tables and towers", within="[0, 4294967295]")
    measure: Measure = part(Measure, "what the conversion costs at step 0")
    processes: int = key(1, "workers on this machine, for measuring", within="[1, inf)")
    parallel: Parallel = part(Parallel, "layout over ranks, for measuring")
    precision: Precision = part(Precision, "number formats, for measuring")
    max_shard_size: str = key("5GB", "largest output file")
    plain: bool = key(False, "plain lines even on a terminal")
    debug: bool = key(False, "print tracebacks")


@dataclass
class CalibrateCommand:
    """Run a parent over shards and write how it routes."""

    checkpoint: str = key(MISSING, "parent's Hugging Face folder")
    out: str = key(MISSING, "calibration folder to write; must not exist")
    tokens: int = key(262_144, "tokens to route; whole sequences, so a few less or more", within="[1, inf)")
    seq_length: int = key(1024, "tokens of a packed sequence", within="[2, inf)")
    sample: int = key(2048, "tokens whose router logits are kept, for predictions", within="[1, inf)")
    seed: int = key(0, "seed of the order of samples", within="[0, 4294967295]")
    processes: int = key(1, "workers on this machine", within="[1, inf)")
    data: CalibrateData = part(CalibrateData, "shards")
    parallel: Parallel = part(Parallel, "layout over ranks")
    precision: Precision = part(Precision, "number formats")
    plain: bool = key(False, "plain lines even on a terminal")
    debug: bool = key(False, "print tracebacks")


@dataclass
class VerifyCommand:
    """Prove that every tensor of a child equals its recipe."""

    source: str = key(MISSING, "parent's folder")
    target: str = key(MISSING, "child's folder")
    calibration: str | None = key(None, "folder that the child's map was made from, to have the map computed again")
    usage: str | None = key(None, "usage file that the child's map was made from, to have the map computed again")
    workers: int = key(0, "comparing threads; 0 takes two a core, at most 16", within="[0, inf)")
    plain: bool = key(False, "plain lines even on a terminal")
    debug: bool = key(False, "print tracebacks")


@dataclass
class CountCommand:
    """Count parameters by part, in all and active per token."""

    model: str = key(MISSING, "a checkpoint folder, a config.json or a preset's name")
    format: str = key("table", "table or json", ("table", "json"))
    debug: bool = key(False, "print tracebacks")


@dataclass
class DiffCommand:
    """Show two models' configs and derived sizes side by side."""

    left: str = key(MISSING, "a checkpoint folder, a config.json or a preset's name")
    right: str = key(MISSING, "a checkpoint folder, a config.json or a preset's name")
    format: str = key("table", "table or json", ("table", "json"))
    debug: bool = key(False, "print tracebacks")


@dataclass
class ExportCommand:
    """Write a run's checkpoint as a Hugging Face folder."""

    run: str = key(MISSING, "run folder")
    step: int | None = key(None, "step of the checkpoint; not given: the latest", within="[0, inf)")
    target: str = key(MISSING, "folder to write; must not exist")
    format: str = key(
        "native",
        "native (with group-aware model code), lmdeploy (qwen3_moe with router_n_groups alone), or the kind that the run must be",
        ("native", "lmdeploy", "qwen3_moe", "qwen3_vl_moe", "interns1_pro"),
    )
    max_shard_size: str = key("5GB", "largest output file")
    debug: bool = key(False, "print tracebacks")


@dataclass
class ReportCommand:
    """Write a run, or several, as one HTML page with plots."""

    run: str = key(MISSING, "run folder")
    compare: list[str] = words("run folders to draw beside it")
    out: str | None = key(None, "file to write; not given: report/index.html in the run folder")
    debug: bool = key(False, "print tracebacks")


@dataclass
class LogitsCommand:
    """Run the engine forward on a Hugging Face folder."""

    checkpoint: str = key(MISSING, "Hugging Face folder")
    tokens: str = key(MISSING, "int64 .npy [B, S]")
    out: str = key(MISSING, "float32 .npy [B, S, V] to write")
    routes: str | None = key(None, "integer .npy [B, S, layers, K]: experts to visit instead of the routers' choice (replay)")
    routes_out: str | None = key(None, "uint8 or uint16 .npy [B, S, layers, K] to write: the experts that were visited")
    processes: int = key(1, "workers on this machine", within="[1, inf)")
    parallel: Parallel = part(Parallel, "layout over ranks")
    precision: Precision = part(Precision, "number formats")
    debug: bool = key(False, "print tracebacks")


COMMANDS: dict[str, type] = {
    "train": TrainCommand,
    "upcycle": UpcycleCommand,
    "convert": ConvertCommand,
    "calibrate": CalibrateCommand,
    "verify": VerifyCommand,
    "count": CountCommand,
    "diff": DiffCommand,
    "export": ExportCommand,
    "logits": LogitsCommand,
    "report": ReportCommand,
    "data build": DataBuildCommand,
    "data index": DataIndexCommand,
    "data inspect": DataInspectCommand,
}
