"""Split and excise on several ranks: the same bytes as one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interrupt import slow_pair, wait_for
from tiny import copies, files, flip, matrices

from liborth_cli.errors import LiborthError
from liborth_cli.ranks import World, deal


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair of 7 files of unequal size, and what one process makes of it."""
    return matrices(tmp_path_factory.mktemp("ranks"), [(40 + 30 * i, 64) for i in range(14)], shards=7)


SPLIT = ("split", "base", "finetuned", "--energy", "0.5", "-j", "1")


@pytest.fixture(scope="module")
def whole(ranks, pair):
    assert ranks(1, pair, *SPLIT, "-o", "whole").codes == [0]
    assert ranks(1, pair, "excise", "whole", "--beta", "0.5", "-j", "1", "-o", "half").codes == [0]
    return {name: files(pair / name) for name in ("whole", "whole.private", "half")}


@pytest.mark.parametrize("size", [2, 4])
def test_split_and_excise_give_the_same_bytes(ranks, pair, whole, size):
    out = f"out{size}"
    done = ranks(size, pair, *SPLIT, "-o", out)
    assert done.codes == [0] * size, done
    assert done.out == [f"{out}\n"] + [""] * (size - 1)
    assert files(pair / out) == whole["whole"]
    assert files(pair / f"{out}.private") == whole["whole.private"]
    assert (pair / f"{out}.private").stat().st_mode & 0o77 == 0
    done = ranks(size, pair, "excise", "whole", "--beta", "0.5", "-j", "1", "-o", f"half{size}")
    assert done.codes == [0] * size, done
    assert files(pair / f"half{size}") == whole["half"]
    assert sorted(p.name for p in pair.iterdir() if "partial" in p.name) == []


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return slow_pair(tmp_path_factory.mktemp("slow"))


DEATHS = [
    (1, signal.SIGKILL),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in ((2, signal.SIGSTOP), (0, signal.SIGKILL))),
]


@pytest.mark.parametrize(("victim", "number"), DEATHS)
def test_a_rank_that_dies_ends_the_job_and_another_number_of_ranks_finishes_it(ranks, slow, victim, number):
    out = f"dead{victim}"
    silence = {"LIBORTH_RANK_TIMEOUT": "2"} if number == signal.SIGSTOP else {}
    pids = ranks.start(3, slow, *SPLIT, "-o", out, env=silence)
    wait_for(slow / f"{out}.liborth-partial", 3)
    os.kill(pids[victim], number)
    if number == signal.SIGSTOP:
        time.sleep(5)
        os.kill(pids[victim], signal.SIGKILL)
    done = ranks.wait()
    speaker = 1 if victim == 0 else 0
    assert [code for rank, code in enumerate(done.codes) if rank != victim] == [8, 8], done
    lines = [text for text in done.err if text]
    assert [line.count("error: ") for line in lines] == [1] and "Traceback" not in lines[0], done
    assert f"rank {victim} on" in done.err[speaker] and not any(done.out)
    assert not (slow / out).exists() and not (slow / f"{out}.private").exists()
    if not (slow / "whole").exists():
        assert ranks(1, slow, *SPLIT, "-o", "whole").codes == [0]
    again = ranks(2, slow, *SPLIT, "-o", out, "--resume")
    assert again.codes == [0, 0], again
    assert "done before" in again.err[0]
    assert files(slow / out) == files(slow / "whole")
    assert files(slow / f"{out}.private") == files(slow / "whole.private")


def test_ranks_that_share_no_disk(ranks, pair, whole, tmp_path):
    """Without --gather that is refused, with it the first rank has all, and the others nothing."""
    places = copies(pair, tmp_path, 3)
    done = ranks(3, tmp_path, *SPLIT, "-o", "out", folders=places)
    assert done.codes == [6, 6, 6] and "--gather" in done.err[0] and done.err[0].count("\n") == 1, done
    done = ranks(3, tmp_path, *SPLIT, "-o", "out", "--gather", folders=places)
    assert done.codes == [0, 0, 0], done
    assert files(tmp_path / "host0" / "out") == whole["whole"]
    assert files(tmp_path / "host0" / "out.private") == whole["whole.private"]
    for place in places[1:]:
        assert sorted(p.name for p in Path(place).iterdir()) == ["base", "finetuned"]


@pytest.mark.parametrize("position", [-5, 6000], ids=["in the sample", "in between"])
def test_another_file_on_one_rank_is_refused(ranks, pair, tmp_path, position):
    """Before anything is made, and one changed bit is enough: copies are hashed whole."""
    places = copies(pair, tmp_path, 2)
    victim = sorted((tmp_path / "host1" / "base").glob("*.safetensors"))[3]
    flip(victim, position)
    done = ranks(2, tmp_path, *SPLIT, "-o", "out", "--gather", folders=places)
    assert done.codes == [4, 4], done
    assert victim.name in done.err[0] and "rank 1" in done.err[0] and done.err[0].count("\n") == 1
    assert not list(tmp_path.glob("host*/out*"))


def test_torchrun_itself(pair, whole):
    """Its launcher, two processes on a port that it chooses; no zygote."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LIBORTH_RANK_TIMEOUT": "60"}
    command = (*torchrun, sys.executable, "-m", "liborth_cli", *SPLIT, "-o", "torchrun")
    done = subprocess.run(command, cwd=pair, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torchrun\n"
    assert files(pair / "torchrun") == whole["whole"] and files(pair / "torchrun.private") == whole["whole.private"]


BAD = [
    ({"WORLD_SIZE": "2", "MASTER_ADDR": ""}, 2, "no MASTER_ADDR"),
    ({"WORLD_SIZE": "2", "RANK": "5"}, 2, "no ranks"),
    ({"WORLD_SIZE": "two"}, 2, "no ranks"),
    ({"LIBORTH_RANK_TIMEOUT": "soon"}, 2, "write seconds"),
]


@pytest.mark.parametrize(("env", "code", "words"), BAD)
def test_an_environment_that_is_none_is_one_line(monkeypatch, env, code, words):
    sound = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with pytest.raises(LiborthError) as raised:
        World.join({**sound, **env})
    assert words in str(raised.value) and raised.value.exit_code == code and len(str(raised.value)) < 300


def test_ranks_that_do_not_fit_together_are_one_line(ranks, pair):
    for envs, code, words in (
        ([{}, {"WORLD_SIZE": "3"}], 2, "WORLD_SIZE=3"),
        ([{"LIBORTH_RANK_TIMEOUT": "2"}, {"WORLD_SIZE": "1"}], 8, "rank 1 of 2 did not come"),
    ):
        done = ranks(2, pair, "excise", "nothing", "--beta", "0", envs=envs)
        assert done.codes[0] == code and words in done.err[0] and done.err[0].count("\n") == 1, done
    done = ranks(2, pair, *SPLIT, "-o", "other", more=[[], ["--seed", "5"]])
    assert done.codes == [4, 4] and "rank 1" in done.err[0] and done.err[0].count("\n") == 1, done
    script = "import liborth_cli.line as r, sys\nfrom liborth_cli.cli import main\n"
    script += "r.__version__ = f'0.{rank}'\nsys.argv = ['liborth', 'doctor']\nmain.run()"
    done = ranks(2, pair, script=script)
    # Either rank may see it first; rank 0 says it.
    assert done.codes[0] == 4 and "liborth 0.1" in done.err[0] and done.err[0].count("\n") == 1, done
    done = ranks(2, pair, "doctor")
    assert done.codes == [2, 2] and "runs as one process" in done.err[0] and not done.err[1], done


def test_dealing():
    costs = [5, 3, 9, 1, 1, 4, 4]
    bins = deal(range(7), lambda i: costs[i], 3)
    assert bins == [[2], [0, 1, 4], [3, 5, 6]] or max(sum(costs[i] for i in one) for one in bins) <= 10
    assert sorted(i for one in bins for i in one) == list(range(7)) and all(one == sorted(one) for one in bins)
    assert deal(range(7), lambda i: costs[i], 3) == bins
    assert deal([], lambda _: 1, 2) == [[], []]
