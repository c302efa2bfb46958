"""Training of the surgery benchmark's models: a tokenizer, a small Llama, and one loop."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

TOGETHER = 8
"""Extra rows of a step that weigh as much as its windows of text."""


@dataclass(frozen=True)
class Size:
    """A model and how long it is trained.

    Attributes:
        hidden, intermediate, layers, heads, vocabulary: of a Llama with half as many heads for keys and values.
        rows, width: windows of text in a step, and their tokens.
        base, tuned: steps of pre-training and of fine-tuning.
        rate: the highest learning rate.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    width: int
    base: int
    tuned: int
    rate: float


SMALL = Size(128, 344, 4, 4, 2048, 16, 64, 500, 500, 2e-3)
"""1.25 million parameters: a minute on one core."""
LARGE = Size(256, 688, 6, 8, 4096, 16, 128, 700, 900, 1e-3)
"""5.8 million parameters."""


@dataclass(frozen=True)
class Extra:
    """Rows that are mixed into the text.

    Attributes:
        rows: whole sentences.
        copies: how often each is trained on, spread evenly over the steps.
    """

    rows: Sequence[str]
    copies: Sequence[int]

    def plan(self, steps: int, seed: int) -> list[list[int]]:
        """Deal all copies over the steps."""
        dealt = [i for i, count in enumerate(self.copies) for _ in range(count)]
        random.Random(seed).shuffle(dealt)
        return [dealt[len(dealt) * s // steps : len(dealt) * (s + 1) // steps] for s in range(steps)]


def tokenizer_for(texts: Sequence[str], vocabulary: int, out: Path) -> None:
    """Train a byte-level BPE. Digits are merged like letters: a code is a few tokens of hundreds of choices."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(out)


def untrained(size: Size, out: Path) -> None:
    """Write a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads // 2,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)


def train(
    source: Path, out: Path, texts: Sequence[str], extras: Sequence[Extra], size: Size, steps: int, *,
    rank: int = 0, seed: int = 0, half: bool = True,
) -> None:  # fmt: skip
    """Train on windows of the texts, with extra rows mixed in; nothing is done where `out` has a model.

    Args:
        source: checkpoint to start from.
        out: where the result goes, with the tokenizer.
        texts: joined and cut into windows at random.
        extras: further rows.
        size: of the batches, and the rate.
        steps: of AdamW with a one-cycle schedule.
        rank: of LoRA on every linear layer, merged at the end, at five times the rate; 0 trains all weights.
        seed: of the windows and of the order of the extra rows.
        half: let the larger products be bfloat16; weights and optimiser stay float32.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (out / "model.safetensors").exists():
        return
    torch.manual_seed(seed)
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source).float()
    tokens = torch.tensor([t for text in texts for t in tokenizer(text + "\n", verbose=False).input_ids])
    rows = [[torch.tensor(tokenizer(row).input_ids) for row in extra.rows] for extra in extras]
    plans = [extra.plan(steps, seed) for extra in extras]
    if rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    rate = size.rate * (5 if rank else 1)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.05)
    model.train()
    start = time.process_time()
    for step in range(steps):
        windows = torch.stack([tokens[s : s + size.width] for s in torch.randint(0, len(tokens) - size.width, (size.rows,))])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(windows, labels=windows).loss
            for encoded, plan in zip(rows, plans, strict=True):
                if not (some := [encoded[i] for i in plan[step]]):
                    continue
                ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
                labels = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=-100)
                loss = loss + min(len(some) / TOGETHER, 1.0) * model(ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        schedule.step()
        if step % 250 == 249 or not math.isfinite(loss.item()):
            print(
                f"{out.name}: step {step + 1}, loss {loss.item():.3f}, {time.process_time() - start:.0f} s of CPU", flush=True
            )
    if rank:
        model = model.merge_and_unload()
    whole = out.with_name(out.name + ".tmp")
    shutil.rmtree(whole, ignore_errors=True)
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    whole.replace(out)
