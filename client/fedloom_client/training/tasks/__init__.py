"""What models are trained to do: how texts and records become examples, the loss, the metrics.

protocol.py        what a task is, also one that a site has installed itself
making.py          the task of a run spec
causal.py          next tokens
losses.py          what tasks share
"""

from fedloom_client.training.tasks.making import new_task
from fedloom_client.training.tasks.protocol import (
    AnyTask,
    BadRecord,
    Example,
    Inputs,
    Measured,
    RecordTask,
    Sums,
    Task,
    TextTask,
)
from fedloom_client.training.tasks.tokenizers import refuse_remote_code

__all__ = [
    "AnyTask", "BadRecord", "Example", "Inputs", "Measured", "RecordTask", "Sums", "Task", "TextTask",
    "new_task", "refuse_remote_code",
]  # fmt: skip
