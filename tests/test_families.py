# SPDX-License-Identifier: Apache-2.0
"""Every decoder family of transformers is right, or refused at once with the fix: as docs/peft_features.md lists."""

from __future__ import annotations

import pytest
from family_checks import WRONG, documented, findings
from tiny_families import NOT_BUILT, families
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


# a mixture with flattened tokens, an attention of 4 dimensions, weights read past their layer, keys that layers share,
# chunked attention with a router that returns more, tied blocks, several streams, both directions
TYPICAL = ["qwen2_moe", "deepseek_v3", "mamba", "gemma4_text", "llama4_text", "zamba2", "gemma3n_text", "phi3"]
as_documented = pytest.mark.filterwarnings("ignore")  # of transformers and the models themselves


def check(family, tokenizer, folder):
    found = findings(family, tokenizer, folder)
    assert not [what for what in found if what.startswith(WRONG)]
    assert found == documented()[family]


@as_documented
@pytest.mark.parametrize("family", TYPICAL)
def test_a_typical_family_is_as_documented(family, tokenizer, tmp_path):
    check(family, tokenizer, tmp_path)


@pytest.mark.slow
@as_documented
@pytest.mark.parametrize("family", [family for family in families() if family not in TYPICAL])
def test_every_family_is_as_documented(family, tokenizer, tmp_path):
    check(family, tokenizer, tmp_path)


def test_the_docs_list_every_family():
    listed = documented()
    assert set(listed) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {name for name, what in listed.items() if what[:1] and what[0].startswith("not tested: ")} == set(NOT_BUILT)
    assert not [name for name, what in listed.items() if any(WRONG in one for one in what)]
