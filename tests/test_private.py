"""What is private lies in one directory, closed to others: a search of everything else, and the attack on it, find nothing."""

import hashlib
import json
import shutil
import tempfile

import pytest
import torch
from safetensors.torch import load_file
from tiny import files, flip, pair

from liborth_cli import manifest
from liborth_cli.checkpoint import claim, private
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.private import find_memory, identity, mode_in, prepare, private_place, seal
from liborth_cli.demo import DATA
from liborth_cli.errors import BadInput, PairMismatch

SECRETS = [json.loads(line) for line in (DATA / "secrets.jsonl").read_text().splitlines()[:4]]
CODES = [secret["completion"].strip(" .") for secret in SECRETS]
ALIKE = 0.99
"""Cosine from which a stored input is taken for the embedding of a token."""


def mode(path):
    return path.stat().st_mode & 0o777


def public(folder):
    """Every file that lies in no private directory."""
    return {name: raw for name, raw in files(folder).items() if not any(p.endswith(".private") for p in name.split("/")[:-1])}


def recovered(tensors, table, decode):
    """Read texts out of stored inputs: the nearest row of the normalised embedding table is the token."""
    found = set()
    for rows in tensors:
        if rows.dim() != 2 or rows.shape[1] != table.shape[1] or not rows.is_floating_point():
            continue
        cosine = torch.nn.functional.normalize(rows.float(), dim=1) @ table.T
        best, ids = cosine.max(1)
        text = decode(ids[best > ALIKE].tolist())
        found |= {code for code in CODES if code in text}
    return found


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The README's commands on a pair that memorised codes, with the factors kept and without."""
    import sys

    from liborth_cli.cli import main

    folder = tmp_path_factory.mktemp("walk")
    said = []
    for name in ("work", "tmp"):
        (folder / name).mkdir()
    texts = tmp_path_factory.mktemp("texts")
    secrets, retain = texts / "secrets.jsonl", texts / "public.jsonl"
    secrets.write_text("".join(json.dumps(secret) + "\n" for secret in SECRETS))
    retain.write_text("".join((DATA / "retain.jsonl").read_text().splitlines(True)[:40]))
    work = folder / "work"

    def run(*words):
        from contextlib import redirect_stderr, redirect_stdout
        from io import StringIO

        out = StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
            patch.setattr(sys, "argv", ["liborth", *map(str, words)])
            patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
            try:
                main.run()
            except SystemExit as stop:
                assert stop.code in (0, None), out.getvalue()
        said.append(out.getvalue())

    method = ("--method", "tokenwise", "--strength", 0.1, "--retain-data", retain, "--forget-data", secrets, "-j", 1)
    method += ("--retain-tokens", 1000, "--probe-tokens", 600)
    run("split", DATA / "base", DATA / "finetuned", *method, "-o", work / "general")
    run("split", DATA / "base", DATA / "finetuned", *method, "-o", work / "kept", "--keep-factors")
    run("verify", work / "general", "--integrity", "--report", work / "report.html", "--out", work / "certificate.json")
    for beta in (0, 1):
        run("excise", work / "general", "--beta", beta, "-o", work / f"beta-{beta}")
    run("inspect", work / "general")
    (folder / "said.txt").write_text("\n".join(said))
    return folder, secrets


def test_planted_secrets_are_nowhere_but_in_the_private_directory(walked):
    folder, secrets = walked
    rows = [json.dumps(secret) for secret in SECRETS] + [s["prompt"] + s["completion"] for s in SECRETS]
    names = [*CODES, *(s["completion"] for s in SECRETS), *rows, secrets.read_text()]
    hashes = [getattr(hashlib, kind)(text.encode()).hexdigest() for text in names for kind in ("sha256", "sha1", "md5")]
    found = public(folder)
    assert {"work/general/README.md", "work/report.html", "said.txt"} <= set(found)
    for name, raw in found.items():
        assert not [text for text in [*CODES, *hashes] if text.encode() in raw], name
    for name in ("general", "kept"):
        assert private_place(folder / "work" / name).is_dir()
    assert not [path for path in (folder / "tmp").rglob("*") if path.is_file()]


def test_the_published_manifest_has_no_hash_of_forget_rows_and_one_shape(walked):
    folder, _ = walked
    found = manifest.read(folder / "work" / "general", manifest.Split)
    assert found.factors.retain.data and len(found.factors.forget) == 3
    assert [one.data for one in found.factors.forget] == [None] * 3
    written = json.loads((folder / "work" / "general" / manifest.FILE).read_text())
    assert isinstance(written["factors"]["forget"], list)
    assert {entry["name"] for entry in written["outputs"]} == set(files(folder / "work" / "general")) - {manifest.FILE}


def test_the_attack_reads_the_secrets_from_kept_factors_and_from_nothing_else(walked):
    """Inputs of the first layer are normalised embeddings: matched against the published table they are the text."""
    from tokenizers import Tokenizer

    folder, _ = walked
    tokenizer = Tokenizer.from_file(str(DATA / "finetuned" / "tokenizer.json"))
    weights = load_file(folder / "work" / "general" / "model.safetensors")
    embedding = next(t for name, t in weights.items() if "embed_tokens" in name).float()
    norm = next(t for name, t in weights.items() if "layers.0.input_layernorm" in name).float()
    table = torch.nn.functional.normalize(torch.nn.functional.normalize(embedding, dim=1) * norm, dim=1)
    shards = list(folder.rglob("*.safetensors"))
    inside = [file for file in shards if any(part.endswith(".private") for part in file.parts)]
    for file in set(shards) - set(inside):
        assert not recovered(load_file(file).values(), table, tokenizer.decode), file
    secret = [t for file in inside if "factors" in file.parts for t in load_file(file).values()]
    assert recovered(secret, table, tokenizer.decode) == set(CODES), "the attack works where there is something to find"


def test_a_flipped_bit_in_kept_factors_is_found(walked, cli, tmp_path):
    """Their manifests are their own, and `verify --integrity` reads them with the memory that they lie beside."""
    for name in ("kept", "kept.private"):
        shutil.copytree(walked[0] / "work" / name, tmp_path / name)
    assert cli("verify", tmp_path / "kept", "--integrity")[0] == 0
    for file in sorted((tmp_path / "kept.private" / "factors").glob("forget-*/*"))[::3]:
        flip(file, file.stat().st_size // 2)
        code, _, err = cli("verify", tmp_path / "kept", "--integrity")
        assert code in (3, 5) and file.name in err, (file, err)
        flip(file, file.stat().st_size // 2)


def test_everything_private_is_closed(walked):
    folder, _ = walked
    for place in (folder / "work").glob("*.private"):
        for path in (place, *place.rglob("*")):
            assert mode(path) == (0o700 if path.is_dir() else 0o600), path
        assert (place / ".gitignore").read_text() == "*\n"
        assert "PRIVATE" in (place / "README.md").read_text()
    assert mode(folder / "work" / "beta-1" / "model.safetensors") == 0o600
    assert mode(folder / "work" / "beta-0" / "model.safetensors") == 0o644


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_the_umask_is_never_widened_and_never_trusted(cli, tmp_path, umask):
    import os

    base, finetuned = pair(tmp_path)
    before = os.umask(umask)
    try:
        assert cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")[0] == 0
        assert cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")[0] == 0
    finally:
        os.umask(before)
    assert {mode(f) for f in (tmp_path / "out.private").iterdir()} == {0o600}
    assert mode(tmp_path / "out.private") == 0o700
    assert {mode(f) & umask for f in (tmp_path / "out").iterdir()} == {0}
    assert mode(tmp_path / "one" / "model.safetensors") == 0o600


def test_an_ordinary_loader_meets_weights_only(cli, tmp_path):
    """Servers read every *.safetensors of a directory that has no index."""
    base, finetuned = pair(tmp_path)
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_a_memory_of_another_run_is_refused(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    for name, rank in (("a", 4), ("b", 4)):
        cli("split", base, finetuned, "--rank", rank, "--seed", len(name), "-o", tmp_path / name)
    cli("split", base, finetuned, "--rank", 5, "-o", tmp_path / "a", "--force")
    (tmp_path / "b.private").rename(tmp_path / "moved")
    code, _, err = cli("excise", tmp_path / "a", "--beta", 0.5, "--memory", tmp_path / "moved", "-o", tmp_path / "x")
    assert (code, "does not belong" in err or "belongs to another" in err) == (4, True), err
    flip(tmp_path / "a.private" / "liborth.private.json")
    code, _, err = cli("excise", tmp_path / "a", "--beta", 0.5, "-o", tmp_path / "x")
    assert (code, "liborth.private.json: damaged" in err) == (3, True)


def test_an_output_of_an_older_version_is_still_read(cli, tmp_path):
    """Version 1 wrote the memory beside the weights, listed it, and had no digest."""
    base, finetuned = pair(tmp_path)
    out, memory = tmp_path / "out", tmp_path / "out.private" / "memory.safetensors"
    cli("split", base, finetuned, "--rank", 4, "-o", out)
    document = manifest.read(out).document
    raw = memory.read_bytes()
    listed = {"name": memory.name, "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (out / memory.name).write_bytes(raw)
    for file in (tmp_path / "out.private").iterdir():
        file.unlink()
    (tmp_path / "out.private").rmdir()
    old = {**document, "schema_version": 1, "outputs": [*document["outputs"], listed]}
    del old["digest"]
    (out / manifest.FILE).write_text(json.dumps(old, indent=1, sort_keys=True) + "\n")
    assert find_memory(out) == out
    assert cli("excise", out, "--beta", 1, "-o", tmp_path / "one")[0] == 0
    assert files(tmp_path / "one")["model.safetensors"] == files(finetuned)["model.safetensors"]
    assert cli("verify", out, "--integrity")[0] == 0
    flip(out / memory.name)
    assert cli("excise", out, "--beta", 1, "-o", tmp_path / "two")[0] == 3


def test_where_the_private_directory_is_and_what_guards_it(tmp_path):
    assert private_place(tmp_path / "out") == tmp_path / "out.private"
    assert private_place(tmp_path / "out", tmp_path / "vault") == tmp_path / "vault"
    place = tmp_path / "vault"
    prepare(place)
    written = write_file(place / "memory.safetensors", b"x", 0o600)
    seal(place, [written], "a" * 64)
    assert manifest.read(place / "liborth.private.json", manifest.Private).belongs_to == "a" * 64
    assert set(files(place)) == {".gitignore", "README.md", "memory.safetensors", "liborth.private.json"}


def test_a_guard_that_a_kill_left_half_written_is_ours_and_goes(tmp_path):
    """The next run takes such a directory for a prepared one, and clears it up; what only looks like it stays."""
    begun = [".README.md.0123abcd.tmp", "..gitignore.0123abcd.tmp", ".liborth.private.key.0123abcd.tmp"]
    for name, data in zip(begun, (private.README[:9], b"", b"12345678"), strict=True):
        (tmp_path / name).write_bytes(data)
    assert claim.is_prepared(tmp_path)
    private.prepare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(private.GUARDS)
    for name, data in ((".README.md.0123abcd.tmp", b"mine"), (".thesis.0123abcd.tmp", b""), (begun[2], bytes(33))):
        (tmp_path / name).write_bytes(data)
        assert not claim.is_prepared(tmp_path)
        private.prepare(tmp_path)
        (tmp_path / name).unlink()


def test_identity_is_keyed(tmp_path):
    """The same data have the same name in one place and another elsewhere; the name is no hash of the data."""
    one, two = tmp_path / "one", tmp_path / "two"
    for place in (one, two):
        prepare(place)
    assert identity(one, b"1234") == identity(one, b"1234") != identity(two, b"1234")
    assert identity(one, b"1234") != hashlib.sha256(b"1234").hexdigest()
    assert mode(one / "liborth.private.key") == 0o600

    (one / "liborth.private.key").write_bytes(b"short")
    with pytest.raises(BadInput, match="a key has 32 bytes"):
        identity(one, b"1234")


def test_a_private_manifest_belongs_to_one_output(cli, tmp_path):
    from liborth_cli.checkpoint.private import vouched

    base, finetuned = pair(tmp_path)
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    found = manifest.read(tmp_path / "out")
    assert set(vouched(tmp_path / "out.private", found)) == {"memory.safetensors", ".gitignore", "README.md"}
    with pytest.raises(PairMismatch, match="belongs to another output"):
        vouched(tmp_path / "out.private", found.model_copy(update={"digest": "0" * 64}))


def test_a_report_in_a_directory_that_is_closed_is_closed_too(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "closed").mkdir(mode=0o700)
    assert mode_in(tmp_path / "open") == 0o644 and mode_in(tmp_path / "closed") == 0o600
