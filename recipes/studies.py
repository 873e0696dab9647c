"""What is asked of the method, and the runs that answer it: `dfptkd study NAME --budget BUDGET`.

full: 240 epochs, three seeds; short: 40 epochs, the same schedule compressed; cpu: one pair small
enough for two cores, eight seeds. Requirement numbers refer to the method reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..engine.config import Budget, Cell, Study

SMALL = "cifar100.resnet20_s2_resnet8_s2"
HEADLINE = "cifar100.wrn_40_2_shufflenetv1"
SEEDS: dict[Budget, tuple[int, ...]] = {
    "full": (0, 1, 2), "short": (0, 1, 2), "cpu": (0, 1, 2, 3, 4, 5, 6, 7),
}  # fmt: skip
EPOCHS: dict[Budget, int | None] = {"full": None, "short": 40, "cpu": None}
SCOPES: dict[Budget, str] = {
    "full": "Three seeds; the paper's weights, temperature and learning rates are not known to us.",
    "short": "40 epochs and three seeds; it says little about the paper's 240.",
    "cpu": (
        "One small pair on 5,000 images: it says whether the parts work together, not what the "
        "method reaches on the paper's networks."
    ),
}
KD, KD_SAME = "KD", "KD at equal total weights"
DFPT, PLUS = "DFPT-KD", "DFPT-KD+"
ACCURACY = ("test/student_top1",)
# What shows an easy-to-hard path, or its lack: how good the prompt path is, and how far from the
# student.
EASY_TO_HARD = ("test/prompt_top1", "kl/prompt_student")


def _pair(budget: Budget) -> str:
    """What an ablation runs on."""
    return SMALL if budget == "cpu" else HEADLINE


def _study(
    name: str,
    budget: Budget,
    question: str,
    cells: Iterable[Cell],
    *,
    against: tuple[str, ...] = (DFPT,),
    curves: tuple[str, ...] = (),
) -> Study:
    return Study(
        name, budget, question, SCOPES[budget], tuple(cells), SEEDS[budget],
        epochs=EPOCHS[budget], against=against, curves=curves,
    )  # fmt: skip


def _arms(budget: Budget, method: str, *labels: tuple[str, str | None]) -> list[Cell]:
    return [Cell(label, _pair(budget), method, arm) for label, arm in labels]


def _anchors(budget: Budget) -> list[Cell]:
    """KD under both weights and DFPT-KD, in every ablation."""
    pair = _pair(budget)
    return [
        Cell(KD, pair, "kd"), Cell(KD_SAME, pair, "kd", "same_total"), Cell(DFPT, pair, "dfpt")
    ]  # fmt: skip


def _widths(budget: Budget, *values: int) -> list[tuple[str, str]]:
    """Arms of r1; the headline pair's teacher is wide enough for r1 = 4 to be the default's."""
    there = [v for v in values if v != 4 or budget == "cpu"]
    return [(f"r1 = {v}, no floor", f"r1_{v}") for v in there]


def main(budget: Budget) -> Study:
    """Every method on the pairs of the usual tables (M21, M23, M28-M31)."""
    pairs = [SMALL]
    if budget != "cpu":
        pairs = [
            HEADLINE, "cifar100.resnet32x4_resnet8x4", "cifar100.resnet56_resnet20",
            "cifar100.vgg13_vgg8",
        ]  # fmt: skip
    arms = [
        ("labels only", "ce", None),
        (KD, "kd", None),
        (KD_SAME, "kd", "same_total"),
        ("DKD", "dkd", "short_warmup" if budget == "short" else None),
        ("DIST", "dist", None),
        (DFPT, "dfpt", None),
        (PLUS, "dfpt_plus", None),
        ("mixture target (no prompt blocks)", "dfpt", "mixture"),
    ]
    return _study(
        "main", budget, "Does DFPT-KD teach a small student better than KD, and than its rivals?",
        [Cell(label, pair, method, arm) for pair in pairs for label, method, arm in arms],
        against=(KD, KD_SAME), curves=ACCURACY,
    )  # fmt: skip


def bidirectional(budget: Budget) -> Study:
    """Teacher-only supervision of the prompt path against both directions (M18, M33, M38)."""
    cells = _arms(
        budget, "dfpt",
        ("teacher only (lambda_S = 0)", "teacher_only"), ("lambda_S = 0.1", "lambda_s_0.1"),
        ("lambda_S = 0.5", "lambda_s_0.5"), ("lambda_S = 2", "lambda_s_2"),
    )  # fmt: skip
    return _study(
        "bidirectional", budget, "Does the student's supervision of the prompt path help it?",
        [*_anchors(budget), *cells], against=(KD_SAME, "teacher only (lambda_S = 0)"),
        curves=EASY_TO_HARD,
    )  # fmt: skip


def structure(budget: Budget) -> Study:
    """Fusion on and off, every stage against single ones, initialisation (M35, M36, M43, M44)."""
    cells = _arms(
        budget, "dfpt",
        ("without fusion blocks", "no_fusion"), ("stage 1 alone", "stage_1"),
        ("stage 2 alone", "stage_2"), ("stage 3 alone", "stage_3"),
        ("identity initialisation", "identity_init"),
    )  # fmt: skip
    return _study(
        "structure", budget, "Which parts of the prompt path does the gain need?",
        [*_anchors(budget), *cells], curves=EASY_TO_HARD[:1],
    )  # fmt: skip


def scales(budget: Budget) -> Study:
    """The prompt block's convolutions (M34, M37, M43)."""
    cells = _arms(
        budget, "dfpt",
        ("one 3x3, r2 = 1", "single_scale"), ("one 3x3, equal MACs", "single_scale_matched"),
        ("kernels 1, 3, 5", "small_kernels"), ("parallel", "parallel"),
        *((f"r2 = {v}", f"r2_{v}") for v in ("0.125", "0.5", "1")),
        *_widths(budget, 2, 4, 8, 16),
    )  # fmt: skip
    return _study(
        "scales", budget, "What shape must a prompt block have?", [*_anchors(budget), *cells]
    )


def weights(budget: Budget) -> Study:
    """Loss weights, temperature, learning rates (M38, M41, M42)."""
    cells = _arms(
        budget, "dfpt",
        ("alpha = 0", "no_student_teacher"),
        *((f"alpha = {v}", f"alpha_{v}") for v in ("0.5", "2")),
        ("beta = 0", "no_student_prompt"),
        *((f"beta = {v}", f"beta_{v}") for v in ("0.5", "2")),
        ("v_ce = 0", "no_prompt_ce"), ("lambda_T = 0", "no_prompt_teacher"),
        *((f"lambda_T = {v}", f"lambda_t_{v}") for v in ("0.1", "0.5", "2")),
        *((f"tau = {v}", f"tau_{v}") for v in ("1", "2", "8")),
        *((f"prompt blocks at {v} x lr", f"prompt_lr_{v}") for v in ("0.1", "0.3", "3")),
    )  # fmt: skip
    plus = _arms(
        budget, "dfpt_plus",
        (PLUS, None),
        *((f"DFPT-KD+, backbone at {v} x lr", f"backbone_lr_{v}") for v in ("0.001", "0.1", "1")),
    )  # fmt: skip
    return _study(
        "weights", budget, "Which loss weights and learning rates are best?",
        [*_anchors(budget), *cells, *plus],
    )  # fmt: skip


def gap(budget: Budget) -> Study:
    """One student under teachers of growing size (M39): KD, under both weights, and DFPT-KD."""
    suffix, recipe = ("_s2", SMALL) if budget == "cpu" else ("", "cifar100.resnet56_resnet20")
    depths = (14, 20, 32, 56) if budget == "cpu" else (32, 44, 56, 110)
    kinds = (
        (KD, "kd", "teacher"), (KD_SAME, "kd", "same_total_teacher"), (DFPT, "dfpt", "teacher")
    )  # fmt: skip
    names = [f"resnet{depth}{suffix}" for depth in depths]
    cells = [
        Cell(label, recipe, method, f"{arm}_{name}", group=f"teacher {name}")
        for name in names
        for label, method, arm in kinds
    ]
    return _study(
        "gap", budget, "How do KD and DFPT-KD fare as the teacher grows?", cells,
        against=(KD, KD_SAME),
    )  # fmt: skip


def capacity(budget: Budget) -> Study:
    """The smallest prompt block that keeps the gain (M40): widths from C down to C/16."""
    cells = _arms(budget, "dfpt", *_widths(budget, 1, 2, 4, 8, 16))
    return _study(
        "capacity", budget, "How small may a prompt block be?", [*_anchors(budget), *cells],
        against=(DFPT, KD_SAME),
    )  # fmt: skip


def readings(budget: Budget) -> Study:
    """What the sources leave open and no other study settles (M19, M23, M43)."""
    cells = _arms(
        budget, "dfpt",
        ("without the last pair", "no_last_stage"), ("no norm in the prompt", "no_prompt_norm"),
        ("BatchNorm in train mode", "batch_statistics"), ("reversed KL", "reverse_kl"),
        ("alternating updates", "alternating"), ("weights 0.1 / 0.45 / 0.45", "kd_matched"),
    )  # fmt: skip
    return _study(
        "readings", budget, "Which of our readings of the method matter?",
        [*_anchors(budget), *cells],
    )  # fmt: skip


def combination(budget: Budget) -> Study:
    """With relational and contrastive distillation and DKD's decoupling (M49)."""
    cells = _arms(
        budget, "dfpt", ("with RKD", "rkd"), ("with CRD", "crd"), ("with DKD's parts", "decoupled")
    )
    return _study(
        "combination", budget, "Do the gains of other methods add to DFPT-KD's?",
        [*_anchors(budget), *cells],
    )  # fmt: skip


def quickstart(budget: Budget) -> Study:
    """The runs of `make demo`, the same for every budget; `--out-root runs` is its folder."""
    arms = (("labels only", "ce"), (KD, "kd"), (DFPT, "dfpt"), (PLUS, "dfpt_plus"))
    return Study(
        "quickstart", budget, "What does `make demo` show?",
        "Three seeds of networks that are too small, and KD's weights are not DFPT-KD's: it shows "
        "that everything works, not which method is best.",
        tuple(Cell(label, "quickstart", method) for label, method in arms), (0, 1, 2),
    )  # fmt: skip


STUDIES: dict[str, Callable[[Budget], Study]] = {
    study.__name__: study
    for study in (
        main, bidirectional, structure, scales, weights, gap, capacity, readings, combination,
        quickstart,
    )
}  # fmt: skip
