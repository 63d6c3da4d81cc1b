#!/usr/bin/env bash
# One model, one size.  usage: smaller.sh MODEL OUT [BUDGET] [further options of compress]
set -euo pipefail
model=$1 out=$2 budget=${3:-4.3bpw}

aptq plan "$model" --budget "$budget"
aptq compress "$model" --budget "$budget" --out "$out" "${@:4}"
aptq eval "$out" --reference "$model" --windows 2
aptq report "$out"
