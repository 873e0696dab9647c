"""M20: configurations are documented, validated and survive JSON."""

import ast
import dataclasses
import inspect
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfptkd.engine import config as module
from dfptkd.engine.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    PromptConfig,
    RunConfig,
    StepConfig,
    TeacherConfig,
    from_dict,
    to_dict,
)
from dfptkd.engine.errors import UsageError
from dfptkd.engine.options import NOT_KNOWN_FROM_PAPER
from dfptkd.engine.teacher import teacher_run

CLASSES = (DataConfig, PromptConfig, TeacherConfig, LossConfig, OptimConfig, StepConfig, RunConfig)
PREFIX = {
    DataConfig: "data.",
    PromptConfig: "prompt.",
    TeacherConfig: "teacher.",
    LossConfig: "loss.",
    OptimConfig: "optim.",
    StepConfig: "step.",
    RunConfig: "",
}
NAN = float("nan")
AT_LEAST_ONE = (0, -1)
POSITIVE = (0.0, -0.1, NAN)
NOT_NEGATIVE = (-0.1, NAN)
SHARE = (-0.1, 1.0, NAN)
WEIGHTS = (
    "student_ce", "student_teacher", "student_prompt", "prompt_ce", "prompt_teacher",
    "prompt_student", "kd_ce", "kd_kl", "dkd_ce", "dkd_alpha", "dkd_beta", "dist_ce", "dist_inter",
    "dist_intra", "rkd_distance", "rkd_angle", "crd",
)  # fmt: skip
# Class -> field -> values that no run could use
REFUSED = {
    DataConfig: {
        "limit": AT_LEAST_ONE,
        "train_limit": AT_LEAST_ONE,
        "image_size": AT_LEAST_ONE,
        "start_size": (*AT_LEAST_ONE, 225),
        "ramp": ((0.5, 0.4), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (NAN, 0.5), (0.5,)),
        "num_classes": (1, 0),
        "crop_padding": (-1,),
        "workers": (-1,),
        "order_seed": (-1,),
        "timeout": (-0.1, NAN),
        "mean": ((0.5, 0.5), (0.5, 0.5, 1.1), (0.5, 0.5, NAN)),
        "std": ((0.5, 0.5), (0.5, 0.5, 0.0)),
        "max_quarantined": (-0.1, 1.1, NAN),
    },
    PromptConfig: {
        "r1": AT_LEAST_ONE,
        "r2": (0.0, -0.5, 1.01, NAN),
        "kernels": ((), (2,), (3, 4), (-1,), (0,)),
        "min_width": AT_LEAST_ONE,
        "fusion_groups": AT_LEAST_ONE,
        "insert_stages": ((), (0,), (1, 1), (-1, 2)),
    },
    TeacherConfig: {
        "epochs": AT_LEAST_ONE,
        "mean": ((0.5, 0.5), (0.5, 0.5, 1.1), (0.5, 0.5, NAN)),
        "std": ((0.5, 0.5), (0.5, 0.5, 0.0)),
        "lr": POSITIVE,
        "global_batch": AT_LEAST_ONE,
        "expected_top1": (-1.0, 100.1, NAN),
        "expected_of": (("cifar:vgg8",), ()),
    },
    LossConfig: {
        "tau": POSITIVE,
        **dict.fromkeys(WEIGHTS, (*NOT_NEGATIVE, -1, float("inf"))),
        "crd_negatives": AT_LEAST_ONE,
        "warmup_epochs": NOT_NEGATIVE,
        "label_smoothing": SHARE,
    },
    OptimConfig: {
        "lr": POSITIVE,
        "lr_batch": AT_LEAST_ONE,
        "betas": ((0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), (0.9,)),
        "eps": POSITIVE,
        "momentum": SHARE,
        "weight_decay": NOT_NEGATIVE,
        "milestones": ((0.5, 0.4), (0.0,), (1.0,), (-0.5, 0.5), (NAN,)),
        "gamma": (0.0, -0.1, 1.5, NAN),
        "warmup_epochs": NOT_NEGATIVE,
        "prompt_lr_scale": POSITIVE,
        "backbone_lr_scale": POSITIVE,
        "clip_grad_norm": POSITIVE,
        "ema_decay": (0.0, 1.0, -0.1, NAN),
    },
    StepConfig: {
        "max_skips": (-1,),
        "max_skips_in_a_row": (-1,),
        "max_rewinds": (-1,),
        "timeout": (0.0, -1.0, NAN),
    },
    RunConfig: {
        "seed": (-1,),
        "seeds": ((), (1, 1), (-1,)),
        "epochs": AT_LEAST_ONE,
        "global_batch": AT_LEAST_ONE,
        "accumulate": (*AT_LEAST_ONE, 3),
        "eval_batch": AT_LEAST_ONE,
        "eval_every": AT_LEAST_ONE,
        "max_steps": AT_LEAST_ONE,
        "checkpoint_steps": AT_LEAST_ONE,
        "checkpoint_minutes": (-0.1, NAN),
        "checkpoint_every": AT_LEAST_ONE,
        "keep_checkpoints": AT_LEAST_ONE,
    },
}  # fmt: skip
CASES = [
    (cls, name, value)
    for cls, fields in REFUSED.items()
    for name, values in fields.items()
    for value in values
]


@pytest.mark.parametrize(("cls", "name", "value"), CASES)
def test_M20_a_value_that_no_run_could_use_is_refused(cls, name, value):
    with pytest.raises(UsageError) as caught:
        cls(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{PREFIX[cls]}{name}={value!r}: expected ")
    assert "\n" not in message


def test_M20_every_numeric_field_has_a_range():
    """A new field must be listed above (or say here why it needs no range)."""
    for cls in CLASSES:
        for f in dataclasses.fields(cls):
            if "int" in f.type or "float" in f.type:
                assert f.name in REFUSED[cls], f"{cls.__name__}.{f.name}"


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (PromptConfig, {"r1": 1, "r2": 1.0, "kernels": (1,), "min_width": 1}),
        (PromptConfig, {"insert_stages": (3, 1)}),
        (LossConfig, {"student_ce": 0.0, "prompt_student": 0, "warmup_epochs": 0.5}),
        (OptimConfig, {"momentum": 0.0, "weight_decay": 0.0, "milestones": (), "gamma": 1.0}),
        (OptimConfig, {"lr_batch": 1, "betas": (0.0, 0.0), "eps": 1e-16}),
        (DataConfig, {"image_size": 64, "start_size": 64, "ramp": (0.0, 1.0)}),
        (DataConfig, {"limit": 1, "workers": 0, "num_classes": 2, "crop_padding": 0}),
        (RunConfig, {"global_batch": 12, "accumulate": 3, "seeds": (0,), "max_steps": 1}),
    ],
)
def test_M20_the_ends_of_the_ranges_are_accepted(cls, fields):
    assert all(getattr(cls(**fields), name) == value for name, value in fields.items())


def test_M20_fields_that_contradict_each_other_are_refused():
    with pytest.raises(UsageError, match=r"loss\.mixture_control.*above 0"):
        LossConfig(mixture_control=True, prompt_teacher=0.0, prompt_student=0.0)
    with pytest.raises(UsageError, match=r"loss\.mixture_control.*'kd'.*'dfpt'"):
        RunConfig(method="kd", loss=LossConfig(mixture_control=True))
    with pytest.raises(UsageError, match=r"loss\.decoupled with loss\.reverse_kl.*one of them"):
        LossConfig(decoupled=True, reverse_kl=True)
    for name in ("decoupled", "rkd_distance", "rkd_angle", "crd"):
        loss = LossConfig(**{name: 1})
        assert loss.added == (name,)
        for other in ({"method": "kd"}, {"loss": dataclasses.replace(loss, mixture_control=True)}):
            with pytest.raises(UsageError, match=rf"loss\.{name} with method=.*prompt modules"):
                RunConfig(**{"loss": loss, **other})
        config = RunConfig(method="dfpt_plus", loss=loss)
        assert config.loss == loss
        assert loss.of_any_method() == teacher_run(config).loss == LossConfig()
        if name != "decoupled":
            with pytest.raises(UsageError, match=r"step\.joint_paths.*no loss\.rkd_distance"):
                RunConfig(loss=loss, step=StepConfig(joint_paths=True))
    alternating = LossConfig(update="alternating")
    for other in (
        {"method": "kd"},
        {"loss": LossConfig(update="alternating", mixture_control=True)},
    ):
        with pytest.raises(UsageError, match=r"loss\.update='alternating' with method.*'dfpt'"):
            RunConfig(**{"loss": alternating, **other})
    # a teacher alone would rest in every other step
    assert teacher_run(RunConfig(loss=alternating)).loss.update == "simultaneous"
    joint = StepConfig(joint_paths=True)
    for method in ("kd", "dfpt_plus"):
        with pytest.raises(UsageError, match=r"step\.joint_paths.*'dfpt'"):
            RunConfig(method=method, step=joint)
    with pytest.raises(UsageError, match=r"step\.joint_paths.*eval mode"):
        RunConfig(step=joint, prompt=PromptConfig(bn_mode="train"))
    with pytest.raises(UsageError, match=r"optim\.name.*'alternating'.*'apex-lamb'.*adamw"):
        RunConfig(loss=LossConfig(update="alternating"), optim=OptimConfig(name="apex-lamb"))
    with pytest.raises(UsageError, match=r"optim\.nesterov.*momentum"):
        OptimConfig(nesterov=True, momentum=0.0)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_M20_every_field_is_documented(cls):
    """The help of an option is the string after its field; a section has its class's docstring."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    documented = {
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
    sections = {"data", "teacher", "prompt", "loss", "optim", "step"} if cls is RunConfig else set()
    assert {f.name for f in dataclasses.fields(cls)} - sections == documented
    assert inspect.getdoc(cls)


def flat(values: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def test_M20_names_not_known_from_the_paper_exist():
    names = flat(to_dict(RunConfig()))
    assert set(NOT_KNOWN_FROM_PAPER) <= names.keys()
    assert len(set(NOT_KNOWN_FROM_PAPER)) == len(NOT_KNOWN_FROM_PAPER)
    must = ("loss.tau", "loss.prompt_student", "loss.warmup_epochs", "prompt.r1", "prompt.bn_mode")
    assert {*must, "optim.prompt_lr_scale", "optim.backbone_lr_scale"} <= {*NOT_KNOWN_FROM_PAPER}


weights = st.floats(0, 1e3, allow_nan=False)
names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
configs = st.builds(
    RunConfig,
    method=st.sampled_from(["ce", "kd", "dkd", "dist", "dfpt", "dfpt_plus"]),
    seed=st.integers(0, 2**31),
    seeds=st.none() | st.lists(st.integers(0, 99), min_size=1, unique=True).map(tuple),
    epochs=st.integers(1, 1000),
    max_steps=st.none() | st.integers(1, 10**6),
    device=st.none() | st.sampled_from(["cpu", "cuda"]),
    out=st.none() | names,
    data=st.builds(
        DataConfig, limit=st.none() | st.integers(1, 10**6), flip=st.booleans(), root=names
    ),
    teacher=st.builds(TeacherConfig, stages=st.none() | st.lists(names, max_size=3).map(tuple)),
    prompt=st.builds(
        PromptConfig,
        r2=st.floats(0, 1, exclude_min=True),
        kernels=st.lists(st.sampled_from([1, 3, 5, 7]), min_size=1).map(tuple),
        insert_stages=st.just("all")
        | st.lists(st.integers(1, 5), min_size=1, unique=True).map(tuple),
        init=st.sampled_from(["random", "identity"]),
    ),
    loss=st.builds(LossConfig, student_teacher=weights, prompt_student=weights),
    optim=st.builds(
        OptimConfig,
        milestones=st.lists(st.floats(0.01, 0.99)).map(lambda shares: tuple(sorted(shares))),
        ema_decay=st.none() | st.floats(0.1, 0.9999),
    ),
)


@given(configs)
def test_M20_a_configuration_survives_json(config):
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_paths_and_lists_are_kept_as_records_hold_them(tmp_path):
    data = DataConfig(root=tmp_path, mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2])
    config = RunConfig(out=tmp_path / "run", data=data)
    assert config.out == str(tmp_path / "run")
    assert (config.data.root, config.data.mean) == (str(tmp_path), (0.5, 0.5, 0.5))
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_from_dict_keeps_defaults_and_makes_whole_numbers_floats():
    config = from_dict(RunConfig, {"loss": {"tau": 2}, "optim": {"clip_grad_norm": 1}})
    assert config == RunConfig(loss=LossConfig(tau=2.0), optim=OptimConfig(clip_grad_norm=1.0))
    assert isinstance(config.loss.tau, float)
    assert isinstance(config.optim.clip_grad_norm, float)
    assert from_dict(RunConfig, {}) == RunConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, r"unknown configuration key 'epoch': expected one of .*'epochs'"),
        ({"optim": {"lrr": 1.0}}, r"unknown configuration key 'optim\.lrr'"),
        ({"optim": 5}, r"optim: expected an object, got int"),
        ([], r"configuration: expected an object, got list"),
        ({"epochs": 1.5}, r"epochs=1\.5: expected int"),
        ({"epochs": True}, r"epochs=True: expected int"),
        ({"optim": {"lr": True}}, r"optim\.lr=True: expected float"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr='fast': expected float"),
        ({"deterministic": 1}, r"deterministic=1: expected bool"),
        ({"max_steps": "a"}, r"max_steps='a': expected int \| None"),
        ({"resume": 3}, r"resume=3: expected str"),
        ({"prompt": {"kernels": 3}}, r"prompt\.kernels=3: expected tuple\[int, \.\.\.\]"),
        ({"prompt": {"kernels": ["a"]}}, r"prompt\.kernels='a': expected int"),
        ({"prompt": {"init": "zero"}}, r"init='zero': expected Literal\['random', 'identity'\]"),
        ({"prompt": {"insert_stages": "some"}}, r"insert_stages='some': expected .*'all'"),
        ({"teacher": {"stages": "layer1"}}, r"teacher\.stages='layer1': expected tuple\[str"),
        ({"prompt": {"r1": 0}}, r"prompt\.r1=0: expected"),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(values, message):
    with pytest.raises(UsageError, match=message) as caught:
        from_dict(RunConfig, values)
    assert "\n" not in str(caught.value)


def test_M46_fusion_is_on_unless_asked_for_by_name():
    assert PromptConfig().fusion
    assert from_dict(PromptConfig, {}).fusion


def test_prompt_path_exists_for_the_dual_path_methods_alone():
    def has(method: str, **loss: object) -> bool:
        return RunConfig(method=method, loss=LossConfig(**loss)).has_prompt_path

    assert [m for m in module.MethodName.__args__ if has(m)] == ["dfpt", "dfpt_plus"]
    assert not has("dfpt", mixture_control=True)


def test_configurations_are_frozen():
    for cls in CLASSES:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cls(), dataclasses.fields(cls)[0].name, None)
