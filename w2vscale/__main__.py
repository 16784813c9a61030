"""The entry point of the `w2vscale` command and of `python -m w2vscale`."""

import sys

from w2vscale import interrupts


def main() -> None:
    """Run the command line. Ctrl-C is one line from the first import on."""
    interrupts.handle()
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
