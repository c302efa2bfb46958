"""A packed memory is smaller and gives every bit back: codec against brute force, files against those of the plain format."""

import json
import zlib

import numpy as np
import pytest
import torch
from tiny import FLOATS, files, flip, pair, private, random_bits, save

from liborth_cli.checkpoint import packed
from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput, PairMismatch

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
         torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}  # fmt: skip


def both_ways(general, finetuned, dtype):
    """Pack and unpack; return the packed bytes and what came back."""
    width, step = DTYPES[dtype].bits // 8, packed.BLOCK * (DTYPES[dtype].bits // 8)
    pieces = [(general[i : i + step], finetuned[i : i + step]) for i in range(0, len(general), step)]
    raw = b"".join(packed.pack(iter(pieces), dtype))
    head = packed.Head.read(lambda a, b: np.frombuffer(raw[a:b], np.uint8), len(raw), "here")
    found = []
    for number, (bits, _) in enumerate(pieces):
        block = raw[head.offsets[number] : head.offsets[number + 1]]
        found.append(packed.unpack(packed.codes(block, head, len(bits) // width, "here"), bits, head))
    return raw, np.concatenate(found) if found else general


@pytest.mark.parametrize("dtype", [*NAMES.values(), "I16", "F8_E8M0"])
def test_every_bit_comes_back_whatever_the_bits(dtype):
    rng = np.random.default_rng(0)
    bits = [rng.integers(0, 256, 3000 * DTYPES[dtype].bits // 8, dtype=np.uint8) for _ in range(2)]
    raw, back = both_ways(*bits, dtype)
    assert (back == bits[1]).all() and len(raw) <= packed.most(len(bits[0]))
    assert both_ways(bits[0][:0], bits[1][:0], dtype)[1].size == 0


def test_the_distance_counts_the_numbers_between():
    """All 16-bit patterns, in the order of the numbers that they are; against torch's own nextafter and comparison."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    numbers = every.view(torch.bfloat16)
    finite = torch.isfinite(numbers)
    place = torch.from_numpy(packed.places(every.numpy().view(np.uint16)).astype(np.int64))
    assert len(place.unique()) == 1 << 16
    ranked = numbers[finite][place[finite].argsort()].double()
    assert (ranked.diff() >= 0).all() and (ranked.diff() == 0).sum() == 1  # only −0 and +0 are equal
    one = torch.tensor([1.0], dtype=torch.bfloat16)
    after = torch.nextafter(one, torch.tensor([2.0], dtype=torch.bfloat16))
    codes = packed._distance(*(t.view(torch.int16).numpy().view(np.uint16) for t in (one, after)), True)
    assert codes.tolist() == [2]  # one step up is 2, one down 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_packed_split_gives_the_same_files_back_for_every_beta(tmp_path, cli, dtype, shards):
    pair(tmp_path, dtype, shards)
    words = ("split", tmp_path / "base", tmp_path / "finetuned", "--method", "random", "--energy", 0.5, "-j", 1)
    for name in ("xor", "packed"):
        assert cli(*words, "--memory-format", name, "-o", tmp_path / name)[0] == 0
    plain, small = (files(private(tmp_path / name)) for name in ("xor", "packed"))
    general = {name: raw for name, raw in files(tmp_path / "packed").items() if name.endswith((".safetensors", "index.json"))}
    assert all(files(tmp_path / "xor")[name] == raw for name, raw in general.items())
    weigh = [sum(len(raw) for name, raw in some.items() if "safetensors" in name) for some in (plain, small)]
    assert plain.keys() == small.keys() and weigh[1] != weigh[0]
    for beta in (1, 0.3, 2):
        out = [tmp_path / f"{name}-{beta}" for name in ("xor", "packed")]
        assert [
            cli("excise", tmp_path / n, "--beta", beta, "-o", o)[0] for n, o in zip(("xor", "packed"), out, strict=True)
        ] == [0, 0]
        weights = [{n: raw for n, raw in files(o).items() if "safetensors" in n} for o in out]
        assert weights[0] == weights[1]
    restored, tuned = files(tmp_path / "packed-1"), files(tmp_path / "finetuned")
    assert all(restored[name] == raw for name, raw in tuned.items())
    assert cli("verify", tmp_path / "packed", "--integrity", "--finetuned", tmp_path / "finetuned")[0] == 0
    code, _, err = cli("verify", tmp_path / "packed", "--integrity", "--subset", "50%", "--finetuned", tmp_path / "finetuned")
    assert code == 0, err
    assert "PRIVATE" in cli("inspect", private(tmp_path / "packed"))[1]


def test_a_small_edit_takes_a_fraction(tmp_path, cli):
    old = {"w.weight": torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()}
    step = torch.randn(512, 512, generator=torch.Generator().manual_seed(1)) * 0.003
    save(tmp_path / "base", old)
    save(tmp_path / "finetuned", {"w.weight": (old["w.weight"].float() + step).bfloat16()})
    words = ("split", tmp_path / "base", tmp_path / "finetuned", "--method", "scale", "--scale", 0, "-j", 1)
    for name in ("xor", "packed"):
        assert cli(*words, "--memory-format", name, "-o", tmp_path / name)[0] == 0
    plain, small = (private(tmp_path / name) / "memory.safetensors" for name in ("xor", "packed"))
    assert small.stat().st_size < 0.25 * plain.stat().st_size and small.stat().st_mode & 0o77 == 0


def test_reads_that_end_within_a_block_and_any_bits_at_all(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 100)
    shape = (37, 29)
    save(tmp_path / "base", {"w.weight": random_bits(shape, torch.bfloat16, 0)})
    save(tmp_path / "finetuned", {"w.weight": random_bits(shape, torch.bfloat16, 1)})
    words = ("--method", "random", "--energy", 0.5, "--nonfinite", "passthrough", "--vectors", "memory")
    pair(tmp_path / "other")
    assert cli("split", tmp_path / "other" / "base", tmp_path / "other" / "finetuned", *words, "--memory-format", "packed",
               "-o", tmp_path / "g")[0] == 0  # fmt: skip
    with (
        Checkpoint.open(tmp_path / "g") as general,
        Memory.open(private(tmp_path / "g")) as memory,
        Checkpoint.open(tmp_path / "other" / "finetuned") as tuned,
    ):
        for name in memory.changes:
            size = general.tensors[name].nbytes
            spans = [(0, size), (4, 404), (396, 408), (size - 4, size), (8, 8)]
            for start, stop in [(low, high) for low, high in spans if high <= size]:
                found = memory.reattach(name, general.read(name, start, stop), start)
                assert (found == tuned.read(name, start, stop)).all()


@pytest.mark.parametrize("at", [1, 3, 8, 20, 60, -1])
def test_damage_is_one_line(tmp_path, cli, at):
    pair(tmp_path)
    assert (
        cli("split", tmp_path / "base", tmp_path / "finetuned", "--rank", 2, "--memory-format", "packed", "-o", tmp_path / "g")[
            0
        ]
        == 0
    )
    file = private(tmp_path / "g") / "memory.safetensors"
    with Checkpoint.open(file) as plain:
        name = next(name for name in plain.tensors if name.startswith("ulp/"))
        info, begin = plain.tensors[name], len(next(iter(plain.shards.values())).header)
    raw = bytearray(file.read_bytes())
    position = begin + info.offset + at if at >= 0 else begin + info.offset + info.nbytes - 1
    raw[position] ^= 0xFF
    file.write_bytes(raw)
    with Checkpoint.open(tmp_path / "g") as general:
        try:
            with Memory.open(private(tmp_path / "g")) as memory:
                memory.check_fits(general)
                bits = general.read(name[4:])
                assert len(memory.reattach(name[4:], bits)) == len(bits)  # a bit of a code: the hash finds it
        except (BadInput, PairMismatch) as error:
            assert len(str(error)) < 300
    assert cli("excise", tmp_path / "g", "--beta", 1, "-o", tmp_path / "x")[0] in (3, 4) and not (tmp_path / "x").exists()


def test_the_manifest_says_which_and_replay_writes_the_same(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair(tmp_path)
    assert cli("split", "base", "finetuned", "--rank", 2, "--memory-format", "packed", "-o", "g", "-j", 1)[0] == 0
    assert json.loads((tmp_path / "g" / "liborth.manifest.json").read_text())["parameters"]["memory_format"] == "packed"
    assert cli("replay", "g", "-o", "again")[0] == 0
    assert files(private(tmp_path / "again")) == files(private(tmp_path / "g"))
    flip(private(tmp_path / "g") / "memory.safetensors")
    assert cli("excise", "g", "--beta", 1, "-o", "x")[0] == 3
    assert zlib.Z_RLE == packed.STRATEGY
