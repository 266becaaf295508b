#!/usr/bin/env bash
# Verifies a GPU: builds, runs the GPU's tests, then the benchmarks, and writes a record of all of it.
#
#     benchmarks/gpu_record.sh RECORD.tgz [STAGE...]     the first four stages, or those named; the build always
#
# Stages, what is learned first in front: tests (those that run on the GPU), steps (whole training steps beside their
# peers), profile (a training step by kind), benchmarks (each operation): less than ten minutes on an H100 with 16 cores,
# the build 35 s, then 130, 100, 40 and 180. Named alone, minutes each: verify (python -m imf_kernels.verify), tiles (of
# attention, timed), sanitizer (memory and races of the CUDA kernel), compiled (peers of torch.compile).
# RECORD.tgz is replaced after every stage, so it is complete up to there when the machine is taken away; unpack it in
# benchmarks/results. TIME_LIMIT (seconds) bounds the whole: a stage that it cuts short still writes what it has.
# Nothing is downloaded: it takes PYTHON (python3) with its PyTorch, and nvcc, CMake, ninja and pybind11. With
# pytest-xdist the tests run in PROCESSES (default: a CPU core and 5 GiB of GPU memory each). Test files whose packages
# are missing are left out and named in left_out.txt. A stage that fails does not stop the next; stages.tsv has exit
# code and seconds of each, <stage>.log what it said. COMMIT is what the record names where there is no git.
set -uo pipefail
if [[ ${1:-} != *.tgz ]]; then
  echo "usage: $0 RECORD.tgz [STAGE...]" >&2
  exit 2
fi
record=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
wanted=" ${*:-tests steps profile benchmarks} build info "
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
failed=0
child=

folder=$(mktemp -d)
out=$folder/$(basename "$record" .tgz)
mkdir "$out"
keep() {
  tar czf "$record.new" -C "$folder" "$(basename "$out")" && mv "$record.new" "$record"
}
trap 'keep; rm -rf "$folder"' EXIT
trap 'TIME_LIMIT=0; kill -INT $child 2>/dev/null' INT TERM

stage() {  # name, seconds that it may take, command...
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  [[ $wanted == *" ${name%-*} "* ]] || return 0
  if ((SECONDS + limit > ${TIME_LIMIT:-SECONDS + limit})); then
    limit=$((TIME_LIMIT - SECONDS))
  fi
  if ((limit <= 0)); then
    printf '%s\tno time left\t0\n' "$name" | tee -a "$out/stages.tsv"
    failed=1
    return 1
  fi
  # SIGINT, on which pytest still writes its failures and its XML. A background process would ignore it.
  env --default-signal=INT timeout --signal=INT --kill-after=30 "$limit" "$@" >"$out/$name.log" 2>&1 &
  child=$!
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal ended the waiting alone
    wait "$child" || code=$?
  done
  printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - start)) >>"$out/stages.tsv"
  echo "$name: exit code $code after $((SECONDS - start)) s"
  if ((code)); then
    failed=1
    tail -n 15 "$out/$name.log"
  fi
  keep
  return $code
}

printf 'stage\texit code\tseconds\n' >"$out/stages.tsv"
{
  date -u +%Y-%m-%dT%H:%M:%SZ
  echo "commit ${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
  [[ -n ${COMMIT:-} ]] || git status --short 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap,clocks.max.sm --format=csv 2>&1 || echo "no nvidia-smi"
  nvcc --version 2>&1 | tail -n 2
  "$python" --version
  "$python" -m pip list 2>/dev/null
} >"$out/machine.txt"

install=("$python" -m pip install --no-build-isolation --no-deps -e .)
if command -v nvcc || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
  # ON, so that kernels that do not compile are a failure and not an absence. Triton's can be recorded without them.
  if ! stage build 1200 env IMF_CUDA=ON "${install[@]}"; then
    wanted+="build_without_cuda "
    stage build_without_cuda 1200 env IMF_CUDA=OFF "${install[@]}"
  fi
else
  stage build 1200 env IMF_CUDA=OFF "${install[@]}"
fi
stage info 120 "$python" -m imf_kernels.info
"$python" - >"$out/sources.json" <<'END'  # which kernels the record holds for
import json, imf_kernels
from imf_kernels.backends import sources
print(json.dumps({"imf_kernels": imf_kernels.__version__, "sources": sources.digests()}, indent=1))
END
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "PyTorch finds no GPU here: tests and benchmarks on one cannot run. What was written is in $record." >&2
  exit 3
fi

"$python" -m pytest --collect-only -q tests 2>&1 | grep -oE "^ERROR tests/\S+ - ModuleNotFoundError.*" >"$out/left_out.txt"
left_out=()
while read -r _ file _; do left_out+=("--ignore=$file"); done <"$out/left_out.txt"
echo "test files left out for want of a package: ${#left_out[@]}"
# Compiling is most of the tests' time: a core a process. An H100's references in fp64 take up to 4 GiB.
share='import os, torch, xdist; print(max(1, min(os.cpu_count(), torch.cuda.mem_get_info()[0] // (5 << 30))))'
parallel=()
if processes=${PROCESSES:-$("$python" -c "$share" 2>/dev/null)}; then
  parallel=(-n "$processes" --dist worksteal)
fi
stage tests 3600 env OMP_WAIT_POLICY=passive "$python" -m pytest tests "${left_out[@]}" "${parallel[@]}" \
  -m gpu --durations 20 --tb short -p no:cacheprovider --junitxml "$out/tests.xml"
stage steps 1800 "$python" -m benchmarks.training.bench_gpu_step "$out/steps.json"
for size in "iMF-B/2 128" "iMF-XL/2 32"; do
  preset=${size% *}
  stage "profile-${preset%/*}" 900 "$python" -m benchmarks.training.profile_step --preset "$preset" --batch "${size#* }" \
    --json "$out/profile-${preset%/*}.json"
done
stage benchmarks 3600 "$python" -m benchmarks.ops.bench_gpu "$out/benchmarks.json"
stage verify 600 "$python" -m imf_kernels.verify
stage tiles 3600 "$python" -m benchmarks.ops.tune_attention "$out/tiles.json"
for tool in memcheck racecheck; do
  stage "sanitizer-$tool" 900 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -m gpu \
    tests/ops/test_operations.py -k "cuda and scaled_dot and digits" -p no:cacheprovider
done
stage compiled 3600 "$python" -m benchmarks.training.bench_gpu_step "$out/compiled.json" --compiled
exit $failed
