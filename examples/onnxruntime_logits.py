"""Runs an output folder of export-model in ONNX Runtime: python examples/onnxruntime_logits.py OUT TEXT [LENGTH].

Needs onnxruntime and numpy alone: OUT holds the model and the library that runs its HyperAttention nodes. Prints the loss
on the first LENGTH bytes of TEXT, for a model that reads bytes.
"""

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime


def open_session(out: Path) -> onnxruntime.InferenceSession:
    """A session on the processor. Without the library the file still runs, by exact attention in n x n memory."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(out.resolve() / "libhyperattention_ort.so"))
    return onnxruntime.InferenceSession(out / "model.onnx", options, providers=["CPUExecutionProvider"])


def loss(logits: np.ndarray, ids: np.ndarray) -> float:
    """Mean nats a byte of predicting ids [S] from logits [S, vocabulary] of the byte before."""
    largest = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
    return float((log_sum[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]).mean())


def main() -> None:
    out, text = Path(sys.argv[1]), Path(sys.argv[2])
    length = int(sys.argv[3]) if len(sys.argv) > 3 else 8192
    ids = np.frombuffer(text.read_bytes()[:length], np.uint8).astype(np.int64)
    session = open_session(out)
    start = time.perf_counter()
    # lengths: how many tokens of each row are real; rows are padded on the right.
    (logits,) = session.run(["logits"], {"input_ids": ids[None], "lengths": np.array([len(ids)], np.int32)})
    seconds = time.perf_counter() - start
    print(f"{len(ids)} bytes in {seconds:.2f} s: {loss(logits[0], ids):.4f} nats a byte")


if __name__ == "__main__":
    main()
