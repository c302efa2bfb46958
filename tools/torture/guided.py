"""Fuzz one parser guided by coverage, with atheris (not a dependency: pip install atheris).

    python -m tools.torture.guided "manifests" --seconds 60 --work /tmp/liborth-guided

The parsers and the sound documents to begin with are those of tools/torture/fuzz.py. It ends with exit 0 when everything was
read or refused in one line, and with a traceback and the document otherwise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Parse the arguments and fuzz until the time is over."""
    import atheris  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

    parsing = ["liborth_cli.checkpoint", "liborth_cli.manifest"]
    with atheris.instrument_imports(include=parsing):  # pyright: ignore[reportAttributeAccessIssue]
        from liborth_cli import manifest  # noqa: F401
        from liborth_cli.checkpoint import claim, delta, reader, transaction  # noqa: F401
    from liborth_cli.errors import LiborthError
    from tools.torture import fuzz
    from tools.torture.jobs import make_inputs

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parser")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--work", type=Path, default=Path("/tmp/liborth-guided"))
    asked = parser.parse_args()
    if not (asked.work / "in").exists():
        make_inputs(asked.work / "in", True)
    parse, corpus = {}, asked.work / "corpus" / asked.parser.replace(" ", "-")
    for name, sound, function in fuzz.parsers(asked.work):
        parse[name] = function
        if name == asked.parser:
            corpus.mkdir(parents=True, exist_ok=True)
            for number, document in enumerate(sound):
                (corpus / str(number)).write_bytes(document)
    file = asked.work / "document.safetensors"

    def one(data: bytes) -> None:
        file.write_bytes(data)
        try:
            parse[asked.parser](file)
        except LiborthError as error:
            assert len(str(error)) < 400 and "\n" not in str(error), str(error)
        except KeyboardInterrupt:
            pass

    atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={asked.seconds}", "-max_len=8192", "-verbosity=0",
                   "-print_final_stats=1"], one)  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    main()
