"""A PyTorch model in, an output folder with ONNX, engine and libraries out."""

if __name__ != "hyperattention.export":
    raise ImportError("import hyperattention.export, not export")

__all__: list[str] = []
