"""The daemon at a data-holding site, and the training process it starts."""
