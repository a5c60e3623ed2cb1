"""Names and shapes of the vision towers that parents carry, from their `vision_config`, in the order of a model's state dict.

Qwen3-VL's tower (also Intern-S1-Pro's, without DeepStack) and Intern-S1's InternViT with its projector, as transformers'
`qwen3_vl_moe` and `internvl` build them. Linear weights are [out, in].

Legend of the formulas: H hidden of the tower, I intermediate width, O hidden of the text model.
"""

from collections.abc import Iterator
from typing import Any

from moexpand.base.errors import InputError
from moexpand.upcycle.architecture import VisionArchitecture
from moexpand.upcycle.safetensors_file import Shape

Named = Iterator[tuple[str, Shape]]


def qwen3_vl_tower(vision: dict[str, Any], prefix: str, deepstack: bool) -> dict[str, Shape]:
    """Tensors of a Qwen3-VL vision tower: patches, learned positions, blocks, and the mergers into the text model.

    Args:
        vision: `vision_config` of config.json.
        prefix: what stands before the names, `model.visual.`.
        deepstack: the family has one more merger for each of `deepstack_visual_indexes`, whose features are added to the first
            text layers.

    Raises:
        InputError: a key of `vision` is missing or no size.
    """
    hidden, inner, merge = (_size(vision, key) for key in ("hidden_size", "intermediate_size", "spatial_merge_size"))
    patch = _size(vision, "patch_size")
    merged, out = hidden * merge**2, _size(vision, "out_hidden_size")

    def merger(name: str, normed: int) -> Named:
        yield from _norm(f"{name}.norm", normed)
        yield from _linear(f"{name}.linear_fc1", merged, merged)
        yield from _linear(f"{name}.linear_fc2", merged, out)

    def tower() -> Named:
        kernel = (_size(vision, "in_channels"), _size(vision, "temporal_patch_size"), patch, patch)
        yield "patch_embed.proj.weight", (hidden, *kernel)
        yield "patch_embed.proj.bias", (hidden,)
        yield "pos_embed.weight", (_size(vision, "num_position_embeddings"), hidden)
        for block in range(_size(vision, "depth")):
            yield from _norm(f"blocks.{block}.norm1", hidden)
            yield from _norm(f"blocks.{block}.norm2", hidden)
            yield from _linear(f"blocks.{block}.attn.qkv", hidden, 3 * hidden)
            yield from _linear(f"blocks.{block}.attn.proj", hidden, hidden)
            yield from _linear(f"blocks.{block}.mlp.linear_fc1", hidden, inner)
            yield from _linear(f"blocks.{block}.mlp.linear_fc2", inner, hidden)
        # The main merger normalises single patches, those of DeepStack the merge x merge patches that become one token.
        yield from merger("merger", hidden)
        for number in range(_length(vision, "deepstack_visual_indexes") if deepstack else 0):
            yield from merger(f"deepstack_merger_list.{number}", merged)

    return {prefix + name: shape for name, shape in tower()}


def qwen3_vl_architecture(vision: dict[str, Any], image_token_id: object, deepstack: bool) -> VisionArchitecture:
    """The same tower as the engine is told of it.

    Raises:
        InputError: a key of `vision` is missing or no size.
    """
    if type(image_token_id) is not int:
        raise InputError(f"config.json has image_token_id={image_token_id!r}; the number of a token is needed.")
    sizes = (
        "depth hidden_size intermediate_size num_heads in_channels patch_size temporal_patch_size spatial_merge_size "
        "out_hidden_size num_position_embeddings"
    )
    layers = tuple(vision["deepstack_visual_indexes"]) if deepstack and _length(vision, "deepstack_visual_indexes") else ()
    return VisionArchitecture(
        **{key: _size(vision, key) for key in sizes.split()},
        hidden_act=str(vision.get("hidden_act", "gelu_pytorch_tanh")),
        deepstack_visual_indexes=layers,
        image_token_id=image_token_id,
    )


def intern_vit(
    vision: dict[str, Any], text_hidden: int, downsample_ratio: float, tower_prefix: str, projector_prefix: str
) -> dict[str, Shape]:
    """Tensors of an InternViT and of the projector that feeds its patches to the text model.

    Args:
        vision: `vision_config` of config.json. `attention_bias`, `use_qk_norm`, `norm_type`, `use_mask_token`,
            `use_absolute_position_embeddings` and `use_mean_pooling` may be absent and are then transformers' defaults.
        text_hidden: O.
        downsample_ratio: of the pixel shuffle; 0.5 makes one token of 2 x 2 patches.
        tower_prefix: what stands before the tower's names, `model.vision_tower.`.
        projector_prefix: the same for the projector, `model.multi_modal_projector.`.

    Raises:
        InputError: a key of `vision` is missing or no size.
    """
    hidden = _size(vision, "hidden_size")
    shuffled = hidden * int(1 / downsample_ratio) ** 2

    def projector() -> Named:
        yield from _norm("layer_norm", shuffled)
        yield from _linear("linear_1", shuffled, text_hidden)
        yield from _linear("linear_2", text_hidden, text_hidden)

    tower = {tower_prefix + name: shape for name, shape in _intern_vit_tower(vision, hidden)}
    return tower | {projector_prefix + name: shape for name, shape in projector()}


def _intern_vit_tower(vision: dict[str, Any], hidden: int) -> Named:
    inner, qkv_bias = _size(vision, "intermediate_size"), vision.get("attention_bias", False)
    norm_bias = vision.get("norm_type", "layer_norm") == "layer_norm"
    (height, width), (patch_height, patch_width) = _pair(vision, "image_size"), _pair(vision, "patch_size")
    yield "embeddings.cls_token", (1, 1, hidden)
    if vision.get("use_mask_token", False):
        yield "embeddings.mask_token", (1, 1, hidden)
    if vision.get("use_absolute_position_embeddings", True):
        patches = (height // patch_height) * (width // patch_width)
        yield "embeddings.position_embeddings", (1, patches + 1, hidden)
    yield "embeddings.patch_embeddings.projection.weight", (hidden, _size(vision, "num_channels"), patch_height, patch_width)
    yield "embeddings.patch_embeddings.projection.bias", (hidden,)
    for number in range(_size(vision, "num_hidden_layers")):
        layer = f"encoder.layer.{number}"
        yield f"{layer}.lambda_1", (hidden,)
        yield f"{layer}.lambda_2", (hidden,)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from _linear(f"{layer}.attention.{name}", hidden, hidden, bias=qkv_bias)
        yield from _linear(f"{layer}.attention.projection_layer", hidden, hidden)
        if vision.get("use_qk_norm", False):
            yield from _norm(f"{layer}.attention.q_norm", hidden, bias=False)
            yield from _norm(f"{layer}.attention.k_norm", hidden, bias=False)
        yield from _linear(f"{layer}.mlp.fc1", hidden, inner)
        yield from _linear(f"{layer}.mlp.fc2", inner, hidden)
        yield from _norm(f"{layer}.layernorm_before", hidden, bias=norm_bias)
        yield from _norm(f"{layer}.layernorm_after", hidden, bias=norm_bias)
    if not vision.get("use_mean_pooling", True):
        yield from _norm("layernorm", hidden)


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, size: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (size,)
    if bias:
        yield f"{name}.bias", (size,)


def _size(vision: dict[str, Any], key: str) -> int:
    value = vision.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"vision_config of config.json has {key}={value!r}; a whole number of at least 1 is needed.")
    return value


def _pair(vision: dict[str, Any], key: str) -> tuple[int, int]:
    """Height and width, written as a pair or as one number for both."""
    value = vision.get(key)
    pair: list[Any] = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(pair) != 2 or any(type(side) is not int or side < 1 for side in pair):
        raise InputError(f"vision_config of config.json has {key}={value!r}; a whole number of at least 1 or two are needed.")
    return pair[0], pair[1]


def _length(vision: dict[str, Any], key: str) -> int:
    value = vision.get(key)
    if not isinstance(value, list | tuple):
        raise InputError(f"vision_config of config.json has {key}={value!r}; a list of layers is needed.")
    return len(value)
