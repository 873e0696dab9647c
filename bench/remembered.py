"""KD runs of the quick start with remembered teacher logits against the same runs without.

    python -m dfptkd.bench.remembered [--method kd] [--epochs 10] [--rounds 3] [--device cpu]

    first       the recipe as it is, nothing known before: 50 forms an image, few are met twice
    again       the same run once more: its file knows every image
    no crop     --data.crop-padding 0, nothing known before: 2 forms an image

Both sides of a case run in turn, `--rounds` times; of each run the images a second of every epoch
from the second on count. All runs of a case must end with the same bits. Needs Fashion-MNIST; makes
the quick start's teacher where it is missing. Everything else is written to a temporary folder.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

CASES: dict[str, list[str]] = {
    "first": [],
    "again": [],
    "no crop": ["--data.crop-padding", "0"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement; 1 where bits differ."""
    parser = argparse.ArgumentParser(prog="python -m dfptkd.bench.remembered")
    parser.add_argument("--method", default="kd")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where the teacher lies")
    args = parser.parse_args(argv)
    failed = False
    with tempfile.TemporaryDirectory(prefix="dfptkd-remembered-") as scratch:
        run = Runner(args, Path(scratch))
        run("off", [], "settling")  # makes the teacher, and settles the choice of kernels
        print("case      off images/s   on images/s   ratio   known from epoch 2 on   same bits")
        for case, options in CASES.items():
            speeds: dict[str, list[float]] = {"off": [], "file": []}
            bits, shares = set(), []
            for i in range(args.rounds):
                if case != "again":
                    run.forget()
                for side, found in speeds.items():
                    out = run(side, options, f"{case}-{side}-{i}".replace(" ", "-"))
                    found += images_per_second(out)
                    bits.add(digest(out))
                    shares += known(out) if side == "file" else []
            off, on = (statistics.median(found) for found in speeds.values())
            failed |= len(bits) > 1
            print(
                f"{case:8}  {off:12,.0f}  {on:12,.0f}   {on / off:5.2f}   "
                f"{statistics.mean(shares or [0.0]):19.1f} %   {'yes' if len(bits) == 1 else 'NO'}",
                flush=True,
            )
    return int(failed)


class Runner:
    """Runs of `dfptkd train quickstart` in processes of their own.

    Args:
        args: Of the command line.
        scratch: Takes the runs, and a cache of logits that is nobody else's.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.data = scratch / "data"  # beside which the logits lie
        self.data.mkdir()

    def __call__(self, remember: str, options: Sequence[str], name: str) -> Path:
        args, out = self.args, self.scratch / name
        command = [
            sys.executable, "-m", "dfptkd.engine.cli", "train", "quickstart",
            "--method", args.method, "--epochs", str(args.epochs), "--eval-every", "1",
            "--checkpoint-every", str(args.epochs), "--device", args.device, "--seed", "0",
            "--out-root", str(args.root), "--out", str(out), "--data.root", str(self.data),
            "--teacher.remember", remember, *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return out

    def forget(self) -> None:
        """Remove the logits that earlier runs have kept."""
        for path in self.data.rglob("*.logits"):
            path.unlink()


def images_per_second(out: Path) -> list[float]:
    """Of each epoch from the second on."""
    with open(out / "metrics.csv", newline="") as file:
        return [float(row["images_per_second"]) for row in csv.DictReader(file)][1:]


def known(out: Path) -> list[float]:
    """Percent of the images of each epoch from the second on."""
    lines = (out / "events.jsonl").read_text().splitlines()
    events = [e for e in map(json.loads, lines) if e["kind"] == "teacher_logits"]
    found = [re.match(r"([\d.]+) % of", event["message"]) for event in events]
    return [float(match[1]) for match in found if match][1:]


def digest(out: Path) -> str:
    """SHA-256 of the finished student's tensors; the file's metadata come in any order."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(out / "student.safetensors").items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
