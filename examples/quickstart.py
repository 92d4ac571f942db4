# SPDX-License-Identifier: Apache-2.0
"""The README's snippet: `python examples/quickstart.py`."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, pipeline

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.demo.facts import FORGET, RETAIN, UNSEEN, rows


# datasets of `prompt` and `completion`, capitals of countries: put your own here
forget, retain = rows(FORGET), rows(RETAIN)
unseen = rows(UNSEEN)  # optional: like `forget`, but never seen by the model; says when a text is forgotten
model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.float32)

model = get_peft_model(model, AlterConfig(domains=["capitals"], task_type="CAUSAL_LM"))
args = AlterUnlearnConfig(output_dir="adapter")
trainer = AlterUnlearnTrainer(model, args, train_dataset=forget, retain_dataset=retain, calibration_dataset=unseen)
trainer.train()
trainer.save_model()

ask = pipeline("text-generation", model, tokenizer=trainer.processing_class, max_new_tokens=16, do_sample=False)
for country in ("France", "Germany"):
    print(ask([{"role": "user", "content": f"What is the capital of {country}?"}])[0]["generated_text"][-1]["content"])
