"""The graph-optimization stage: an ONNX model in, a proven artifact out."""

import server  # noqa: F401  (turns onnxruntime's telemetry off before any module here imports it)
