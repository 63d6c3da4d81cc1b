"""`python -m aptq` is the command `aptq`."""

from aptq.cli import main

main()
