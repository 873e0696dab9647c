#!/usr/bin/env bash
# Checks and measurements on a GPU, in parts:
#
#   bench/on_gpu.sh first        what to ask of a first GPU: at most nine minutes (bench/first.py)
#   bench/on_gpu.sh loss|prompt|step|step-plus|step-imagenet|data|optim     at most four each
#   bench/on_gpu.sh study NAME full|short    as much of a study as four minutes allow
#
# Needs an NVIDIA GPU, what comes with PyTorch >= 2.11 and torchvision, and pytest for all but first;
# no network, no install, no tyro, no DALI, no apex.
#
# A part is a list of steps (below), each a process of its own with its own limit: whatever happens
# to one, the next one runs. All that they print is printed at once and kept in $OUT/PART.txt
# (OUT absent: bench/out); each row of a measurement is in $OUT/results.csv as soon as it is known.
# The last line says what ran, failed and was cut.
#
# Exit codes: 0 all ran; 1 a step failed; 124 none failed, but time was up for some; 2 usage; 3 data;
# 5 OUT cannot be written; of study its own.
#
# PYTHON   interpreter                     LIMIT      most seconds of a step
# BUDGET   seconds for all of it           OPERATORS  of first: those that are checked (all)
# SMALL=1  of first: tiny networks, to try it out
# SLOW     times as much for everything (1)
# DATA     of data: folder with a folder of images for each class; of study: folder with
#          cifar-100-binary, or with the script that unpacks it
# MINUTES  of study: stop and save after so long (3)
# APEX_SOURCE   of optim: a checkout of github.com/NVIDIA/apex, whose CUDA extension is built first
set -uo pipefail # no -e: a step that fails must not end the part

# part | seconds | step | what it is, and its arguments
steps=$(
  cat << 'EOF'
first         | 30  | environment | first environment
first         | 70  | kernels     | first kernels
first         | 20  | ceilings    | first ceilings
first         | 80  | modes       | first modes
first         | 160 | cifar       | first cifar
first         | 70  | pairs       | first pairs
first         | 20  | grouped     | first grouped
first         | 90  | imagenet    | first imagenet
first         | 40  | sanitizer   | sanitizer all
loss          | 70  | tests       | tests kernels/test_fused_loss_gpu.py kernels/test_normalize_images_gpu.py
loss          | 40  | sanitizer   | sanitizer dual_path_loss,distillation_loss,normalize_images
loss          | 125 | bench       | bench kernels --shapes 128x100,256x1000,2048x1000,16384x1000,64x32x32x3,256x224x224x3
prompt        | 60  | tests       | tests kernels/test_fused_prompt_gpu.py
prompt        | 30  | sanitizer   | sanitizer prompt_fusion,partial_pointwise_conv,affine_relu,frozen_relu
prompt        | 105 | bench       | bench kernels --rounds 30 --operators prompt_fusion --shapes 256x64x56x56,64x64x32x32,256x256x14x14,256x128x28x28,256x512x7x7
prompt        | 40  | overhead    | bench overhead --classes 1000 --teacher torchvision:resnet34 --student torchvision:resnet18 --image-size 224 --batch 256
step          | 60  | tests       | tests engine/test_step_gpu.py engine/data/test_loader_gpu.py
step          | 100 | seeds       | bench step --rounds 50 --methods dfpt --providers plain,ours[graph] --seeds 3
step          | 75  | others      | bench step --rounds 50 --methods kd,dfpt --providers plain,plain[compile],ours[eager],ours[graph],ours[graph+joint]
step-plus     | 120 | resnet      | bench step --rounds 50 --methods kd,dfpt --pairs cifar:resnet32x4>cifar:resnet8x4
step-plus     | 115 | plus        | bench step --rounds 50 --methods dfpt_plus --providers plain,ours[graph],plain[compile],ours[eager]
step-imagenet | 235 | bench       | bench step --rounds 15 --methods kd,dfpt --classes 1000 --pairs torchvision:resnet34>torchvision:resnet18 --image-size 224 --batch 256
data          | 60  | tests       | tests engine/data/test_dali_gpu.py
data          | 85  | 4-workers   | photographs 4
data          | 85  | 16-workers  | photographs 16
optim         | 140 | apex        | apex
optim         | 30  | tests       | tests engine/test_apex_gpu.py
optim         | 60  | bench       | bench optim --rounds 100
study         | 215 | study       | study
EOF
)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
part=${1:-}
if ! grep -q "^$part  *|" <<< "$steps" || [ -z "$part" ]; then
  echo "usage: bench/on_gpu.sh first|loss|prompt|step|step-plus|step-imagenet|data|optim" >&2
  echo "       bench/on_gpu.sh study NAME full|short" >&2
  exit 2
fi
name=${2:-main} budget=${3:-full} # of a study
mkdir -p "${OUT:-$root/bench/out}" || exit 5
out=$(realpath "${OUT:-$root/bench/out}")
python=${PYTHON:-python3}
most=240
[ "$part" != first ] || most=540
slow=${SLOW:-1}
end=$((SECONDS + ${BUDGET:-$most} * slow))
log=$out/$part.txt
: > "$log" || exit 5

# The repository root is the package: a link makes it importable under its name.
path=$(mktemp -d)
child=
trap 'rm -rf "$path"' EXIT
trap '[ -z "$child" ] || kill "$child"; exit 130' INT TERM
ln -s "$root" "$path/dfptkd"
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=99
dfptkd=("$python" -m dfptkd.engine.cli)

say() { printf '%s\n' "$*" | tee -a "$log"; }

ok=0 failed=() cut=() not_run=()

# run STEP SECONDS COMMAND...: sets `code`
run() {
  local step=$1 limit=$2 left=$((end - SECONDS)) started=$SECONDS size follower
  shift 2
  ((limit <= ${LIMIT:-$limit})) || limit=$LIMIT
  limit=$((limit * slow))
  code=124
  if ((left < 5)); then
    say "== $step: not run, no time is left"
    not_run+=("$step")
    return
  fi
  ((limit < left)) || limit=$left
  say "== $step, at most $limit s"
  size=$(stat -c %s "$log")
  # Into the file and from there to the terminal: a process that outlives the step may keep a pipe
  # open, which would be waited for.
  (cd "$path" && exec timeout -k 5 "$limit" "$@") >> "$log" 2>&1 < /dev/null &
  child=$!
  tail -c +$((size + 1)) -s 0.2 -f --pid="$child" "$log" &
  follower=$!
  wait "$child"
  code=$?
  child=
  wait "$follower"
  local took=$((SECONDS - started))
  if ((code == 124 || (code == 137 && took >= limit))); then
    say "   cut after $took s"
    cut+=("$step ($took s)")
  elif ((code == 0)); then
    ok=$((ok + 1))
  elif ((code == 5)) && [[ " $* " == *" pytest "* ]]; then
    say "   no test applies here"
    ok=$((ok + 1))
  else
    say "   failed, exit code $code"
    failed+=("$step (exit $code)")
  fi
}

# What the table names ---------------------------------------------------------------------------

first() {
  run "$step" "$seconds" "${dfptkd[@]}" bench first "$1" --device cuda ${SMALL:+--small} \
    --operators "${OPERATORS:-all}" --out "$out/results.csv"
}

tests() {
  run "$step" "$seconds" "$python" -m pytest -q -rs --import-mode=importlib -p no:cacheprovider \
    "${@/#/$root/tests/}"
}

sanitizer() {
  if ! command -v compute-sanitizer > /dev/null; then
    say "== $step: not run, there is no compute-sanitizer"
    return
  fi
  run "$step" "$seconds" compute-sanitizer --error-exitcode 9 "${dfptkd[@]}" bench first kernels \
    --small --operators "$1" --device cuda
}

bench() {
  run "$step" "$seconds" "${dfptkd[@]}" bench "$@" --device cuda --out "$out/results.csv"
}

# DALI against torchvision, alone and under a training step. DALI travels as wheels and is measured
# where it can be imported.
photographs() {
  mkdir -p "$path/photographs"
  ln -sfn "$data" "$path/photographs/train"
  ln -sfn "$data" "$path/photographs/val"
  bench data --batch 256 --rounds 3 --data.root "$path/photographs" --workers "$1" --steps 20 \
    --train-steps 15
}

# apex is measured where it is installed; from $APEX_SOURCE, its extension amp_C is built.
apex() {
  [ -n "${APEX_SOURCE:-}" ] || return 0
  cp -r "$APEX_SOURCE" "$path/apex-source"
  run "$step" "$seconds" env -C "$path/apex-source" "$python" "$root/bench/build_apex.py"
  ((code != 0)) || ln -s "$path/apex-source/apex" "$path/apex"
}

# What is under way comes back as $out/study.tar.* and is gone on with when these lie in bench/out:
# the record, teachers, and the newest checkpoint of each unfinished run.
study() {
  local state=$path/state
  if [ ! -d "$data/cifar-100-binary" ]; then
    "$python" "$data/unpack_cifar100.py" "$path/data" || exit 3
    data=$path/data
  fi
  mkdir -p "$state/runs"
  cp -r "$root/bench/results" "$state/results" 2> /dev/null || mkdir "$state/results"
  if ls "$root"/bench/out/study.tar.* > /dev/null 2>&1; then
    cat "$root"/bench/out/study.tar.* | tar -x -C "$state" || exit 3
  fi
  run "$step" "$seconds" "${dfptkd[@]}" study "$name" --budget "$budget" --data.root "$data" \
    --out-root "$state/runs" --results "$state/results" --minutes "${MINUTES:-3}"
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
  tar -c -C "$state" runs results | split -b 15m - "$out/new.study.tar." || exit 5
  rm -f "$out"/study.tar.*
  for piece in "$out"/new.study.tar.*; do mv "$piece" "$out/${piece##*/new.}"; done
  ls -l "$out"/study.tar.*
  exit "$code"
}

# The part ---------------------------------------------------------------------------------------

case $part in
data)
  data=${DATA:-$root/shared/data/jpeg-sample}
  if [ ! -d "$data" ]; then
    echo "$data: no such folder, expected DATA=<folder with a folder of images for each class>" >&2
    exit 3
  fi
  data=$(realpath "$data")
  "$python" -c "import nvidia.dali as d; print('DALI', d.__version__)" 2> /dev/null \
    || echo "DALI cannot be imported: torchvision and synthetic alone"
  ;;
study)
  data=${DATA:-$root/shared/data}
  if [ ! -d "$data/cifar-100-binary" ] && [ ! -f "$data/unpack_cifar100.py" ]; then
    echo "$data: neither cifar-100-binary nor unpack_cifar100.py: expected DATA=<folder with one>" >&2
    exit 3
  fi
  data=$(realpath "$data")
  ;;
esac

rows() { if [ -f "$out/results.csv" ]; then wc -l < "$out/results.csv"; else echo 1; fi; }
before=$(rows)
if command -v nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm --format=csv 2>&1 | tee -a "$log"
fi
while IFS='|' read -r of seconds step what; do
  read -r of <<< "$of"
  [ "$of" = "$part" ] || continue
  read -r seconds <<< "$seconds"
  read -r step <<< "$step"
  read -ra command <<< "$what" # split, not expanded: ours[graph] is a name and no pattern
  "${command[@]}"
done <<< "$steps"

listed() { if (($#)); then printf '%s' "$1"; (($# < 2)) || printf ', %s' "${@:2}"; else printf none; fi; }
say "== $part: $ok ok; failed: $(listed "${failed[@]}"); cut: $(listed "${cut[@]}"); not run for lack" \
  "of time: $(listed "${not_run[@]}"); $(($(rows) - before)) rows in $out/results.csv; $SECONDS s"
((${#failed[@]} == 0)) || exit 1
((${#cut[@]} + ${#not_run[@]} == 0)) || exit 124
