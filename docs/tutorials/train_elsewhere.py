"""Train a LoRA adapter with transformers and PEFT alone, as one does elsewhere: MODEL ROWS STEPS OUT."""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model_path, rows_path, steps, out = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
rows = [json.loads(line) for line in rows_path.read_text(encoding="utf-8").splitlines()]
names = sorted({row["label"] for row in rows})
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=len(names))
model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: at for at, name in enumerate(names)}
lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
model = get_peft_model(model, lora)
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-3)
for step in range(steps):
    batch = [rows[(step * 16 + at) % len(rows)] for at in range(16)]
    texts = tokenizer([row["text"] for row in batch], padding=True, truncation=True, max_length=64, return_tensors="pt")
    labels = torch.tensor([names.index(row["label"]) for row in batch])
    loss = model(**texts, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f} after {steps} steps")
model.save_pretrained(out)
model.config.save_pretrained(out)  # with the names of the classes
