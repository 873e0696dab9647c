"""Networks that do not fit a run are refused in one line before anything is trained, without a
trace of the attempt."""

import random
from collections import namedtuple

import numpy
import pytest
import torch
from torch import Tensor, nn

from dfptkd.engine.config import RunConfig
from dfptkd.engine.errors import UsageError
from dfptkd.engine.methods import build_method
from dfptkd.engine.models import create_model
from dfptkd.engine.models.cost import count_macs
from dfptkd.engine.models.fit import (
    Demand,
    check_step,
    check_student,
    check_teacher,
    meta_twin,
)

SIZE = (16, 16)
DEMAND = Demand(num_classes=5, image_size=SIZE, part=4, evaluated=3)
Outputs = namedtuple("Outputs", ("logits", "aux_logits"))


class Network(nn.Module):
    """Convolution, BatchNorm and dropout; `change` is done to images, features and logits."""

    def __init__(self, *, classes=5, images=None, features=None, logits=None, training_alone=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(6, classes)
        self.changes = images, features, logits
        self.training_alone = training_alone

    def forward(self, x: Tensor):
        images, features, logits = self.changes
        x = x if images is None else images(x)
        x = self.drop(self.norm(self.conv(x)))
        x = x if features is None else features(x)
        x = self.fc(x.mean((2, 3)))
        if logits is None or (self.training_alone and not self.training):
            return x
        return logits(x)


def needs_values(x: Tensor) -> Tensor:
    """Code that tensors without memory do not take, and that draws from every generator."""
    assert x.sum().item() == 0
    return x + random.random() + numpy.random.rand()


def refuse_size(x: Tensor) -> Tensor:
    assert x.shape[2:] == (24, 24), "expected 24 x 24 pixels"
    return x


def one_value_a_channel(x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x.mean((2, 3)), None, None, training=True)[:, :, None, None]


def whole_state(network: nn.Module) -> list:
    """Whatever a pass could have moved."""
    tensors = [*network.parameters(), *network.buffers()]
    return [
        *(tensor.detach().clone() for tensor in tensors),
        *(tensor._version for tensor in tensors),
        *(id(tensor) for tensor in tensors),
        *(parameter.grad for parameter in network.parameters()),
        *((module.training, len(vars(module))) for module in network.modules()),
        torch.get_rng_state(), random.getstate(), str(numpy.random.get_state()),
    ]  # fmt: skip


def same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("images", [None, needs_values])
def test_a_check_leaves_no_trace(images):
    student, teacher = Network(images=images), create_model("cifar:resnet8", num_classes=5)
    student.norm.eval()
    method = build_method(RunConfig(), student, teacher).train()
    before = [whole_state(method), whole_state(teacher)]
    check_student("own", student, DEMAND)
    check_teacher("cifar:resnet8", teacher, DEMAND)
    check_step(RunConfig(), method, DEMAND)
    after = [whole_state(method), whole_state(teacher)]
    for old, new in zip(before, after, strict=True):
        assert all(same(a, b) for a, b in zip(old, new, strict=True))


def test_the_copy_without_memory_is_the_network():
    network = create_model("cifar:wrn_16_1", num_classes=5)
    network.fc.weight.requires_grad_(False)
    network.tied = nn.ParameterList([network.fc.bias])
    twin = meta_twin(network)
    assert {t.device.type for t in twin.state_dict().values()} == {"meta"}
    pairs = list(zip(network.named_parameters(), twin.named_parameters(), strict=True))
    assert all(
        (a, p.shape, p.requires_grad) == (b, q.shape, q.requires_grad) for (a, p), (b, q) in pairs
    )
    assert twin.tied[0] is twin.fc.bias


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Network(logits=lambda x: (x, x)), "returns a tuple in training mode: expected one tensor"),
        (
            Network(logits=lambda x: Outputs(x, x), training_alone=True),
            "returns a Outputs in training",
        ),
        (Network(logits=lambda x: {"out": x}), "returns a dict"),
        (
            Network(classes=7),
            "returns torch.float32 [4, 7] in training mode for 4 images of 16 x 16",
        ),
        (Network(logits=lambda x: x[:, :, None, None]), "[4, 5, 1, 1]"),
        (Network(logits=lambda x: x.view(-1, 5)[:2]), "[2, 5]"),
        (Network(logits=lambda x: x.argmax(1)), "torch.int64 [4]"),
        (
            Network(images=refuse_size),
            "(expected 24 x 24 pixels): expected a network for images of 16",
        ),
        (Network(images=lambda x: x.view(-1)), "cannot be trained on parts of 4 images of 16 x 16"),
    ],
)
def test_a_student_that_does_not_fit_is_refused_in_one_line(network, words):
    with pytest.raises(UsageError) as error:
        check_student("own:name", network, DEMAND)
    assert str(error.value).startswith("student own:name ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_auxiliary_heads_of_the_training_mode_alone_are_fine_for_a_teacher():
    check_teacher("own", Network(logits=lambda x: (x, x), training_alone=True), DEMAND)
    with pytest.raises(UsageError, match=r"^teacher own returns a tuple in evaluation mode"):
        check_teacher("own", Network(logits=lambda x: (x, x)), DEMAND)


@pytest.mark.parametrize("images", [None, needs_values])
def test_one_value_a_channel_is_refused_with_what_would_do(images):
    network = Network(images=images, features=one_value_a_channel)
    check_student("own", network, DEMAND)
    with pytest.raises(UsageError) as error:
        check_student("own", network, Demand(5, SIZE, part=1, evaluated=3))
    for words in (
        "parts of 1 image of",
        "more than 1 value per channel",
        "expected 2 images or more",
    ):
        assert words in str(error.value)


def test_the_last_image_of_an_evaluation_counts():
    network = Network(logits=lambda x: x.squeeze(0))
    check_student("own", network, DEMAND)
    with pytest.raises(UsageError, match=r"\[5\] in evaluation mode for 1 image"):
        check_student("own", network, Demand(5, SIZE, part=4, evaluated=1))


def test_images_that_grow_are_checked_from_their_first_size_on():
    network = Network(images=refuse_size)
    check_student("own", network, Demand(5, (24, 24), part=4, evaluated=3))
    with pytest.raises(UsageError, match="16 x 16"):
        check_student("own", network, Demand(5, (24, 24), 4, 3, start_size=SIZE))


def test_prompt_blocks_that_see_one_value_a_channel_are_refused():
    """The networks fit by themselves: the frozen BatchNorms do not look at the batch."""
    student, teacher = Network(), create_model("cifar:resnet8_s2", num_classes=5)
    small = Demand(5, (4, 4), part=1, evaluated=1)
    check_student("own", student, small)
    check_teacher("cifar:resnet8_s2", teacher, small)
    method = build_method(RunConfig(), student, teacher)
    with pytest.raises(UsageError, match=r"^method dfpt with teacher .* 2 images or more"):
        check_step(RunConfig(), method, small)
    check_step(RunConfig(), method, Demand(5, (4, 4), part=2, evaluated=1))


@pytest.mark.parametrize("method", ["kd", "dfpt"])
def test_nothing_is_trained_where_student_and_teacher_are_one(method):
    network = create_model("cifar:resnet8", num_classes=5)
    with pytest.raises(UsageError, match="share parameters"):
        build_method(RunConfig(method=method), network, network)
    student = create_model("cifar:resnet8", num_classes=5).requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter requires grad"):
        build_method(RunConfig(method=method), student, network)


def test_a_network_whose_code_needs_values_is_counted_too():
    plain, network = Network(), Network(images=needs_values)
    assert (
        count_macs(network, (1, 3, *SIZE))
        == count_macs(plain, (1, 3, *SIZE))
        == 8 * 8 * 6 * 27 + 30
    )
