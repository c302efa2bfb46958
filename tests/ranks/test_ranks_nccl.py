"""Sums between GPUs: what NCCL would be given, on pretended GPUs and with a pretended network; NCCL itself needs real ones."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from elsewhere import Elsewhere, Remote

from liborth_cli import messages
from liborth_cli.line import Line
from liborth_cli.messages import SUMS, Tensors


class Network:
    """What torch.distributed does of `send` and `recv`; NCCL takes tensors of its own GPU alone, and knows no tags."""

    def __init__(self):
        self.ways, self.log = defaultdict(queue.Queue), []

    def of(self, rank):
        network = self

        class Dist:
            @staticmethod
            def send(tensor, to, tag=0):
                kind = network.kind(tensor, rank)
                network.log.append((kind, tag, tensor.numel()))
                network.ways[kind, rank, to, None if kind == "nccl" else tag].put(tensor.cpu().clone())

            @staticmethod
            def recv(tensor, source, tag=0):
                kind = network.kind(tensor, rank)
                tensor.copy_(network.ways[kind, source, rank, None if kind == "nccl" else tag].get(timeout=20))

        return Dist

    @staticmethod
    def kind(tensor, rank):
        if tensor.device.type == "cpu":
            assert not isinstance(tensor, Remote)
            return "gloo"
        assert tensor.device == torch.device("cuda", rank)
        return "nccl"


def lines(size, devices):
    """Ranks that are connected already, and where each says that it computes."""
    network, rounds = Network(), threading.Barrier(size)
    found = [Line.__new__(Line) for _ in range(size)]
    said = [""] * size
    for rank, line in enumerate(found):
        line.size, line._hosts, line.tensors = size, ["here"] * size, Tensors(rank, size, network.of(rank))

        def share(value, rank=rank):
            said[rank] = value
            rounds.wait(20)
            return list(said)

        line.share = share
    with ThreadPoolExecutor(size) as pool:
        list(pool.map(lambda pair: pair[0].use(pair[1]), zip(found, devices, strict=True)))
    return network, found


def reduced(found, devices, sums):
    def one(line):
        with Elsewhere():
            mine = {name: t.to(torch.device(devices[line.tensors.rank])) for name, t in sums(line.tensors.rank).items()}
            return {name: (t.device, t.cpu()) for name, t in line.tensors.reduce_to(1, mine, ("rows/",)).items()}

    with ThreadPoolExecutor(len(found)) as pool:
        return list(pool.map(one, found))


def sums(rank):
    made = torch.Generator().manual_seed(rank)
    parts = {f"a{i}": torch.randn(3 + i, 5, generator=made) for i in range(6)}
    if rank == 2:
        del parts["a3"]
    return {**parts, "count": torch.tensor(float(rank), dtype=torch.float64), "rows/x": torch.full((rank, 2), float(rank))}


@pytest.mark.parametrize(
    ("devices", "way"),
    [
        (["cuda:0", "cuda:1", "cuda:2"], "nccl"),
        (["cuda:0", "cuda:0", "cuda:0"], "gloo"),  # which NCCL refuses
        (["cpu"] * 3, "gloo"),
    ],
)
def test_sums_go_from_gpu_to_gpu_and_all_else_through_the_host(devices, way, monkeypatch):
    monkeypatch.setattr(messages, "BUCKET", 200)
    network, found = lines(3, devices)
    first = reduced(found, devices, sums)
    again = reduced(found, devices, sums)
    assert first[0] == first[2] == {}
    expected = [sums(rank) for rank in range(3)]
    for name, (device, total) in first[1].items():
        parts = [one[name] for one in expected if name in one]
        assert device == torch.device(devices[1])
        assert torch.equal(total, torch.cat(parts) if "rows" in name else sum(parts[1:], parts[0]))
        assert torch.equal(total, again[1][name][1])
    assert first[1].keys() == expected[0].keys()
    sent = [(kind, size) for kind, tag, size in network.log if tag == SUMS]
    bytes_of = {kind: sum(size for other, size in sent if other == kind) for kind, _ in sent}
    assert ("nccl" in bytes_of) == (way == "nccl")
    if way == "nccl":
        assert bytes_of["nccl"] == 2 * sum(t.nbytes for rank in (0, 2) for t in expected[rank].values())
        assert len([kind for kind, _ in sent if kind == "nccl"]) < 2 * 2 * 6, "small tensors go together"
