"""SCAFFOLD at a site: control variates that correct the drift towards the site's own data."""

from pathlib import Path

import torch

from fedloom_client.training.roundalgorithm import Left, RoundStart, gradient_of
from fedloom_client.training.sharding import read_like
from fedloom_common.controls import CONTROL, control_of, is_control
from fedloom_common.errors import BadTensor, TrainingFailed
from fedloom_common.tensors import Manifest, read_tensor


class ScaffoldRound:
    """Steps along  g − cₖ + c,  and what they tell of the site's mean gradient.

    With plain SGD the mean of the gradients g, weighted by the steps' learning rates η, is
    (x − y)/Ση + cₖ − c,  where x is the round's global model and y the trained one: that is the new cₖ
    (option II, with Ση for Kη as rates may change within a round). So  c + Δcₖ = (x − y)/Ση.

    Source: Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1.
    Memory: c − cₖ, a copy of what is trained; one more at the end, when gradients are gone.
    """

    def __init__(self, start: RoundStart) -> None:
        """Begin a round.

        Raises:
            BadTensor: the global model has no control variates.
            TrainingFailed: the site's own are damaged, or not of this model.
        """
        self._start = start
        self._corrections = {
            name: tensor.float() for name, tensor in _read(start, start.global_model, CONTROL).items()
        }
        if (own := start.controls.present) is None:
            return
        try:
            for name, tensor in _read(start, own, "").items():
                self._corrections[name] -= tensor
        except BadTensor as error:
            raise TrainingFailed(
                f"the site's control variates {own} cannot be used ({error}): delete the file to begin anew"
            ) from error

    def add_to_objective(self) -> None:
        """Nothing."""

    @torch.no_grad()
    def correct(self) -> None:
        """Add c − cₖ, after clipping: only so is the mean of the gradients that were followed told apart."""
        for name, correction in self._corrections.items():
            gradient_of(self._start.trained[name]).add_(correction)

    @torch.no_grad()
    def end(self) -> Left:
        """c + Δcₖ for the update, and the new cₖ for the site; called once."""
        whole = _others(self._start)
        for name, began in _read(self._start, self._start.global_model, "").items():
            told = (began.float() - self._start.trained[name].float()) / self._start.rate_sum
            whole[control_of(name)] = told
            self._corrections[name].neg_().add_(told)
        return Left(in_update=whole, at_site=self._corrections)


def _read(start: RoundStart, file: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of what is trained, or those of that prefix that belong to them, where they are trained."""
    manifest = Manifest.read(file)
    places = {info.name: info for info in manifest.tensors}
    tensors = {}
    with file.open("rb", buffering=0) as opened:
        for name, parameter in start.trained.items():
            info = places.get(prefix + name)
            if info is None or info.shape != tuple(parameter.shape):
                raise BadTensor(f"{file.name} has no tensor {prefix + name} of shape {list(parameter.shape)}")
            tensors[name] = read_like(opened.fileno(), info, parameter)
    return tensors


def _others(start: RoundStart) -> dict[str, torch.Tensor]:
    """The server's control variates of what is not trained, as they came."""
    with start.global_model.open("rb", buffering=0) as opened:
        return {
            info.name: read_tensor(opened.fileno(), info)
            for info in Manifest.read(start.global_model).tensors
            if is_control(info.name) and info.name.removeprefix(CONTROL) not in start.trained
        }
