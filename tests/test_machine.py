"""What a process may use of a machine, what of it is free, and what `doctor` says of that."""

import hashlib
import json
import os
import threading

import pytest
import torch

from liborth_cli import cgroup, doctor, machine
from liborth_cli.demo import DATA
from liborth_cli.errors import UsageError
from liborth_cli.stream import work


@pytest.fixture
def free(monkeypatch):
    """A machine with eight cores, all of them allowed."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(machine, "allowed_cores", lambda: 8)
    return monkeypatch


@pytest.mark.parametrize(
    ("loads", "threads"),
    [
        ("0.00 0.0 0.0 1/200 99", 8),
        ("4.00 4.0 4.0 5/200 99", 4),
        ("4.00 4.0 4.0 1/200 99", 8),  # it has just ended
        ("0.10 0.1 0.1 9/200 99", 8),  # it has just begun, and may end at once
        ("40.0 40.0 40.0 41/200 99", 1),
        ("nonsense", 8),
    ],
)
def test_threads_by_themselves_are_what_is_free(free, loads, threads):
    share = machine.busy_share
    free.setattr(machine, "busy_share", lambda cores: share(cores, loads))
    assert machine.available_cores() == threads


def test_a_share_of_the_machine_is_not_the_machine(free):
    """Two of eight cores allowed and half of the machine busy: one of ours is taken to be free."""
    free.setattr(machine, "allowed_cores", lambda: 2)
    free.setattr(machine, "busy_share", lambda cores: 0.5)
    assert machine.available_cores() == 1


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("4,2", 4), ("0", 8), ("", 8), ("many", 8)])
def test_omp_num_threads_decides(free, value, threads):
    free.setattr(machine, "busy_share", lambda cores: 0.0)
    free.setenv("OMP_NUM_THREADS", value)
    assert machine.available_cores() == threads


def group(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_version_two_of_control_groups(tmp_path):
    root = group(tmp_path, {
        "proc/self/cgroup": "0::/jobs/mine\n",
        "sys/fs/cgroup/jobs/mine/cpu.max": "max 100000\n", "sys/fs/cgroup/jobs/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/jobs/mine/memory.max": "1000\n", "sys/fs/cgroup/jobs/mine/memory.current": "300\n",
        "sys/fs/cgroup/jobs/memory.max": "max\n", "sys/fs/cgroup/jobs/memory.current": "300\n",
    })  # fmt: skip
    assert (cgroup.cpu_quota(root), cgroup.memory_left(root)) == (1.5, 700)


def test_version_one_of_control_groups(tmp_path):
    root = group(tmp_path, {
        "proc/self/cgroup": "4:memory:/a\n2:cpu,cpuacct:/a\n1:name=systemd:/\n",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "5000\n", "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "6000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    })  # fmt: skip
    assert (cgroup.cpu_quota(root), cgroup.memory_left(root)) == (4.0, 0)
    assert (cgroup.cpu_quota(tmp_path / "no"), cgroup.memory_left(tmp_path / "no")) == (None, None)


def test_a_quota_bounds_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for quota, cores in ((None, 16), (0.3, 1), (2.5, 3), (64.0, 16)):
        monkeypatch.setattr(cgroup, "cpu_quota", lambda quota=quota: quota)
        assert machine.allowed_cores() == cores


def test_bfloat16_on_a_device_without_it_is_said_to_be_slow(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda _: False)
    assert "float32 is several times faster" in machine.slowed(torch.bfloat16, device)
    assert not machine.slowed(torch.float32, device)
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda _: True)
    assert not machine.slowed(torch.bfloat16, device)


@pytest.mark.parametrize(
    "words",
    [
        ("curvature", DATA / "finetuned", "--data", DATA / "retain.jsonl", "--tokens", 100),
        ("tune", DATA / "base", "--method", "full", "--data", DATA / "secrets.jsonl", "--steps", 1, "--batch-size", 1),
    ],
    ids=lambda words: words[0],
)
def test_a_command_that_is_given_such_a_dtype_warns(words, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda _: False)
    for dtype, said in (("float32", False), ("bfloat16", True)):
        code, _, err = cli(*words, "--dtype", dtype, "-o", tmp_path / dtype)
        assert code == 0, err
        assert ("float32 is several times faster" in err) == said


def test_doctor_says_what_is_missing_and_how_large_a_model_may_be(cli, monkeypatch):
    monkeypatch.setattr(doctor, "spare_bytes", lambda: 32_000_000_000)
    monkeypatch.setattr(doctor, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(doctor, "EXTRAS", {**doctor.EXTRAS, "nowhere_to_be_found": ("none", "nothing")})
    code, out, err = cli("doctor", "--json")
    document = json.loads(out)
    able = {one["command"]: one["weights"] for one in document["abilities"]}
    assert (code, err) == (0, "")
    assert able["tune"] == 2_000_000_000 and able["inspect"] is None
    assert "nowhere_to_be_found: pip install 'liborth[none]' for nothing" in document["advice"]
    code, out, _ = cli("doctor")
    assert "slower than float32 here" in out
    assert code == 0 and "2.0 billion weights" in out and "pip install 'liborth[none]'" in out


@pytest.mark.parametrize("device", ["cuda", "cuda:all", "cuda:3"])
def test_a_missing_gpu_is_named_as_it_was_asked_for(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match=f"--device {device}: torch sees 0"):
        machine.configure(device, 1)


def test_a_predicted_time_says_that_narrow_models_take_longer():
    assert "far below 768 rows it takes several times longer" in work.said(torch.device("cpu"))


def test_what_a_time_assumes_names_the_rate_of_narrow_products_beside_that_of_float32(monkeypatch):
    monkeypatch.setattr(work, "rate", lambda device, dtype="float32": {"float32": 5e10, "bfloat16": 2e11}[dtype])
    assert "50 billion multiply-adds a second, measured" in work.said(torch.device("cpu"))
    assert "a second in float32, 200 in bfloat16, measured" in work.said(torch.device("cpu"), "bfloat16")


def test_threads_of_this_process_are_no_others(monkeypatch, tmp_path):
    """Inputs are hashed before anybody asks how many cores are free; after a busy minute that was one thread too few."""
    over = threading.Event()
    workers = [threading.Thread(target=lambda: [hashlib.sha256(bytes(1 << 20)) for _ in iter(over.is_set, True)]) for _ in "ab"]
    for worker in workers:
        worker.start()
    try:
        seen = max(machine.running_threads() for _ in range(200))
    finally:
        over.set()
        for worker in workers:
            worker.join()
    assert 2 <= seen <= 3 + threading.active_count()
    assert machine.running_threads() >= 1
    monkeypatch.setattr(machine, "running_threads", lambda: 3)
    monkeypatch.setattr(machine.Path, "read_text", lambda *_, **__: "2.00 1.00 1.00 3/100 42")
    assert machine.busy_share(2) == 0.0
    monkeypatch.setattr(machine, "running_threads", lambda: 1)
    assert machine.busy_share(2) == 1.0
