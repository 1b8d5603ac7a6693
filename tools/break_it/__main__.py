"""Break what a device reads, and see what edge-dtm says.

    python tools/break_it table --out docs/faults.md     # known faults, by the real command line
    python tools/break_it fuzz --inputs 100000           # many files damaged at random
    python tools/break_it replay findings/manifest.json-123.bin

The exit status is 1 when something is not as it should be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The tool also runs from a checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from break_it import faults, fuzz
from edge_dtm.core.errors import EdgeDtmError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="break_it", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="try known faults, print a table")
    table.add_argument("--flips", type=int, default=200, help="flipped bytes [%(default)s]")
    table.add_argument("--cuts", type=int, default=50, help="truncations [%(default)s]")
    table.add_argument("--out", type=Path, help="also write the page, such as docs/faults.md")
    many = commands.add_parser("fuzz", help="read many files damaged at random")
    many.add_argument("--inputs", type=int, default=100_000, help="in all [%(default)s]")
    many.add_argument("--seed", type=int, default=0)
    many.add_argument("--out", type=Path, default=Path("findings"), help="[%(default)s]")
    again = commands.add_parser("replay", help="read again what an earlier fuzz wrote")
    again.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "table":
            return faults.run(options.flips, options.cuts, options.out)
        if options.command == "fuzz":
            return fuzz.run_all(options.inputs, options.seed, options.out)
        return fuzz.replay(options.file)
    except (EdgeDtmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
