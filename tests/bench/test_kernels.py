"""The bench measures what it says, keeps what it measured before, and refuses a wrong result."""

import csv
from dataclasses import fields

import pytest
import torch

from dfptkd.bench import kernels as bench
from dfptkd.bench.measure import Row, append_rows, time_interleaved
from dfptkd.engine.cli import main

CPU = torch.device("cpu")


def measure(operations=("dual_path_loss",)):
    return bench.bench([(4, 5)], CPU, torch.float32, rounds=3, operations=operations)


def test_rows_carry_their_circumstances():
    rows = measure()
    assert {row.provider for row in rows} >= {"eager", "compile"}
    assert {row.passes for row in rows} == {"forward", "forward+backward"}
    for row in rows:
        assert row.device.startswith("cpu: ")
        assert row.torch == torch.__version__
        assert row.n == 3
        assert row.p20_us <= row.median_us <= row.p80_us
        # five tensors of 20 floats and four labels
        assert row.gb_per_s == pytest.approx((5 * 80 + 32) / row.median_us / 1e3, abs=0.01)


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


def test_a_provider_with_another_result_is_not_timed(monkeypatch):
    original = bench.providers

    def with_a_wrong_one(operation, x):
        return original(operation, x) | {"wrong": lambda: 1.01 * bench.fused_total(operation, x)}

    monkeypatch.setattr(bench, "providers", with_a_wrong_one)
    with pytest.raises(RuntimeError, match="wrong: total off by"):
        measure()


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
