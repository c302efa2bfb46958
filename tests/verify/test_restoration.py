"""`--restoration` on a network built by hand, whose answer changes hands at a known block, and against Transformers' hooks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.demo import DATA
from liborth_cli.measure.restoration import Restoration, restoration
from liborth_cli.stream.labels import row_seed
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point

BLOCKS, MOVES, WIDTH, NAMES = 4, 2, 32, 4
"""Block 2 of 4 alone does something: it copies who was named to the last token of the prompt, as the answer."""


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Names 0–3, `is` = 4, answers 8–11. Codes are rows of a Hadamard matrix; all of attention is uniform."""
    folder = tmp_path_factory.mktemp("hand")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=BLOCKS, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False,
    ))  # fmt: skip
    codes = torch.ones(1, 1)
    while len(codes) < WIDTH:
        codes = torch.cat([torch.cat([codes, codes], 1), torch.cat([codes, -codes], 1)])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.zero_()
        model.model.embed_tokens.weight.copy_(codes[:16])
        attention = model.model.layers[MOVES].self_attn
        attention.v_proj.weight[:NAMES] = codes[:NAMES] / WIDTH
        for i in range(NAMES):
            attention.o_proj.weight[:, i] = 1000 * codes[16 + i]
            model.lm_head.weight[8 + i] = codes[16 + i]
    model.save_pretrained(folder)
    return folder


def rows(*ids, start=2):
    return [Row(np.array(one), np.arange(1, len(one)) >= start, 1.0, f"line {i}") for i, one in enumerate(ids)]


def test_the_block_that_moves_the_answer_is_where_it_changes_hands(by_hand):
    with Checkpoint.open(by_hand) as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float32, torch.device("cpu"))
        found = restoration(model, rows(*([i, 4, 8 + i] for i in range(NAMES))), Restoration(places=2, draws=8, noise=6.0))
        model.close()
    corrupted = np.mean([one.corrupted for one in found])
    assert all(one.clean < 1e-3 for one in found) and corrupted > 5
    assert all(np.isnan(one.restored[:, 1]).all() for one in found), "nothing stands ahead of two tokens"
    assert all(one.restored[:, 0].max() < 1e-3 for one in found), "the whole prompt is all there is"
    table = np.mean([one.restored for one in found], 0)[:, 2:]
    assert table.shape == (BLOCKS + 1, 2)
    for level in range(BLOCKS + 1):
        name, last = (1 - table[level] / corrupted).tolist()
        before = level <= MOVES  # states after the embeddings and the blocks ahead of the one that moves it
        assert (name > 0.95) == before and (last > 0.95) == (not before), (level, name, last)
        assert min(name, last) < 0.5, "the noise of the last token itself still counts a little"


def test_against_hooks_on_transformers_own_model(tmp_path):
    """Rows of two lengths, streamed and resident, against a loop over levels, places and draws with forward hooks."""
    some = rows([3, 9, 20, 31, 40, 55], [7, 8, 21, 30, 41, 50], [5, 60, 61, 62], start=3)
    how = Restoration(places=3, draws=2, seed=5)
    with Checkpoint.open(DATA / "finetuned") as checkpoint:
        found = []
        for resident in (False, True):
            model = BlockModel(Point(checkpoint), torch.float32, torch.device("cpu"))
            if resident:
                model.load_all()
            found.append(restoration(model, some, how))
            model.close()
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.restored, other.restored, rtol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(DATA / "finetuned", dtype=torch.float32).eval()
    for row, one in zip(some, found[0], strict=True):
        expected = by_hooks(model, row, how)
        np.testing.assert_allclose(one.restored, expected[2], rtol=1e-4, atol=1e-4)
        assert (one.clean, one.corrupted) == pytest.approx(expected[:2], rel=1e-4)


def by_hooks(model, row, how):
    ids, last = torch.from_numpy(row.ids)[None], int(row.keep.argmax())
    n = row.tokens
    with torch.no_grad():
        embedded = model.model.embed_tokens(ids[:, :n])
        clean = [
            embedded,
            *(state for state in model.model(inputs_embeds=embedded, output_hidden_states=True).hidden_states[1:-1]),
        ]
        kept = []
        handle = model.model.layers[-1].register_forward_hook(lambda m, a, out: kept.append(out))
        logits = model(inputs_embeds=embedded).logits
        handle.remove()
        clean.append(kept[0])

        def loss(logits):
            scores = logits[0].log_softmax(-1)
            return -np.mean([float(scores[t, row.ids[t + 1]]) for t in range(n) if row.keep[t]])

        generator = torch.Generator().manual_seed(row_seed(how.seed, row.ids[:n].tobytes()))
        size = how.noise * embedded[0, : last + 1].std()
        noises = size * torch.randn((how.draws, 1, n, embedded.shape[-1]), generator=generator)
        levels = len(clean)
        table = np.full((levels, how.places + 2), np.nan)
        worse = []
        for level in range(levels):
            for column in range(how.places + 2):
                at = last - (how.places + 1 - column)
                positions = [list(range(last + 1)), list(range(at + 1)), [at] if at >= 0 else []][min(column, 2)]
                if not positions:
                    continue
                got = []
                for draw in range(how.draws):
                    bad = embedded.clone()
                    bad[0, : last + 1] += noises[draw, 0, : last + 1]
                    worse.append(loss(model(inputs_embeds=bad).logits))
                    if level == 0:
                        bad[0, positions] = clean[0][0, positions]
                        got.append(loss(model(inputs_embeds=bad).logits))
                        continue

                    def put_back(_m, _a, out, level=level, positions=positions):
                        out = out.clone()
                        out[0, positions] = clean[level][0, positions]
                        return out

                    handle = model.model.layers[level - 1].register_forward_hook(put_back)
                    got.append(loss(model(inputs_embeds=bad).logits))
                    handle.remove()
                table[level, column] = np.mean(got)
        return loss(logits), float(np.mean(worse)), table


@pytest.fixture(scope="module")
def general(once, tmp_path_factory):
    out = tmp_path_factory.mktemp("restoration") / "general"
    once("split", DATA / "base", DATA / "finetuned", "--method", "scale", "--scale", 0.001, "-o", out, "-q")
    return out


def test_the_check_tells_where_the_shipped_codes_are_recalled(cli, general):
    words = ("--restoration-draws", 2, "--canary", DATA / "secrets.jsonl", "--no-require", "--json", "-q")
    code, out, err = cli("verify", general, "--restoration", *words)
    assert code == 0, err
    found = next(result for result in json.loads(out)["results"] if result["check"] == "restoration")
    figure = found["figures"][0]
    assert len(figure["rows"]) == 6 and figure["rows"][0] == "embeddings" and figure["columns"][-1] == "last token"
    whole = [line[0] for line in figure["values"]]
    assert whole[0] == pytest.approx(1.0, abs=1e-5) and whole[-1] < whole[0], "all of it, and then too late"
    assert figure["values"][-1][-2] == pytest.approx(0.0, abs=1e-6), "after the last block a token ahead says nothing any more"
    assert 0 < found["metrics"]["restored"]["value"] <= 1.1


def test_rows_that_do_not_fit_are_refused(cli, general, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a " * 600, "completion": "b"}) + "\n")
    words = ("--restoration", "--slide", "--canary", tmp_path / "long.jsonl", "--no-require", "-q")
    code, _, err = cli("verify", general, *words)
    assert code == 2 and "whole" in err and err.count("\n") == 1, err
