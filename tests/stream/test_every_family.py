"""The sweep: every causal language model that Transformers can build small here computes the same, or is refused in one line.

`liborth curvature`, `verify` and whatever else runs a model run it block by block, so a family is understood when the losses of
its own `forward` come back. What Transformers cannot build from a small configuration, or cannot run on a CPU, is skipped, with
the reason.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import LiborthError
from liborth_cli.measure.scores import Evaluator
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 67,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
FEWER: tuple[dict[str, Any], ...] = (
    {"num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
     "num_experts_per_tok": 2, "n_routed_experts": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
     "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
     "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "ffn_dim": 48, "n_inner": 48,
     "word_embed_proj_dim": 32, "state_size": 8, "sliding_window": 6, "rotary_dim": 4, "attention_hidden_size": 32},
    {"num_key_value_heads": 2},
    {},
)  # fmt: skip
"""What a family may want to be small, tried in turn; a configuration takes what it does not know as well."""
BIG = 20_000_000
"""Weights above which a family did not become small, and is skipped."""


def build(family: str) -> Any:
    why = ""
    for more in FEWER:
        try:
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **{**SIZES, **more})
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > BIG:
                why = f"{size:,} weights in spite of a small configuration"
                continue
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        except Exception as error:
            why = f"Transformers does not build it: {type(error).__name__}"
    pytest.skip(why)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_losses_are_those_of_transformers_or_it_is_refused(family, tmp_path):
    warnings.filterwarnings("ignore")
    model = build(family)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 67, (2, 21)))
    try:
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits
    except Exception as error:
        pytest.skip(f"Transformers does not run it: {type(error).__name__}")
    expected = -logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    if not torch.isfinite(expected).all():
        pytest.skip("random weights of this family give numbers that are not finite")
    model.save_pretrained(tmp_path)
    rows = [Row(row.numpy(), np.ones(20, bool), 1.0, f"row {i}") for i, row in enumerate(ids)]
    for resident in (False, True):
        try:
            with Checkpoint.open(tmp_path) as checkpoint:
                runner = BlockModel(Point(checkpoint), torch.float32, torch.device("cpu"))
                found = Evaluator(runner, rows, resident).score()
                runner.close()
        except LiborthError as refusal:
            line = str(refusal)
            named = (type(model).__name__, family, model.config.model_type, "config.json says")
            assert "\n" not in line and len(line) < 300 and any(name in line for name in named), line
            print(f"refused: {line.partition(': ')[2]}")
            continue
        for score, true in zip(found, expected, strict=True):
            np.testing.assert_allclose(score.loss, true.numpy(), atol=1e-3)
