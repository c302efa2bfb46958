"""The model card written beside a checkpoint. It says what was done, and that doing is not proving."""

from __future__ import annotations

from typing import Any

import yaml

UNVERIFIED = (
    "**A split that was not verified is not a result.** Nothing here proves that private text is gone. Measure it on your own\n"
    "secrets, beside the controls (`--method scale`, `--method random`), before you publish."
)


def split_card(manifest: dict[str, Any]) -> str:
    """Render the card of a split.

    Args:
        manifest: the manifest, without its outputs.

    Returns:
        Markdown with a YAML head that the hub understands.
    """
    parameters, totals = manifest["parameters"], manifest["totals"]
    inputs = manifest["inputs"]
    shares = f"{totals['skill']:.2%} | {totals['memory']:.2%}"
    cells = " | ".join(map(str, [*(parameters[key] for key in ("method", "amount", "memory_side", "alpha")), shares]))
    rows = [(side, inputs[side]["title"], inputs[side]["commit"] or "") for side in ("reference", "finetuned")]
    return _render(
        "General checkpoint",
        inputs["finetuned"],
        f"""Made by liborth {manifest["liborth"]} from a fine-tuned checkpoint and the reference it started from. The update
between the two was divided matrix by matrix; this checkpoint holds the reference plus the *skill* part.

| | | commit |
|---|---|---|
{"".join(f"| {side} | {_cell(title)} | {commit} |{chr(10)}" for side, title, commit in rows)}
| method | amount | memory side | alpha | energy kept as skill | energy in memory |
|---|---|---|---|---|---|
| {cells} |

{UNVERIFIED}

`memory.safetensors`, where it is present, **is the private data**: with it `liborth excise --beta 1` gives the fine-tuned
checkpoint back bit for bit. Do not publish it. What was done to each tensor stands in `liborth.manifest.json`.
""",
    )


def excise_card(manifest: dict[str, Any]) -> str:
    """Render the card of what `excise` wrote."""
    beta = manifest["parameters"]["beta"]
    meaning = {
        0.0: "the general checkpoint, without its memory",
        1.0: "the fine-tuned checkpoint, memory included: **treat it as private**",
    }.get(beta, "between (or beyond) the general and the fine-tuned checkpoint: **it may recite private text**")
    return _render(
        f"Checkpoint at beta = {beta:g}",
        manifest["inputs"]["finetuned"],
        f"Made by liborth {manifest['liborth']} from the output of a split. It is {meaning}.\n\n{UNVERIFIED}\n",
    )


def tune_card(manifest: dict[str, Any]) -> str:
    """Render the card of what `tune` wrote."""
    parameters = manifest["parameters"]
    meaning = {
        "full": "every weight was trained; nothing is kept apart, so **it may recite what it was trained on**",
        "lora": "low-rank updates were trained and merged; nothing is kept apart, so **it may recite what it was trained on**",
        "ogd": "this checkpoint is the base itself; what was learnt lies in the memory file, orthogonal to what the base uses",
        "sinks": "the general stream; the neurons that were added for memory lie in the memory file",
    }[parameters["method"]]
    return _render(
        "General checkpoint" if manifest["memory"] else "Fine-tuned checkpoint",
        manifest["inputs"]["reference"],
        f"""Made by liborth {manifest["liborth"]} from {_cell(manifest["inputs"]["reference"]["title"])} with
`liborth tune --method {parameters["method"]}`: {meaning}.

{UNVERIFIED}

`memory.safetensors`, where it is present, **is the private data**: do not publish it. How training went stands in
`training.json`, what was asked for in `liborth.manifest.json`.
""",
    )


def _render(title: str, source: dict[str, Any], body: str) -> str:
    base = {"base_model": source["title"]} if source["commit"] else {}
    head = yaml.safe_dump({**base, "tags": ["liborth"]}, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n# {title}\n\n{body}"


def _cell(text: str) -> str:
    return "".join(c for c in text if c.isprintable()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
