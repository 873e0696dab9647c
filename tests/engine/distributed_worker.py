"""One of several processes of test_distributed.py: `distributed_worker.py SCENARIO,... OUT`.

A scenario writes what this rank has found to OUT/<scenario>-rank<r>.json or .safetensors.
"""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file

from dfptkd.engine import train as train_module
from dfptkd.engine.cli import main
from dfptkd.engine.config import DataConfig, LossConfig, OptimConfig, RunConfig, StepConfig
from dfptkd.engine.data import load_data, train_batches
from dfptkd.engine.distributed import SINGLE, World
from dfptkd.engine.errors import DataError, DfptkdError
from dfptkd.engine.methods import build_method
from dfptkd.engine.methods.base import Samples
from dfptkd.engine.metrics import Evaluator
from dfptkd.engine.models import create_model
from dfptkd.engine.step import TrainStep

CPU = torch.device("cpu")
STEPS = 3  # before any ReLU flips by rounding alone
METHODS = ("kd", "dfpt", "dfpt_plus")
DATA_CONFIG = DataConfig(name="synthetic", num_classes=10, image_size=16, limit=101)
CONTRAST = LossConfig(crd=0.8, crd_negatives=20)
OPTIM = OptimConfig(lr=1e-3, schedule="constant", weight_decay=0.01, ema_decay=0.5)


def step_data():
    return load_data(DATA_CONFIG, CPU)


def take_statistics(network, *labels):
    """Those of a batch, so that BatchNorms in eval mode keep activations in bounds, too."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.train()(images, *labels)


def make_step(method, world=SINGLE, *, eval_mode=False, optim=OPTIM, **run):
    """The same networks whatever the world."""
    torch.manual_seed(0)
    student = create_model("cifar:resnet8", num_classes=10)
    teacher = None if method == "ce" else create_model("cifar:resnet8", num_classes=10)
    run = {"global_batch": 8, "kernels": "native", **run}  # nothing is timed
    config = RunConfig(method=method, optim=optim, data=DATA_CONFIG, device="cpu", epochs=1, **run)
    for network in (student, teacher):
        if network is not None:
            take_statistics(network)
    made = build_method(config, student, teacher, step_data().train.labels)
    if eval_mode:
        labels = torch.zeros(32, dtype=torch.int64)
        samples = [1.0, Samples(torch.arange(32), labels[0])] if made.takes_samples else []
        take_statistics(made, labels, *samples)
    made.train(not eval_mode)
    return TrainStep(
        made, config, step_data(), total_steps=100, steps_per_epoch=8, device=CPU, world=world
    )


def batches(shard=(0, 1)):
    found = train_batches(step_data().train, batch_size=8, seed=0, epoch=0, shard=shard)
    return list(found)[:STEPS]


def train(step, shard=(0, 1), count=STEPS, change=lambda batch: batch):
    for i, batch in enumerate(batches(shard)[:count]):
        step(change(batch), i)
    return step


def figures(step):
    """Parameters, averages and the last gradients, each as one vector."""
    ema = step.ema.module.parameters()
    return {
        "params": torch.cat([p.detach().flatten() for p in step.params]),
        "grads": torch.cat([p.grad.flatten() for p in step.params]),
        "ema": torch.cat([p.detach().flatten() for p in ema]),
    }


def whole_state(step):
    """Everything that a step may write, by name."""
    found = dict(step.method.trained_state())  # the banks of CRD among it
    momentum = [s["momentum_buffer"] for s in step.optimizer.state.values()]
    found |= {f"momentum.{i}": buffer for i, buffer in enumerate(momentum)}
    found |= {f"ema.{k}": v for k, v in step.ema.state_dict().items()}
    found["meter"] = step.meter.sums
    return {k: v.clone() for k, v in found.items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


# Scenarios ----------------------------------------------------------------------------------------


def steps(world):
    """The walk of each method, whole and in accumulated parts."""
    found = {}
    assert world.size > 1
    for method in METHODS:
        for accumulate in (1, 2):
            step = make_step(method, world, eval_mode=True, accumulate=accumulate)
            train(step, world.shard)
            assert step.gate.skipped == 0
            name = f"{method}.{accumulate}"
            found |= {f"{name}.{k}": v for k, v in figures(step).items()}
            found[f"{name}.meter"] = step.world.total(step.meter.sums)
    return found


def contrast(world):
    """The walk with CRD, whole and in accumulated parts, and its banks."""
    found = {}
    for accumulate in (1, 2):
        step = make_step("dfpt", world, eval_mode=True, accumulate=accumulate, loss=CONTRAST)
        train(step, world.shard)
        state = {**figures(step), **dict(step.method.contrast.named_buffers())}
        found |= {f"{accumulate}.{k}": v for k, v in state.items()}
    return found


def gate(world):
    """A loss that is not finite in rank 1 alone, its gradients finite or not."""
    found = {}
    for method in ("ce", "dfpt", "dfpt_plus"):
        for part in ("images", "loss"):
            for first in (True, False):
                found[f"{method} {part} {first}"] = _bad_step(world, method, part, first)
    for part in ("images", "loss"):
        found[f"crd {part}"] = _bad_step(world, "dfpt", part, False, loss=CONTRAST)
    found["control"] = _bad_step(world, "ce", "loss", False, agree=False)
    return found


def _bad_step(world, method, part, first, agree=True, **run):
    step = make_step(method, world, **run)
    good, bad, after = batches(world.shard)[:3]
    if not first:
        step(good, 0)
    before = whole_state(step)
    plain, losses, all_true = step.normalise, step.method.losses, world.all_true
    if not agree:
        world.all_true = lambda flags: flags
    if world.rank == 1 and part == "images":
        step.normalise = lambda batch: plain(batch) * float("nan")
    if world.rank == 1 and part == "loss":

        def spoilt(*args):
            output = losses(*args)
            output.total = output.total + float("nan")  # the gradient stays finite
            return output

        step.method.losses = spoilt
    step(bad, 1)
    unchanged = same(before, whole_state(step))
    step.normalise, world.all_true = plain, all_true
    step.method.losses = losses
    step(after, 2)
    state = whole_state(step)
    params = torch.cat([p.detach().flatten() for p in step.params]).double()
    return {
        "unchanged": unchanged,
        "skipped": int(step.gate.skipped),
        "goes on": not same(before, state) and all(v.isfinite().all() for v in state.values()),
        "sum": params.sum().item(),
        "statistics": sum(b.double().sum().item() for b in step.method.trained_buffers()),
    }


def compiled(world):
    """A compiled walk beside an eager one; nothing recompiles after the first step.

    The regions are traced and differentiated as ever and then run by PyTorch's own kernels: what
    Inductor makes of them is not what several processes change, and would take most of a minute.
    """
    TrainStep._compile = lambda step: step.method.compile_regions(
        fullgraph=True, dynamic=False, backend="aot_eager"
    )
    start, ways = None, []
    for mode in ("eager", "compile"):
        step = make_step("dfpt", world, step=StepConfig(mode=mode))
        start = torch.cat([p.detach().flatten() for p in step.params])
        for i, batch in enumerate(batches(world.shard)[:3]):
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                step(batch, i)
        ways.append(torch.cat([p.detach().flatten() for p in step.params]) - start)
    gap = (ways[0] - ways[1]).norm() / ways[0].norm()
    return {"gap": gap.item(), "sum": ways[1].double().sum().item()}


def evaluation(world):
    """All columns of an evaluation, and how often each image was looked at."""
    step = make_step("dfpt", world)
    data = step_data()
    seen, batch = [], data.test.batch
    data.test.batch = lambda indices, **options: (
        seen.extend(indices.tolist()) or batch(indices, **options)
    )
    evaluator = Evaluator(step.method, data, batch_size=16, workers=0, world=world)
    teacher = evaluator.teacher()
    seen.clear()
    row = evaluator(None)
    return {"teacher": teacher, "row": row, "seen": seen[: len(seen) // 2]}  # student, then prompt


def failure(world):
    """An error of rank 1 alone reaches both; one of the main process, too."""

    def work():
        if world.rank == 1:
            raise DataError("rank 1 has no data")

    found = []
    for attempt in (
        lambda: world.everywhere(work),
        lambda: world.of_main(lambda: (_ for _ in ()).throw(DataError("main has none"))),
    ):
        try:
            attempt()
        except DataError as error:
            found.append([str(error), error.is_echo])
    return found


def numbers(world):
    """What does not depend on a method: sums, random draws, JSON, tensors."""
    torch.manual_seed(world.seed_of_rank(0, 0))
    tensors = world.tensors_of_main({"a": torch.arange(3)} if world.is_main else None)
    return {
        "exchange": world.exchange({"rank": world.rank, "text": "ä" * (world.rank + 1)}),
        "draw": torch.rand(1).item(),
        "of_main": world.of_main(lambda: [world.rank, 0.1]),
        "tensors": tensors["a"].tolist(),
    }


def hang(world):
    """Rank 1 comes too late: rank 0 ends its wait with an error, and not never."""
    started, ended = time.monotonic(), Path(sys.argv[2]) / "hang-rank0.json"
    try:
        with world.connected(CPU, timeout_s=2):
            if world.rank == 1:
                while time.monotonic() < started + 60 and not ended.exists():
                    time.sleep(0.1)
            else:
                world.exchange(None)
    except DfptkdError as error:
        return {"error": str(error), "seconds": time.monotonic() - started}
    return None


SCENARIOS = {
    f.__name__: f for f in (steps, contrast, gate, compiled, evaluation, failure, numbers, hang)
}


def run_scenarios(names, out):
    world = World.from_environment()
    with nullcontext() if "hang" in names else world.connected(CPU):
        for name in names:
            started = time.monotonic()
            found = SCENARIOS[name](world)
            if isinstance(
                next(iter(found.values()), None) if isinstance(found, dict) else None, torch.Tensor
            ):
                save_file(found, out / f"{name}-rank{world.rank}.safetensors")
            else:
                (out / f"{name}-rank{world.rank}.json").write_text(json.dumps(found))
            print(f"{name}: {time.monotonic() - started:.1f} s")


def run_command(args):
    """The command line, of a student that drops pixels at random; a rank may come to harm.

    DFPTKD_TEST_HARM="rank:step:signal number" does that to a rank in that step of its first start.
    """
    plain, call = train_module.create_model, train_module.TrainStep.__call__

    def dropping(name, **options):
        model = plain(name, **options)
        if name == "cifar:resnet8_s2":
            model.register_forward_pre_hook(
                lambda m, x: (torch.nn.functional.dropout(x[0], 0.1, m.training),)
            )
        return model

    def harmed(step, batch, at):
        call(step, batch, at)
        rank, when, number = (int(n) for n in os.environ["DFPTKD_TEST_HARM"].split(":"))
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        is_student = step.config.role == "student"
        if first and is_student and step.world.rank == rank and at == when:
            os.kill(os.getpid(), signal.Signals(number))

    train_module.create_model = dropping
    if "DFPTKD_TEST_HARM" in os.environ:
        train_module.TrainStep.__call__ = harmed
    return main(args)


if __name__ == "__main__":
    if sys.argv[1] == "command":
        sys.exit(run_command(sys.argv[2:]))
    run_scenarios(sys.argv[1].split(","), Path(sys.argv[2]))
