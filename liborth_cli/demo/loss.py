"""Mean loss of a small model on a text, through Transformers' own loader and tokenizer."""

from __future__ import annotations

from pathlib import Path


def mean_loss(folder: Path, text: str) -> float:
    """Return the mean negative log-likelihood, in nats a token.

    The text is cut into windows of the model's context that overlap by one token, so every token but the first is
    predicted once.

    Args:
        folder: a checkpoint that Transformers loads.
        text: what to predict.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(text, return_tensors="pt").input_ids[0]
    context = model.config.max_position_embeddings
    total = 0.0
    with torch.inference_mode():
        whole = (len(tokens) - 1) // (context - 1)
        windows = [tokens[: whole * (context - 1) + 1].unfold(0, context, context - 1)] if whole else []
        rest = tokens[whole * (context - 1) :]
        for batch in [*windows, rest[None]] if len(rest) > 1 else windows:
            logits = model(batch[:, :-1]).logits
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (len(tokens) - 1)
