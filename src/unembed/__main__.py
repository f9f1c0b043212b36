"""`python -m unembed`."""

from unembed.cli.main import main

main()
