#!/usr/bin/env bash
# GPU checks and measurements of one part:
# bench/on_gpu.sh loss|prompt|step|step-plus|step-imagenet|data|optim
# bench/on_gpu.sh study NAME full|short
#
# Needs an NVIDIA GPU, PyTorch >= 2.11 and Triton >= 3.6; no network, no install, no tyro. Stays
# within 9 minutes. Correctness first; a short table last; rows for bench/results.csv and the full
# output are left in $OUT (or bench/out).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
part=${1:-}
out=${OUT:-$root/bench/out}
python=${PYTHON:-python3}
mkdir -p "$out"

# The repository root is the package: a link makes it importable under its name.
path=$(mktemp -d)
trap 'rm -rf "$path"' EXIT
ln -s "$root" "$path/dfptkd"
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}"

case $part in
loss)
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm --format=csv | tee "$out/gpu.csv"
  (cd "$path" && timeout 240 "$python" -m pytest -q --import-mode=importlib -p no:cacheprovider \
    "$root/tests/kernels/test_fused_loss_gpu.py" \
    "$root/tests/kernels/test_normalize_images_gpu.py") 2>&1 | tee "$out/loss-tests.txt" | tail -n 15
  if command -v compute-sanitizer > /dev/null; then
    (cd "$path" && timeout 90 compute-sanitizer --error-exitcode 9 "$python" -c "
import torch
from dfptkd.kernels import dual_path_loss
for rows, classes in ((7, 10), (33, 1001), (3, 21841)):
    s, p, t = torch.randn(3, rows, classes, device='cuda', dtype=torch.bfloat16)
    y = torch.randint(classes, (rows,), device='cuda')
    s.requires_grad_(), p.requires_grad_()
    dual_path_loss(s, p, t, y).total.backward()
torch.cuda.synchronize()
") > "$out/loss-sanitizer.txt" 2>&1 && echo "compute-sanitizer: clean" || tail -n 20 "$out/loss-sanitizer.txt"
  fi
  (cd "$path" && timeout 180 "$python" -m dfptkd.bench.kernels --device cuda \
    --out "$out/results.csv") 2>&1 | tee "$out/loss-bench.txt" | tail -n 60
  ;;
prompt)
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm --format=csv | tee "$out/gpu.csv"
  (cd "$path" && timeout 200 "$python" -m pytest -q --import-mode=importlib -p no:cacheprovider \
    "$root/tests/kernels/test_fused_prompt_gpu.py") 2>&1 | tee "$out/prompt-tests.txt" | tail -n 15
  if command -v compute-sanitizer > /dev/null; then
    (cd "$path" && timeout 90 compute-sanitizer --error-exitcode 9 "$python" -c "
import torch
from dfptkd.engine.models import PromptFusion
from dfptkd.kernels import use_backend
for channels, size in ((33, (7, 5)), (64, (14, 14))):
    pair = PromptFusion(channels).cuda()
    x = torch.randn(3, channels, *size, device='cuda', requires_grad=True)
    with use_backend('triton'), torch.autocast('cuda', torch.bfloat16):
        y = pair(x)
    y.sum().backward()
torch.cuda.synchronize()
") > "$out/prompt-sanitizer.txt" 2>&1 && echo "compute-sanitizer: clean" || tail -n 20 "$out/prompt-sanitizer.txt"
  fi
  (cd "$path" && timeout 240 "$python" -m dfptkd.bench.kernels --device cuda --rounds 30 \
    --shapes 256x64x56x56,256x128x28x28,256x256x14x14,256x512x7x7,64x64x32x32 \
    --out "$out/results.csv") 2>&1 | tee "$out/prompt-bench.txt" | tail -n 60
  (cd "$path" && timeout 60 "$python" -m dfptkd.bench.overhead --device cuda --classes 1000 \
    --teacher torchvision:resnet34 --student torchvision:resnet18 --image-size 224 --batch 256 \
    --out "$out/results.csv") 2>&1 | tee "$out/prompt-overhead.txt" | tail -n 20
  ;;
# CIFAR sizes: checks of the execution modes, then both pairs of the targets, three seeds at once.
step)
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm --format=csv | tee "$out/gpu.csv"
  (cd "$path" && timeout 240 "$python" -m pytest -q --import-mode=importlib -p no:cacheprovider \
    "$root/tests/engine/test_step_gpu.py" "$root/tests/engine/data/test_loader_gpu.py") 2>&1 | tee "$out/step-tests.txt" | tail -n 15
  (cd "$path" && timeout 280 "$python" -m dfptkd.bench.step --device cuda --rounds 50 --seeds 3 \
    --methods kd,dfpt --out "$out/results.csv") 2>&1 | tee "$out/step-bench.txt" | tail -n 30
  ;;
step-plus)
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm --format=csv | tee "$out/gpu.csv"
  (cd "$path" && timeout 260 "$python" -m dfptkd.bench.step --device cuda --rounds 50 \
    --methods kd,dfpt --pairs "cifar:resnet32x4>cifar:resnet8x4" \
    --out "$out/results.csv") 2>&1 | tee "$out/step-resnet.txt" | tail -n 30
  (cd "$path" && timeout 260 "$python" -m dfptkd.bench.step --device cuda --rounds 50 \
    --methods dfpt_plus --out "$out/results.csv") 2>&1 | tee "$out/step-plus.txt" | tail -n 30
  ;;
step-imagenet)
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm --format=csv | tee "$out/gpu.csv"
  (cd "$path" && timeout 520 "$python" -m dfptkd.bench.step --device cuda --rounds 15 --classes 1000 \
    --methods kd,dfpt --pairs "torchvision:resnet34>torchvision:resnet18" --image-size 224 \
    --batch 256 --out "$out/results.csv") 2>&1 | tee "$out/step-imagenet.txt" | tail -n 30
  ;;
# Photographs: DALI against torchvision, alone and under a training step. DALI travels as wheels and
# is measured where it can be imported; $DATA is a folder with a folder of images for each class.
data)
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm --format=csv | tee "$out/gpu.csv"
  photographs=${DATA:-$root/shared/data/jpeg-sample}
  if [ ! -d "$photographs" ]; then
    echo "$photographs: no such folder, expected DATA=<folder with a folder of images for each class>" >&2
    exit 3
  fi
  mkdir "$path/photographs"
  ln -s "$(realpath "$photographs")" "$path/photographs/train"
  ln -s "$(realpath "$photographs")" "$path/photographs/val"
  "$python" -c "import nvidia.dali as d; print('DALI', d.__version__)" 2>/dev/null \
    || echo "DALI cannot be imported: torchvision and synthetic alone"
  (cd "$path" && timeout 200 "$python" -m pytest -q -s --import-mode=importlib -p no:cacheprovider \
    "$root/tests/engine/data/test_dali_gpu.py") 2>&1 | tee "$out/data-tests.txt" | tail -n 15
  for workers in 4 16; do
    (cd "$path" && timeout 160 "$python" -m dfptkd.bench.data --device cuda --batch 256 --rounds 3 \
      --data.root "$path/photographs" --workers "$workers" --steps 20 --train-steps 15 \
      --out "$out/results.csv") 2>&1 | tee "$out/data-bench-$workers.txt" | tail -n 12
  done
  ;;
# Optimizers. APEX_SOURCE: a checkout of github.com/NVIDIA/apex whose CUDA extension amp_C is built
# first (needs nvcc); without it apex is measured where it is installed already.
optim)
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm --format=csv | tee "$out/gpu.csv"
  if [ -n "${APEX_SOURCE:-}" ]; then
    cp -r "$APEX_SOURCE" "$path/apex-source"
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c \
      "import torch; print('%d.%d' % torch.cuda.get_device_capability())")}
    (cd "$path/apex-source" && timeout 300 "$python" - << 'EOF'
# amp_C alone, with the sources and flags that apex's setup.py gives it: all of apex takes longer.
import pathlib
import site
from torch.utils.cpp_extension import load
text = pathlib.Path("setup.py").read_text()
names = text.partition('name="amp_C"')[2].partition("]")[0].split('"')
sources = [name for name in names if name.startswith("csrc/")]
# A pip-installed CUDA has its headers there.
packages = [pathlib.Path(folder) for folder in site.getsitepackages()]
headers = [str(path) for folder in packages for path in folder.glob("nvidia/*/include")]
load("amp_C", sources, extra_cflags=["-O3"], build_directory="..", verbose=True,
     extra_cuda_cflags=["-lineinfo", "-O3", "--use_fast_math"], extra_include_paths=["csrc", *headers])
EOF
    ) > "$out/optim-build.txt" 2>&1 || { tail -n 20 "$out/optim-build.txt"; exit 1; }
    ln -s "$path/apex-source/apex" "$path/apex"
  fi
  (cd "$path" && timeout 120 "$python" -m pytest -q --import-mode=importlib -p no:cacheprovider \
    -rs "$root/tests/engine/test_apex_gpu.py") 2>&1 | tee "$out/optim-tests.txt" | tail -n 15
  (cd "$path" && timeout 120 "$python" -m dfptkd.bench.optim --device cuda --rounds 100 \
    --out "$out/results.csv") 2>&1 | tee "$out/optim-bench.txt" | tail -n 30
  ;;
# As much of a study as $MINUTES allow (7; saving and packing take more). $DATA: folder with
# cifar-100-binary, or with the script that unpacks it. What is under way comes back as $out/study.tar.* and is gone on with when these
# lie in bench/out: the record, teachers, and the newest checkpoint of each unfinished run.
study)
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm --format=csv | tee "$out/gpu.csv" || true
  name=${2:-main} budget=${3:-full} data=${DATA:-$root/shared/data}
  if [ ! -d "$data/cifar-100-binary" ]; then
    if [ ! -f "$data/unpack_cifar100.py" ]; then
      echo "$data: neither cifar-100-binary nor unpack_cifar100.py: expected DATA=<folder with one>" >&2
      exit 3
    fi
    "$python" "$data/unpack_cifar100.py" "$path/data"
    data=$path/data
  fi
  state=$path/state
  mkdir -p "$state/runs"
  cp -r "$root/bench/results" "$state/results" 2> /dev/null || mkdir "$state/results"
  if ls "$root"/bench/out/study.tar.* > /dev/null 2>&1; then
    cat "$root"/bench/out/study.tar.* | tar -x -C "$state"
  fi
  code=0
  (cd "$path" && "$python" -m dfptkd.engine.cli study "$name" --budget "$budget" --data.root "$data" \
    --out-root "$state/runs" --results "$state/results" --minutes "${MINUTES:-7}") 2>&1 \
    | tee "$out/study.txt" || code=$?
  "$python" - "$state" << 'EOF' || echo "not thinned out: everything is packed" >&2
# A run that is on record may go; of the others the newest checkpoint is enough.
import pathlib
import shutil
import sys
import zipfile
state = pathlib.Path(sys.argv[1])
archives = [zipfile.ZipFile(path).namelist() for path in state.glob("results/runs/*.zip")]
on_record = {name.removesuffix("/run.json") for names in archives for name in names}
for run in (state / "runs").iterdir():
    if run.name in on_record:
        shutil.rmtree(run)
        continue
    steps = sorted(run.glob("checkpoints/step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    is_finished = any((run / f"{kind}.safetensors").is_file() for kind in ("teacher", "student"))
    for old in steps if is_finished else steps[:-1]:
        shutil.rmtree(old)
EOF
  tar -c -C "$state" runs results | split -b 15m - "$out/new.study.tar."
  rm -f "$out"/study.tar.*
  for part in "$out"/new.study.tar.*; do mv "$part" "$out/${part##*/new.}"; done
  ls -l "$out"/study.tar.*
  exit $code
  ;;
*)
  echo "usage: bench/on_gpu.sh loss|prompt|step|step-plus|step-imagenet|data|optim" >&2
  echo "       bench/on_gpu.sh study NAME full|short" >&2
  exit 2
  ;;
esac
