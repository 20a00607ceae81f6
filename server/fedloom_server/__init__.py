"""The coordinator. Start reading at ``rounds``."""
