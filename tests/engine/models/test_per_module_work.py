import copy

import pytest
import torch
from torch import nn

from dfptkd.engine.models import PromptFusion, create_model
from dfptkd.engine.models.parts import channel_shuffle
from dfptkd.engine.models.per_module_work import BatchCounters, CastWeights


def networks():
    torch.manual_seed(0)
    student = create_model("cifar:ShuffleV1", num_classes=10)
    pair = PromptFusion(16)
    for module in (student, pair):
        module.to(memory_format=torch.channels_last)
    return [student.train(), pair.train()]


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.randn(
        4, 16, 8, 8, generator=generator
    )


def forward_and_backward(student, pair):
    images, maps = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        total = student(images).float().square().mean() + pair(maps).float().square().mean()
    total.backward()
    return total.detach()


def counts(modules):
    return [
        int(m.num_batches_tracked)
        for module in modules
        for m in module.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]


def test_batches_are_counted_as_by_each_batch_norm_itself():
    plain, ours = networks(), networks()
    counters = BatchCounters(ours)
    for _ in range(2):
        forward_and_backward(*plain)
        with counters.apart():
            forward_and_backward(*ours)
        counters.add(torch.ones((), dtype=torch.int64))
    assert counts(ours) == counts(plain)
    assert set(counts(ours)) == {2}
    counters.add(torch.zeros((), dtype=torch.int64))  # a step that was skipped
    assert counts(ours) == counts(plain)


def test_batch_norms_in_eval_mode_are_not_counted():
    ours = networks()
    counters = BatchCounters(ours)
    ours[0].eval()
    counters.add(torch.ones((), dtype=torch.int64))
    assert set(counts(ours[:1])) == {0}
    assert set(counts(ours[1:])) == {1}


def test_batch_norms_that_read_their_count_keep_it():
    averaging = nn.BatchNorm2d(2, momentum=None)
    counters = BatchCounters([averaging, nn.SyncBatchNorm(2)])
    assert not counters.owns(averaging.num_batches_tracked)
    with counters.apart():
        averaging(torch.randn(2, 2, 2, 2))
    assert int(averaging.num_batches_tracked) == 1


def test_counts_are_back_after_a_forward_pass_that_fails():
    ours = networks()
    with pytest.raises(RuntimeError, match="out of memory"), BatchCounters(ours).apart():
        raise RuntimeError("out of memory")
    assert set(counts(ours)) == {0}


def test_weights_cast_together_give_the_bits_of_autocast():
    plain, ours = networks(), networks()
    weights = CastWeights(ours, torch.bfloat16)
    expected = forward_and_backward(*plain)
    with weights.applied():
        images, maps = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            total = ours[0](images).float().square().mean()
            total = total + ours[1](maps).float().square().mean()
    total.backward()
    assert torch.equal(total.detach(), expected)
    names = [name for module in plain for name, _ in module.named_parameters()]
    grads = [[p.grad for module in side for p in module.parameters()] for side in (plain, ours)]
    for name, a, b in zip(names, *grads, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b), name
    convolutions = sum(isinstance(m, nn.Conv2d) for module in ours for m in module.modules())
    assert len(weights.slots) >= convolutions
    assert all(isinstance(p, nn.Parameter) for module in ours for p in module._parameters.values())


def test_nothing_is_cast_without_autocast_nor_of_what_is_frozen():
    ours = networks()
    assert not CastWeights(ours, None).slots
    ours[0].requires_grad_(False)
    slots = CastWeights(ours, torch.bfloat16).slots
    assert slots
    assert all(module in set(ours[1].modules()) for module, _ in slots)


def test_a_weight_that_gets_no_gradient_is_no_obstacle():
    ours = networks()
    unused = nn.Linear(2, 2)
    weights = CastWeights([*ours, unused], torch.bfloat16)
    with weights.applied(), torch.autocast("cpu", torch.bfloat16):
        total = ours[0](inputs()[0]).float().sum()
    total.backward()
    assert unused.weight.grad is None
    assert next(ours[0].parameters()).grad is not None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channel_shuffle_moves_channel_g_c_to_c_g_in_one_copy(layout):
    x = torch.arange(2 * 6 * 4 * 3.0).reshape(2, 6, 4, 3).contiguous(memory_format=layout)
    y = channel_shuffle(copy.deepcopy(x), 3)
    for g in range(3):
        for c in range(2):
            assert torch.equal(y[:, c * 3 + g], x[:, g * 2 + c])
    assert y.is_contiguous(memory_format=torch.channels_last)
