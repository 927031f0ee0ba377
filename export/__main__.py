"""`python -m hyperattention.export`."""

from hyperattention.export.cli import main

if __name__ == "__main__":
    main()
