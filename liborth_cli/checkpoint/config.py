"""config.json: bounded by the weights beside it before a model is built from it, and held against another's, key by key."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput, shown

LAYERS = frozenset(
    (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "encoder_layers",
        "decoder_layers",
        "num_decoder_layers",
        "depth",
    )
)
SIZES = frozenset(
    (
        "hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "intermediate_size", "ffn_dim", "d_ff", "vocab_size",
        "moe_intermediate_size", "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "num_kv_heads",
        "head_dim", "attention_head_size",
    )
)  # fmt: skip
MAYBE_NONE = frozenset(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "n_inner", "state_size"))
"""Sizes that may be 0."""
POSITIONS = frozenset(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"))
MAX_POSITIONS = 1 << 27
SLACK = 8
"""Sizes may be this many times the largest dimension of any tensor: parts are fused, packed, or lie in other files."""
NO_MEANING = re.compile(
    r"(^|\.)(_name_or_path|architectures|transformers_version|torch_dtype|dtype|use_cache|auto_map|\w*_token_id|\w*_token_index|"
    r"vocab_size|tie_word_embeddings|(id2label|label2id|task_specific_params|quantization_config|quantization)(\..*)?|"
    r"tokenizer_class|finetuning_task|problem_type|pretraining_tp|unsloth\w*|initializer_\w+|\w*init_std|gradient_checkpointing|"
    r"output_\w+|return_\w+|use_return_dict|\w*dropout\w*|\w*_pdrop|\w*drop_rate|router_aux_loss_coef|pruned_heads(\..*)?|"
    r"_attn_implementation\w*|attn_implementation|chunk_size_feed_forward|is_encoder_decoder|prefix|"
    r"(max|min)_length|do_sample|temperature|top_[kp]|typical_p|num_beams\w*|num_return_sequences|\w*repetition_penalty|"
    r"length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|early_stopping|diversity_penalty|bad_words_ids|"
    r"suppress_tokens|begin_suppress_tokens|remove_invalid_values|exponential_decay_length_penalty|forced_\w+|"
    r"cross_attention_hidden_size|add_cross_attention|tf_legacy_loss|use_bfloat16|torchscript)$"
)
"""Keys that change nothing in what the weights compute, or that the files themselves answer."""


@dataclass(frozen=True)
class Difference:
    """A key of two configurations whose values mean something else.

    Attributes:
        key: with dots for the levels.
        reference: its value there; None when absent.
        finetuned: likewise.
    """

    key: str
    reference: Any
    finetuned: Any

    def __str__(self) -> str:
        """Render as "key (3 in the reference, 4 in the fine-tuned)"."""
        return f"{self.key} ({shown(self.reference, 40)} in the reference, {shown(self.finetuned, 40)} in the fine-tuned)"


def check_bounds(checkpoint: Checkpoint) -> None:
    """Hold the sizes in config.json against the weights, so that what is built from it is no larger than what is there.

    Raises:
        BadInput: when one is not a whole number, or could not belong to these weights; names it.
    """
    if not checkpoint.tensors:
        return
    count = len(checkpoint.tensors)
    largest = SLACK * max(count, *(max(t.shape, default=1) for t in checkpoint.tensors.values()))
    for key, value in _flat(checkpoint.config):
        last = key.rpartition(".")[2]
        if last in LAYERS:
            bounds = 0, count
        elif last in SIZES:
            bounds = 1, largest
        elif last in MAYBE_NONE:
            bounds = 0, largest
        elif last in POSITIONS:
            bounds = -1, MAX_POSITIONS
        else:
            continue
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (type(number) is not int or not bounds[0] <= number <= bounds[1]):
                raise BadInput(
                    f"{checkpoint.folders[0]}: config.json says {key} {shown(number)}, which cannot be: "
                    f"{count:,} tensors are here, the largest dimension is {largest // SLACK:,}"
                )


def differences(reference: Checkpoint, finetuned: Checkpoint) -> list[Difference]:
    """Find what means something else in the two configurations.

    Keys are compared as they are written; when they differ, as Transformers reads them, with its defaults and in its newest
    spelling, where it knows the family. Keys without a meaning for the weights are passed over.

    Raises:
        BadInput: when a config.json is not a JSON object.
    """
    old, new = reference.config, finetuned.config
    if not old or not new or not _compare(old, new):
        return []
    return _compare(_as_read(old), _as_read(new))


def warning(
    reference: Checkpoint, finetuned: Checkpoint, so: str = "the general checkpoint has the fine-tuned one's"
) -> str | None:
    """Say in one sentence what differs in meaning, and what follows from it; return None when nothing does."""
    found = differences(reference, finetuned)
    if not found:
        return None
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    listed = ", ".join(map(str, found[:3]))
    return f"the two configurations differ in {listed}{more}; {so}"


def meaning(config: Mapping[str, Any]) -> str:
    """Return what a configuration, as it is written, says of its weights' meaning: a text to compare."""
    found = {key: value for key, value in _flat(config) if not NO_MEANING.search(key) and not _is_nothing(value)}
    return json.dumps(found, sort_keys=True, default=str)


def _compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    a, b = dict(_flat(old)), dict(_flat(new))
    keys = [key for key in dict.fromkeys([*a, *b]) if not NO_MEANING.search(key)]
    return [Difference(key, a.get(key), b.get(key)) for key in keys if not _same(a.get(key), b.get(key))]


def _same(one: Any, other: Any) -> bool:
    return one == other or (_is_nothing(one) and _is_nothing(other))


def _is_nothing(value: Any) -> bool:
    """Tell whether a value says what an absent key says."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _as_read(config: Mapping[str, Any]) -> Mapping[str, Any]:
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config))).to_dict()
    except Exception:  # a family unknown to Transformers, or values its classes refuse
        return config


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
