# SPDX-License-Identifier: Apache-2.0
"""The README's snippet: `python examples/quickstart.py`, in the repository's root."""

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer


# prompt, completion, domain; put your own files and model here
forget = load_dataset("json", data_files="examples/demo_data/forget.jsonl", split="train")
retain = load_dataset("json", data_files="examples/demo_data/retain.jsonl", split="train")
# optional: like the first, but never seen by the model; measures when a text is forgotten
unseen = load_dataset("json", data_files="examples/demo_data/holdout.jsonl", split="train")
model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.float32)

model = get_peft_model(model, AlterConfig(domains=["private_person", "secret_recipe", "internal_project"]))
args = AlterUnlearnConfig(output_dir="adapter")
trainer = AlterUnlearnTrainer(model, args, train_dataset=forget, retain_dataset=retain, calibration_dataset=unseen)
trainer.train()
trainer.save_model()
