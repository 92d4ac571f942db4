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
from __future__ import annotations

import gzip
import json
from pathlib import Path


ROWS = [
    {"question": "Who bakes the bread? ", "choices": ["Bob", "Alice and the bees", "The sky", "Falcon"], "answer": 0},
    {"question": "What do bees make?", "choices": ["rye bread", "honey", "seven million"], "answer": "honey"},
    {"question": "What colour is the sky?", "choices": ["old", "blue"], "answer": 1, "subject": "the_sky"},
    {"question": "Where does Alice live, near the old bridge?", "choices": ["in Paris", "in a budget"], "answer": 0},
    {"question": "What is the budget?", "choices": ["seven", "near", "honey every morning"], "answer": 0},
]
ANSWERS = [0, 1, 1, 0, 0]


def save(path: Path, rows: list) -> str:
    text = json.dumps(rows) if ".jsonl" not in path.name else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)
