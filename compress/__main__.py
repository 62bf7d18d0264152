"""`python -m compress` is the program `compress`."""

from compress.cli import main

main()
