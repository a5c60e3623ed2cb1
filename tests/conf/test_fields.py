"""Keys that are not at their defaults, told as a command line gives them."""

from moexpand.conf.fields import changed
from moexpand.conf.model_schema import Model, VisionModel
from moexpand.conf.train_schema import Balance, Run, Vision


def test_nothing_is_changed_by_default() -> None:
    assert changed(Model(), "model") == changed(Run(), "run") == []


def test_changed_keys_are_told_as_a_command_line_gives_them() -> None:
    tower = VisionModel(depth=2, deepstack_visual_indexes=[0, 1])
    assert changed(Model(fope_sep_head=False, rope_theta=1e4, vision=tower), "model") == [
        "model.rope_theta=10000.0",
        "model.fope_sep_head=false",
        "model.vision.depth=2",
        "model.vision.deepstack_visual_indexes=[0,1]",
    ]
    assert changed(Vision(freeze=["tower", "decoder"]), "vision") == ["vision.freeze=[tower,decoder]"]
    assert changed(Balance(scope="global", selection_bias=True), "b") == ["b.scope=global", "b.selection_bias=true"]
