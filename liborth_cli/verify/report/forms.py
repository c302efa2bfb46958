"""Where the figures of a certificate may go in two European documents; which of them suffices is not for a program to say.

The sources are Opinion 28/2024 of the European Data Protection Board (17 December 2024), which holds that a model trained on
personal data is anonymous only when the likelihood of extracting them, directly or by queries, is insignificant; and the Model
Documentation Form of the EU's General-Purpose AI Code of Practice (Transparency chapter, July 2025). Both are paraphrased.
"""

from __future__ import annotations

from dataclasses import dataclass

from liborth_cli.verify.report.summary import measured
from liborth_cli.verify.result import Certificate

ASKED: dict[str, tuple[str, ...]] = {
    "Direct extraction of training data, also with some probability": (
        "extraction", "extraction_sampled", "extraction_strength", "exact_memorisation", "quantised_extraction",
    ),
    "Obtaining them by queries, on purpose or not": ("prompt_extraction", "exposure"),
    "Telling whether a row was trained on (membership inference)": (
        "leak", "loss_auc", "mink_auc", "minkpp_auc", "calibrated_auc", "calibrated_tpr",
    ),
    "Getting them back by means reasonably likely to be used: further training": (
        "relearn_gap_fresh", "relearn_gap", "relearn_gap_retrained", "relearned",
    ),
    "Attribute inference, model inversion, traces in activations": ("attribute_first", "attribute_auc", "trace"),
}  # fmt: skip
"""What the Opinion asks about, and the metrics that bear on it."""
CAVEAT = (
    "These tables say where figures of this page may be entered. They are no legal advice and no finding: no figure here shows "
    "that a model is anonymous, and all of them are measurements on the rows that were given."
)


@dataclass(frozen=True)
class Entry:
    """One line of a form.

    Attributes:
        asked: what the document asks for.
        said: what this certificate has for it.
    """

    asked: str
    said: list[str]


def extraction_entries(certificate: Certificate) -> list[Entry]:
    """Fill in what bears on the likelihood of extraction (EDPB, Opinion 28/2024)."""
    found = []
    for asked, names in ASKED.items():
        said = [f"{name} {metric.text}" for name in names if (metric := measured(certificate, name)) is not None]
        found.append(Entry(asked, said or ["not measured"]))
    return found


def documentation_entries(certificate: Certificate) -> list[Entry]:
    """Fill in what a certificate knows of the EU's Model Documentation Form; the rest of the form is for the provider."""
    about, count = certificate.about, certificate.about.weights
    signed = certificate.provenance.signed_by if certificate.provenance else None
    authentic = [f"SHA-256 of {count} weight file{'' if count == 1 else 's'}, under Provenance"] if count else []
    authentic += [f"manifest signed by {signed}"] if signed else []
    edit = about.edit
    made = [f"liborth split, {edit.method}, {edit.amount}: {edit.divided} of {edit.tensors} tensors"] if edit else []
    removed = measured(certificate, "extraction")
    curated = [f"extraction {removed.text}, of the rows named as what must be gone"] if removed else []
    known = {
        "Legal name for the model provider": [about.owner] if about.owner else [],
        "Model name": [about.name or certificate.subject],
        "Model authenticity": authentic,
        "Model dependencies": [f"{about.reference or 'unknown'}, by way of {about.finetuned}"] if about.finetuned else [],
        "Design specifications of the training process": made,
        "Data curation: measures against unsuitable data": curated,
    }
    return [Entry(asked, said or ["not on record"]) for asked, said in known.items()]
