"""The gRPC edge: protobuf comes no further in than here, and no rule of a run stands here."""
