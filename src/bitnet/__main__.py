"""`python -m bitnet` is the command `bitnet`."""

from bitnet.cli import main

if __name__ == "__main__":
    main()
