# SPDX-License-Identifier: Apache-2.0
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
