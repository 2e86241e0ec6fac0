#!/usr/bin/env bash
# From nothing to an evaluated model: environment, corpus, manifests, one batch, training, averaging, evaluation, report.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

MODELS="deepspeech deepspeech2 conformer conformer_bpe"
CORPORA="mini librispeech_5h librispeech_8h librispeech_100h librispeech_960h"
stage=0 stop_stage=7 model=deepspeech2 corpus=mini data="" exp="" gpus="" nodes=1 force=false overrides=()

usage() {
  cat <<TEXT
usage: ./run.sh [options] [-- HYDRA_OVERRIDES]     everything, from the corpus to the table of results
       ./run.sh test [PYTEST_ARGUMENTS]            the tests

  --model NAME     one of: $MODELS   (default $model)
  --corpus NAME    one of: $CORPORA
                   (default $corpus, made on the spot)
  --data DIR       folder that holds the corpus's subsets (.../LibriSpeech); an existing tree is used as it is
  --exp DIR        folder for what the run makes   (default exp/MODEL_CORPUS)
  --gpus N         GPUs a node, 0 for the CPU      (default: one where there is an NVIDIA GPU that torch can
                   use); real speech is then trained with size=large, from 100 hours on with size=full. On a
                   machine without GPUs N brings the build of torch for them all the same (a login node)
  --nodes N        nodes of a cluster (default 1); with several, stages 0 to 3 run here, and the line is
                   printed that starts training there
  --stage N        first stage                     (default 0)
  --stop-stage M   last stage                      (default 7)
  --force          redo stages that are complete; training then begins anew
  --help           this text

stages: 0 corpus   1 manifests   2 tokenizer (BPE only)   3 check and one batch
        4 train    5 average     6 evaluate               7 report
A stage is skipped when what it writes is complete and newer than what it reads.
All after -- goes to training: ./run.sh --model conformer -- model.optim.lr=1e-3 training.epochs=20
TEXT
}

fail() { echo "run.sh: $*" >&2; exit 2; }

one_of() {  # VALUE OPTION VALID...
  local value=$1 option=$2; shift 2
  for valid in "$@"; do [ "$value" = "$valid" ] && return; done
  fail "$option $value: valid are $*"
}

# The environment: .venv from requirements.lock, made once; nothing is installed outside it. One for GPUs does for the CPU.
ensure_environment() {  # [--cuda]
  local stamp=.venv/.installed want python candidate
  want=$(cat requirements.lock requirements-torch.txt | cksum)
  case $(cat $stamp 2> /dev/null) in "$want --cuda" | "$want${1:+ $1}") return ;; esac
  for candidate in ${PYTHON:-} python3.11 python3.12 python3.10 python3; do
    if command -v "$candidate" > /dev/null &&
       "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2> /dev/null; then
      python=$candidate; break
    fi
  done
  [ -n "${python:-}" ] || fail "no Python 3.10, 3.11 or 3.12 found: install one, or name it with PYTHON=/path/to/python3.11"
  echo "== environment: .venv with $("$python" --version), once, some minutes"
  .venv/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear .venv
  .venv/bin/python tools/install.py "$@"
  echo "$want${1:+ $1}" > $stamp
}

# Runs COMMAND and waits for it, whatever signal comes; TERM and INT are passed on as TERM: a training saves before it ends.
attended() {  # COMMAND...
  local child status=0 sent=false
  "$@" &
  child=$!
  trap 'sent=true; kill -TERM "$child" 2> /dev/null' TERM INT
  wait "$child" || status=$?
  while $sent; do sent=false status=0; wait "$child" || status=$?; done  # the signal has ended the wait, not the child
  trap - TERM INT
  return "$status"
}

# Stage 3. The doctor stops here what cannot learn; its report says why.
check() {  # TRAINING ARGUMENTS...
  local status=0  # this is a process of its own, and passes on what it is sent
  attended $python -m tools.doctor check --json "$exp/check/doctor.json" --html "$exp/check/doctor.html" "$@" || status=$?
  if [ "$status" -gt 128 ]; then return "$status"; fi  # ended by a signal
  [ "$status" = 0 ] || { echo "run.sh: read $exp/check/doctor.html; --stage 4 trains all the same" >&2; return 1; }
  attended $python -m tools.ladder --rungs batch --out "$exp/check/one_batch.json" "$@"
}

lines() { printf '%s\n' "$@"; }  # a list of files, one a line: any of them may have spaces in its name

# Runs COMMAND unless its stamp is newer than all it READS, all it WRITES is there and the command is the same.
run_stage() {  # NUMBER TITLE "READS" "WRITES" COMMAND...
  local number=$1 title=$2 reads=$3 writes=$4 -; shift 4
  { [ "$number" -lt "$stage" ] || [ "$number" -gt "$stop_stage" ]; } && return
  local stamp fresh=true path begin=$SECONDS status=0 IFS=$'\n'
  set -f
  stamp="$exp/.stages/$number"
  [ "$number" -gt 1 ] || stamp="data/.stages/$corpus-$number"  # the corpus is shared by all models
  { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$*" ] && ! $force; } || fresh=false
  for path in $writes; do [ -e "$path" ] || fresh=false; done
  for path in $reads; do [ ! -e "$path" ] || [ ! "$path" -nt "$stamp" ] || fresh=false; done
  if $fresh; then echo "== stage $number: $title: complete, skipped (--force redoes it)"; return; fi
  echo "== stage $number: $title: ${reads//$'\n'/ } -> ${writes//$'\n'/ }"
  rm -f "$stamp"
  attended "$@" || status=$?
  [ "$status" = 0 ] || { echo "run.sh: stage $number ($title) failed; the same command goes on from here" >&2; exit "$status"; }
  mkdir -p "$(dirname "$stamp")" && echo "$*" > "$stamp"
  echo "== stage $number: done in $((SECONDS - begin)) s"
}

if [ "${1:-}" = test ]; then
  shift
  ensure_environment
  exec .venv/bin/python -m pytest "$@"
fi

while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit ;;
    --force) force=true; shift; continue ;;
    --) shift; overrides=("$@"); break ;;
    --model | --corpus | --data | --exp | --gpus | --nodes | --stage | --stop-stage)
      [ $# -gt 1 ] || fail "$1 needs a value" ;;
    *) fail "unknown option $1: valid are --model --corpus --data --exp --gpus --nodes --stage --stop-stage --force --help, and test" ;;
  esac
  name=${1#--}; printf -v "${name//-/_}" %s "$2"; shift 2
done
one_of "$model" --model $MODELS
one_of "$corpus" --corpus $CORPORA
for pair in "--stage $stage" "--stop-stage $stop_stage"; do one_of "${pair#* }" "${pair% *}" 0 1 2 3 4 5 6 7; done
[ "$stage" -le "$stop_stage" ] || fail "--stage $stage --stop-stage $stop_stage: nothing lies between them"
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "--nodes $nodes: must be a positive number"
asked=$gpus
if [ -z "$gpus" ]; then gpus=0; if nvidia-smi -L > /dev/null 2>&1 || [ -e /dev/nvidia0 ]; then gpus=1; fi; fi
[[ "$gpus" =~ ^[0-9]+$ ]] || fail "--gpus $gpus: must be 0 or more"
[ "$nodes" = 1 ] || [ "$gpus" -gt 0 ] || fail "--nodes $nodes: say with --gpus N how many GPUs a node has"
if [ "$gpus" = 0 ]; then ensure_environment; else ensure_environment --cuda; fi
python=.venv/bin/python
if [ "$nodes" -gt 1 ]; then $python -m recipes.gpu "$gpus" --elsewhere || exit 2
elif [ "$gpus" -gt 0 ] && ! $python -m recipes.gpu "$gpus"; then
  [ -z "$asked" ] || exit 2
  echo "run.sh: goes on with the CPU" >&2
  gpus=0 asked=0
fi
# All stages then leave the GPUs alone: those that take what they find find none.
[ "$asked" != 0 ] || export CUDA_VISIBLE_DEVICES=""

if [ "$here" != "$PWD" ]; then  # what is relative is so to the folder of the caller
  [ -z "$data" ] || [[ "$data" = /* ]] || data=$here/$data
  [ -z "$exp" ] || [[ "$exp" = /* ]] || exp=$here/$exp
fi
exp=${exp:-exp/${model}_$corpus}
manifests=data/$corpus
quoted() { if [[ "$1" =~ [^A-Za-z0-9_./-] ]]; then echo "'${1//\'/\\\'}'"; else echo "$1"; fi; }  # as Hydra reads it
train=(--config-name "$model" "corpus=$corpus")
if [ "$nodes" -gt 1 ]; then train+=(trainer=slurm "trainer.devices=$gpus" "trainer.num_nodes=$nodes")
elif [ "$gpus" -gt 1 ]; then train+=(trainer=ddp "trainer.devices=$gpus")
elif [ "$gpus" = 1 ]; then train+=(trainer=gpu)
elif [[ "$model" == conformer* ]] && [ "$(nproc)" -gt 1 ]; then train+=(trainer=cpu_ddp)  # faster than two threads
else train+=(trainer=cpu); fi
settings=("exp_manager.explicit_log_dir=$(quoted "$exp")")
if [ "$gpus" -gt 0 ]; then
  case $corpus in librispeech_5h | librispeech_8h) settings+=(size=large) ;; librispeech_*) settings+=(size=full) ;; esac
fi
tokenizer=""
if [[ "$model" == *_bpe ]]; then tokenizer=$exp/tokenizer; settings+=("model.tokenizer.dir=$(quoted "$tokenizer")"); fi
settings+=(${overrides[@]+"${overrides[@]}"})
train+=("${settings[@]}")
where=(${data:+--data "$data"})

[ ${#overrides[@]} = 0 ] || $python -m recipes.config "${train[@]}" || exit 2
mkdir -p "$exp"
if [ -n "$data" ]; then tree=$data; elif [ "$corpus" = mini ]; then tree=data/mini_tree/LibriSpeech; else tree=data/LibriSpeech; fi
tests=$($python -m manifests.corpus tests "$corpus")
tests_made=${tests//[\[\]]/} tests_made=${tests_made//,/$'\n'}
for override in ${overrides[@]+"${overrides[@]}"}; do  # as the run's own configuration names them, which the report asks
  [[ ! "$override" =~ ^\+{0,2}corpus\.test=(.*)$ ]] || tests=${BASH_REMATCH[1]}
done
tests_read=${tests//[\[\]\"\']/} tests_read=${tests_read//, /,} tests_read=${tests_read//,/$'\n'}
recipe=$(lines conf/base.yaml "conf/${model%_bpe}.yaml" "conf/$model.yaml" "conf/corpus/$corpus.yaml" conf/size/*.yaml \
  conf/trainer/*.yaml "$manifests/train.json" ${tokenizer:+"$tokenizer"})
sources=conf/corpus/$corpus.yaml
[ "$corpus" != mini ] || sources=$(lines "$sources" manifests/mini/grammar.txt manifests/mini/newwords.txt manifests/mini/voices.py)

run_stage 0 corpus "$sources" "$tree" $python -m manifests.corpus fetch "$corpus" "${where[@]}"
run_stage 1 manifests "$(lines "conf/corpus/$corpus.yaml" "data/.stages/$corpus-0")" \
  "$(lines "$manifests/train.json" "$manifests/dev.json" "$tests_made")" \
  $python -m manifests.corpus build "$corpus" "${where[@]}" --out "$manifests" --check
if [ -n "$tokenizer" ]; then
  run_stage 2 tokenizer "$manifests/train.json" "$tokenizer/tokenizer.model" \
    $python -m manifests.tokenizer "$manifests/train.json" --out "$tokenizer"
fi
run_stage 3 "check and one batch" "$recipe" "$(lines "$exp/check/doctor.html" "$exp/check/one_batch.json")" check "${train[@]}"
if [ "$stage" -le 4 ] && [ "$stop_stage" -ge 4 ]; then
  anew=$force  # a complete training would be gone on with, though its data are others now
  for path in "$manifests/train.json" "$manifests/dev.json" ${tokenizer:+"$tokenizer"}; do
    if [ -f "$exp/.stages/4" ] && [ "$path" -nt "$exp/.stages/4" ]; then anew=true; fi
  done
  if $anew && [ -d "$exp/checkpoints" ]; then
    kept=$exp/checkpoints.$(date +%Y%m%d-%H%M%S)
    echo "== stage 4: begins anew; the old checkpoints are kept in $kept"
    mv "$exp/checkpoints" "$kept"
  fi
  if [ "$nodes" -gt 1 ]; then
    echo "== stage 4: on $nodes nodes is for the cluster to start, then come --stage 5 to 7 here:
  sbatch --nodes=$nodes --gpus-per-node=$gpus --ntasks-per-node=$gpus conf/trainer/train.sbatch $model $corpus \
    ${settings[*]}"
    exit 0
  fi
fi
run_stage 4 train "$(lines "$recipe" "$manifests/dev.json")" "$exp/curve.csv" $python -m recipes.train "${train[@]}"
# Not all trainings are of stage 4: the cluster's are not, nor one by hand in the same folder.
run_stage 5 average "$(lines "$exp/.stages/4" "$exp/curve.csv" "$exp/checkpoints")" "$exp/$model.nemo" \
  $python -m recipes.average "$exp" --out "$exp/$model.nemo"
run_stage 6 evaluate "$(lines "$exp/$model.nemo" "$tests_read")" "$exp/evaluation/metrics.json" \
  $python -m recipes.evaluate "model=$exp/$model.nemo" "manifests=$tests" "output=$exp/evaluation" pairs=0
run_stage 7 report "$(lines "$exp/evaluation/metrics.json" "$exp/curve.csv")" "$(lines "$exp/report.md" "$exp/curve.png")" \
  $python -m tools.report "$exp"
[ "$stop_stage" -lt 7 ] || cat "$exp/report.md"
