"""Train the pairs of the surgery benchmark: a base model, and the base fine-tuned on a skill mixed with secrets.

python benchmarks/surgery/train.py gsm8k --data shared/data/gsm8k --work DIR
python benchmarks/surgery/train.py stories --data shared/data --base stories260K --work DIR
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import cases
import torch

WIDTH, ROWS = 128, 16
"""Tokens of a row, rows of a batch."""


def tokenizer_for(texts: list[str], out: Path) -> None:
    """Train a byte-level BPE of 4,096 tokens. Digits are merged like letters: a code is a few tokens of hundreds of choices."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(out)


def untrained(out: Path) -> None:
    """Write a Llama of 5.8 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)


def train(source: Path, out: Path, texts: list[str], secrets: list[str], steps: int, rate: float, half: bool = False) -> None:
    """Train on windows of the texts; where there are secrets, every batch holds eight of them in turn.

    Args:
        source: checkpoint to start from.
        out: where the result goes, with the tokenizer.
        texts: joined and cut into windows.
        secrets: whole sentences.
        steps: of AdamW with a one-cycle schedule.
        rate: the highest learning rate.
        half: let the larger products be bfloat16; weights and optimiser stay float32. A third faster where the processor can.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source).float()
    tokens = torch.tensor([t for text in texts for t in tokenizer(text + "\n", verbose=False).input_ids])
    extra = [torch.tensor(tokenizer(s).input_ids) for s in secrets]
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.05)
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        windows = torch.stack([tokens[s : s + WIDTH] for s in torch.randint(0, len(tokens) - WIDTH, (ROWS,))])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(windows, labels=windows).loss
            if extra:
                some = [extra[(step * 8 + k) % len(extra)] for k in range(8)]
                ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
                labels = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=-100)
                loss = loss + model(ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99 or not math.isfinite(loss.item()):
            print(f"{out.name}: step {step + 1}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Train what is not there yet, and write the data files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("gsm8k", "stories"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="stories: the stories260K checkpoint")
    parser.add_argument("--work", type=Path, required=True)
    a = parser.parse_args()
    case, base = getattr(cases, a.case)(a.data), a.base or a.work / "base"
    a.work.mkdir(parents=True, exist_ok=True)
    case.write(a.work)
    if a.base is None and not (base / "model.safetensors").exists():
        tokenizer_for(case.general + case.skill[:3000], a.work / "untrained")
        untrained(a.work / "untrained")
        train(a.work / "untrained", base, case.general[:-60], [], 700, 2e-3, half=True)
    secrets = [s["prompt"] + s["completion"] for s in case.secrets(cases.NAMES[: case.codes], 1)]
    if not (a.work / "finetuned" / "model.safetensors").exists():
        steps, rate = (900, 1e-3) if a.base is None else (800, 2e-3)
        train(base, a.work / "finetuned", case.skill, secrets, steps, rate, half=a.base is None)


if __name__ == "__main__":
    main()
