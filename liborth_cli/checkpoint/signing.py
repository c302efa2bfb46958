"""Signatures by a tool that people have: `ssh-keygen -Y sign`, over the bytes of a manifest or a certificate.

A manifest's own digest finds damage; a signature says whose word it is. It is a file NAME.sig beside NAME, in the format of
OpenSSH (PROTOCOL.sshsig) with the namespace "liborth", so that anybody can check it without liborth:

    ssh-keygen -Y verify -f allowed_signers -I WHO -n liborth -s NAME.sig < NAME
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from liborth_cli.checkpoint.documents import read_small
from liborth_cli.errors import UsageError, VerificationFailed

NAMESPACE, SUFFIX, TOOL = "liborth", ".sig", "ssh-keygen"
MAX_BYTES = 1 << 16
"""A signature by the longest RSA key has a few kilobytes."""


def check_key(key: Path | None) -> None:
    """Sign nothing in particular with a key, so that one that does not work is found before the work and not after it.

    Raises:
        UsageError: when there is no ssh-keygen, no such key, or it cannot sign.
    """
    if key is not None:
        sign(b"", key)


def sign(data: bytes, key: Path) -> bytes:
    """Return the signature of some bytes.

    Args:
        data: what is signed.
        key: a private key of OpenSSH, or a public one whose private half an agent holds.

    Raises:
        UsageError: when there is no ssh-keygen, no such key, or it cannot sign.
    """
    if not key.is_file():
        raise UsageError(f"--sign {key}: no such key file; make one with `ssh-keygen -t ed25519 -f {key}`")
    done = _call(["-Y", "sign", "-q", "-f", str(key), "-n", NAMESPACE], data, "--sign")
    if done.returncode or not done.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----"):
        raise UsageError(f"--sign {key}: {TOOL} cannot sign with it ({_last_line(done)})")
    return done.stdout


def signer_of(file: Path, signers: Path) -> str:
    """Return who signed a file, by a list of those whose word counts.

    Args:
        file: what was signed; the signature lies beside it.
        signers: an allowed_signers file of OpenSSH: a name and a public key on each line.

    Raises:
        UsageError: when there is no ssh-keygen or no such list.
        BadInput: when the file cannot be read.
        VerificationFailed: when there is no signature, it is of something else, or by nobody on the list.
    """
    if not signers.is_file():
        raise UsageError(f"--signers {signers}: no such file; it has a line 'NAME ssh-ed25519 KEY' for each signer")
    signature = file.with_name(file.name + SUFFIX)
    if not signature.is_file():
        raise VerificationFailed(f"{file}: is not signed (no {signature.name} beside it)")
    read_small(signature, MAX_BYTES)
    found = _call(["-Y", "find-principals", "-f", str(signers), "-s", str(signature)], b"", "--signers")
    names = found.stdout.decode("utf-8", "replace").splitlines()
    if found.returncode or not names:
        raise VerificationFailed(f"{signature}: is by nobody on the list {signers} ({_last_line(found)})")
    data, words = read_small(file), ["-n", NAMESPACE, "-s", str(signature), "-f", str(signers)]
    done = _call(["-Y", "verify", *words, "-I", names[0]], data, "--signers")
    if done.returncode:
        raise VerificationFailed(f"{file}: is not what {names[0]} signed, or was not signed for liborth ({_last_line(done)})")
    return names[0]


def _call(words: list[str], data: bytes, option: str) -> subprocess.CompletedProcess[bytes]:
    tool = shutil.which(TOOL)
    if tool is None:
        raise UsageError(f"{option}: {TOOL} is not installed, which makes and checks signatures; it comes with OpenSSH")
    try:
        return subprocess.run([tool, *words], input=data, capture_output=True, check=False)  # noqa: S603  no shell
    except OSError as error:
        raise UsageError(f"{option}: {TOOL} does not run ({error.strerror})") from None


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:80] if lines else f"exit code {done.returncode}"
