#!/usr/bin/env bash
# # Departments, with an encoder
#
# A question from a medical entrance exam belongs to one of sixteen departments. MiniLM, an encoder of 23 million parameters, learns to sort them. This page is a script,
# `docs/tutorials/departments.sh`: as it stands it takes 60 steps, in about two minutes; with `LONG=1` it trains to the end.
#
# ## Rows and a model
#
# Rows have a `text` and a `label`, so edge-ft trains a classifier: the task follows from the columns and the model.
set -euo pipefail
MODEL=${MODEL:-$(python -m edge_ft.bench.studies rows departments --out rows --train 2000 --validation 256 --test 400)}
ROWS="--data rows/train.jsonl --validation rows/validation.jsonl --test rows/test.jsonl"
STEPS="--max-steps 60"
if [ -n "${LONG:-}" ]; then STEPS="--epochs 3"; fi
# ## Train
#
# MiniLM has no head for these departments; a new one is made, and trained with the adapter.
edge-ft tune --model "$MODEL" $ROWS $STEPS --max-length 128 --batch-size 16 --out departments-run
# The report gives accuracy and macro-F1 of the base (an untrained head, so chance) and of the tuned model, each with its 95% interval. With few steps the interval is
# wide, and the rarer departments are not learned yet.
#
# ## Ship, in 4 bits
#
# `--weights int8-dynamic` is another choice for encoders: larger, and often faster. [Results](../appendix-engines.md#an-encoder-in-every-format) compares them.
edge-ft export departments-run --out departments-bundle --max-tax 0.1
# ## Sort
#
# One answer is the label with the scores of all; a file is answered row by row, in order.
edge-ft run departments-bundle "Which nerve supplies the diaphragm?" --json -
edge-ft run departments-bundle --jsonl rows/test.jsonl --out answers.jsonl
edge-ft eval departments-bundle --data rows/test.jsonl
# ## Where to go from here
#
# - [Tasks and models](../tasks.md): several labels at once, numbers, tags of words, embeddings.
# - [The audit](../audit.md): what is said about labels that are nearly unique, missing or written in several ways.
