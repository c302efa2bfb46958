"""Compile every kernel for one kind of GPU and print, as JSON, what the compiler says of it: `compile_kernels.py 90`.

A process of its own, because Triton decides when it is imported whether to compile or to interpret.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from liborth_kernels import filter_triton, moments_triton, rebuild_triton, sketch_triton, syrk_triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(nvidia.__file__).parent / "bin"


def kernels():
    """Yield kernel, pointer types, constants and number of warps, as the launchers choose them."""
    syrk = syrk_triton._syrk
    for kind, pair, precision in (
        ("bf16", False, "ieee"), ("fp16", False, "ieee"), ("fp32", False, "bf16x3"), ("bf16", True, "bf16x3"),
    ):  # fmt: skip
        depth = syrk_triton.DEPTH[not pair and kind != "fp32"]
        types = {"total": "*fp32", "new": f"*{kind}", "old": f"*{kind}", "order": "*i32", "weight": "fp32"}
        constants = {
            "PAIR": pair,
            "WIDEN": False,
            "EVEN": True,
            "PRECISION": precision,
            "BLOCK": syrk_triton.BLOCK,
            "CHUNK": 1024,
            "DEPTH": depth,
        }
        narrow = not pair and kind != "fp32"
        yield syrk, types, {**constants, "row_step": 1, "old_row_step": 1}, syrk_triton.WARPS[narrow]
    constants = {"PRECISION": "bf16x3", "BLOCK": moments_triton.BLOCK, "DEPTH": moments_triton.DEPTH, "CHUNK": 1024}
    types = {"total": "*fp32", "gradients": "*bf16", "inputs": "*bf16", "order": "*i32", "weight": "fp32"}
    yield moments_triton._second_moments, types, {**constants, "g_place": 1, "a_place": 1}, 8
    types = {"out": "*fp32", "new": "*bf16", "old": "*bf16", "x": "*bf16"}
    for even, (left, right) in ((True, (64, 16)), (False, (128, 0))):
        constants = {
            "PARTS": sketch_triton.PARTS,
            "WIDEN": False,
            "EVEN": even,
            "ROWS": sketch_triton.TILE.rows,
            "LEFT": left,
            "RIGHT": right,
            "DEPTH": sketch_triton.TILE.depth,
            "CHUNK": 1024,
        }
        yield sketch_triton._sketch, types, {**constants, "new_column": 1, "old_column": 1}, sketch_triton.TILE.warps
    types = {"out": "*fp64", "coefficients": "*fp64", "ratios": "*fp64", "strength": "*fp64"}
    for hard in (False, True):
        yield filter_triton._filter, types, {"HARD": hard, "BLOCK": 1024}, 4
    for weight, bits, wide in (("bf16", "i16", "fp32"), ("fp16", "i16", "fp32"), ("fp32", "i32", "fp64")):
        types = {"general": f"*{bits}", "delta": f"*{bits}", "finetuned": f"*{bits}", "reference": f"*{weight}"}
        types |= {"skill": "*fp32", "factors": f"*{wide}"}
        yield rebuild_triton._rebuild, types, {"BF16": weight == "bf16", "BLOCK": 1024}, 4


def main() -> None:
    capability, found = int(sys.argv[1]), []
    for kernel, types, constants, warps in kernels():
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n] not in ("constexpr", "fp32")}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": warps, "num_stages": 3}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            said = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
        usage = dict(re.findall(r"(REG|STACK):(\d+)", said.stdout + said.stderr))
        found.append(
            {
                "kernel": kernel.fn.__name__,
                "tensor_cores": "PRECISION" in constants or "PARTS" in constants,
                "registers": int(usage["REG"]),
                "spilled": int(usage["STACK"]),
                "shared": made.metadata.shared,
                "stores": made.asm["ptx"].count("st.global"),
                "instructions": " ".join(sorted(set(re.findall(r"\b(?:wg)?mma\.\w+", made.asm["ptx"])))),
            }
        )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
