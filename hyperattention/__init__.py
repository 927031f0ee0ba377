"""HyperAttention for deployment: the operator, its export to ONNX and TensorRT, and its validation."""

from hyperattention.config import Config
from hyperattention.errors import (
    AccuracyFailed,
    BuildFailed,
    EnvironmentFault,
    ExportFailed,
    HyperAttentionError,
    UnsupportedModel,
    UsageError,
)

__version__ = "0.1.0"
__all__ = [
    "AccuracyFailed",
    "BuildFailed",
    "Config",
    "EnvironmentFault",
    "ExportFailed",
    "HyperAttentionError",
    "UnsupportedModel",
    "UsageError",
]
