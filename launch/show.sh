#!/usr/bin/env bash
# Draw one caption with a trained run, let the model describe its own picture, and say where everything is.
# Usage: launch/show.sh CONFIG.yaml "CAPTION"
set -euo pipefail
config=$1 prompt=$2
bin=${BIN:-$(dirname "$(command -v mmgen)")}
run=$("$bin/mmgen" train --config "$config" --dry-run --json | "$bin/python" -c 'import json,sys; print(json.load(sys.stdin)["config"]["run"]["dir"])')
"$bin/mmgen" sample --config "$config" --out "$run/demo" "$prompt" > /dev/null
said=$("$bin/mmgen" caption --config "$config" --json "$run/demo/0000.png" | "$bin/python" -c 'import json,sys; print(json.load(sys.stdin)["captions"][0]["caption"])')
echo
echo "caption given:   $prompt"
echo "image drawn:     $run/demo/grid.png"
echo "model's caption: $said"
"$bin/python" - "$run/report.json" <<'PY'
import json, sys
report = json.load(open(sys.argv[1]))
names = ("t2i_accuracy", "t2i_accuracy_heldout_combination", "i2t_accuracy", "within_class_variance_ratio", "t2i_accuracy_shuffled")
print("scores:          " + "  ".join(f"{name} {report[name]:.3f}" for name in names if name in report))
PY
echo "files:           $run/report.json  $run/samples/  $run/metrics.jsonl  $run/checkpoints/latest"
echo "try next:        $bin/mmgen sample --config $config \"a green 5 bottom left\" \"a cyan 2 top right and a yellow 8 bottom right\""
