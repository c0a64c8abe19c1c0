"""`python -m milepost`: the command line, where its script is not on the path."""

from milepost.cli.main import main

if __name__ == "__main__":
    main()
