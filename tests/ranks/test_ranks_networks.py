"""Ranks on machines of their own, as far as a kernel can play several: network namespaces, a slow link, a link that is cut."""

import os
import shutil
import subprocess

import pytest
from interrupt import wait_for
from tiny import copies, files, matrices

pytestmark = pytest.mark.slow
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


@pytest.mark.parametrize("delay", ["", "50ms"])
def test_the_way_between_changes_nothing(ranks, networks, far, delay):
    """Also where a round trip takes 100 ms; --gather sends whole files over it."""
    folder, how = far
    qdisc = ("dev", "veth0", "root", "netem", "delay", delay)
    for name in networks if delay else ():
        if subprocess.run(["tc", "-n", name, "qdisc", "add", *qdisc], capture_output=True).returncode:
            pytest.skip("the kernel has no netem, which makes a link slow")
    how = {**how, "env": {**how["env"], "LIBORTH_RANK_TIMEOUT": "30"}}
    done = ranks(2, folder, *WORDS, "-o", f"slow{delay}", **how)
    assert done.codes == [0, 0], done
    assert files(folder / f"slow{delay}") == files(folder / "whole")
    places = [str(folder / f"host{rank}") for rank in range(2)]
    done = ranks(2, folder, *WORDS, "-o", f"slow{delay}", "--gather", folders=places, **how)
    assert done.codes == [0, 0], done
    assert files(folder / "host0" / f"slow{delay}") == files(folder / "whole")
    for name in networks if delay else ():
        subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", "veth0", "root"], check=True)


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
