"""An output folder in, numbers, a verdict and a report out."""

if __name__ != "hyperattention.validate":
    raise ImportError("import hyperattention.validate, not validate")

__all__: list[str] = []
