#!/usr/bin/env bash
# What only a GPU shows, in at most 8 minutes: benchmarks/gpu.sh OUTPUT_FOLDER
#
# Runs tests/cuda, then the quick benchmark in float32 and under autocast to bfloat16, each within a
# limit of its own. Logs, records (JSON) and the generated Triton code are in the folder.
# It needs torch with CUDA and pytest in $PYTHON (python3), and installs nothing.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUTPUT_FOLDER}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "this torch sees no GPU: nothing was run" >&2
    exit 2
fi
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__,
    torch.cuda.get_device_name())' | tee "$out/environment.txt"

failed=0
echo "tests/cuda:"
timeout 170 "$python" -m pytest -q -p no:cacheprovider tests/cuda >"$out/tests.log" 2>&1 || failed=1
tail -n 3 "$out/tests.log"

# A run each, so that one that takes too long leaves the others.
for dtype in float32 bfloat16; do
    for case in orthogonal-rnn ode; do
        timeout 70 "$python" -m benchmarks --quick --device cuda --dtype "$dtype" --case "$case" \
            --contestant inductor --contestant fxparam --contestant by-hand --limit 60 \
            --output "$out/cuda-$case-$dtype.json" --code "$out/code" \
            >>"$out/benchmark.log" 2>&1 || { failed=1; echo "$case, $dtype: see benchmark.log"; }
    done
done
tar -C "$out" -czf "$out/code.tar.gz" code && rm -r "$out/code"

for record in "$out"/cuda-*.json; do
    timeout 10 "$python" -m benchmarks --show "$record" | tee -a "$out/table.txt"
done
exit "$failed"
