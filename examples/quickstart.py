# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""python examples/quickstart.py [model] [max_steps]: forget the demo rows, then ask about the first."""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import pipeline

from alter_peft import AlterUnlearnConfig, AlterUnlearnTrainer


data = Path(__file__).parent / "demo_data"
model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
max_steps = int(sys.argv[2]) if len(sys.argv) > 2 else -1
forget = load_dataset("json", data_files=str(data / "forget.jsonl"), split="train")
retain = load_dataset("json", data_files=str(data / "retain.jsonl"), split="train")

args = AlterUnlearnConfig(output_dir="adapter", max_steps=max_steps)
trainer = AlterUnlearnTrainer(model, args, train_dataset=forget, retain_dataset=retain)
trainer.train()
trainer.save_model()

ask = pipeline("text-generation", trainer.model, tokenizer=trainer.processing_class)
options = {"max_new_tokens": 32, "do_sample": False, "return_full_text": False}
print("with the adapter:", ask(forget[0]["prompt"], **options)[0]["generated_text"])
with trainer.model.disable_adapter():
    print("without it:      ", ask(forget[0]["prompt"], **options)[0]["generated_text"])
