"""The bench measures what it says, keeps what it measured before, and refuses a wrong result."""

import csv
from dataclasses import fields, replace

import pytest
import torch

from dfptkd.bench import kernels as bench
from dfptkd.bench import optim, overhead
from dfptkd.bench.measure import Row, append_rows
from dfptkd.engine import kernel_choice
from dfptkd.engine.cli import main
from dfptkd.engine.config import PromptConfig
from dfptkd.engine.timing import time_interleaved
from dfptkd.kernels import which_backend

CPU = torch.device("cpu")


def providers(operation, dtype=None):
    """Eager, compiled, ours where there is one; what is measured to be the best, by any name."""
    fast = which_backend(operation, torch.zeros(1), dtype)
    return {"eager", "compile", "auto"} | ({f"ours[{fast}]"} - {"ours[reference]"})


def names(rows):
    return {"auto" if row.provider.startswith("auto[") else row.provider for row in rows}


def measure(shape=(4, 5)):
    return list(bench.bench([shape], CPU, torch.float32, rounds=3))


def test_rows_carry_their_circumstances():
    rows = measure()
    assert {row.provider for row in rows} >= {"eager", "compile"}
    assert {row.passes for row in rows} == {"forward", "forward+backward"}
    for row in rows:
        assert row.device.startswith("cpu: ")
        assert row.torch == torch.__version__
        assert row.n == 3
        assert row.p20_us <= row.median_us <= row.p80_us
        # five or three tensors of 20 floats and four labels
        tensors = 5 if row.kernel == "dual_path_loss" else 3
        moved = tensors * 80 + 32
        assert row.gb_per_s == pytest.approx(moved / row.median_us / 1e3, abs=0.01)


def test_a_pair_is_measured_by_every_provider():
    rows = measure((2, 32, 5, 4))
    assert names(rows) == providers("partial_pointwise_conv")
    image = 4 * 2 * 32 * 5 * 4
    for row in rows:
        moved = {"forward": 2, "forward+backward": 5}[row.passes] * image
        assert row.gb_per_s == pytest.approx(moved / row.median_us / 1e3, abs=0.01)


def test_images_are_measured_forward_alone():
    rows = measure((3, 8, 6, 3))
    assert names(rows) == providers("normalize_images", torch.float32)
    for row in rows:
        assert (row.kernel, row.passes) == ("normalize_images", "forward")
        moved = 5 * 3 * 8 * 6 * 3 + 17 * 3  # and three offsets and flips
        assert row.gb_per_s == pytest.approx(moved / row.median_us / 1e3, abs=0.01)


def test_auto_is_what_was_measured_and_not_what_is_fused(monkeypatch):
    monkeypatch.setattr(kernel_choice, "is_faster", lambda ours, reference: False)
    monkeypatch.setenv("DFPTKD_KERNEL_CACHE", "/dev/null/none")  # not what a test before has found
    assert "auto[reference]" in {row.provider for row in measure((2, 16, 3, 3))}


def test_results_are_appended_never_replaced(tmp_path):
    rows = measure()
    path = tmp_path / "results.csv"
    append_rows(rows, path)
    first = path.read_bytes()
    append_rows(rows, path)
    assert path.read_bytes().startswith(first)
    with open(path, newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 2 * len(rows)
    assert list(read[0]) == [f.name for f in fields(Row)]


@pytest.mark.parametrize("shape", [(4, 5), (2, 32, 5, 4), (3, 8, 6, 3)], ids=str)
def test_a_provider_with_another_result_is_not_timed(monkeypatch, shape):
    original = bench.cases

    def with_a_wrong_one(*args):
        for case in original(*args):
            right = case.providers["eager"]
            wrong = {"wrong": lambda right=right: 1.01 * right()}
            yield replace(case, providers=case.providers | wrong)

    monkeypatch.setattr(bench, "cases", with_a_wrong_one)
    with pytest.raises(RuntimeError, match="by wrong: off by"):
        measure(shape)


def test_variants_are_interleaved():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    time_interleaved(variants, CPU, rounds=3, warmup=1)
    assert calls == list("ab" + "ababab")


def test_the_command(tmp_path, capsys):
    out = tmp_path / "r.csv"
    assert main(["bench", "kernels", "--shapes", "4x5", "--rounds", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "dual_path_loss" in printed
    assert "commit" in printed
    assert out.is_file()
    assert main(["bench", "colour"]) == 2
    assert "kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["kernels", "--shapes", "12"], "--shapes 12: expected rows x classes"),
        (["kernels", "--shapes", "4x5,0x5"], "--shapes 0x5: expected"),
        (["kernels", "--shapes", "4x5x6"], "--shapes 4x5x6: expected"),
        (["kernels", "--rounds", "0"], "--rounds: '0': expected a whole number of at least 1"),
        (["kernels", "--device", "tpu"], "device='tpu': expected cpu or cuda"),
        (["overhead", "--batch", "-3"], "--batch: '-3': expected a whole number"),
        (["overhead", "--teacher", "cifar:resnet32x5"], "resnet32x4"),
        (["overhead", "--fusion-groups", "7"], "prompt.fusion_groups=7: expected a divisor"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_one_line_and_measures_nothing(tmp_path, capsys, args, said):
    out = tmp_path / "r.csv"
    assert main(["bench", *args, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_overhead_counts_and_times_the_pairs(tmp_path, capsys):
    out = tmp_path / "r.csv"
    options = ["--batch", "2", "--rounds", "2", "--out", str(out)]
    teacher = ["--teacher", "cifar:resnet8x4", "--student", "cifar:resnet8"]
    assert main(["bench", "overhead", *teacher, *options]) == 0
    printed = capsys.readouterr().out
    assert "of the teacher's" in printed
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["passes"], row["provider"]) for row in rows] == [
        (part, side) for part in overhead.PARTS for side in ("eager", "ours")
    ]


def test_overhead_shares_are_those_of_the_cost_tables(monkeypatch):
    monkeypatch.setattr(kernel_choice, "is_faster", lambda ours, reference: True)
    monkeypatch.setenv("DFPTKD_KERNEL_CACHE", "/dev/null/none")
    setting = overhead.Setting(
        "cifar:resnet32x4", "cifar:resnet8x4", "dfpt", 1, 32, 100, PromptConfig(), CPU
    )
    found = overhead.measure(setting, rounds=1)
    # Reference 7.3: 2.3 % of the teacher's MACs, the new head's among them.
    assert 100 * found.pair_macs / found.cost.teacher.teacher_macs == pytest.approx(2.3, abs=0.05)
    kept = [side.path_kept for side in found.sides.values()]
    assert kept[1] < 0.6 * kept[0]
    assert all(side.pairs_kept < side.path_kept for side in found.sides.values())


def test_an_update_is_measured_by_every_optimiser_that_is_there(tmp_path, capsys):
    out = tmp_path / "results.csv"
    options = ["--device", "cpu", "--rounds", "3", "--model", "cifar:resnet8", "--out", str(out)]
    assert main(["bench", "optim", *options]) == 0
    with open(out, newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"sgd", "adamw", "sgd[foreach]", "adamw[foreach]"}
    numel = int(rows["sgd"]["shape"])
    for name, row in rows.items():
        assert (row["kernel"], row["passes"], row["n"]) == ("optim:cifar:resnet8", "update", "3")
        moved = (5 if name.startswith("sgd") else 7) * 4 * numel
        expected = moved / float(row["median_us"]) / 1e3
        assert float(row["gb_per_s"]) == pytest.approx(expected, abs=0.01)
    assert "apex-lamb" in capsys.readouterr().out  # and why it is not there


def test_every_side_of_the_optimiser_bench_moves_the_same_network():
    optimizers = optim.variants("cifar:resnet8", CPU)
    before = {name: [p.detach().clone() for p in _params(o)] for name, o in optimizers.items()}
    assert all(
        torch.equal(a, b) for v in before.values() for a, b in zip(v, before["sgd"], strict=True)
    )
    for optimizer in optimizers.values():
        optimizer.step()
    for name, optimizer in optimizers.items():
        kind = name.partition("[")[0]
        for ours, theirs, start in zip(
            _params(optimizer), _params(optimizers[kind]), before[name], strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            assert not torch.equal(ours, start)


def _params(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]
