"""Pictures have transformers' bits and settings, and their tokens follow from their sizes."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from moexpand.base.errors import InputError
from moexpand.data.image_decode import BadImage, decode_image, image_size
from moexpand.data.images import ImageProcessor, ImageSettings, image_tokens
from moexpand.data.parts import encode_parts
from moexpand.data.tokens import load_tokenizer
from tests.data.picture_maker import picture, saved

QWEN3_VL = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
"""As Qwen3-VL's checkpoints hold it."""
SMALL = ImageSettings(min_pixels=4096, max_pixels=65536)
"""Limits that tests can pass from both sides with few pixels."""


def theirs(settings: ImageSettings) -> Qwen2VLImageProcessorPil:
    """transformers' processor of the same settings."""
    size = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    names = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "rescale_factor")
    return Qwen2VLImageProcessorPil(size=size, **{name: getattr(settings, name) for name in names})


# ---------------------------------------------------------------- the same bits as transformers

SIZES = [(256, 256), (257, 255), (770, 1033), (1, 1), (1, 200), (200, 1), (5, 900), (31, 33), (64, 48), (640, 480), (96, 17000)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_patches_and_grid_have_transformers_bits_at_every_size(width, height):
    settings = ImageSettings()
    image = picture(width, height)
    expected = theirs(settings)(image)
    processor = ImageProcessor(settings)
    raw, grid = processor.process(image)
    assert (raw.dtype, raw.shape) == (np.uint8, (np.prod(grid), 3 * 16 * 16))
    patches = processor.normalise(raw)
    assert patches.dtype == np.float32
    assert patches.tobytes() == expected["pixel_values"].tobytes()
    assert patches.shape == expected["pixel_values"].shape
    assert grid == tuple(expected["image_grid_thw"][0])


MODES = ["RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "P+transparency", "1", "CMYK", "YCbCr", "I;16", "HSV", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_patches_have_transformers_bits_in_every_mode(mode):
    image = picture(100, 70, "RGB" if mode == "HSV" else mode).convert("HSV") if mode == "HSV" else picture(100, 70, mode)
    expected = theirs(SMALL)(image)["pixel_values"]
    processor = ImageProcessor(SMALL)
    assert processor.normalise(processor.process(image)[0]).tobytes() == expected.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    patch=st.sampled_from([14, 16]),
    merge=st.integers(1, 3),
    frames=st.integers(1, 3),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.1, 1)] * 3),
    rescale=st.sampled_from([1 / 255, 1 / 256, 0.00392156862745098]),
    seed=st.integers(0, 9),
)
def test_any_settings_give_transformers_bits_normalised_here_or_by_the_table(
    width, height, patch, merge, frames, mean, std, rescale, seed
):
    settings = ImageSettings(patch, merge, frames, 3000, 40_000, mean, std, rescale)
    image = picture(width, height, seed=seed)
    processor = ImageProcessor(settings)
    if max(width, height) / min(width, height) > 200:
        with pytest.raises(BadImage, match="200 times"):
            processor.process(image)
        with pytest.raises(ValueError, match="aspect ratio"):
            theirs(settings)(image)
        return
    expected = theirs(settings)(image)
    raw, grid = processor.process(image)
    assert processor.normalise(raw).tobytes() == expected["pixel_values"].tobytes()
    assert grid == tuple(expected["image_grid_thw"][0])
    # what a device does with the table: channel by channel, the frame repeated
    repeated = np.repeat(raw.reshape(len(raw), 3, 1, patch * patch), frames, axis=2)
    assert processor.table[np.arange(3)[:, None, None], repeated].tobytes() == expected["pixel_values"].tobytes()


# ---------------------------------------------------------------- tokens from sizes

SIDES = st.one_of(st.integers(1, 700), st.integers(1, 70_000))
LIMITS = st.sampled_from([(65_536, 16_777_216), (3136, 1_003_520), (1, 1), (1024, 1024), (100_000, 100_001), (65_536, 65_536)])


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=30),
    limits=LIMITS,
    patch=st.sampled_from([14, 16]),
    merge=st.integers(1, 3),
)
@example(
    sizes=[(48, 80), (16, 16), (48, 4096), (4095, 4097), (4112, 4080), (1, 201), (0, 5), (1, 1 << 26)],
    limits=(1, 16_777_216),
    patch=16,
    merge=2,
)
def test_tokens_of_many_sizes_are_those_of_each_in_transformers(sizes, limits, patch, merge):
    settings = ImageSettings(patch, merge, min_pixels=limits[0], max_pixels=limits[1])
    heights, widths = np.array(sizes).T
    tokens = settings.vision_tokens(heights, widths)
    assert tokens.dtype == np.int64
    assert tokens.shape == heights.shape
    for (height, width), count in zip(sizes, tokens, strict=True):
        try:
            expected = settings.smart_resize(height, width)
        except BadImage:
            assert count == 0
            assert min(height, width) < 1 or max(height, width) > 200 * min(height, width) or max(height, width) >= 1 << 26
            continue
        assert expected == smart_resize(height, width, settings.factor, *limits)
        assert count == expected[0] * expected[1] // settings.factor**2 > 0


def test_halves_are_rounded_to_even_at_every_multiple():
    """Sides at and around odd multiples of half the factor, where rounding half up would differ."""
    sides = np.array([16 + 32 * k + shift for k in range(130) for shift in (-1, 0, 1)])
    heights, widths = (grid.ravel() for grid in np.meshgrid(sides, sides[::7]))
    settings = ImageSettings()
    expected = [
        -1 if max(h, w) / min(h, w) > 200 else np.prod(smart_resize(int(h), int(w), 32, 65_536, 16_777_216)) // 1024
        for h, w in zip(heights, widths, strict=True)
    ]
    tokens = settings.vision_tokens(heights, widths)
    assert [int(x) or -1 for x in tokens] == expected
    assert settings.vision_tokens(np.array([[48], [80]]), np.array([320, 352, 384])).shape == (2, 3)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), format=st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_planned_tokens_are_those_of_the_decoded_picture(width, height, format):
    content = saved(picture(width, height), format)
    size = image_size(content)
    planned = int(SMALL.vision_tokens(*(np.array([side]) for side in size))[0])
    if not planned:
        with pytest.raises(BadImage, match="200 times"):
            ImageProcessor(SMALL).process(decode_image(content))
        return
    patches, grid = ImageProcessor(SMALL).process(decode_image(content))
    assert planned == image_tokens(grid, SMALL.merge_size) == len(patches) // 4


def test_ids_of_a_picture_are_start_pads_end():
    assert image_tokens((1, 48, 64), 2) == 768
    ids = encode_parts([{"image": "png"}], load_tokenizer("qwen"), [image_tokens((1, 48, 64), 2)]).ids
    assert ids.dtype == np.int32
    assert ids.tolist() == [151652] + [151655] * 768 + [151653]
    with pytest.raises(InputError, match="merge_size 2"):
        image_tokens((1, 3, 4), 2)


# ---------------------------------------------------------------- settings


def write(folder, fields, name="preprocessor_config.json"):
    (folder / name).write_text(json.dumps(fields))


FULL = QWEN3_VL | {
    "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "crop_size": None,
    "rescale_factor": 0.00392156862745098, "data_format": "channels_first", "device": None, "do_center_crop": None,
}  # fmt: skip
LEGACY = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip


@pytest.mark.parametrize("fields", [QWEN3_VL, FULL, LEGACY, FULL | {"min_pixels": 4096, "max_pixels": 8192}])
def test_a_checkpoints_settings_give_the_bits_of_the_processor_that_transformers_loads_from_it(fields, tmp_path):
    write(tmp_path, fields)
    image = picture(190, 140)
    expected = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(image)
    processor = ImageProcessor(ImageSettings.from_checkpoint(tmp_path))
    patches, grid = processor.process(image)
    assert processor.normalise(patches).tobytes() == expected["pixel_values"].tobytes()
    assert grid == tuple(expected["image_grid_thw"][0])


def test_defaults_are_those_of_qwen3_vl_and_what_transformers_saves_is_read(tmp_path):
    write(tmp_path, QWEN3_VL)
    assert ImageSettings.from_checkpoint(tmp_path) == ImageSettings()
    other = ImageSettings(min_pixels=5000, max_pixels=90_000)
    theirs(other).save_pretrained(tmp_path)
    assert ImageSettings.from_checkpoint(tmp_path) == other


def test_the_nested_processor_config_goes_first_as_in_transformers(tmp_path):
    write(tmp_path, LEGACY)
    write(tmp_path, {"processor_class": "Qwen3VLProcessor"}, "processor_config.json")
    assert ImageSettings.from_checkpoint(tmp_path).patch_size == 14
    write(tmp_path, {"image_processor": QWEN3_VL}, "processor_config.json")
    assert ImageSettings.from_checkpoint(tmp_path).patch_size == 16
    assert Qwen2VLImageProcessorPil.from_pretrained(tmp_path).patch_size == 16


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sharpen": 2}, "has the field sharpen"),
        ({"resample": 2}, "sets resample to 2"),
        ({"do_resize": False}, "sets do_resize to False"),
        ({"do_center_crop": True}, "sets do_center_crop to True"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"size": {"height": 4, "width": 4}}, "areas"),
        ({"size": {"shortest_edge": 4}}, "longest_edge"),
        ({"patch_size": None}, "does not give patch_size"),
        ({"patch_size": "16"}, "patch_size"),
        ({"patch_size": 15}, "must be even"),
        ({"image_std": [0.5, 0, 0.5]}, "must be positive"),
        ({"image_mean": [0.5, 0.5]}, "three finite numbers"),
        ({"image_mean": ["a", 1, 2]}, "three finite numbers"),
        ({"min_pixels": 1 << 30}, "above max_pixels"),
        ({"rescale_factor": "big"}, "rescale_factor"),
    ],
)
def test_settings_that_would_change_the_result_are_refused_by_name(change, sentence, tmp_path):
    write(tmp_path, QWEN3_VL | change)
    with pytest.raises(InputError, match=sentence):
        ImageSettings.from_checkpoint(tmp_path)


def test_a_folder_without_settings_and_damaged_json_are_refused(tmp_path):
    with pytest.raises(InputError, match="neither"):
        ImageSettings.from_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        ImageSettings.from_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        ImageSettings.from_checkpoint(tmp_path)


def test_the_fingerprint_changes_with_every_setting_and_with_nothing_else():
    base = ImageSettings()
    changed = [
        ImageSettings(patch_size=14), ImageSettings(merge_size=1), ImageSettings(temporal_patch_size=1),
        ImageSettings(min_pixels=1), ImageSettings(max_pixels=70_000), ImageSettings(image_mean=(0.5, 0.5, 0.4)),
        ImageSettings(image_std=(0.5, 0.5, 0.4)), ImageSettings(rescale_factor=1 / 256),
    ]  # fmt: skip
    assert len({settings.fingerprint for settings in [base, *changed]}) == 9
    assert base.fingerprint == ImageSettings(image_mean=[0.5, 0.5, 0.5]).fingerprint  # type: ignore[arg-type]
    assert ImageSettings(image_mean=(0, 0, 0)).fingerprint == ImageSettings(image_mean=(0.0, 0.0, 0.0)).fingerprint  # type: ignore[arg-type]
    # in indexes that exist: a change of this value makes every one of them unusable
    assert base.fingerprint == "855f7996348c14707ce5884edabde1c88c3fa3dd17f7e2f357096e40b9c92c29"
