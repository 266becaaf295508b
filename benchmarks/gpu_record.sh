#!/usr/bin/env bash
# Verifies a GPU: builds, runs every test on it, then the benchmarks, and writes a record of all of it.
#
#     benchmarks/gpu_record.sh FOLDER [STAGE...]     all stages, or the build and those named
#
# Stages: triton (the tests of the Triton kernels), benchmarks, tests (all of them), profile (a training step by
# kind), steps (whole training steps beside their peers), compiled (torch.compile's peer).
# Nothing is downloaded: it takes PYTHON (python3) with its PyTorch, and nvcc, CMake, ninja and pybind11.
# Test files whose packages are missing are left out and named in FOLDER/left_out.txt. A stage that fails does not
# stop the next; FOLDER/stages.tsv has exit code and seconds of each, FOLDER/<stage>.log what it said.
set -uo pipefail
if [ $# -eq 0 ]; then
  echo "usage: $0 FOLDER [STAGE...]" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
wanted=" ${*:-triton benchmarks tests profile steps compiled} build info "
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=0

stage() {  # name, seconds that it may take, command...
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  [[ $wanted == *" $name "* ]] || return 0
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - start)) >>"$out/stages.tsv"
  echo "$name: exit code $code after $((SECONDS - start)) s"
  if [ $code -ne 0 ]; then
    failed=1
    tail -n 15 "$out/$name.log"
  fi
}

printf 'stage\texit code\tseconds\n' >"$out/stages.tsv"
{
  date -u +%Y-%m-%dT%H:%M:%SZ
  echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
  git status --short 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap,clocks.max.sm --format=csv 2>&1 || echo "no nvidia-smi"
  nvcc --version 2>&1 | tail -n 2
  "$python" --version
  "$python" -m pip list 2>/dev/null
} >"$out/machine.txt"

stage build 1200 env IMF_CUDA="${IMF_CUDA:-auto}" "$python" -m pip install --no-build-isolation --no-deps -e .
stage info 120 "$python" -m imf_kernels.info
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "PyTorch finds no GPU here: tests and benchmarks on one cannot run. What was written is in $out." >&2
  exit 3
fi

"$python" -m pytest --collect-only -q tests 2>&1 | grep -oE "^ERROR tests/\S+ - ModuleNotFoundError.*" >"$out/left_out.txt"
left_out=()
while read -r _ file _; do left_out+=("--ignore=$file"); done <"$out/left_out.txt"
echo "test files left out for want of a package: ${#left_out[@]}"
stage triton 3600 "$python" -m pytest tests "${left_out[@]}" -k triton --durations 20 --junitxml "$out/triton.xml"
stage benchmarks 3600 "$python" benchmarks/bench_gpu.py "$out/benchmarks.json"
stage tests 3600 "$python" -m pytest tests "${left_out[@]}" --durations 20 --junitxml "$out/tests.xml"
stage profile 900 "$python" benchmarks/profile_step.py --preset iMF-B/2 --batch 128 --json "$out/profile.json"
stage steps 1800 env PYTHONPATH=tests "$python" benchmarks/bench_gpu_step.py "$out/steps.json"
stage compiled 3600 "$python" benchmarks/bench_gpu.py "$out/compiled.json" --compiled --only B/2
exit $failed
