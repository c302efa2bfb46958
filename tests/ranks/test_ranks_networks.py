"""Ranks on machines of their own, as far as a kernel can play several: network namespaces, a slow link, a link that is cut."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from interrupt import wait_for
from tiny import copies, files, matrices

pytestmark = pytest.mark.slow
LINK = str(Path(__file__).with_name("link.py"))
PING = """
import socket, sys, time
start = time.monotonic()
try:
    socket.create_connection((sys.argv[1], 9), timeout=10)
except ConnectionRefusedError:
    print(time.monotonic() - start)
"""
WORDS = ("split", "base", "finetuned", "--energy", "0.5", "-j", "1")


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def networks():
    """Two network namespaces with a link between them: (names, device in both); removed at the end."""
    names = [f"liborth-{os.getpid()}-{side}" for side in "ab"]
    if not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("needs ip and tc")
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as refused:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"the kernel forbids network namespaces: {refused.stderr.strip()}")
    yield names
    for name in names:
        ip("netns", "del", name)


@pytest.fixture(scope="module")
def far(ranks, networks, tmp_path_factory):
    """A pair of 8 files, what one process makes of it, a copy a host, and what ranks in two namespaces are started with."""
    folder = matrices(tmp_path_factory.mktemp("far"), [(300, 400)] * 16, shards=8)
    assert ranks(1, folder, *WORDS, "-o", "whole").codes == [0]
    copies(folder, folder, 2)
    env = {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "veth0", "LIBORTH_RANK_TIMEOUT": "5"}
    return folder, {"networks": networks, "env": env}


@pytest.fixture
def slow(networks):
    """A way between the namespaces with a round trip of 100 ms: by `tc`, or by `link.py` where the kernel has no netem."""
    delay = ("qdisc", "add", "dev", "veth0", "root", "netem", "delay", "50ms")
    if not any(subprocess.run(["tc", "-n", name, *delay], capture_output=True).returncode for name in networks):
        yield {}
        for name in networks:
            subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", "veth0", "root"], check=True)
        return
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, LINK, *networks, "0.05"], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as link:
        assert link.stdin and link.stdout and link.stderr
        if link.stdout.readline() != "ready\n":
            pytest.skip(f"the kernel has neither netem nor tun devices: {link.stderr.read().strip()[-200:]}")
        yield {"MASTER_ADDR": "10.78.0.1", "GLOO_SOCKET_IFNAME": "slow0"}
        link.stdin.close()


@pytest.mark.parametrize("way", ["quick", "delayed"])
def test_the_way_between_changes_nothing(ranks, request, networks, far, way):
    """Also where a round trip takes 100 ms; --gather sends whole files over it."""
    folder, how = far
    env = request.getfixturevalue("slow") if way == "delayed" else {}
    if way == "delayed":
        ping = ("ip", "netns", "exec", networks[1], sys.executable, "-c", PING, env.get("MASTER_ADDR", "10.77.0.1"))
        assert float(subprocess.run(ping, check=True, capture_output=True, text=True, timeout=30).stdout) >= 0.1
    how = {**how, "env": {**how["env"], "LIBORTH_RANK_TIMEOUT": "30", **env}}
    done = ranks(2, folder, *WORDS, "-o", way, **how)
    assert done.codes == [0, 0], done
    assert files(folder / way) == files(folder / "whole")
    places = [str(folder / f"host{rank}") for rank in range(2)]
    done = ranks(2, folder, *WORDS, "-o", way, "--gather", folders=places, **how)
    assert done.codes == [0, 0], done
    assert files(folder / "host0" / way) == files(folder / "whole")


def test_a_link_that_is_cut_ends_both_sides(ranks, networks, far):
    folder, how = far
    ranks.start(2, folder, *WORDS, "-o", "cut", **how)
    wait_for(folder / "cut.liborth-partial", 2)
    ip("-n", networks[1], "link", "set", "veth0", "down")
    done = ranks.wait()
    ip("-n", networks[1], "link", "set", "veth0", "up")
    assert done.codes == [8, 8], done
    assert "rank 1" in done.err[0] and done.err[0].count("error: ") == 1 and "Traceback" not in "".join(done.err), done
    assert not (folder / "cut").exists()
    assert ranks(2, folder, *WORDS, "-o", "cut", "--resume", **how).codes == [0, 0]
    assert (folder / "cut").exists()
