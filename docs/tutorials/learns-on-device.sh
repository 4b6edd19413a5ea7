#!/usr/bin/env bash
# # A bundle that learns on the device
#
# A model ships before the rows of its user exist. A bundle can learn them where it runs, without torch, over the very 4-bit weights that it holds. This page is a script,
# `docs/tutorials/learns-on-device.sh`: as it stands it takes a few steps only; with `LONG=1` it trains to the end.
#
# ## Once, where torch is: a bundle of the base
#
# Rows and a model as in [the support FAQ](support-faq.sh). The bundle holds the base as it is; 0.25 MB of graphs in `train/` let it learn.
set -euo pipefail
MODEL=${MODEL:-$(python -m edge_ft.bench.studies rows support --out rows)}
STEPS="--max-steps 12"
if [ -n "${LONG:-}" ]; then STEPS="--epochs 2"; fi
edge-ft export "$MODEL" --trainable --out device-bundle
# ## On the device: learn
#
# `pip install edge-ft` is enough from here on. The command is that of any other training, with the bundle as the model; `--memory low` computes activations again
# instead of keeping them. Ctrl-C saves the state, and `--resume` goes on.
edge-ft tune --model device-bundle --data rows/train.jsonl --validation rows/validation.jsonl --test rows/test.jsonl $STEPS --memory low --out learned
# ## Try it, and keep it
#
# The run's adapter can be bound for one command. `--onto` puts it into the bundle: the gate first compares it with the bundle's base, and refuses what has learned nothing.
edge-ft run device-bundle --adapter learned "Do I need a permit for a garden wall?" --max-new-tokens 48
edge-ft export learned --onto device-bundle --name support
# The bundle now answers with what it learned; `--adapter none` is the base.
edge-ft run device-bundle "Do I need a permit for a garden wall?" --max-new-tokens 48
edge-ft run device-bundle --adapter none "Do I need a permit for a garden wall?" --max-new-tokens 48
# ## Where to go from here
#
# - [Training on the device](../on-device.md): which bundles can learn, what a step costs, what is refused.
# - [Adapters](../adapters.md): several adapters in one bundle.
