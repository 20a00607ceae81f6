"""One round of H = 1 beside one step of torch's own DDP, which knows nothing of fedloom.

    python -m learning.ddp RANK WORLD FOLDER      (started by ``difference_from_ddp``)

Each rank loads the initial model with transformers, takes one site's first batch, and steps with
torch.optim.SGD on gradients that DistributedDataParallel has averaged.
"""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from fedloom_client.training.data import PackedData
from fedloom_common.tensors import read_tensors, write_tensors
from learning.arms import OWN, Arm, Rates, Setting, run_spec
from learning.federation import Federation

RATE = 1.0  # large, so that the step is far larger than the gate's 1e-6
TIMEOUT_S = 300
STEPPED = "ddp.safetensors"


async def difference_from_ddp(federation: Federation, setting: Setting, folder: Path) -> tuple[float, float]:
    """Largest difference of a weight between both, and the largest that the step changed."""
    arm = Arm(name="exact", told="", local_steps=1, inner="sgd")
    spec = run_spec(replace(setting, steps=1), arm, Rates(local=RATE), seed=1)
    content = spec.model_dump(mode="json")
    content["local"] |= {"clip_norm": None, "schedule": {"kind": "constant"}}
    spec = type(spec).model_validate(content)
    run = await federation.train(spec)
    initial = federation.initial(spec)
    folder.mkdir()
    (folder / "initial").symlink_to(initial)
    for site in range(setting.sites):
        packed = next((initial.parents[1] / f"site-{site + 1}/packed" / OWN).glob("*/facts.json")).parent
        data = PackedData.open(packed).train
        sampler: DistributedSampler[int] = DistributedSampler(
            range(len(data)),
            num_replicas=1,
            rank=0,
            seed=spec.seed,
            drop_last=True,  # type: ignore[arg-type]
        )
        first = np.array(list(sampler)[: spec.local.batch_examples])
        np.save(folder / f"batch-{site}.npy", data.take(first, {})["input_ids"].astype(np.int64))
    await asyncio.to_thread(_step_with_torch, folder, setting.sites)
    before = dict(read_tensors(initial / "model.safetensors"))
    ours, theirs = (dict(read_tensors(path)) for path in (federation.model(run), folder / STEPPED))
    difference = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    return difference, max(float((ours[name] - before[name]).abs().max()) for name in ours)


def _step_with_torch(folder: Path, world: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "learning.ddp", str(rank), str(world), str(folder)],
            env=environment | {"PYTHONPATH": os.pathsep.join((environment["PYTHONPATH"], *sys.path))},
        )
        for rank in range(world)
    ]
    failed = [rank for rank, process in enumerate(ranks) if process.wait(TIMEOUT_S)]
    if failed:
        raise SystemExit(f"ranks {failed} of the DDP step failed: see above")


def step(rank: int, world: int, folder: Path) -> None:
    """One rank's part of the step; rank 0 saves the weights."""
    from transformers import AutoModelForCausalLM

    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "initial", dtype=torch.float32)
    parallel = DistributedDataParallel(model.train())
    optimizer = torch.optim.SGD(parallel.parameters(), RATE)
    batch = torch.from_numpy(np.load(folder / f"batch-{rank}.npy"))
    parallel(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    if rank == 0:
        write_tensors(folder / STEPPED, {name: value.detach() for name, value in model.named_parameters()})
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    step(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
