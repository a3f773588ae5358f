"""Other servers, as a user who knows them would set them up. Each module is run in the environment of its server.

Modules that run there import nothing of this project but ``benchmarks.serving.peers.setup``.
"""
