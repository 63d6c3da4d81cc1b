#!/usr/bin/env bash
# Measure once, compress to several sizes.  usage: front.sh MODEL OUT BUDGETS [further options of measure]
set -euo pipefail
model=$1 out=$2 budgets=$3

aptq measure "$model" --out "$out-scores.json" "${@:4}"
aptq plan "$model" --budget "$budgets" --scores "$out-scores.json" --html "$out-front.html"
aptq compress "$model" --budget "$budgets" --scores "$out-scores.json" --out "$out" "${@:4}"
aptq report --compare "$out"/* --out "$out-compared.html"
