"""What models are trained to do: how texts and records become examples, the loss, the metrics.

protocol.py        what a task is, also one that a site has installed itself
making.py          the task of a run spec
causal.py masked.py                          on texts
classification.py seq2seq.py instruction.py  on records
base.py losses.py tokenizers.py              what they share
"""

from fedloom_client.training.tasks.base import BaseTask
from fedloom_client.training.tasks.losses import label_metrics, label_sums, mean_cross_entropy, token_sums
from fedloom_client.training.tasks.making import new_task, packing_key
from fedloom_client.training.tasks.protocol import (
    IGNORED,
    AnyTask,
    BadRecord,
    Example,
    Inputs,
    Measured,
    PluginSetting,
    RecordTask,
    Sums,
    Task,
    TextTask,
)
from fedloom_client.training.tasks.tokenizers import refuse_remote_code

__all__ = [
    "IGNORED", "AnyTask", "BadRecord", "BaseTask", "Example", "Inputs", "Measured", "PluginSetting",
    "RecordTask", "Sums", "Task", "TextTask", "label_metrics", "label_sums", "mean_cross_entropy",
    "new_task", "packing_key", "refuse_remote_code", "token_sums",
]  # fmt: skip
