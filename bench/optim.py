"""`dfptkd bench optim`: one update of a network's parameters, by every optimiser that is there.

    sgd, adamw            as a run takes them: torch's fused kernels
    sgd[foreach], ...     torch's default: a few kernels for all parameters together
    apex-sgd, apex-lamb   where apex's CUDA extension has been built

All in one process, interleaved, each on its own copy of the same parameters and gradients. GB/s are
those of the least bytes: an update reads gradient, parameter and state and writes the last two.

    dfptkd bench optim [--model torchvision:resnet18] [--rounds 50]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ..engine.config import LossConfig, OptimConfig
from ..engine.errors import UsageError
from ..engine.methods.cross_entropy import CrossEntropy
from ..engine.models import create_model
from ..engine.optim import build_optimizer, check_optimizer, rates_to_device
from ..engine.timing import copy_bandwidth, time_interleaved
from .kernels import print_rows
from .measure import (
    Row,
    append_rows,
    bench_parser,
    captured,
    make_row,
    peak_bytes,
    prepared_device,
)

NAMES = ("sgd", "adamw", "apex-sgd", "apex-lamb")
STATE_TENSORS = {"sgd": 1, "adamw": 2, "apex-sgd": 1, "apex-lamb": 2}


def available(device: torch.device) -> list[str]:
    """Optimisers that can be had here, and on the terminal why not the others."""
    found = []
    for name in NAMES:
        try:
            check_optimizer(OptimConfig(name=name), device)  # type: ignore[arg-type]
            found.append(name)
        except UsageError as error:
            print(error)
    return found


def variants(model: str, device: torch.device) -> dict[str, torch.optim.Optimizer]:
    """Provider -> an optimiser of its own copy of the model, gradients in place."""
    found = {}
    for name in available(device):
        found[name] = _optimizer(name, _network(model, device))
    for name, maker in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        config = dataclasses.asdict(OptimConfig())
        options = {"momentum": config["momentum"]} if name == "sgd" else {"capturable": False}
        found[f"{name}[foreach]"] = maker(
            _network(model, device).parameters(),
            lr=1e-3, weight_decay=config["weight_decay"], foreach=True, **options,
        )  # fmt: skip
    return found


def _optimizer(name: str, network: nn.Module) -> torch.optim.Optimizer:
    config = OptimConfig(name=name, lr=1e-3)  # type: ignore[arg-type]
    return build_optimizer(CrossEntropy(network, LossConfig()), config, 1)


def _network(model: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    network = create_model(model, num_classes=1000)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for param in network.parameters():
        param.grad = 1e-3 * torch.randn_like(param)
    return network


def _graphs(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Callable[[], object]]:
    """Their steps as CUDA graphs, those that allow it."""
    graphs: dict[str, Callable[[], object]] = {}
    for name, optimizer in optimizers.items():
        if name != "apex-sgd":  # takes a number, which is enough to time it
            rates_to_device(optimizer, optimizer.param_groups[0]["params"][0].device)
        try:
            graphs[name] = captured(optimizer.step)
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"{name}: no CUDA graph: {' '.join(str(error).split())[:100]}")
    return graphs


def bench(model: str, device: torch.device, *, rounds: int) -> Iterator[Row]:
    """One row for each provider and timing contract, as they are done."""
    optimizers = variants(model, device)
    numel = sum(p.numel() for group in optimizers["sgd"].param_groups for p in group["params"])
    copy = copy_bandwidth(device)
    calls: dict[str, Callable[[], object]] = {n: o.step for n, o in optimizers.items()}
    contracts = {"hot": lambda: calls}
    if device.type == "cuda":
        contracts["graph"] = lambda: _graphs(optimizers)
    for contract, make_calls in contracts.items():
        timed = make_calls()
        timings = time_interleaved(timed, device, rounds=rounds, warmup=5)
        for name, timing in timings.items():
            moved = (3 + 2 * STATE_TENSORS[name.partition("[")[0]]) * 4 * numel
            yield make_row(
                timing,
                device,
                kernel=f"optim:{model}",
                provider=name,
                passes="update",
                contract=contract,
                shape=(numel,),
                dtype=torch.float32,
                bytes_moved=moved,
                copy_gb_per_s=copy,
                peak=None if contract == "graph" else peak_bytes(timed[name], device),
            )


def main(args: Sequence[str]) -> int:
    """`dfptkd bench optim`; returns the exit code."""
    parser = bench_parser("optim")
    parser.add_argument("--model", default="torchvision:resnet18", help="name of a model")
    options = parser.parse_args(args)
    device = prepared_device(options)
    rows = []
    for row in bench(options.model, device, rounds=options.rounds):
        append_rows([row], options.out)
        rows.append(row)
    print_rows(rows)
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
