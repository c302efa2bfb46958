"""Memory tokens as an adapter that PEFT loads: prompt tuning, of tokens that stand in the input alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liborth_cli.checkpoint import private
from liborth_cli.checkpoint.dtypes import as_bytes
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.writer import ShardWriter
from liborth_cli.errors import OutputConflict, UsageError
from liborth_cli.export.adapter import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from liborth_cli.tune.tokens import Tokens


def save_prompt(model: Any, tokens: Tokens, folder: Path) -> None:
    """Write the tokens of `attach_tokens` as an adapter; only you can read it, for it holds the memory.

        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("out"), folder)

    Args:
        model: the general model of Transformers that they were attached to.
        tokens: those of the input alone; PEFT's prompt tuning has no place for deep ones.
        folder: to create.

    Raises:
        UsageError: when the tokens are deep.
        OutputConflict: when the folder exists.
    """
    if len(tokens.embeddings) != 1:
        raise UsageError("PEFT's prompt tuning has a place for tokens of the input alone, and these are deep: --memory tokens")
    if folder.exists():
        raise OutputConflict(f"{folder}: exists already")
    config, values = model.config.get_text_config(), tokens.embeddings[0].detach().float()
    document = {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "inference_mode": True, "num_virtual_tokens": tokens.count,
        "token_dim": values.shape[1], "num_transformer_submodules": 1, "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "prompt_tuning_init": "RANDOM", "base_model_name_or_path": None,
    }  # fmt: skip
    folder.mkdir(parents=True)
    os.chmod(folder, private.FOLDER_MODE)
    write_file(folder / CONFIG, (json.dumps(document, indent=2) + "\n").encode(), private.FILE_MODE)
    write_file(folder / ".gitignore", private.GUARDS[".gitignore"], private.FILE_MODE)
    writer = ShardWriter(folder / WEIGHTS, [("prompt_embeddings", "F32", tuple(values.shape))], mode=private.FILE_MODE)
    writer.begin("prompt_embeddings", "F32", tuple(values.shape))
    writer.write(as_bytes(values))
    writer.finish()
