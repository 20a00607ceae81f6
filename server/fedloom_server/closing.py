"""What is done once a run has made its last model, before the run ends."""

from fedloom_server.batches import evaluations, terms_of_evaluation
from fedloom_server.evaluation import combine, metrics_of
from fedloom_server.federation import Federation
from fedloom_server.measuring import tell_round
from fedloom_server.records import AssignmentState, Run


async def measure_last(run: Run, federation: Federation) -> bool:
    """Have the run's last model measured for itself, as no training will; whether that told anything new.

    Raises:
        TooFewSites: nobody is connected who could.
    """
    evaluation = run.spec.evaluation
    if evaluation.when != "before_training" or not evaluation.every_rounds:
        return False
    record = federation.store.round(run.id, run.rounds_done)
    if record is None:  # no model was made, and the initial one is not to be measured
        return False
    batch = await evaluations(run, record, federation)
    await federation.assignments.carry_out(run, batch, terms_of_evaluation(run, record, federation))
    done = [metrics_of(assignment) for assignment in batch if assignment.state is AssignmentState.DONE]
    metrics = combine(done) if done else {}
    is_news = not metrics.keys() <= record.metrics.keys()
    if is_news:
        record.metrics = record.metrics | metrics
        federation.store.save(record)
        tell_round(run, record, federation)
    return is_news
