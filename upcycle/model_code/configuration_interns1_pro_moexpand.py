"""Configuration of Intern-S1-Pro: Qwen3-VL-MoE's with groups, Fourier positions, and a tower without DeepStack."""

from typing import Any, ClassVar

from transformers import PretrainedConfig, Qwen3VLMoeConfig, Qwen3VLMoeTextConfig, Qwen3VLMoeVisionConfig


class InternS1ProTextConfig(Qwen3VLMoeTextConfig):
    """The decoder: `router_n_groups` groups, and Fourier positions where the rope rules have one of their keys."""

    model_type = "interns1_pro_text"
    # Keys that the rules of plain rotary embedding do not have; transformers would warn of each.
    ignore_keys_at_rope_validation = {"fope_init_factor", "fope_sep_head", "num_inv_freq"}  # noqa: RUF012

    router_n_groups: int = 1


class InternS1ProVisionConfig(Qwen3VLMoeVisionConfig):
    """The tower."""

    model_type = "interns1_pro_vision"

    deepstack_visual_indexes: list[int] | tuple[int, ...] = ()


class InternS1ProTimeSeriesConfig(PretrainedConfig):
    """The encoder of time series, which the model code beside this file does not compute; serving engines read its sizes."""

    model_type = "interns1_pro_time_series"


class InternS1ProConfig(Qwen3VLMoeConfig):
    """The whole model; `ts_config` is there where the model has an encoder of time series, as engines ask for it."""

    model_type = "interns1_pro"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": InternS1ProVisionConfig,
        "text_config": InternS1ProTextConfig,
    }

    def __post_init__(self, **kwargs: Any) -> None:
        sizes = kwargs.pop("ts_config", None)
        super().__post_init__(**kwargs)
        if sizes is not None:
            self.ts_config = sizes if isinstance(sizes, PretrainedConfig) else InternS1ProTimeSeriesConfig(**sizes)


__all__ = ["InternS1ProConfig", "InternS1ProTextConfig", "InternS1ProTimeSeriesConfig", "InternS1ProVisionConfig"]
