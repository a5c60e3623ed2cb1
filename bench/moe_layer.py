"""The expanded Mixture-of-Experts layer against what a user would run instead: parent's layer, plain router, other experts.

    layer     512 experts in 8 groups (router gradient `ste`) against the 128-expert parent's layer (plain top-8), same active
              parameters and tokens; forward and backward, at several numbers of rows an expert
    router    grouped router with `ste` against plain top-8 routers over the same 512 experts (ours and Megatron-Core's) and
              against itself with `default_vector`; the whole layer with both gradients
    experts   our 512 experts against Megatron-Core's SequentialMLP and transformers' grouped_mm experts, same weights and rows;
              ours is handed sorted rows in the first comparison and sorts them itself in the second, as the others do

One process, interleaved rounds, medians. `python bench/moe_layer.py [layer|router|experts ...] [--hidden 256 ...]`; on a GPU
`--hidden 4096 --intermediate 1536 --dtype bf16` is the released model's layer.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

warnings.filterwarnings("ignore")
EXPERTS, GROUPS, PARENT, TOP_K = 512, 8, 128, 8
QUICKSTART = (192, 48)
"""Hidden and intermediate size of the quickstart's child."""

Run = Callable[[], Any]


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run; all take turns, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            _settle()
            began = time.perf_counter()
            run()
            _settle()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(measured: list[float]) -> str:
    """Median and range in milliseconds."""
    return f"{statistics.median(measured) * 1e3:9.2f} ms ({min(measured) * 1e3:.2f} to {max(measured) * 1e3:.2f})"


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """Of the medians."""
    return statistics.median(seconds[over]) / statistics.median(seconds[under])


def moe_layer(experts: int, groups: int, sizes: argparse.Namespace, **rules: Any) -> Any:
    """A GroupedMoELayer of a one-layer model, with random weights."""
    from moexpand.parallel.model import build_stages
    from moexpand.parallel.shape import DTYPES, Layout, ModelShape, RouterRules

    shape = ModelShape(
        vocab_size=64, hidden_size=sizes.hidden, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_experts=experts, num_experts_per_tok=TOP_K, moe_intermediate_size=sizes.intermediate, router_n_groups=groups,
    )  # fmt: skip
    stage = build_stages(shape, Layout(), RouterRules(balance_coefficient=1e-3, **rules), DTYPES[sizes.dtype])[0]
    layer = stage.decoder.layers[0].mlp.train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.02)
        # Rows of one length: on random tokens every expert is then as likely as the others, so that the load is even.
        layer.router.weight.copy_(torch.nn.functional.normalize(layer.router.weight, dim=1))
    return layer


def forget_gradients(module: torch.nn.Module) -> None:
    """As an optimiser's zero_grad does."""
    for parameter in module.parameters():
        parameter.grad = None


def through(layer: Any, x_TH: torch.Tensor) -> Run:
    """Forward and backward of a layer."""
    x_T1H = x_TH[:, None].clone().requires_grad_()
    tags_1T = torch.arange(len(x_TH), device=x_TH.device)[None] * 2
    ones = torch.ones_like(x_T1H)

    def run() -> None:
        forget_gradients(layer)
        x_T1H.grad = None
        layer(x_T1H, padding_mask=tags_1T)[0].backward(ones)

    return run


def tokens(number: int, sizes: argparse.Namespace) -> torch.Tensor:
    """Random hidden states [T, H]."""
    from moexpand.parallel import cpu
    from moexpand.parallel.shape import DTYPES

    return torch.randn(number, sizes.hidden, dtype=torch.float32).to(cpu.device(), DTYPES[sizes.dtype])


def compare_layers(sizes: argparse.Namespace) -> None:
    """512 grouped experts against 128: the price of four times the weights at the same arithmetic."""
    child = moe_layer(EXPERTS, GROUPS, sizes, gradient="ste")
    parent = moe_layer(PARENT, 1, sizes)
    print(f"layer, forward and backward, hidden {sizes.hidden}, intermediate {sizes.intermediate}, {sizes.dtype}:")
    for rows in sizes.rows:
        x_TH = tokens(rows * EXPERTS // TOP_K, sizes)
        runs = {"child": through(child, x_TH), "parent": through(parent, x_TH)}
        seconds = interleaved(runs, sizes.rounds)
        print(
            f"  {rows:4d} rows an expert, {len(x_TH):6d} tokens: 512 in 8 groups {spread(seconds['child'])}, "
            f"parent's 128 {spread(seconds['parent'])}, ratio {ratio(seconds, 'child', 'parent'):.3f}"
        )
        forget_gradients(child)
        forget_gradients(parent)


def compare_routers(sizes: argparse.Namespace) -> None:
    """Grouped selection with a dense gradient against plain top-k."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter

    from moexpand.parallel import cpu

    child, dense = (moe_layer(EXPERTS, GROUPS, sizes, gradient=gradient) for gradient in ("ste", "default_vector"))
    dense.load_state_dict(child.state_dict(), strict=False)
    grouped, plain = child.router, moe_layer(EXPERTS, 1, sizes).router
    config = copy.copy(plain.config)
    config.moe_router_load_balancing_type, config.moe_aux_loss_coeff, config.moe_router_fusion = "aux_loss", 1e-3, False
    megatron = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups()).to(cpu.device()).train()
    megatron.set_layer_number(1)
    with torch.no_grad():
        megatron.weight.copy_(plain.weight)
        grouped.weight.copy_(plain.weight)
    cpu.enable()
    x_TH = tokens(sizes.tokens, sizes)

    def ours(router: Any) -> Run:
        x, tags_T = x_TH.clone().requires_grad_(), torch.arange(len(x_TH), device=x_TH.device) * 2
        gradient = torch.rand(len(x_TH), TOP_K, device=x_TH.device)

        def run() -> None:
            forget_gradients(router)
            x.grad = None
            router(x, tags_T).weights.backward(gradient)

        return run

    def with_vectors(layer: Any) -> Run:
        """The router with what `default_vector` adds to the layer beside the experts' sums."""
        x, tags_T = x_TH.clone().requires_grad_(), torch.arange(len(x_TH), device=x_TH.device) * 2
        output_TH, gradient = torch.zeros_like(x_TH).requires_grad_(), torch.rand(len(x_TH), TOP_K, device=x_TH.device)

        def run() -> None:
            forget_gradients(layer.router)
            x.grad = output_TH.grad = None
            choice = layer.router(x, tags_T)
            represented_TH = layer.default_vectors.represent(output_TH, choice.shares)
            torch.autograd.backward([choice.weights, represented_TH], [gradient, x_TH])

        return run

    def theirs() -> None:
        forget_gradients(megatron)
        x = x_TH[:, None].clone().requires_grad_()
        weights_TE, _ = megatron(x)
        weights_TE.backward(weights_TE.detach())

    runs = {
        "grouped, ste": ours(grouped),
        "plain top-8, ours": ours(plain),
        "plain top-8, Megatron-Core": theirs,
        "grouped, default_vector": with_vectors(dense),
    }
    seconds = interleaved(runs, sizes.rounds * 4)
    print(f"router with balance loss, forward and backward, {len(x_TH)} tokens, hidden {sizes.hidden}, {EXPERTS} experts:")
    for name, measured in seconds.items():
        print(f"  {name:28s}{spread(measured)}, grouped / this {ratio(seconds, 'grouped, ste', name):.3f}")
    seconds = interleaved({"ste": through(child, x_TH), "default_vector": through(dense, x_TH)}, sizes.rounds)
    print(
        f"  the whole layer: ste {spread(seconds['ste'])}, default_vector {spread(seconds['default_vector'])}, "
        f"ratio {ratio(seconds, 'default_vector', 'ste'):.3f}"
    )


def compare_experts(sizes: argparse.Namespace) -> None:
    """Stacked weights in one function against an expert after the other and against transformers' grouped_mm."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from moexpand.parallel import cpu

    layer = moe_layer(EXPERTS, GROUPS, sizes)
    ours, device = layer.experts, cpu.device()
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    sequential = SequentialMLP(EXPERTS, ours.config, submodules, groups).to(device)
    config = Qwen3MoeConfig(
        hidden_size=sizes.hidden, moe_intermediate_size=sizes.intermediate, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "grouped_mm"
    hugging = Qwen3MoeExperts(config).to(device, ours.down.dtype)
    with torch.no_grad():
        hugging.gate_up_proj.copy_(ours.gate_up.flatten(1, 2))
        hugging.down_proj.copy_(ours.down)
        for expert, mlp in enumerate(sequential.local_experts):
            mlp.linear_fc1.weight.copy_(ours.gate_up[expert].flatten(0, 1))
            mlp.linear_fc2.weight.copy_(ours.down[expert])

    print(f"{EXPERTS} experts, forward and backward, hidden {sizes.hidden}, intermediate {sizes.intermediate}, {sizes.dtype}:")
    for rows in sizes.expert_rows:
        x_TH = tokens(rows * EXPERTS // TOP_K, sizes)
        choice = layer.router(x_TH, torch.zeros(len(x_TH), dtype=torch.int64, device=device))
        seconds = _time_experts(ours, sequential, hugging, x_TH, choice.chosen, choice.weights.detach(), sizes)
        for mine, other in PAIRS:
            print(
                f"  {rows:4d} rows an expert: ours {spread(seconds[mine])}, {other} {spread(seconds[other])}, "
                f"{ratio(seconds, other, mine):.2f}x as fast"
            )


PAIRS = (("ours, sorted rows", "SequentialMLP"), ("ours", "transformers"))


def _time_experts(
    ours: Any, sequential: Any, hugging: Any, x_TH: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor, sizes: Any
) -> dict[str, list[float]]:
    visits = torch.argsort(chosen_TK.flatten(), stable=True)
    x_RH, w_R = x_TH[visits // TOP_K], weights_TK.flatten()[visits]
    counts_E = torch.bincount(chosen_TK.flatten(), minlength=EXPERTS)

    def both(module: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Run:
        ones = torch.ones_like(x)

        def run() -> torch.Tensor:
            forget_gradients(module)
            leaf = x.detach().requires_grad_()
            output = forward(leaf)
            output.backward(ones)
            assert leaf.grad is not None
            return torch.cat((output.detach(), leaf.grad))

        return run

    runs = {
        "ours, sorted rows": both(ours, lambda x: ours(x, w_R, ours.rows_given(counts_E)), x_RH),
        "SequentialMLP": both(sequential, lambda x: sequential(x, counts_E, w_R.to(x.dtype))[0], x_RH),
        "ours": both(ours, lambda x: ours(x, weights_TK, ours.rows_of(chosen_TK)), x_TH),
        "transformers": both(hugging, lambda x: hugging(x, chosen_TK, weights_TK.to(x.dtype)), x_TH),
    }
    # Nothing is timed that does not compute the same.
    bound = 1e-5 if sizes.dtype == "fp32" else 3e-2
    for mine, other in PAIRS:
        expected = runs[other]()
        assert (runs[mine]() - expected).abs().max() <= bound * expected.abs().max(), (mine, other)
    seconds = interleaved(runs, sizes.rounds)
    for module in (ours, sequential, hugging):
        forget_gradients(module)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    questions = {"layer": compare_layers, "router": compare_routers, "experts": compare_experts}
    parser.add_argument("questions", nargs="*", choices=[*questions, []], help="all by default")
    parser.add_argument("--hidden", type=int, help="512 by default, for the experts also the quickstart's 192")
    parser.add_argument("--intermediate", type=int, help="512 by default, for the experts also the quickstart's 48")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--expert-rows", type=int, nargs="+", default=[8, 32, 128], help="rows an expert in `experts`")
    parser.add_argument("--tokens", type=int, default=4096, help="of the routers' comparison")
    parser.add_argument("--rounds", type=int, default=5)
    sizes = parser.parse_args()

    import megatron.core
    import transformers

    from moexpand.parallel import ranks
    from moexpand.parallel.shape import Layout

    torch.manual_seed(0)
    ranks.start(Layout())
    for question in sizes.questions or questions:
        widths = [(sizes.hidden or 512, sizes.intermediate or 512)]
        if question == "experts" and not (sizes.hidden or sizes.intermediate):
            widths.insert(0, QUICKSTART)
        for hidden, intermediate in widths:
            questions[question](argparse.Namespace(**{**vars(sizes), "hidden": hidden, "intermediate": intermediate}))
    ranks.stop()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(
        f"medians (and ranges) of interleaved rounds; {device}, torch {torch.__version__}, "
        f"megatron-core {megatron.core.__version__}, transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    main()
