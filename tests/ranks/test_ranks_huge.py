"""A pair of 405B, as headers over holes: planned and dealt within 1 GiB."""

import json


def test_a_405b_is_planned_and_dealt_within_a_gibibyte(ranks, tmp_path):
    script = """
import json, sys
from pathlib import Path
import benchmarks
sys.path[:0] = benchmarks.__path__
from llama_shapes import LLAMA_405B, headers_only
from scaling import plan_and_deal
base, finetuned = (headers_only(Path(side), LLAMA_405B) for side in ("base", "finetuned"))
found = plan_and_deal(base, finetuned, (1, 8, 128))
print(json.dumps([found.files, found.peak, {size: share[0] for size, share in found.shares.items()}]))
"""
    done = ranks(1, tmp_path, script=script)
    assert done.codes == [0], done
    files, peak, shares = json.loads(done.out[0])
    assert files == 191 and peak < 1 << 30
    assert shares["1"] > 8e11 and shares["8"] < shares["1"] / 7 and shares["128"] < shares["1"] / 80
