"""The operator's commands: they talk to the coordinator over gRPC, and import nothing that runs in it."""
