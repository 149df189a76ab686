#!/usr/bin/env bash
# Runs the trainer on every host of a TPU VM slice. Safe to repeat: a host that already runs it is left alone, and a run
# that was preempted goes on from its newest checkpoint.
#
#   TPU=my-slice ZONE=us-east5-a ./launch/tpu_pod.sh --config=configs/world.py:large --workdir=/gcs/run1 [flags...]
#
# The workdir has to be a folder that all hosts see, such as a bucket mounted by gcsfuse.
set -euo pipefail
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
REPO=${REPO:-worldr1_jax} # the clone on the hosts
printf -v flags '%q ' "$@"
printf -v repo '%q' "$REPO"
# The trainer inherits descriptor 9 and with it the lock, which is free again as soon as it has ended, however it ended.
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  set -e
  cd $repo
  exec 9>train.lock
  flock -n 9 || { echo already running; exit 0; }
  test -x .venv/bin/pip || if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'
    then python3 -m venv .venv
    else python3 -m pip install -q --user uv && python3 -m uv venv -q --seed --python 3.12 .venv  # Ubuntu 22.04
  fi
  .venv/bin/pip install -q -e '.[tpu]'
  nohup .venv/bin/python launch/tpu_train.py --distributed $flags >>train.log 2>&1 </dev/null &
"
