"""Runs the command line as `python -m fastops`."""

from fastops.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
