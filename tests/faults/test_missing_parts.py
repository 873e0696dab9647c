"""A machine without the optional parts (row 24); with one of them broken: tests/kernels."""

import json
import subprocess
import sys

from injectors import tiny_config, write_teacher

from dfptkd.engine.train import to_dict

BARE = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "timm", "apex", "amp_C", "onnx"}:
            return None
        if name.startswith("nvidia.dali"):
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
import torch
from dfptkd.kernels import backend
backend.library_candidates = lambda: []
from dfptkd.engine.cli import main
assert not torch.cuda.is_initialized()
codes = [main(["doctor"]), main(["train", "--config", sys.argv[1]])]
# Control: whoever asks for what is missing is told so; it really is not there.
for asked in (
    ["--kernels", "native"],
    ["--teacher.name", "timm:test_resnet"],
    ["--data.name", "folder", "--data.loader", "dali"],
    ["--optim.name", "apex-sgd"],
):
    code = main(["train", "--config", sys.argv[1], "--out", sys.argv[2], *asked])
    print("asked for", asked[-1], code)
assert not torch.cuda.is_initialized()
assert "triton" not in sys.modules
sys.exit(max(codes))
"""


def test_row_24_a_bare_machine_trains_and_doctor_says_what_is_lost(tmp_path):
    write_teacher(tmp_path)
    config = tiny_config(tmp_path / "bare", "dfpt")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"config": to_dict(config)}))
    command = [sys.executable, "-c", BARE, str(file), str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for lost in ("no timm:... models", "no fused GPU kernels", "decoded by Pillow", "no ONNX"):
        assert lost in done.stdout
    assert "native library is not built" in done.stdout
    for asked in ("native", "timm:test_resnet", "dali", "apex-sgd"):
        assert f"asked for {asked} 2" in done.stdout
    assert json.loads((tmp_path / "bare/status.json").read_text())["state"] == "finished"
