"""Manifests and certificates signed by OpenSSH, and what a signature does not let through."""

import shutil
import subprocess

import pytest
from tiny import flip, pair, reseal

from liborth_cli.checkpoint import signing
from liborth_cli.errors import UsageError, VerificationFailed

needs_openssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two keys, and a list on which only the first one stands."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "mallory"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    kind, key, _ = (folder / "alice.pub").read_text().split()
    (folder / "signers").write_text(f'alice@example.org namespaces="liborth" {kind} {key}\n')
    return folder


@needs_openssh
def test_a_signed_split_says_whose_word_it_is(cli, keys, tmp_path):
    base, finetuned = pair(tmp_path)
    out, signers = tmp_path / "out", ("--signers", keys / "signers")
    split = ("split", base, finetuned, "--rank", 4, "-q")
    assert cli(*split, "-o", out, "--sign", keys / "alice")[0] == 0
    code, said, _ = cli("verify", out, "--integrity", *signers)
    assert code == 0 and "signed by alice@example.org, and the files are what it says" in said, said
    assert cli("excise", out, "--beta", 0, "-o", tmp_path / "clean", "--sign", keys / "alice", "-q")[0] == 0
    assert cli("verify", tmp_path / "clean", "--integrity", *signers)[0] == 0
    assert cli(*split, "-o", out, "--force", "--sign", keys / "mallory")[0] == 0, "an old signature is ours to replace"
    code, _, err = cli("verify", out, "--integrity", *signers)
    assert code == 5 and "by nobody on the list" in err, err
    assert cli(*split, "-o", out, "--force")[0] == 0
    code, _, err = cli("verify", out, "--integrity", *signers)
    assert code == 5 and "is not signed" in err, err


@needs_openssh
def test_a_manifest_that_was_written_anew_is_not_what_was_signed(cli, keys, tmp_path):
    base, finetuned = pair(tmp_path)
    assert cli("split", base, finetuned, "--rank", 4, "-q", "-o", tmp_path / "out", "--sign", keys / "alice")[0] == 0
    reseal(tmp_path / "out", lambda document: document["parameters"].update(alpha=0.5))
    code, _, err = cli("verify", tmp_path / "out", "--integrity", "--signers", keys / "signers")
    assert code == 5 and "is not what alice@example.org signed" in err, err


@needs_openssh
def test_a_certificate_can_be_checked_without_liborth(cli, keys, tmp_path):
    base, finetuned = pair(tmp_path)
    assert cli("split", base, finetuned, "--rank", 4, "-q", "-o", tmp_path / "out")[0] == 0
    file = tmp_path / "certificate.json"
    assert cli("verify", tmp_path / "out", "--integrity", "--out", file, "--sign", keys / "alice")[0] == 0
    words = ["ssh-keygen", "-Y", "verify", "-f", keys / "signers", "-I", "alice@example.org", "-n", "liborth"]
    words += ["-s", f"{file}.sig"]
    assert subprocess.run(words, input=file.read_bytes(), capture_output=True).returncode == 0
    assert signing.signer_of(file, keys / "signers") == "alice@example.org"
    flip(file, 5)
    with pytest.raises(VerificationFailed, match="is not what"):
        signing.signer_of(file, keys / "signers")
    code, _, err = cli("verify", tmp_path / "out", "--integrity", "--sign", keys / "alice")
    assert code == 2 and "give that, too" in err, err
    code, _, err = cli("verify", tmp_path / "out", "--integrity", "--out", tmp_path / "c.json", "--sign", keys / "none")
    assert code == 2 and "no such key file" in err and not (tmp_path / "c.json").exists(), err


@needs_openssh
def test_a_file_that_is_no_key_is_found_before_the_work(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    (tmp_path / "key").write_text("no key")
    (tmp_path / "key").chmod(0o600)
    code, _, err = cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out", "--sign", tmp_path / "key")
    assert code == 2 and "cannot sign with it" in err and not (tmp_path / "out").exists(), err


def test_without_openssh_it_is_one_line(cli, tmp_path, monkeypatch):
    base, finetuned = pair(tmp_path)
    (tmp_path / "key").write_text("")
    monkeypatch.setattr(signing.shutil, "which", lambda name: None)
    code, _, err = cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out", "--sign", tmp_path / "key")
    assert code == 2 and "--sign: ssh-keygen is not installed" in err and err.count("\n") == 1, err
    with pytest.raises(UsageError, match="not installed"):
        signing.sign(b"", tmp_path / "key")
