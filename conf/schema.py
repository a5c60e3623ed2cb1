"""What every command can be told: one dataclass a command, one field a key, with type, default and a line of help.

`KEY = None` means "not given"; a key that must be given has the type `str` and the default MISSING.
"""

from dataclasses import dataclass

from omegaconf import MISSING

from moexpand.conf.data_schema import CalibrateData, DataBuildCommand, DataIndexCommand, DataInspectCommand
from moexpand.conf.fields import key, part, words
from moexpand.conf.model_schema import TimeSeriesModel, VisionModel
from moexpand.conf.train_schema import Parallel, Precision, TrainCommand

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
    quantization: str = key("none", "none, or fp8: all linears of the decoder in blocks of 128 x 128", ("none", "fp8"))
    max_shard_size: str = key("5GB", "largest output file")
    debug: bool = key(False, "print tracebacks")


@dataclass
class PlanCommand:
    """Plan a run on a cluster: layouts that fit, memory by part, traffic by link, a configuration."""

    model: str = key(MISSING, "checkpoint folder, config.json, or preset such as Qwen3-235B-A22B-x4")
    precision: str = key("bf16", "number format of weights and activations", ("fp32", "bf16"))
    nodes: int = key(1, "machines", within="[1, inf)")
    gpus_per_node: int = key(8, "GPUs of a machine", within="[1, inf)")
    gpu: str = key("h100", "a100-40, a100, h100, h200, b200, or the GiB that torch sees, as in gpu=96")
    network_gbit: float = key(400.0, "rate of the network for each GPU, in Gbit/s", within="(0, inf)")
    reserve_gib: float = key(6.0, "GiB to leave to CUDA, NCCL and fragmentation", within="[0, inf)")
    seq_length: int = key(4096, "tokens of a packed sequence", within="[1, inf)")
    global_batch: int = key(1024, "packed sequences a step", within="[1, inf)")
    micro_batch: int = key(1, "packed sequences a forward pass", within="[1, inf)")
    imbalance: float = key(
        1.5, "load of the busiest rank's experts over the mean, where dispatch follows the router", within="[1, inf)"
    )
    pictures: float = key(0.25, "share of the tokens that are places of pictures, for models with a tower", within="[0, 1]")
    top: int = key(8, "layouts to show", within="[1, inf)")
    out: str | None = key(None, "file for the configuration of the first one, to be given to train by --config-name")
    format: str = key("table", "table or json", ("table", "json"))
    debug: bool = key(False, "print tracebacks")
    parallel: Parallel = part(Parallel, "what is given here, other than its default, is kept")


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


@dataclass
class DoctorCommand:
    """Say what this machine has for training, what is missing and what mends it."""

    folder: str = key(".", "where runs would be written")
    format: str = key("table", "table or json", ("table", "json"))
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
    "plan": PlanCommand,
    "doctor": DoctorCommand,
    "data build": DataBuildCommand,
    "data index": DataIndexCommand,
    "data inspect": DataInspectCommand,
}
