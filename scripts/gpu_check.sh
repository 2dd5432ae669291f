#!/usr/bin/env bash
# One visit to a GPU: what is right there, and how fast. Usage: bash scripts/gpu_check.sh [SECONDS], 480 without.
# The most important figures come first; nothing is begun that would not end in time, and what is there already
# is not measured again, so a visit can be cut off and repeated with the same OUT.
#   OUT          folder for gpu_check.txt and gpu_check.json (gpu_check)
#   WHEELS       folder of wheels of what the machine lacks (.whl); nothing is installed where there is none
#   DATA         folder made by fairseq-preprocess; without it training, benchmarks and decoding are left out
#   CHECKPOINTS  folder with *.pt, DEQ-Transformers trained on it; each is measured
#   DEVICE=cpu   rehearses everything at toy sizes; SLOW=5 allows each part five times its time
# Needs torch, pytest, pytest-timeout and pytest-xdist on the machine.
LIMIT=${1:-480}
begin=$(date +%s)
cd "$(dirname "$0")/.." || exit 1
root=$PWD
export DEVICE=${DEVICE:-cuda} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export TEARDOWN_CUPTI=0 DISABLE_CUPTI_LAZY_REINIT=1  # or a profile of CUDA graphs can crash after another one
OUT=${OUT:-gpu_check} WHEELS=${WHEELS:-.whl} SLOW=${SLOW:-1}
mkdir -p "$OUT"; OUT=$(cd "$OUT" && pwd)
PARTS=${PARTS:-/tmp/gpu_check_parts}
export OUT PARTS
mkdir -p "$PARTS"
text=$OUT/gpu_check.txt
tell() { echo "$@" | tee -a "$text"; }
passed() { echo $(($(date +%s) - begin)); }

# step SECONDS NAME COMMAND...: at most so long, never beyond the limit, not again; its last lines to the text.
step() {
    local most=$(($1 * SLOW)) name=$2 rest=$((LIMIT - $(passed))) from code
    shift 2
    [ -e "$PARTS/$name.done" ] && return
    [ "$rest" -lt 8 ] && { tell "== $name: left out, no time"; return; }
    [ "$most" -gt "$rest" ] && most=$rest
    from=$(passed)
    if [ -n "$LIVE" ]; then  # partial tables as they come
        timeout -k 3 "$most" "$@" 2>"$PARTS/$name.err" | tee "$PARTS/$name.log" | tee -a "$text"
        code=${PIPESTATUS[0]}
    else
        timeout -k 3 "$most" "$@" >"$PARTS/$name.log" 2>"$PARTS/$name.err"
        code=$?
    fi
    [ "$code" = 0 ] && touch "$PARTS/$name.done"
    {
        echo "== $name: status $code, $(($(passed) - from)) s (at $(passed))"
        [ -n "$LIVE" ] || tail -n "${KEEP:-15}" "$PARTS/$name.log" | cut -c1-400
        [ "$code" = 0 ] || [ "$code" = 124 ] || grep -v Warning "$PARTS/$name.err" | tail -n 6 | cut -c1-400
    } | tee -a "$text"
    python3 -m fairseq_deq.tools gpu-check merge 2>/dev/null
}
training() { # NAME OPTION...: fairseq-train for a minute
    local name=$1 cpu=
    shift
    [ "$DEVICE" = cpu ] && cpu=--cpu
    KEEP=1 step 75 "train-$name" timeout -s INT "$((${MINUTE:-60} * SLOW))" python3 -c \
        "import sys; from fairseq_cli.train import cli_main; sys.exit(cli_main())" "$DATA" --user-dir fairseq_deq $cpu \
        --task deq_language_modeling --arch deq_transformer_lm_tiny --criterion deq_lm_loss --mem-len 64 \
        --tokens-per-sample 64 --batch-size 16 --optimizer adam --clip-norm 0.25 --lr 0.001 --warmup-updates 20 \
        --lr-scheduler inverse_sqrt --num-workers 0 --disable-validation --log-format json --log-interval 10 \
        --max-update "${UPDATES:-100}" --no-save --seed 1 "$@"
}

if compgen -G "$WHEELS/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/gpu_check_site \
        "$WHEELS"/*.whl 2>&1 | tail -3 | tee -a "$text"
    PYTHONPATH=/tmp/gpu_check_site:$PYTHONPATH
fi
export PYTHONPATH=$root:$PYTHONPATH
[ -n "$DATA" ] && DATA=$(cd "$DATA" && pwd)
[ -n "$CHECKPOINTS" ] && CHECKPOINTS=$(cd "$CHECKPOINTS" && pwd)
tell "installed at $(passed) s; $(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null | head -1)"

# 1. Right: side by side, since nothing here is timed.
waiting=()
aside() { if [ "$SLOW" = 1 ]; then "$@" & waiting+=($!); else "$@"; fi; }
tests=(python3 -m pytest -q -p no:cacheprovider --timeout=120 --tb=line -rfE --device "$DEVICE")
KEEP=25 aside step 110 tests "${tests[@]}" -n "${WORKERS:-6}" tests/gpu/test_solves.py \
    tests/gpu/test_models.py tests/solvers/test_captured.py tests/solvers/test_recordings.py \
    tests/models/test_recorded_decoding.py
KEEP=12 aside step 90 tests-training "${tests[@]}" tests/gpu/test_training.py
KEEP=2 aside step 90 warm python3 -m fairseq_deq.tools gpu-check warm
if [ -n "$DATA" ]; then
    aside training fp32
    aside training bf16 --bf16
    [ "$DEVICE" = cpu ] || aside training fp16 --fp16
fi
[ ${#waiting[@]} = 0 ] || wait "${waiting[@]}"
LIVE=1 step 15 curves python3 -m fairseq_deq.tools gpu-check curves "$PARTS"/train-*.log

# 2. Fast: one after another.
LIVE=1 step 20 machine python3 -m fairseq_deq.tools gpu-check machine
LIVE=1 step 130 steps-700 python3 -m fairseq_deq.tools gpu-check steps 700
LIVE=1 step 100 steps-512 python3 -m fairseq_deq.tools gpu-check steps 512
models=()
[ -n "$DATA" ] && [ -n "$CHECKPOINTS" ] && models=("$CHECKPOINTS"/*.pt)
only=(--only "anderson+ift" --only "torchdeq broyden+ift" --only "stack of 12" --only "stack of 24")
toy=(); contexts=(64 512 2048)
[ "$DEVICE" = cpu ] && { toy=(--batch 2 --tokens 8); contexts=(8 16); }
for path in "${models[@]}"; do
    [ -e "$path" ] || continue
    name=$(basename "$path" .pt)
    KEEP=9 step 50 "benchmark-$name" python3 -m fairseq_deq.tools benchmark "$DATA" --path "$path" --rounds 3 \
        --device "$DEVICE" "${only[@]}" "${toy[@]}" --out "$PARTS/benchmark-$name"
done
decoding() { # NAME OPTIONS CONTEXT...: tokens per second against a transformer_lm of 12 layers
    local name=$1 options=$2 cpu=()
    shift 2
    [ "$DEVICE" = cpu ] && cpu=(--cpu)
    [ -e "${models[0]}" ] && LIVE=1 step 70 "$name" python3 -m fairseq_deq.tools benchmark-generation "$DATA" \
        --path "${models[0]}" --overrides "$options" --contexts "$@" --batches 1 8 --beams 1 --tokens 16 --turns 3 --uncached-tokens 0 \
        "${cpu[@]}" --out "$PARTS/$name"
}
decoding generation '{}' "${contexts[@]}"
decoding generation-captured '{"cuda_graph": "auto"}' "${contexts[@]}"
LIVE=1 step 60 steps-128 python3 -m fairseq_deq.tools gpu-check steps 128
LIVE=1 step 60 steps-1024 python3 -m fairseq_deq.tools gpu-check steps 1024
export FAIRSEQ_DEQ_FUSE=1  # once more with the rules of solves compiled
decoding generation-compiled '{}' "${contexts[1]}"
for path in "${models[@]:0:1}"; do
    [ -e "$path" ] || continue
    KEEP=6 step 50 benchmark-compiled python3 -m fairseq_deq.tools benchmark "$DATA" --path "$path" --rounds 3 \
        --device "$DEVICE" --only "anderson+ift" "${toy[@]}" --out "$PARTS/benchmark-compiled"
done
python3 -m fairseq_deq.tools gpu-check merge
tar -czf "$OUT/logs.tar.gz" -C "$PARTS" . 2>/dev/null
tell "done at $(passed) s"
