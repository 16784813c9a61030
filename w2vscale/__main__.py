"""`python -m w2vscale`: the same as the `w2vscale` command."""

from w2vscale.cli.app import main

main()
