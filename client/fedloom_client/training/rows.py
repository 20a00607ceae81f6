"""Records as examples, one for one: what tasks with labels, targets or answers train on."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from fedloom_client.training.examples import ExamplesWriter, Field, Packed
from fedloom_client.training.records import Records, Row
from fedloom_client.training.tasks import BadRecord, Example, RecordTask
from fedloom_common.errors import TrainingFailed

TOLD_EVERY = 100  # records between two looks at whether a stop is wanted


def pack_rows(
    records: Records, task: RecordTask, folder: Path, on_progress: Callable[[int, int], None]
) -> Packed:
    """Write examples to ``train`` and ``held_out`` of a folder.

    Raises:
        TrainingFailed: a file cannot be read, or a record is unfit for the task.
    """
    if records.source.format == "text":
        raise TrainingFailed(
            f"{task.needs}, and the data set's format is text, which is one document a file: make it jsonl, "
            "parquet or dataset"
        )
    fields = [Field(name, "int32", None) for name in task.padding]
    shortened = left_out = 0
    with ExitStack() as stack:
        writers = {
            held_out: stack.enter_context(ExamplesWriter(folder / part, fields))
            for held_out, part in ((False, "train"), (True, "held_out"))
        }
        for row in records.rows(task.fields):
            example = _example(task, row, records)
            if example is None:
                left_out += 1
            else:
                writers[row.held_out].add(example.values)
                shortened += example.is_shortened
            if row.number % TOLD_EVERY == 0:
                on_progress(row.number, records.total)
        for writer in writers.values():
            writer.sync()
    kept = sum(writer.number for writer in writers.values())
    if not kept:
        there = "none of them leaves anything to learn from" if left_out else "there are none"
        raise TrainingFailed(
            f"the records of {records.describe()} make no example: {there}; correct the data set's files, or "
            "raise the task's number of tokens"
        )
    largest = {field.name: max(w.largest[field.name] for w in writers.values()) for field in fields}
    return Packed(fields=fields, largest=largest, records=kept + left_out, shortened=shortened + left_out)


def _example(task: RecordTask, row: Row, records: Records) -> Example | None:
    try:
        return task.example(row.values)
    except BadRecord as error:
        raise TrainingFailed(f"record {row.number} of {records.describe()}: {error}") from error
