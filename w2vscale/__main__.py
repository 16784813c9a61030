"""The entry point of the `w2vscale` command and of `python -m w2vscale`."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C is obeyed without a traceback from the first import on."""
    try:
        from w2vscale.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
