"""The server's controller: FLARE's own FedAvg with the benchmark's model, which is not written to disk."""

from nullmodel import NullCase
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.fedavg import FedAvg


class NullFedAvg(FedAvg):
    """Loads the initial model and marks the ends of rounds; the rest is FLARE's."""

    def load_model(self) -> FLModel:
        """The initial model; the first round begins right after."""
        self._case = NullCase()
        model = FLModel(params=dict(self._case.initial()))
        self._case.mark(0)
        return model

    def save_model(self, model: FLModel) -> None:
        """FLARE calls this at the end of each round."""
        done = self.current_round + 1
        self._case.mark(done)
        if done == self._case.rounds:
            self._case.check(model.params.items())
