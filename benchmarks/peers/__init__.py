"""What users do today: other tools that quantize an ONNX model for a CPU, each run in a process of its own.

A peer is a module that is run with two arguments, ``REQUEST.json`` and ``ANSWER.json``. It reads the first, writes the
second, and says on the last line of stderr why it cannot. Its own environment has other packages than ours, so modules
that run there import nothing of this project but ``benchmarks.peers.protocol``.
"""
