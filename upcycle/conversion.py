"""Another kind of model of a checkpoint, not expanded: its text alone, Intern-S1-Pro's kind, Fourier positions, a fresh tower.

What a conversion changes is in its config.json, which `converted_config` makes; `Conversion` finds every tensor of the target in
the source, changed or fresh. One tensor is held at a time, of stacks of experts one expert's unit, and no byte is read twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from moexpand.base.errors import InputError
from moexpand.upcycle.architecture import Architecture, TimeSeriesArchitecture, VisionArchitecture
from moexpand.upcycle.checkpoint import CONFIG, NUMPY, Checkpoint
from moexpand.upcycle.config_json import read_architecture, text_config
from moexpand.upcycle.families import FAMILIES, family_of
from moexpand.upcycle.family import STACKS, Config, Family
from moexpand.upcycle.fresh_config import series_part, special_tokens, vision_part
from moexpand.upcycle.fresh_weights import fresh_tensor
from moexpand.upcycle.logical import expert_of, read_unchangeable
from moexpand.upcycle.matrices import read_matrix, stored_unit
from moexpand.upcycle.safetensors_file import Shape
from moexpand.upcycle.series_encoder import ENCODER
from moexpand.upcycle.tensors import stored_tensors

TOWER = "model.visual."
HALF = 0.5**0.5
"""A pair that FoPE leaves out has cosine and sine 1: queries and keys are turned by 45 degrees and grow by the root of 2 each."""


@dataclass(frozen=True)
class Changes:
    """What a conversion changes.

    Attributes:
        family: `same`, `qwen3_moe` (text alone) or `interns1_pro`.
        fope: Fourier positions instead of rotary ones.
        compensate: the pairs that FoPE leaves out count in the scores as before.
        fope_init_factor, fope_sep_head: of the fresh tables; 0 is the identity.
        rope_theta, max_position_embeddings: new ones, which with FoPE decide what is left out; None keeps the source's.
        tower: a fresh tower instead of the source's.
        encoder: of time series: `same`, `none`, or a fresh one.
        seed: of fresh tables and towers.
    """

    family: str = "same"
    fope: bool = False
    compensate: bool = True
    fope_init_factor: float = 0.0
    fope_sep_head: bool = True
    rope_theta: float | None = None
    max_position_embeddings: int | None = None
    tower: VisionArchitecture | None = None
    encoder: str | TimeSeriesArchitecture = "same"
    seed: int = 0


def converted_config(source: Checkpoint, changes: Changes) -> Config:
    """config.json of the target.

    Raises:
        InputError: nothing is changed, or the source has not what a change needs.
    """
    arch, family = source.architecture, source.family
    target = _target_family(source, changes)
    _check(source, changes, target)
    text = dict(text_config(source.config, family))
    text["norm_topk_prob"] = arch.norm_topk_prob  # a class may always normalise without the key
    if changes.max_position_embeddings is not None:
        text["max_position_embeddings"] = changes.max_position_embeddings
    _put_positions(text, arch, changes, target)
    kept = {key: value for key, value in source.config.items() if key.endswith("_token_id") or key == "transformers_version"}
    if changes.encoder == "none":
        kept.pop("ts_token_id", None)
    head = {"architectures": [target.class_name], "model_type": target.model_type}
    own = {"auto_map": target.auto_map} if target.auto_map else {}
    if not target.text:
        text = {**kept, **text, "tie_word_embeddings": arch.tie_word_embeddings}
        return {**_without(text, "model_type", "auto_map", "architectures"), **head, **own}
    vision = changes.tower or arch.vision
    assert vision is not None
    text["model_type"] = target.text_type or f"{target.model_type}_text"
    tower_type = source.config["vision_config"].get("model_type") if target is family else target.model_type
    tower = vision_part(vision, str(tower_type))
    if changes.tower is None:
        left = () if target is family else ("deepstack_visual_indexes",)
        tower = {**_without(source.config["vision_config"], *left), "model_type": tower["model_type"]}
    return {
        **special_tokens(vision.image_token_id),
        **kept,
        "image_token_id": vision.image_token_id,
        **head,
        **own,
        "tie_word_embeddings": arch.tie_word_embeddings,
        target.text: _without(text, "tie_word_embeddings", "auto_map", "architectures"),
        "vision_config": tower,
        **_encoder_config(source, changes, target),
    }


def _encoder_config(source: Checkpoint, changes: Changes, target: Family) -> Config:
    if isinstance(changes.encoder, TimeSeriesArchitecture):
        return series_part(changes.encoder)
    kept = target is source.family and changes.encoder == "same" and "ts_config" in source.config
    return {"ts_config": source.config["ts_config"]} if kept else {}


def _without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def _target_family(source: Checkpoint, changes: Changes) -> Family:
    """The family of the target, the grouped one of its kind where the source routes in groups."""
    if changes.family == "same":
        return source.family
    target = FAMILIES[changes.family]
    return family_of(target.child) if source.architecture.router_n_groups > 1 else target


def _check(source: Checkpoint, changes: Changes, target: Family) -> None:
    arch, where = source.architecture, source.folder
    if target is source.family and not changes.fope and changes.tower is None and changes.encoder == "same":
        raise InputError(f"{where} is of model_type={arch.model_type} already, so nothing would change; give what is to differ.")
    if source.config.get("quantization_config"):
        raise InputError(f"{where} has FP8 weights, which are not converted; give a bf16, fp16 or fp32 checkpoint.")
    if changes.fope and target.model_type != "interns1_pro":
        raise InputError(f"positions=fope is for family=interns1_pro, and the target is {target.model_type}.")
    if changes.fope and arch.fope_frequencies:
        raise InputError(f"{where} has Fourier positions already; leave positions=fope out.")
    if arch.fope_frequencies and not target.text:
        raise InputError(f"{where} has Fourier positions, which {target.model_type} does not know; they cannot be taken out.")
    if arch.rope_type != "default" or arch.sliding_window is not None:
        raise InputError(f"{where} has rope_type={arch.rope_type} or sliding windows, which are not converted.")
    for name in ("compensate", "fope_init_factor", "fope_sep_head", "rope_theta", "max_position_embeddings"):
        if not changes.fope and getattr(changes, name) != getattr(Changes(), name):
            raise InputError(f"{name}={getattr(changes, name)} is for positions=fope; leave it out.")
    if target.text and arch.vision is None and changes.tower is None:
        raise InputError(f"{target.model_type} has a vision tower and {where} has none that fits; give tower=fresh.")
    if not target.text and changes.tower is not None:
        raise InputError(f"tower=fresh is for a model with a tower, and the target is {target.model_type}, text alone.")
    if changes.encoder != "same" and target.model_type != "interns1_pro":
        raise InputError(f"encoder=... is for family=interns1_pro, and the target is {target.model_type}; leave it out.")
    if changes.encoder == "none" and not any(name.startswith(ENCODER) for name in source.tensors):
        raise InputError(f"{where} has no encoder of time series; leave encoder=none out.")
    if changes.tower is not None and changes.tower.out_hidden_size != arch.hidden_size:
        raise InputError(
            f"The fresh tower gives features of {changes.tower.out_hidden_size} and {where} takes {arch.hidden_size}."
        )


def _put_positions(text: Config, arch: Architecture, changes: Changes, target: Family) -> None:
    """The rules of positions in a decoder's config, in the form that the source has."""
    rules: Config | None = None
    if changes.fope:
        rules = {"rope_type": "default", "fope_init_factor": changes.fope_init_factor, "fope_sep_head": changes.fope_sep_head}
        rules["num_inv_freq"] = None
    elif arch.fope_frequencies or (arch.mrope_section and target.mrope_section):
        return
    theta = arch.rope_theta if changes.rope_theta is None else changes.rope_theta
    if "rope_parameters" in text:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, **(rules or {})}
    else:
        text["rope_scaling"], text["rope_theta"] = rules, theta


class Conversion:
    """The target of a conversion, tensor by tensor."""

    def __init__(self, source: Checkpoint, changes: Changes) -> None:
        self.source, self.changes = source, changes
        self.config = converted_config(source, changes)
        self.architecture = read_architecture(self.config, f"The converted {CONFIG}")
        self.family = family_of(self.architecture.model_type)
        same = self.family is source.family
        self.layout = source.experts_layout if same else self.family.experts_layout
        self.transposed = source.transposed if same else self.family.transposed
        self._read = lru_cache(maxsize=1)(read_unchangeable)  # a transposed stack holds gate and up of an expert as one run

    @cached_property
    def tensors(self) -> dict[str, tuple[str, Shape]]:
        """Dtype and shape of every tensor of the target."""
        shapes = stored_tensors(self.architecture, self.layout, transposed=self.transposed)
        shapes |= self.family.carried(self.config, CONFIG) | self.family.buffers(self.config, CONFIG)
        free = self.family.free if self.changes.encoder == "same" else ()
        kept = {name: info.shape for name, info in self.source.tensors.items() if name.startswith(free)}
        return {name: (self._dtype(name), shape) for name, shape in (shapes | kept).items()}

    @property
    def left_out(self) -> list[str]:
        """Tensors of the source that the target has no place for."""
        used = {found for name in self.tensors for found in self._sources(name)}
        return [name for name in self.source.tensors if name not in used]

    @property
    def clipped(self) -> list[int]:
        """Places of a head whose pairs FoPE leaves out."""
        half, kept = self.architecture.head_dim // 2, self.architecture.fope_frequencies
        return [*range(kept, half), *range(half + kept, 2 * half)] if self.changes.fope else []

    def produce(self, name: str) -> np.ndarray | Iterator[np.ndarray]:
        """A tensor of the target in its dtype; a stack of experts one after the other."""
        stack, prefix = name.rpartition(".")[2], name.rpartition(".")[0]
        if stack in STACKS and prefix.endswith(".mlp.experts"):
            return self._units(int(prefix.split(".")[-3]), STACKS[stack])
        expert = expert_of(name)
        if expert is not None:
            return np.ascontiguousarray(read_matrix(self.source, *expert, self._read))
        found = self._sources(name)
        if not found:
            return self._fresh(name)
        values = self.source.read_numpy(found[0])
        if self.clipped and self.changes.compensate and name.endswith(("self_attn.q_norm.weight", "self_attn.k_norm.weight")):
            scaled = values.astype(np.float32)
            scaled[self.clipped] *= np.float32(HALF)
            return scaled.astype(values.dtype)
        return values

    def _units(self, layer: int, matrices: Sequence[str]) -> Iterator[np.ndarray]:
        for expert in range(self.architecture.num_experts):
            read = [read_matrix(self.source, layer, expert, matrix, self._read) for matrix in matrices]
            yield stored_unit(read, self.transposed)

    def _fresh(self, name: str) -> np.ndarray:
        dtype, shape = self.tensors[name]
        width, gain = self.architecture.initializer_range, self.changes.fope_init_factor
        return fresh_tensor(name, shape, self.changes.seed, width, gain).astype(NUMPY[dtype])

    def _sources(self, name: str) -> list[str]:
        """Tensors of the source that a tensor of the target is made of; none for a fresh one."""
        family, prefix = self.source.family, name.rpartition(".")[0]
        if prefix.endswith(".mlp.experts"):
            layer = int(prefix.split(".")[-3])
            experts, matrices = range(self.architecture.num_experts), STACKS[name.rpartition(".")[2]]
            return [self.source.matrix_name(layer, expert, matrix) for expert in experts for matrix in matrices]
        expert = expert_of(name)
        if expert is not None:
            return [self.source.matrix_name(*expert)]
        if name.startswith(ENCODER) and isinstance(self.changes.encoder, TimeSeriesArchitecture):
            return []
        if name.startswith(TOWER):
            return [] if self.changes.tower is not None else [name]
        if ".rotary_emb." in name and self.changes.fope:
            return []
        if name.startswith(self.family.prefix):
            return [family.prefix + name.removeprefix(self.family.prefix)]
        return [name]

    def _dtype(self, name: str) -> str:
        if ".rotary_emb." in name and self.changes.fope:
            return "F32"
        found = self._sources(name) or [self.source.family.embedding_name()]
        return self.source.info(found[0]).dtype
