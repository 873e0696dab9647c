"""Suggestions for a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

# What users of other trainers type (timm, torchvision's references, mdistiller, RepDistiller,
# Lightning, Hugging Face) -> the options that do it here, or a sentence where there is none. An
# option of ours needs no line for the last part of its name: `momentum`, `gamma`, `image-size`.
_AUTOMATIC = "runs are bf16 on a GPU and fp32 on a CPU by themselves: expected --precision"
_LAUNCH = (
    "the number of processes is the launcher's: expected torchrun --nproc-per-node N --no-python "
    "dfptkd ..., one for each GPU (CUDA_VISIBLE_DEVICES says which)"
)
_ALPHA = "expected --loss.student-teacher (dfpt), --loss.kd-kl (kd) or --loss.dkd-alpha (dkd)"
_BETA = "expected --loss.student-prompt (dfpt), --loss.dkd-beta (dkd) or --optim.betas (adamw)"
_SAYS = "there is no such option: a run prints a line an epoch, and > FILE puts it elsewhere"
_AUGMENTATION = (
    "training images are cropped and flipped, and nothing else is built in: expected --data.flip "
    "or --data.crop-padding"
)
SYNONYMS: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(
        ("lr", "learning-rate", "base-lr", "init-lr"), ("--optim.lr",)
    ),
    **dict.fromkeys(
        ("batch-size", "batch", "b", "bs", "train-batch-size", "per-device-train-batch-size",
         "batch-size-per-gpu"),
        ("--global-batch",),
    ),
    **dict.fromkeys(
        ("eval-batch-size", "test-batch-size", "val-batch-size", "validation-batch-size"),
        ("--eval-batch",),
    ),
    **dict.fromkeys(("wd", "weight-decay-rate", "l2"), ("--optim.weight-decay",)),
    **dict.fromkeys(("opt", "optimizer", "optimiser"), ("--optim.name",)),
    **dict.fromkeys(("sched", "scheduler", "lr-scheduler", "lr-schedule"), ("--optim.schedule",)),
    **dict.fromkeys(("lr-decay-epochs", "lr-steps", "lr-step-size", "decay-milestones"),
                    ("--optim.milestones",)),
    **dict.fromkeys(("lr-decay-rate", "decay-rate", "lr-gamma"), ("--optim.gamma",)),
    **dict.fromkeys(("warmup", "lr-warmup-epochs"), ("--optim.warmup-epochs",)),
    **dict.fromkeys(("clip-grad", "clip", "grad-clip", "gradient-clip-val", "max-grad-norm",
                     "clip-norm"), ("--optim.clip-grad-norm",)),
    **dict.fromkeys(("ema", "model-ema", "model-ema-decay"), ("--optim.ema-decay",)),
    **dict.fromkeys(("amp", "bf16", "mixed-precision", "apex", "use-amp"), _AUTOMATIC),
    **dict.fromkeys(("fp16", "half"), "expected --precision fp16"),
    **dict.fromkeys(("fp32", "no-amp"), "expected --precision fp32"),
    **dict.fromkeys(("j", "num-workers", "n-workers", "dataloader-num-workers"),
                    ("--data.workers",)),
    **dict.fromkeys(("gpus", "gpu", "gpu-id", "gpu-ids", "num-gpus", "ngpus", "n-gpus", "devices",
                     "world-size", "nproc-per-node", "nodes", "num-nodes", "rank", "local-rank",
                     "dist-url", "dist-backend", "multiprocessing-distributed", "ddp"), _LAUNCH),
    **dict.fromkeys(("cpu", "cuda", "no-cuda"), "expected --device cpu or --device cuda"),
    **dict.fromkeys(("quiet", "q", "silent", "verbose", "v", "print-freq", "p", "log-interval",
                     "logging-steps", "progress"), _SAYS),
    **dict.fromkeys(("dry-run", "n"), "expected dfptkd plan RECIPE, which starts nothing"),
    **dict.fromkeys(("temperature", "temp", "t", "kd-t", "kd-temperature"), ("--loss.tau",)),
    **dict.fromkeys(("alpha", "a", "kd-alpha", "lambda"), _ALPHA),
    **dict.fromkeys(("beta", "kd-beta"), _BETA),
    **dict.fromkeys(("gamma-ce", "ce-weight", "r"),
                    "expected --loss.student-ce (dfpt), --loss.kd-ce (kd), --loss.dkd-ce (dkd) or "
                    "--loss.dist-ce (dist)"),
    **dict.fromkeys(("kd-weight", "kl-weight", "distill", "kd"), "expected --method, and --loss.*"),
    **dict.fromkeys(("smoothing",), ("--loss.label-smoothing",)),
    **dict.fromkeys(("teacher", "model-t", "teacher-model", "teacher-arch", "t-model"),
                    ("--teacher.name", "--teacher.weights")),
    **dict.fromkeys(("path-t", "teacher-path", "teacher-ckpt", "teacher-checkpoint",
                     "teacher-weights", "t-path"), ("--teacher.weights",)),
    **dict.fromkeys(("student-model", "model-s", "model", "arch", "net", "network",
                     "student-arch", "s-model"), ("--student",)),
    **dict.fromkeys(("pretrained", "student-checkpoint", "initial-checkpoint", "init-from",
                     "finetune"), ("--student-weights", "--teacher.weights")),
    **dict.fromkeys(("dataset", "data-set", "dataset-name", "task"), ("--data.name",)),
    **dict.fromkeys(("data", "data-dir", "data-path", "dataset-dir", "dataset-root", "datadir",
                     "data-root", "d"), ("--data.root",)),
    **dict.fromkeys(("img-size", "input-size", "crop-size", "train-crop-size", "resolution",
                     "size"), ("--data.image-size",)),
    **dict.fromkeys(("n-cls", "nb-classes", "classes", "num-class"), ("--data.num-classes",)),
    **dict.fromkeys(("hflip", "horizontal-flip"), ("--data.flip",)),
    **dict.fromkeys(("mixup", "cutmix", "aa", "auto-augment", "autoaugment", "reprob",
                     "random-erase", "color-jitter", "randaugment", "augment"), _AUGMENTATION),
    **dict.fromkeys(("output", "o", "output-dir", "save-dir", "save-path", "save-folder", "outdir",
                     "exp-dir", "log-dir", "logdir", "work-dir", "checkpoint-dir", "model-dir",
                     "default-root-dir"), ("--out", "--out-root")),
    **dict.fromkeys(("resume-from", "resume-from-checkpoint", "load", "checkpoint", "ckpt",
                     "ckpt-path", "restore", "start-epoch"), ("--resume",)),
    **dict.fromkeys(("num-epochs", "n-epochs", "max-epochs", "num-train-epochs", "ep", "e"),
                    ("--epochs",)),
    **dict.fromkeys(("steps", "iterations", "iters", "num-steps", "max-iters"), ("--max-steps",)),
    **dict.fromkeys(("accumulation-steps", "grad-accum", "grad-accum-steps",
                     "accumulate-grad-batches", "gradient-accumulation-steps"), ("--accumulate",)),
    **dict.fromkeys(("val-freq", "eval-freq", "eval-interval", "check-val-every-n-epoch",
                     "test-freq"), ("--eval-every",)),
    **dict.fromkeys(("save-freq", "save-every", "save-interval", "checkpoint-freq"),
                    ("--checkpoint-every",)),
    **dict.fromkeys(("torchcompile", "compile", "torch-compile"), "expected --step.mode compile"),
    **dict.fromkeys(("cuda-graphs", "cuda-graph"), "expected --step.mode graph"),
    **dict.fromkeys(("evaluate", "eval", "test", "test-only", "val", "validate"),
                    "expected dfptkd eval CHECKPOINT"),
    **dict.fromkeys(("random-seed", "manual-seed", "trial"), ("--seed",)),
    **dict.fromkeys(("distillation", "distill-method", "algo", "algorithm", "loss"),
                    ("--method",)),
    **dict.fromkeys(("cfg", "config-file", "c", "yaml"), "expected --config run.json"),
    **dict.fromkeys(("wandb", "wandb-project", "use-wandb", "tensorboard"),
                    "there is no such option: metrics.csv and TensorBoard's files are always "
                    "written, into the run's folder"),
    **dict.fromkeys(("channels-last",), "there is no such option: images always lie that way"),
}  # fmt: skip


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one most like it, or some of them."""
    some = list(known)
    close = difflib.get_close_matches(name, some, n=1, cutoff=0.4)
    if close:
        return f": did you mean {close[0]}?"
    return f": expected one of {' '.join(some[:12])}{' ...' if len(some) > 12 else ''}"


def option_suggestion(
    name: str, known: Collection[str], synonyms: Mapping[str, str | tuple[str, ...]] = SYNONYMS
) -> str:
    """The end of a message about an unknown option: by its name elsewhere, then by its spelling.

    Args:
        name: As typed, with its dashes.
        known: The options that there are, likewise.
        synonyms: As `SYNONYMS`.
    """
    bare = name.lstrip("-").lower()
    last = {option: option.lstrip("-").rpartition(".")[2] for option in known}
    for word in dict.fromkeys((bare, bare.rpartition(".")[2])):
        answer = synonyms.get(word, ())
        if isinstance(answer, str):
            return f": {answer}"
        found = [*answer, *(option for option in known if last[option] == word)]
        if found:
            return f": did you mean {' or '.join(dict.fromkeys(found))}?"
    # By their last parts too: `--lrr` is nearer to `lr` than to any whole name.
    spelled = {part: option for option, part in reversed(last.items())}
    spelled |= {option.lstrip("-"): option for option in known}
    close = difflib.get_close_matches(bare, list(spelled), n=1, cutoff=0.6)
    return f": did you mean {spelled[close[0]]}?" if close else ": --help lists the options"
