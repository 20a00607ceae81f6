"""The training process: torchrun's launcher, its ranks and their loop. No network code enters here."""
