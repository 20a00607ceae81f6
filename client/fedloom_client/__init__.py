"""The daemon at a data-holding site, and the training process it starts."""

import os

# Without it gRPC's C core writes a line for each failed connect; it is read once, when grpc is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
