"""Server optimizers against torch.optim and against the paper's recursion, over several rounds of files."""

import numpy as np
import pytest
import torch
from peaks import peak_bytes, zeros
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from fedloom_common.errors import BadTensor
from fedloom_common.runspec import Aggregation, RunSpec
from fedloom_common.tensors import Manifest
from fedloom_server.aggregation import pieces
from fedloom_server.optimizers import learning_rate, optimizer_for
from fedloom_server.serverstep import Step, take_step

ROUNDS = 6
SHAPES = {"w": (300, 7), "scalar": (), "empty": (0, 3)}
RATE = 0.37


def drawn(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def optimizer_of(spec):
    return optimizer_for(Aggregation(server_optimizer=spec).server_optimizer)


class Rounds:
    """Steps on files, each with the state that the one before left."""

    def __init__(self, folder, spec, model, rate=RATE):
        self.folder, self.optimizer, self.rate = folder, optimizer_of(spec), rate
        self.number, self.state, self.model = 0, None, folder / "model-0"
        save_file(model, self.model, {"format": "pt", "origin": "here"})

    def play(self, change):
        """One round whose updates come to the model less ``change``: the gradient; gives the next model."""
        self.number += 1
        base = load_file(self.model)
        centre, out, state = (self.folder / f"{kind}-{self.number}" for kind in ("centre", "model", "state"))
        save_file({n: t - change[n].to(t.dtype) if n in change else t for n, t in base.items()}, centre)
        step = Step(
            optimizer=self.optimizer, rate=self.rate, base=self.model, centre=centre, state=self.state
        )
        take_step(step, out, state)
        self.model, self.state = out, state
        return load_file(out)


def torch_sgd(**more):
    return lambda parameters: torch.optim.SGD(parameters, RATE, **more)


def torch_adam(beta1, beta2, tau):
    """torch's Adam with its bias correction taken back, so that it is the paper's with v begun at 0.

    torch steps by  η/(1−β₁ᵗ) m / (√v/√(1−β₂ᵗ) + ε):  with η (1−β₁ᵗ)/√(1−β₂ᵗ) and ε = τ/√(1−β₂ᵗ)  that is
    η m / (√v + τ).
    """

    class Uncorrected(torch.optim.Adam):
        steps = 0

        def step(self):
            self.steps += 1
            root = (1 - beta2**self.steps) ** 0.5
            for group in self.param_groups:
                group["lr"], group["eps"] = RATE * (1 - beta1**self.steps) / root, tau / root
            super().step()

    return lambda parameters: Uncorrected(parameters, RATE, betas=(beta1, beta2))


TORCH = {
    "fedavg": ({"name": "fedavg", "lr": RATE}, torch_sgd()),
    "fedavgm": ({"name": "fedavgm", "momentum": 0.9}, torch_sgd(momentum=0.9)),
    "diloco": ({"name": "diloco", "momentum": 0.8}, torch_sgd(momentum=0.8, nesterov=True)),
    "fedadam": (
        {"name": "fedadam", "betas": (0.8, 0.95), "tau": 0.01, "initial_v": 0.0},
        torch_adam(0.8, 0.95, 0.01),
    ),
    "fedadam-corrected": (
        {"name": "fedadam", "betas": (0.8, 0.95), "tau": 0.01, "initial_v": 0.0, "bias_correction": True},
        lambda parameters: torch.optim.Adam(parameters, RATE, betas=(0.8, 0.95), eps=0.01),
    ),
    "fedadagrad": (
        {"name": "fedadagrad", "tau": 0.01},
        lambda parameters: torch.optim.Adagrad(parameters, RATE, eps=0.01, initial_accumulator_value=1e-4),
    ),
}


@pytest.mark.parametrize(("spec", "make"), TORCH.values(), ids=TORCH)
def test_rounds_are_steps_of_torchs_optimizer_on_what_the_updates_changed(tmp_path, spec, make):
    rounds = Rounds(tmp_path, spec, drawn(0))
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in drawn(0).items()}
    optimizer = make(list(parameters.values()))
    for number in range(1, ROUNDS + 1):
        change = drawn(number)
        for name, parameter in parameters.items():
            parameter.grad = change[name].clone()
        optimizer.step()
        came = rounds.play(change)
        for name, parameter in parameters.items():  # the state is fp32, all else float64
            np.testing.assert_allclose(came[name], parameter.detach(), rtol=1e-6, atol=1e-6)


def paper(name, gradients, beta1, beta2, tau):
    """Algorithm 2 of arXiv:2003.00295, with Δ = −g and x₀ = 0, in numpy."""
    x, m, v = 0.0, 0.0, tau**2
    for gradient in gradients:
        delta = -gradient
        m = beta1 * m + (1 - beta1) * delta
        if name == "fedadagrad":
            v = v + delta**2
        elif name == "fedyogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + RATE * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_rounds_are_the_papers_recursion(tmp_path, name):
    betas = {"beta": 0.7} if name == "fedadagrad" else {"betas": (0.7, 0.9)}
    zero = {"w": torch.zeros(50, dtype=torch.float64)}
    rounds = Rounds(tmp_path, {"name": name, "tau": 0.05, **betas}, zero)
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=50) * scale for scale in (1, 0.01, 0.01, 5, 0.1, 0)]
    for gradient in gradients:
        came = rounds.play({"w": torch.from_numpy(gradient)})
    np.testing.assert_allclose(came["w"], paper(name, gradients, 0.7, 0.9, 0.05), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "start", "centre"),
    [(torch.float16, 60_000.0, 64_000.0), (torch.bfloat16, 3e38, 3.3e38), (torch.float32, 3e38, 3.3e38)],
)
def test_a_step_past_the_range_of_the_models_type_is_refused(tmp_path, dtype, start, centre):
    rounds = Rounds(
        tmp_path, {"name": "fedavg", "lr": 2.0}, {"w": torch.tensor([start], dtype=dtype)}, rate=2.0
    )
    with pytest.raises(BadTensor, match="the next model's tensor w is not finite in "):
        rounds.play({"w": torch.tensor([start - centre], dtype=dtype)})


def test_bias_correction_is_refused_where_the_moments_do_not_begin_with_zero():
    with pytest.raises(ValidationError, match="give initial_v: 0 too"):
        optimizer_of({"name": "fedadam", "bias_correction": True})


def test_a_small_case_by_hand(tmp_path):
    rounds = Rounds(tmp_path, {"name": "diloco", "momentum": 0.5}, {"w": torch.tensor([10.0])}, rate=0.1)
    assert rounds.play({"w": torch.tensor([2.0])})["w"].item() == pytest.approx(9.7)  # v 2, step .1 (2 + 1)
    assert rounds.play({"w": torch.tensor([4.0])})["w"].item() == pytest.approx(9.05)  # v 5, .1 (4 + 2.5)
    assert load_file(rounds.state)["momentum/w"].tolist() == [5.0]


def test_the_mean_itself_is_the_next_model_where_no_step_is_asked_for():
    assert optimizer_of("fedavg") is None
    for spec in (
        {"name": "fedavg", "lr": 0.5},
        {"name": "fedavg", "schedule": {"kind": "cosine"}},
        "fedavgm",
    ):
        assert optimizer_of(spec) is not None


def test_what_is_no_weight_is_taken_from_the_mean(tmp_path):
    model = {
        "w": torch.ones(3), "control/w": torch.zeros(3), "steps": torch.tensor([4]),
    }  # fmt: skip
    rounds = Rounds(tmp_path, "diloco", model)
    came = rounds.play({"w": torch.ones(3), "control/w": torch.full((3,), 2.0)})
    assert came["control/w"].tolist() == [-2.0] * 3
    assert came["steps"].tolist() == [4]
    assert set(load_file(rounds.state)) == {"momentum/w"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_next_model_has_the_types_of_the_present_one_and_the_state_is_fp32(tmp_path, dtype):
    rounds = Rounds(tmp_path, "fedadam", drawn(0, dtype))
    came = rounds.play(drawn(1, dtype))
    assert {name: tensor.shape for name, tensor in came.items()} == {
        n: torch.Size(s) for n, s in SHAPES.items()
    }
    assert {tensor.dtype for tensor in came.values()} == {dtype}
    state = load_file(rounds.state)
    assert set(state) == {f"{slot}/{name}" for slot in "mv" for name in SHAPES}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_the_bytes_do_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "ALONE_BYTES", 0)
    monkeypatch.setattr(pieces, "TURN_PIECES", 1)
    made = []
    for cores in (1, 4):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        folder = tmp_path / str(cores)
        folder.mkdir()
        rounds = Rounds(folder, "fedyogi", {"w": torch.linspace(-1, 1, 700_000)})
        for number in range(2):
            rounds.play({"w": torch.linspace(number, 1, 700_000)})
        made.append((rounds.model.read_bytes(), rounds.state.read_bytes()))
    assert made[0] == made[1]


def test_a_state_beyond_the_range_of_fp32_leaves_what_was_there(tmp_path):
    rounds = Rounds(tmp_path, "fedadam", {"w": torch.zeros(3)})
    (tmp_path / "model-1").write_bytes(b"before")
    with pytest.raises(BadTensor, match="fedadam's v of tensor w leaves the range of fp32"):
        rounds.play({"w": torch.full((3,), 1e30)})
    assert (tmp_path / "model-1").read_bytes() == b"before"
    assert not (tmp_path / "state-1").exists()


def test_memory_does_not_grow_with_the_model(tmp_path):
    assert _peak_bytes(tmp_path, 48 << 20) - _peak_bytes(tmp_path, 1 << 20) < 24 << 20  # of 48, 48 and 96


def _peak_bytes(folder, tensor_bytes):
    """Peak memory of a process that makes two steps of FedAdam on a model of one tensor."""
    code = """
from fedloom_common.runspec import FedAdam
from fedloom_server.optimizers import optimizer_for
from fedloom_server.serverstep import Step, take_step
state = None
for number in range(2):
    step = Step(optimizer=optimizer_for(FedAdam()), rate=0.1, base=path, centre=path, state=state)
    state = path.with_name(f"state-{number}")
    take_step(step, path.with_name("out"), state)
"""
    return peak_bytes(code, zeros(folder, tensor_bytes))


def spec_of(optimizer, local="adamw"):
    return RunSpec.model_validate(
        {
            "name": "tiny", "model": {"config": {"model_type": "gpt2"}}, "data": "text", "rounds": 10,
            "local": {"steps": 1, "optimizer": {"name": local}},
            "aggregation": {"server_optimizer": optimizer},
        }
    )  # fmt: skip


def test_the_rate_follows_the_rounds():
    cosine = {
        "name": "diloco",
        "lr": 2.0,
        "schedule": {"kind": "cosine", "warmup_rounds": 2, "final_ratio": 0.0},
    }
    spec = spec_of(cosine)
    rates = [learning_rate(spec, number) for number in range(1, 11)]
    wanted = [2 / 3, 4 / 3] + [1 + np.cos(np.pi * done / 8) for done in range(8)]
    np.testing.assert_allclose(rates, wanted)
    assert {learning_rate(spec_of("diloco"), number) for number in range(1, 11)} == {0.7}


@pytest.mark.parametrize(("local", "rate"), [("sgd", 1e-2), ("adamw", 1e-3)])
def test_an_adaptive_rate_fits_what_sites_train_with(local, rate):
    assert learning_rate(spec_of("fedyogi", local=local), 1) == rate
    assert learning_rate(spec_of({"name": "fedyogi", "lr": 0.5}, local=local), 1) == 0.5


def test_a_state_of_a_release_that_counted_no_steps_is_gone_on_with(tmp_path):
    rounds = Rounds(tmp_path, "diloco", {"w": torch.tensor([10.0])})
    rounds.play({"w": torch.tensor([2.0])})
    save_file(load_file(rounds.state), rounds.state, {"fedloom.optimizer": "diloco"})
    rounds.play({"w": torch.tensor([2.0])})
    assert Manifest.read(rounds.state).metadata["fedloom.steps"] == "1"
