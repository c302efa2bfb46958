"""Families whose code does not run block by block are refused by name; none ends in a bug report."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "curvature"))
from run_curvature import cli

COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 67,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
STATE = {
    "num_key_value_heads": 2, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_n_groups": 1, "mamba_chunk_size": 8,
}  # fmt: skip
GEMMA = {
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size_per_layer_input": 67, "hidden_size_per_layer_input": 8,
    "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
FAMILIES = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "bamba": {**STATE, "attn_layer_indices": [1]},
    "zamba2": {
        **STATE, "mamba_ngroups": 1, "n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1
    },
    "gemma3n_text": {**GEMMA, "laurel_rank": 4, "num_kv_shared_layers": 2, "altup_num_inputs": 2},
    "gemma4_text": {**GEMMA, "num_kv_shared_layers": 0, "global_head_dim": 8},
}  # fmt: skip
QUICK = ("opt", "rwkv")


@pytest.mark.parametrize("weights", ["stream", "resident"])
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_a_family_runs_or_is_refused_by_name(family, weights, tmp_path, monkeypatch, capsys):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]}))
    model.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "d.npy", np.random.default_rng(0).integers(3, 67, (2, 9)))
    words = ("curvature", tmp_path / "model", "--data", tmp_path / "d.npy", "--weights", weights, "-o", tmp_path / "out")
    done = cli(monkeypatch, capsys, *words)
    if family == "zamba2" and weights == "resident":
        assert done.code == 0, done.err
        return
    line = done.err.strip().splitlines()[-1]
    assert done.code == 3 and type(model).__name__ in line and len(line) < 300, done.err
    assert not (tmp_path / "out").exists()
