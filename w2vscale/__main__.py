"""The entry point of the `w2vscale` command and of `python -m w2vscale`."""

import os
import sys

from w2vscale import interrupts


def main() -> None:
    """Run the command line. Ctrl-C is one line from the first import on."""
    interrupts.handle()
    if sys.stdout is None:  # closed by whoever started this process
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the whole process
    try:
        from w2vscale.cli.app import main as run

        run()
    except BaseException:
        if interrupts.asked():
            try:
                sys.stdout.flush()
            finally:
                interrupts.leave()
        raise
    finally:
        interrupts.end()


if __name__ == "__main__":
    main()
