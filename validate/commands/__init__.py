"""The commands of `hyperattention`, one module each with a function `command`; validate/cli.py registers them."""
