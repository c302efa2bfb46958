"""Several ranks verify and look for a dose: rows, points of a line and candidates are dealt, and the numbers stay the same."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import OWNGPT

from liborth_cli.measure.scores import RowScore
from liborth_cli.ranks import World
from liborth_cli.verify.subject import States


def test_verify_says_the_same_on_every_number_of_ranks(ranks, tmp_path):
    pair = OWNGPT / "base", OWNGPT / "finetuned"
    assert ranks(1, tmp_path, "split", *pair, "--rank", "8", "-j", "1", "-o", "out").codes == [0]
    (tmp_path / "few.txt").write_text((OWNGPT / "shakespeare_tail.txt").read_text()[:1500])
    words = ("verify", "out", "--retain-data", "few.txt", "--reference", OWNGPT / "base", "--no-require", "--lmc", "--sweep")
    found = {}
    for size in (1, 2):
        done = ranks(size, tmp_path, *words, "-j", "1", "-o", f"{size}.json")
        assert done.codes == [0] * size, done
        assert done.out[0] and not any(done.out[1:] + done.err[1:])
        found[size] = json.loads((tmp_path / f"{size}.json").read_text())
        assert found[size]["results"]
    assert found[1]["results"] == found[2]["results"]


def test_the_frontier_of_a_probe_is_the_same_on_every_number_of_ranks(ranks, tmp_path):
    for side in ("base", "finetuned"):
        (tmp_path / side).symlink_to(OWNGPT / side)
    (tmp_path / "few.txt").write_text((OWNGPT / "shakespeare_tail.txt").read_text()[:1500])
    words = ("split", "base", "finetuned", "--method", "svd", "--probe", "--retain-data", "few.txt", "--json")
    found = {}
    for size in (1, 2):
        done = ranks(size, tmp_path, *words, "-j", "1")
        assert done.codes == [0] * size, done
        found[size] = json.loads(done.out[0])
        assert len(found[size]["dose"]["frontier"]) > 4
    assert found[1] == found[2]


@pytest.mark.parametrize(("names", "own"), [("abcde", "ace"), ("a", "a")])
def test_each_rank_scores_some_of_the_points_alone(names, own):
    """And where there are fewer points than ranks, all ranks share the rows of each."""
    asked, done = [], []

    class Two:
        size, rank = 2, 0

        assign, each = World.assign, World.each

        def share(self, mine):
            other = {at: [[torch.full((2, 2), float(ord(name)))]] for at, name in enumerate(names) if name not in own}
            return [mine, other]

    def score_at(rows, weights, alone=False):
        asked.append((weights, alone))
        return [RowScore.of(np.full((2, 2), float(ord(weights))))]

    states = States(dict(zip(names, names, strict=True)), {}, SimpleNamespace(world=Two()))
    states.score_at = score_at
    states.score_all(["retain"], list(names), done.append)
    assert asked == [(name, len(names) > 1) for name in own]
    assert sum(done) == len(names)
    assert [states.score("retain", name)[0].loss[0] for name in names] == [ord(name) for name in names]
