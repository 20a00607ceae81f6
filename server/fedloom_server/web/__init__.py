"""The coordinator's HTTP port: health and metrics. It reads what others hold, and decides nothing."""
