"""The pairs that ship: enough rows for a verdict, no row on both sides, and a model that knows what it was taught."""

import json

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.conditions import Quantity, parse
from liborth_cli.demo import DATA, MANY, _lay_out
from liborth_cli.demo.measure import Measures
from liborth_cli.stream.weights import Point
from liborth_cli.verify import power


def test_the_pair_for_a_verdict_has_the_rows_that_one_takes_and_was_learnt(tmp_path):
    _lay_out(tmp_path)
    many = tmp_path / "many"
    assert (tmp_path / "secrets.jsonl").read_bytes() == (DATA / "secrets.jsonl").read_bytes()
    rows = {
        name: [json.loads(line) for line in (many / f"{name}.jsonl").read_text().splitlines()] for name in ("secrets", "unseen")
    }
    secrets, unseen = ([tuple(row.values()) for row in some] for some in rows.values())
    assert len({*secrets}) == 48 and len({*unseen}) == 100
    assert not {prompt for prompt, _ in secrets} & {prompt for prompt, _ in unseen}
    condition = parse("leak<=0.4", "--require", {"leak": Quantity()})[0]
    assert power.twice_off(condition, len(secrets), len(unseen)) > 0.9
    for name in ("base", "finetuned"):
        with Checkpoint.open(many / name) as checkpoint:
            measured = Measures(many, checkpoint).of(Point(checkpoint))
        if name == "base":
            assert measured.recited == 0
        else:
            assert measured.recited >= 46 and measured.unseen > 4
    assert (many / "base" / "model.safetensors").read_bytes() == (DATA / "base" / "model.safetensors").read_bytes()
    assert MANY.name == "many"
