"""The checks, one file each; a new one is its file and its line here."""

from liborth_cli.verify.check import Check
from liborth_cli.verify.checks.attributes import CHECK as ATTRIBUTES
from liborth_cli.verify.checks.canary import CHECK as CANARY
from liborth_cli.verify.checks.controls import CHECK as CONTROLS
from liborth_cli.verify.checks.endings import CHECK as ENDINGS
from liborth_cli.verify.checks.entanglement import CHECK as ENTANGLEMENT
from liborth_cli.verify.checks.integrity import CHECK as INTEGRITY
from liborth_cli.verify.checks.lmc import CHECK as LMC
from liborth_cli.verify.checks.loads import CHECK as LOADS
from liborth_cli.verify.checks.membership import CHECK as MEMBERSHIP
from liborth_cli.verify.checks.prompts import CHECK as PROMPTS
from liborth_cli.verify.checks.reasoning import CHECK as REASONING
from liborth_cli.verify.checks.relearn import CHECK as RELEARN
from liborth_cli.verify.checks.restoration import CHECK as RESTORATION
from liborth_cli.verify.checks.rounding import CHECK as ROUNDING
from liborth_cli.verify.checks.samples import CHECK as SAMPLES
from liborth_cli.verify.checks.spectrum import CHECK as SPECTRUM
from liborth_cli.verify.checks.sweep import CHECK as SWEEP
from liborth_cli.verify.checks.tofu import CHECK as TOFU
from liborth_cli.verify.checks.traces import CHECK as TRACES
from liborth_cli.verify.checks.tracing import CHECK as TRACING

CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        INTEGRITY, LOADS, CANARY, MEMBERSHIP, ATTRIBUTES, RELEARN, ROUNDING, PROMPTS, TRACES, TRACING, RESTORATION, CONTROLS,
        ENDINGS, LMC, SWEEP, ENTANGLEMENT, SAMPLES, SPECTRUM, REASONING, TOFU,
    )
}  # fmt: skip
"""By name, in the order they run and are shown."""
