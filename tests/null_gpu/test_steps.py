"""Steps of every method and arm in every mode, on a GPU that computes nothing: the host's side.

After the first step nothing waits for the device; a capture breaks no rule and holds everything
that its step does; torch warns of nothing; steps of several seeds, which replay side by side,
compute their matrix products in workspaces of their own.
"""

import json

import pytest
import torch
from null_gpu.conftest import HERE

from dfptkd.recipes.arms import ARMS

METHODS = ("ce", "kd", "dkd", "dist", "dfpt", "dfpt_plus")
TINY = {"teacher": {"name": "cifar:resnet8"}}
# Arms that change which code is traced; the others change numbers in it.
STRUCTURES = (
    "mixture", "reverse_kl", "alternating", "rkd", "decoupled", "no_fusion", "identity_init",
    "parallel", "single_scale", "no_prompt_norm", "batch_statistics", "grouped_fusion", "stage_2",
    "short_warmup",
)  # fmt: skip
OPTIONS = {
    "accumulation": {"accumulate": 2},
    "EMA": {"optim": {"ema_decay": 0.9}},
    "clipping": {"optim": {"clip_grad_norm": 1.0}},
    "AdamW": {"optim": {"name": "adamw"}},
    "lr warm-up": {"optim": {"warmup_epochs": 1.0}},
    "loss warm-up": {"loss": {"warmup_epochs": 1.0}},
    "all of them": {
        "accumulate": 2,
        "loss": {"warmup_epochs": 1.0},
        "optim": {"name": "adamw", "clip_grad_norm": 1.0, "ema_decay": 0.9, "warmup_epochs": 1.0},
    },
    "smooth labels": {"loss": {"label_smoothing": 0.1}},
    "fp32": {"precision": "fp32"},
    "joint paths": {"step": {"joint_paths": True}},
    "other mean and std": {"teacher": {**TINY["teacher"], "mean": [0.5] * 3, "std": [0.5] * 3}},
}
# Those that change what a compiled region is given; the others are outside of them.
TRACED = (
    "accumulation",
    "loss warm-up",
    "all of them",
    "fp32",
    "joint paths",
    "other mean and std",
)


def case(method, mode, backend="none", arm=None, label="", **changes):
    return {
        "method": method, "mode": mode, "backend": backend, "arm": arm, "label": label,
        "changes": {**TINY, **changes},
    }  # fmt: skip


def method_of(arm):
    """The one that an arm is for."""
    if arm.startswith("same_total"):
        return "kd"
    return "dfpt_plus" if arm.startswith("backbone_lr") else "dfpt"


def arm_case(arm, mode, backend="none"):
    made = case(method_of(arm), mode, backend, arm)
    if f"_{arm}".partition("_teacher_")[2].startswith("resnet"):  # it names a teacher
        del made["changes"]["teacher"]
    return made


def groups():
    """Name -> cases that share a process."""
    made = {
        f"{mode}: methods": [case(m, mode, backend) for m in METHODS]
        for mode, backend in (("eager", "none"), ("compile", "eager"), ("graph", "aot_eager"))
    }
    for mode, backend in (("eager", "none"), ("compile", "eager"), ("graph", "none")):
        made[f"{mode}: options"] = [
            case("dfpt", mode, backend, label=label, **changes)
            for label, changes in OPTIONS.items()
            if mode != "compile" or label in TRACED
        ]
        # Alternating steps are two, which is refused as one graph.
        # CRD looks at the labels when it is built, and read back they are all of class 0.
        arms = [a for a in ARMS if a != "crd" and (mode, a) != ("graph", "alternating")]
        if mode == "compile":
            arms = [a for a in arms if a in STRUCTURES]
        made[f"{mode}: arms"] = [arm_case(arm, mode, backend) for arm in arms]
    made["two seeds"] = [
        {**case(method, "graph", "eager"), "seeds": 2} for method in ("kd", "dfpt", "dfpt_plus")
    ]
    return made


GROUPS = groups()


@pytest.mark.parametrize("group", GROUPS)
def test_steps(on_null_gpu, group, record_property):
    cases = GROUPS[group]
    ended = on_null_gpu(HERE / "steps.py", stdin=json.dumps(cases))
    results = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    record_property("table", f"{group}, torch {torch.__version__}\n" + table(results))
    failures = [
        f"{result['name']} by {result['mode']}: {found}"
        for result in results
        for found in complaints(result)
    ]
    assert not failures, "\n".join([*failures, ended.stderr[-3000:]])
    assert len(results) == len(cases), f"the process ended early:\n{ended.stderr[-3000:]}"


def complaints(result):
    """What is wrong with a case, one line each."""
    found = [] if result["error"] is None else [result["error"].splitlines()[0]]
    if result["fallback"] is not None:
        found.append(result["fallback"])
    if result["waits"]:
        found.append(f"{result['waits']} waits for the device after the first step")
    if result["strays"]:
        found.append(f"{result['strays']} kernels or copies during a capture are not part of it")
    found += result["violations"]
    found += [f"{number} x {text}" for text, number in result["warnings"].items()]
    for i, one in enumerate(result["workspaces"]):
        for other in result["workspaces"][i + 1 :]:
            shared = set(one) & set(other)
            if shared:
                found.append(f"graphs of two seeds share {len(shared)} workspaces of cuBLAS")
    if result["mode"] == "graph" and not found and not result["nodes"]:
        found.append("no graph was captured")
    return found


def table(results):
    """Launches and copies of a step, nodes of its graph."""
    lines = [f"{'':<36}{'mode':<9}{'launches':>9}{'copies':>7}{'nodes':>7}{'waits':>6}{'s':>6}"]
    for r in results:
        counts = r["counts"]
        launches = counts.get("launches", 0) + counts.get("memsets", 0)
        copies = sum(counts.get(k, 0) for k in ("to_device", "to_host", "on_device"))
        verdict = "ok" if not complaints(r) else "FAILED"
        lines.append(
            f"{r['name']:<36}{r['mode']:<9}{launches:>9}{copies:>7}{r['nodes']:>7}{r['waits']:>6}"
            f"{r['seconds']:>6.1f}  {verdict}"
        )
    return "\n".join(lines)
