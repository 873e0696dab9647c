"""M4-M8, M11-M14, M46, M47 and T3-T5: one teacher, two forward paths."""

import copy

import pytest
import torch
from error_bounds import growth
from torch import Tensor, nn

from dfptkd.engine.config import OptimConfig, PromptConfig, RunConfig
from dfptkd.engine.errors import UsageError
from dfptkd.engine.methods import Method, build_method
from dfptkd.engine.models import create_model, split_stages
from dfptkd.engine.models.cifar import CIFAR_MODELS
from dfptkd.engine.models.dual_path import DualPathTeacher, Trunk
from dfptkd.engine.optim import build_optimizer
from dfptkd.kernels import dual_path_loss, use_backend

SMALL = ["cifar:resnet8", "cifar:wrn_16_1", "cifar:vgg8", "cifar:ShuffleV1", "cifar:MobileNetV2"]
CLASSES = 10
MOBILENET_CUTS = ("features.3", "features.6", "features.13", "features.17")


def make_model(name: str) -> nn.Module:
    """A model whose batch statistics are not the trivial (0, 1): a BN in the wrong mode must
    show."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.7, 1.3)
    return model.eval()


def make_dual(
    name: str = "cifar:resnet8", *, plus: bool = False, fold: bool = True, at=None, **prompt: object
):
    return DualPathTeacher(
        make_model(name),
        prompt=PromptConfig(**prompt),
        finetune_backbone=plus,
        fold_bn=fold,
        at=at,
    )


def make_method(name: str, method: str, **prompt: object) -> Method:
    config = RunConfig(method=method, prompt=PromptConfig(**prompt))
    return build_method(config, make_model("cifar:resnet8"), make_model(name)).train()


def images(size: int = 32, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def labels(batch: int = 4) -> Tensor:
    return torch.arange(batch) % CLASSES


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def train(method: Method, steps: int = 3, optim: OptimConfig = OptimConfig()) -> list[Tensor]:
    """Optimisation steps on random images; the original path's logits of the probe after each."""
    optimizer = build_optimizer(method, optim, 64)
    logits = []
    for step in range(steps):
        batch = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        method(batch, labels()).total.backward()
        optimizer.step()
        logits.append(method.teacher.original_path(images()))
    return logits


def stage_tensors(dual: DualPathTeacher, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What enters and what leaves the pair of each stage in one prompt path."""
    entering, leaving = {}, {}

    def hook(name: str):
        def record(_module, inputs, output):
            entering[name], leaving[name] = inputs[0].detach(), output.detach()

        return record

    handles = [pair.register_forward_hook(hook(name)) for name, pair in dual.pairs.items()]
    dual.prompt_path(x)
    for handle in handles:
        handle.remove()
    return entering, leaving


# The two paths
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("plus", [False, True])
def test_M8_original_path_has_the_bits_of_the_unsplit_teacher(name, plus):
    teacher = make_model(name)
    dual = DualPathTeacher(copy.deepcopy(teacher), finetune_backbone=plus, fold_bn=False)
    out = dual(images())
    with torch.no_grad():
        assert torch.equal(out.teacher_logits, teacher(images()))
    assert torch.equal(out.teacher_logits, dual.original_path(images()))
    assert not out.teacher_logits.requires_grad
    assert out.prompt_logits.requires_grad
    assert out.prompt_logits.shape == (4, CLASSES)


@pytest.mark.parametrize("name", SMALL)
def test_M8_folded_original_path_equals_the_unsplit_teacher_within_rounding(name):
    """In fp64, whose rounding no ReLU of so shallow a network makes as large as a mistake."""
    folded, exact = (
        DualPathTeacher(make_model(name).double(), fold_bn=fold).double() for fold in (True, False)
    )
    x = images().double()
    with torch.no_grad():
        want = make_model(name).double()(x)
    scale = want.abs().max().item()
    got = folded.original_path(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11 * scale)
    assert not torch.equal(got, want)  # it did fold
    exact.load_trained_state(folded.trained_state())
    z_folded, z_exact = folded.eval()(x), exact.eval()(x)
    assert torch.equal(z_folded.teacher_logits, got)
    scale = z_exact.prompt_logits.abs().max().item()
    torch.testing.assert_close(
        z_folded.prompt_logits, z_exact.prompt_logits, rtol=0, atol=1e-11 * scale
    )


@pytest.fixture
def eager_blocks():
    """Blocks as modules call each other: their insides are looked into, or their bits compared."""
    with use_backend("reference"):
        yield


@pytest.mark.usefixtures("eager_blocks")
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("plus", [False, True])
def test_M4_next_stage_receives_the_fused_output(name, plus):
    dual = make_dual(name, plus=plus).eval()
    stages = (dual.copied if plus else dual.original).stages
    received = []
    handles = [s.register_forward_pre_hook(lambda _m, a: received.append(a[0])) for s in stages]
    z_P = dual.prompt_path(images())
    for handle in handles:
        handle.remove()

    with torch.no_grad():
        x = images()
        for i, stage in enumerate(stages, start=1):
            assert torch.equal(received[i - 1], x)
            x = stage(x)
            plain, pair = x, dual.pairs[f"stage{i}"]
            x = pair.fusion(x + pair.prompt(x))
            assert not torch.allclose(x, plain, rtol=0.1)
        neck = (dual.copied if plus else dual.original).neck
        assert torch.equal(z_P, dual.head(neck(x)))


@pytest.mark.usefixtures("eager_blocks")
def test_M46_without_fusion_the_next_stage_reads_the_sum():
    dual = make_dual(fusion=False).eval()
    entering, leaving = stage_tensors(dual, images())
    for name, pair in dual.pairs.items():
        with torch.no_grad():
            assert torch.equal(leaving[name], entering[name] + pair.prompt(entering[name]))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("plus", [False, True])
def test_M5_new_head_shares_nothing_with_the_teachers(name, plus):
    dual = make_dual(name, plus=plus)
    new, old = dict(dual.head.named_parameters()), dict(dual.original.head.named_parameters())
    assert new.keys() == old.keys()
    pointers = {p.data_ptr() for p in dual.original.state_dict().values()}
    for key in new:
        assert new[key].shape == old[key].shape
        assert new[key].data_ptr() not in pointers
        assert not torch.equal(new[key], old[key])
        assert new[key].requires_grad
        assert not old[key].requires_grad


def test_M5_identity_initialisation_copies_the_head():
    dual = make_dual(init="identity")
    assert same_bits(state_of(dual.head), state_of(dual.original.head))
    assert dual.head[-1].weight.data_ptr() != dual.original.head[-1].weight.data_ptr()


def test_M6_prompt_block_reads_the_prompt_paths_own_feature():
    dual = make_dual().eval()
    before, z_T, z_P = stage_tensors(dual, images())[0], *dual(images())
    with torch.no_grad():
        dual.pairs["stage1"].prompt.up[0].weight.mul_(2)
    after, new_T, new_P = stage_tensors(dual, images())[0], *dual(images())
    assert torch.equal(before["stage1"], after["stage1"])
    assert not torch.allclose(before["stage2"], after["stage2"], rtol=1e-2)
    assert not torch.allclose(before["stage3"], after["stage3"], rtol=1e-2)
    assert not torch.allclose(z_P, new_P, rtol=1e-2)
    assert torch.equal(z_T, new_T)


# Where the blocks are
# -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CIFAR_MODELS if not n.endswith("_s2")])
def test_M7_every_zoo_model_gets_a_pair_after_every_stage(name):
    with torch.device("meta"):
        teacher = create_model(f"cifar:{name}", num_classes=CLASSES)
        split = split_stages(teacher)
        dual = DualPathTeacher(teacher)
        out = dual(torch.empty(2, 3, 32, 32))
    assert len(split.stages) >= 3
    assert list(dual.pairs) == [f"stage{i}" for i in range(1, len(split.stages) + 1)]
    assert out.prompt_logits.shape == out.teacher_logits.shape == (2, CLASSES)


@pytest.mark.parametrize("stages", [(1,), (2,), (3,), (1, 3), (3, 1), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("plus", [False, True])
def test_M7_any_subset_of_stages(stages, plus):
    dual = make_dual(insert_stages=stages, plus=plus, fold=False).eval()
    assert list(dual.pairs) == [f"stage{i}" for i in sorted(stages)]
    with torch.no_grad():
        x = images()
        for i, stage in enumerate(dual.original.stages, start=1):
            x = stage(x)
            if i in stages:
                x = dual.pairs[f"stage{i}"](x)
        literal = dual.head(dual.original.neck(x))
    assert torch.equal(dual(images()).prompt_logits, literal)
    assert torch.equal(dual.prompt_path(images()), literal)


@pytest.mark.parametrize("stages", [(4,), (1, 7)])
def test_M7_a_stage_that_the_teacher_has_not_is_refused(stages):
    with pytest.raises(UsageError, match=r"prompt\.insert_stages=.*1\.\.3"):
        make_dual(insert_stages=stages)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("torchvision:resnet18", ("layer1", "layer2", "layer3", "layer4")),
        ("torchvision:mobilenet_v2", MOBILENET_CUTS),
    ],
)
@pytest.mark.parametrize(
    "fields", [{}, {"plus": True}, {"bn_mode": "train"}], ids=["dfpt", "plus", "bn_train"]
)
def test_M7_a_teacher_cut_at_module_paths(name, at, fields):
    teacher = make_model(name)
    dual = make_dual(name, at=at, fold=False, **fields)
    assert len(dual.pairs) == len(at)
    out = dual(images(64, batch=2))
    with torch.no_grad():
        assert torch.equal(out.teacher_logits, teacher(images(64, batch=2)))
    out.prompt_logits.sum().backward()
    assert all(p.grad is not None for p in dual.prompt_parameters() + dual.backbone_parameters())
    assert all(p.grad is None for p in dual.original.parameters())


# What training changes
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("bn_mode", ["auto", "train"])
def test_M13_T4_dfpt_leaves_the_teacher_bit_identical(name, bn_mode):
    method = make_method(name, "dfpt", bn_mode=bn_mode)
    dual = method.teacher
    before, logits = state_of(dual.original), dual.original_path(images())
    prompt = [p.clone() for p in dual.prompt_parameters()]
    student = [p.clone() for p in method.student.parameters()]
    for during in train(method):
        assert torch.equal(during, logits)
    assert same_bits(before, state_of(dual.original))
    # The test can fail: the same steps did move everything that should move.
    assert all(not torch.equal(a, b) for a, b in zip(prompt, dual.prompt_parameters(), strict=True))
    assert all(
        not torch.equal(a, b) for a, b in zip(student, method.student.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", SMALL)
def test_M14_T5_dfpt_plus_trains_a_copy_and_leaves_the_original_path(name):
    method = make_method(name, "dfpt_plus")
    dual = method.teacher
    before, logits = state_of(dual.original), dual.original_path(images())
    unfrozen = state_of(Trunk(split_stages(make_model(name))))
    start = {k: v for k, v in unfrozen.items() if not k.startswith("head.")}
    assert same_bits(start, state_of(dual.copied))
    assert not {p.data_ptr() for p in dual.copied.parameters()} & {
        v.data_ptr() for v in dual.original.state_dict().values()
    }
    parameters = [p.clone() for p in dual.backbone_parameters()]
    for during in train(method):
        assert torch.equal(during, logits)
    assert same_bits(before, state_of(dual.original))
    moved = zip(parameters, dual.backbone_parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)
    means = [k for k in start if k.endswith("running_mean")]
    assert all(not torch.equal(start[k], dual.copied.state_dict()[k]) for k in means)


def test_M14_the_copy_has_a_learning_rate_of_its_own():
    optim = OptimConfig(lr=0.05, prompt_lr_scale=0.5)
    groups = make_method("cifar:resnet8", "dfpt_plus").parameter_groups(optim)
    assert [g["name"] for g in groups] == ["student", "prompt", "backbone"]
    assert [g["lr"] for g in groups] == pytest.approx([0.05, 0.025, 0.00025])
    default = make_method("cifar:resnet8", "dfpt_plus").parameter_groups(OptimConfig(lr=0.05))
    assert default[2]["lr"] == pytest.approx(0.01 * 0.05)
    assert [g["name"] for g in make_method("cifar:resnet8", "dfpt").parameter_groups(optim)] == [
        "student",
        "prompt",
    ]


@pytest.mark.parametrize("method_name", ["dfpt", "dfpt_plus"])
def test_M13_M14_optimiser_holds_each_trained_parameter_once_and_no_other(method_name):
    method = make_method("cifar:wrn_16_1", method_name)
    held = [p for g in method.parameter_groups(OptimConfig()) for p in g["params"]]
    trained = [p for p in method.parameters() if p.requires_grad]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in trained}
    assert not {id(p) for p in held} & {id(p) for p in method.teacher.original.parameters()}


def test_M13_bn_mode_train_normalises_by_the_batch_with_buffers_of_its_own():
    config, teacher = PromptConfig(bn_mode="train"), make_model("cifar:resnet8")
    method = build_method(RunConfig(prompt=config), make_model("cifar:resnet8"), teacher).train()
    dual = method.teacher
    own = {id(p) for p in teacher.parameters()}
    assert all(id(p) in own and not p.requires_grad for p in dual.copied.parameters())
    assert dual.backbone_parameters() == []
    frozen, statistics = state_of(dual.original), state_of(teacher)
    train(method, steps=1)
    assert same_bits(state_of(dual.original), frozen)
    assert same_bits(state_of(teacher), statistics)
    moved = dual.copied.state_dict()["stages.1.0.bn1.running_mean"]
    assert not torch.equal(moved, statistics["layer2.0.bn1.running_mean"])
    by_batch, by_statistics = make_dual(bn_mode="train"), make_dual(bn_mode="eval")
    by_statistics.load_state_dict(by_batch.state_dict(), strict=False)
    assert not torch.allclose(
        by_batch(images()).prompt_logits, by_statistics(images()).prompt_logits, rtol=1e-2
    )


MODES = [
    ({}, None),
    ({"bn_mode": "eval"}, None),
    ({"bn_mode": "train"}, True),
    ({"plus": True}, True),
    ({"plus": True, "bn_mode": "eval"}, False),
    ({"plus": True, "bn_mode": "train"}, True),
]


@pytest.mark.parametrize(("fields", "copy_trains"), MODES)
def test_M8_training_mode_of_each_part(fields, copy_trains):
    dual = make_dual(**fields)

    def modes(module: nn.Module) -> set[bool]:
        return {m.training for m in module.modules()}

    assert (dual.copied is None) is (copy_trains is None) is (dual.shared_stages > 0)
    for mode in (True, False, True):
        nn.Sequential(dual).train(mode)  # as a method that holds it does
        assert modes(dual.original) == {False}
        assert modes(dual.pairs) == modes(dual.head) == {mode}
        if dual.copied is not None:
            assert modes(dual.copied) == {mode and copy_trains}


# One stage for two paths
# ----------------------------------------------------------------------------


def losses_and_gradients(dual, student, z_T, z_P):
    result = dual_path_loss(student(images()), z_P, z_T, labels())
    parameters = [*student.parameters(), *dual.prompt_parameters()]
    return result.total, result.terms, torch.autograd.grad(result.total, parameters)


@pytest.mark.parametrize("name", SMALL)
def test_M12_sharing_the_first_stage_changes_no_loss_and_no_gradient(name):
    dual, student = make_dual(name), make_model("cifar:resnet8")
    runs = []
    first = dual.original.stages[0]
    first.register_forward_pre_hook(lambda *_: runs.append(1))
    total, terms, gradients = losses_and_gradients(dual, student, *dual(images()))
    assert len(runs) == 1

    # literally: both paths from the image, stage 1 of the prompt path with a graph
    z_T = dual.original_path(images())
    x = images().requires_grad_()
    for stage, pair in zip(dual.original.stages, dual.pairs.values(), strict=True):
        x = pair(stage(x))
    z_P = dual.head(dual.original.neck(x))
    assert len(runs) == 3
    twice_total, twice_terms, twice_gradients = losses_and_gradients(dual, student, z_T, z_P)
    assert torch.equal(total, twice_total)
    assert torch.equal(terms, twice_terms)
    # The same bits forward; backward, sums of up to N H W products in whatever order.
    for a, b in zip(gradients, twice_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_M12_a_copied_stage_is_not_shared():
    dual = make_dual(plus=True)
    assert dual.shared_stages == 0
    dual(images()).prompt_logits.sum().backward()
    assert dual.copied.stages[0][0].weight.grad.abs().sum() > 0


# In-place operations
# --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at", "size"),
    [(name, None, 32) for name in SMALL]
    + [
        ("torchvision:resnet18", None, 64),
        ("torchvision:vgg11_bn", None, 64),
        ("torchvision:mobilenet_v2", MOBILENET_CUTS, 64),
    ],
)
@pytest.mark.parametrize("plus", [False, True])
def test_M11_nothing_overwrites_a_stage_output(name, at, size, plus):
    dual = make_dual(name, at=at, plus=plus).eval()
    seen: list[tuple[Tensor, int, Tensor]] = []

    def record(_module, _inputs, out):
        seen.append((out, out._version, out.detach().clone()))

    trunks = [dual.original] + ([dual.copied] if plus else [])
    for module in [*dual.pairs.values(), *(s for trunk in trunks for s in trunk.stages)]:
        module.register_forward_hook(record)
    out = dual(images(size, batch=2))
    out.prompt_logits.sum().backward()
    paths = 3 * len(dual.pairs) - (not plus)  # stages of both paths, the first maybe shared; pairs
    assert len(seen) == paths
    for tensor, version, value in seen:
        assert tensor._version == version
        assert torch.equal(tensor, value)


class InPlaceBetween(nn.Module):
    """A network whose second stage starts with an activation in place on the first one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.second(self.act(self.first(x)))).flatten(1))


def test_M11_in_place_activations_of_the_teacher_are_made_out_of_place():
    teacher = InPlaceBetween()
    plain = copy.deepcopy(teacher)
    dual = DualPathTeacher(teacher, at=("first", "second")).eval()

    def literal_prompt_path() -> Tensor:
        with torch.no_grad():
            x = dual.pairs["stage1"](plain.first(images()))
            return dual.head(dual.pairs["stage2"](plain.second(x.relu())))

    out = dual(images())
    assert torch.equal(out.teacher_logits, plain(images()))
    assert torch.equal(out.prompt_logits, literal_prompt_path())
    # Negative control: with the activation in place the prompt path would read an overwritten x_1.
    with torch.no_grad():
        x = plain.first(images())
        plain.act(x)
        x = dual.pairs["stage1"](x)
        broken = dual.head(dual.pairs["stage2"](plain.second(x.relu())))
    assert not torch.allclose(broken, literal_prompt_path(), rtol=1e-3)


# Identity
# -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager_blocks")
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("plus", [False, True])
def test_T3_identity_initialisation_equals_the_teacher(name, plus):
    blocks = {"init": "identity", "fusion_norm": "none"}
    exact = make_dual(name, plus=plus, fold=not plus, **blocks).eval()(images())  # as the copy is
    assert torch.equal(exact.prompt_logits, exact.teacher_logits)
    normed = make_dual(name, plus=plus, init="identity").eval()(images())
    scale = normed.teacher_logits.abs().max().item()
    torch.testing.assert_close(
        normed.prompt_logits, normed.teacher_logits, rtol=0, atol=1e-3 * scale
    )
    assert not torch.equal(normed.prompt_logits, normed.teacher_logits)


@pytest.mark.parametrize("name", SMALL)
def test_M44_random_initialisation_differs_from_the_teacher(name):
    out = make_dual(name, fusion_norm="none").eval()(images())
    scale = out.teacher_logits.abs().max().item()
    assert (out.prompt_logits - out.teacher_logits).abs().max().item() > 0.05 * scale


# State
# ----------------------------------------------------------------------------------------------


def state_of_trained(dual: DualPathTeacher) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in dual.trained_state().items()}


@pytest.mark.parametrize("method_name", ["dfpt", "dfpt_plus"])
def test_trained_state_round_trip_without_the_teacher(method_name):
    method = make_method("cifar:wrn_16_1", method_name)
    train(method)
    dual = method.teacher.eval()
    state = state_of_trained(dual)
    assert not any(key.startswith("original.") for key in state)
    assert any(key.startswith("copied.") for key in state) is (method_name == "dfpt_plus")

    fresh = make_dual("cifar:wrn_16_1", plus=method_name == "dfpt_plus").eval()
    assert not torch.equal(fresh.prompt_path(images()), dual.prompt_path(images()))
    teacher = state_of(fresh.original)
    fresh.load_trained_state(state)
    assert same_bits(state_of_trained(fresh), state)
    assert same_bits(state_of(fresh.original), teacher)
    assert torch.equal(fresh.prompt_path(images()), dual.prompt_path(images()))


def test_trained_state_with_a_missing_or_unknown_name_is_refused():
    dual = make_dual()
    state = state_of_trained(dual)
    with pytest.raises(RuntimeError, match="unknown"):
        dual.load_trained_state({**state, "unknown": torch.zeros(1)})
    state.pop("head.2.weight")
    with pytest.raises(RuntimeError, match=r"head\.2\.weight"):
        dual.load_trained_state(state)


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_of_dfpt_holds_the_teacher_once(name):
    teacher = make_model(name)
    dual = DualPathTeacher(teacher, fold_bn=False)
    state = dual.state_dict()
    stored = [v.data_ptr() for v in state.values()]
    assert len(stored) == len(set(stored))
    original = {v.data_ptr() for k, v in state.items() if k.startswith("original.")}
    counters = "num_batches_tracked"
    assert original == {
        v.data_ptr() for k, v in teacher.state_dict().items() if not k.endswith(counters)
    }
    assert {k.split(".")[0] for k in state} == {"original", "pairs", "head"}


# Size of the prompts
# --------------------------------------------------------------------------------


def test_M47_prompt_norms_are_the_ratios_of_the_norms():
    dual = make_dual().eval()
    for batch in (images(), images(batch=3) + 1):
        with dual.prompt_norms() as norms:
            dual(batch)
        for name, pair in dual.pairs.items():
            x = stage_tensors(dual, batch)[0][name]
            with torch.no_grad():
                p = pair.prompt(x)
            ratios = torch.stack([p[i].norm() / x[i].norm() for i in range(len(batch))])
            # Of two norms; and p itself, by other kernels.
            rounding = 3 * growth(p[0].numel())
            torch.testing.assert_close(norms[name], ratios, rtol=rounding, atol=0)
            assert not norms[name].requires_grad
        assert len(norms) == 3


def test_M47_a_dead_prompt_block_shows_as_zero():
    with (dual := make_dual(init="identity").eval()).prompt_norms() as norms:
        dual(images())
    assert all((entry == 0).all() for entry in norms.values())


def test_M47_observers_are_gone_afterwards_and_after_an_error():
    dual = make_dual()
    with dual.prompt_norms() as norms:
        dual(images())
        assert all(pair.observer is not None for pair in dual.pairs.values())
    before = {name: entry.clone() for name, entry in norms.items()}
    dual(images())
    assert same_bits(before, norms)
    with pytest.raises(ZeroDivisionError), dual.prompt_norms():
        raise ZeroDivisionError
    assert all(pair.observer is None for pair in dual.pairs.values())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-10), (torch.float32, 1e-2)])
def test_joint_paths_are_the_same_paths_in_fewer_calls(dtype, rounding):
    """Logits and gradients within rounding, which flips a ReLU of an fp32 network now and then; the
    original path without a graph."""
    found = {}
    for joint in (False, True):
        torch.manual_seed(0)
        dual = DualPathTeacher(create_model("cifar:resnet14", num_classes=10), joint=joint)
        dual = dual.to(dtype)
        calls = []
        for stage in dual.original.stages:
            stage.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        output = dual(images(batch=4).to(dtype))
        assert not output.teacher_logits.requires_grad
        output.prompt_logits.square().sum().backward()
        grads = [p.grad for p in dual.prompt_parameters()]
        found[joint] = (*output, *grads), len(calls)
    (apart, apart_calls), (together, together_calls) = found[False], found[True]
    assert (apart_calls, together_calls) == (1 + 2 + 2, 3)
    for a, b in zip(apart, together, strict=True):
        assert (a - b).norm() <= rounding * max(a.norm(), 1e-2)


def test_joint_paths_need_a_frozen_backbone():
    teacher = create_model("cifar:resnet14", num_classes=10)
    with pytest.raises(UsageError, match="joint paths"):
        DualPathTeacher(teacher, joint=True, finetune_backbone=True)
