"""The door of the `affekt` command; `python -m affekt` is the same."""

import sys


def main() -> int:
    """Run the command line and return its exit code. `--version` works before any dependency is installed."""
    if sys.argv[1:] == ["--version"]:
        from affekt import __version__

        print(f"affekt {__version__}")
        return 0
    from affekt.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
