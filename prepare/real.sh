#!/usr/bin/env bash
# A real language model learns to search, on a CPU: a cold start, RL against a prompted simulator, then BM25.
#
#     prepare/real.sh POLICY DATA OUT [SEED]
#
# POLICY: a checkpoint (REAL.md: SmolLM2-135M-Instruct). DATA: corpus.jsonl.gz, questions to learn from in
# train/*.jsonl, others that are asked at the end in test/*.jsonl, and dev/*.jsonl, of which a few are asked on
# the way. OUT: fresh questions, and a directory a seed. Interrupted, the same command goes on. In the
# environment: PYTHON, DTYPE (bf16 where the CPU multiplies it), STEPS.
#
# Beside the run: its control with shuffled rewards (shuffled), the run whose simulator does not heed the query
# (deaf), a cold start of which half searches (cold.5), and the body that answers from memory (direct).
set -euo pipefail
: "${3:?usage: prepare/real.sh POLICY DATA OUT [SEED]}"
whole() { (cd "$1" && pwd); }
policy=$([ -d "$1" ] && whole "$1" || echo "$1") data=$(whole "$2") seed=${4:-0}
mkdir -p "$3/$seed"
out=$(whole "$3")
cd "$(dirname "$0")/.."
python=${PYTHON:-python} dtype=${DTYPE:-fp32} steps=${STEPS:-8}
bm25=bm25:$data/corpus.jsonl.gz run=$out/$seed

documents=(--documents 1 --document-words 30)
lengths=(--turns 1 --prompt-tokens 160 --turn-tokens 40 --observation-tokens 80 --episode-tokens 330)
common=(--policy "$policy" "${documents[@]}" "${lengths[@]}" --dtype "$dtype" --seed "$seed")

# Supported: the answer stands in what BM25 returns for the question itself, and not in the question (in "A or B?"
# every search finds it, and a guess is right half of the time). Of the supported training questions a part is
# set aside, not to be learnt from. unselected: test questions as they come.
[ -e "$out/train.jsonl" ] || "$python" - "$data" "$out" "$bm25" <<'EOF'
import json, random, sys
from pathlib import Path
from questions import holds_answer, load_questions
from search import ask, open_search, presented

data, out, search = Path(sys.argv[1]), Path(sys.argv[2]), presented(open_search(sys.argv[3], 1), 1, 30)

def write(name, questions):
    rows = [{"id": q.id, "question": q.text, "golden_answers": list(q.answers)} for q in questions]
    (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

def read(folder):
    return [q for path in sorted((data / folder).glob("*.jsonl")) for q in load_questions(path)]

def supported(questions):
    unnamed = [q for q in questions if not holds_answer(q.text, q.answers)]
    return [q for q in unnamed if holds_answer(ask(search, q.text), q.answers)]

train, test = read("train"), read("test")
fresh = random.Random(13).sample(kept := supported(train), round(0.62 * len(kept)))
write("aside.jsonl", fresh)
write("supported.jsonl", supported(test))
write("unselected.jsonl", random.Random(13).sample(test, min(200, len(test))))
write("dev.jsonl", random.Random(13).sample(kept := supported(read("dev")), len(kept)))
aside = set(map(id, fresh))
write("train.part", [q for q in train if id(q) not in aside])
(out / "train.part").replace(out / "train.jsonl")  # the last: the others are whole
EOF

# 640 tokens a step: with 320, searching was learnt more often than it was shown (REAL.md).
cold() { # NAME SHARE
    [ -e "$run/$1/sft.json" ] && return
    "$python" -m prepare.cold "${common[@]}" --policy-prompt short --data "$out/train.jsonl" --search "$bm25" \
        --searching "$2" --scripts 320 --steps 80 --tokens 640 --lr 1e-3 --held 24 --every 40 \
        --out "$run/$1" $([ -e "$run/$1" ] && echo --resume)
}

reinforce() { # NAME MORE...
    [ -e "$run/$1/result.json" ] && return
    "$python" train.py "${common[@]}" --adapter "$run/cold" --sim-prompt short --sim-tokens 40 --seat-tokens 330 \
        --data "$out/train.jsonl" --questions 8 --group 4 --steps "$steps" --lr 3e-4 --kl .05 --noise-end .25 \
        --shared-coins --eval-data "$out/dev.jsonl" --eval-search "$bm25" --eval-questions 64 --eval-every 4 --keep 1 \
        --save-every 4 --out "$run/$1" "${@:2}" $([ -e "$run/$1/args.json" ] && echo --resume)
}

answer() { # NAME ADAPTER HOW MORE...; HOW: the temperature, or unselected (greedy)
    json=$run/$1.$3.json temperature=$3 files=$out/aside.jsonl,$out/supported.jsonl
    [ "$3" != unselected ] || { temperature=0 files=$out/unselected.jsonl; }
    [ -e "$json" ] || "$python" eval.py "${common[@]}" ${2:+--adapter "$2"} --temperature "$temperature" \
        --data "$files" --seats 64 --json "$json" "${@:4}" $([ -e "$json.part" ] && echo --resume)
}

compare() { # OTHER HOW
    echo "== $1 -> rl: $2"
    "$python" eval.py --compare "$run/$1.$2.json" "$run/rl.$2.json"
}

cold cold .3
reinforce rl --heed 3
for how in 0 1 unselected; do
    answer cold "$run/cold" $how --search "$bm25"
    answer rl "$run/rl/policy" $how --search "$bm25"
    compare cold $how
done
reinforce shuffled --heed 3 --shuffle-rewards
cold cold.5 .5
reinforce deaf
for how in 0 1; do
    answer shuffled "$run/shuffled/policy" $how --search "$bm25"
    answer cold.5 "$run/cold.5" $how --search "$bm25"
    answer deaf "$run/deaf/policy" $how --search "$bm25"
    answer direct "" $how --mode direct
    for other in shuffled cold.5 deaf direct; do compare $other $how; done
done
