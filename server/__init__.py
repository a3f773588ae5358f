"""The runtime: reads artifacts, serves them over HTTP. Never imports the optimizer or ONNX graph libraries.

Since 1.29 the onnxruntime wheels upload usage events unless told not to, and they read the switch when they are first
imported. Importing this package therefore turns that off before any module can import onnxruntime; a user who wants
the upload sets ``ORT_DISABLE_TELEMETRY=0`` in the environment.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
