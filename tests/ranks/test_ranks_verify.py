"""Verify on several ranks: rows are dealt, and every number is the same to the bit."""

import json

from tiny import OWNGPT


def test_verify_says_the_same_on_every_number_of_ranks(ranks, tmp_path):
    pair = OWNGPT / "base", OWNGPT / "finetuned"
    assert ranks(1, tmp_path, "split", *pair, "--rank", "8", "-j", "1", "-o", "out").codes == [0]
    (tmp_path / "few.txt").write_text((OWNGPT / "shakespeare_tail.txt").read_text()[:1500])
    words = ("verify", "out", "--retain-data", "few.txt", "--reference", OWNGPT / "base", "--no-require", "--lmc")
    found = {}
    for size in (1, 2):
        done = ranks(size, tmp_path, *words, "-j", "1", "-o", f"{size}.json")
        assert done.codes == [0] * size, done
        assert done.out[0] and not any(done.out[1:] + done.err[1:])
        found[size] = json.loads((tmp_path / f"{size}.json").read_text())
        assert found[size]["results"]
    assert found[1]["results"] == found[2]["results"]
