"""`python -m hyperattention.validate`."""

from hyperattention.validate.cli import main

if __name__ == "__main__":
    main()
