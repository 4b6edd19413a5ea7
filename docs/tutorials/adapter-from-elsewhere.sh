#!/usr/bin/env bash
# # An adapter from elsewhere
#
# You have a LoRA adapter that PEFT, TRL, unsloth or another trainer saved, and want it on a device without torch. This page is a script,
# `docs/tutorials/adapter-from-elsewhere.sh`; with `LONG=1` its adapter is trained longer.
#
# ## An adapter
#
# Yours is a folder with `adapter_config.json` and `adapter_model.safetensors`. Here transformers and PEFT alone train one
# ([the script](train_elsewhere.py)): a classifier over MiniLM, with a new head, as a stranger would.
set -euo pipefail
HERE=$(dirname "$0")
MODEL=${MODEL:-$(python -m edge_ft.bench.studies rows departments --out rows --train 2000 --validation 256 --test 400)}
STEPS=60
if [ -n "${LONG:-}" ]; then STEPS=400; fi
python "$HERE/train_elsewhere.py" "$MODEL" rows/train.jsonl $STEPS foreign
# ## Export it
#
# The adapter is applied as PEFT applies it. `--data` are rows that the gate scores: the base, the adapted model before rounding, and what ships. Without
# them the bundle is written too, and says that nobody has scored it. Names of the classes are taken from the `config.json` beside the adapter.
edge-ft export "$MODEL" --adapter foreign --data rows/validation.jsonl --max-tax 0.1 --out foreign-bundle
# The adapter was trained over float weights and is now shipped over 4-bit ones: the *quantization tax* it printed is the price of that. An adapter that
# `edge-ft tune` trains over the 4-bit codes pays less.
#
# ## Use it
edge-ft verify foreign-bundle
edge-ft run foreign-bundle "Which nerve supplies the diaphragm?"
# ## What is not taken
#
# DoRA, whole modules and other variants are merged; prompt tuning, IA3 and pickled weights are refused by name. [Adapters](../adapters.md) has the list.
