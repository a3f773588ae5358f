"""``python -m benchmarks.zoo``: make the zoo's models."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.zoo.models import ZOO, ensure
from deploy.quickstart.packages import QuickstartError

CACHE = Path(".cache", "zoo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the models that are named, all without a name; one that fails does not stop the others.

    Returns:
        Exit code: 1 when a model could not be made, 2 when there is none of that name.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description="Make real models for benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(ZOO)} (default: all)")
    parser.add_argument("--into", type=Path, default=CACHE, metavar="DIR", help="where they go (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in ZOO]
    if unknown:
        parser.error(f"no model is called {', '.join(unknown)}; there are {', '.join(ZOO)}")
    failed = 0
    for name in dict.fromkeys(options.names or ZOO):
        try:
            ensure(ZOO[name], options.into, lambda text: print(text, flush=True))
        except QuickstartError as exc:
            failed += 1
            print(f"{name}: {exc}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
