"""The ServerApp: FedAvg over all nodes, without evaluation."""

from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from nullmodel import NullCase

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of a case and check what came of them."""
    case = NullCase()
    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=case.sites,
        min_available_nodes=case.sites,
    )

    def end_round(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower calls this before the first round and after each."""
        case.mark(number)

    initial = ArrayRecord({name: Array(values) for name, values in case.initial()})
    result = strategy.start(grid, initial, num_rounds=case.rounds, evaluate_fn=end_round)
    case.check((name, array.numpy()) for name, array in result.arrays.items())
