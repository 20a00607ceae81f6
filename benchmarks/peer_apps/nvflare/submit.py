"""Submits the null-training job as FLARE's operators do, and stays until it has ended.

Usage: submit.py ADMIN-KIT JOBS-FOLDER
"""

import sys
import time
from pathlib import Path

from null_server import NullFedAvg
from nullmodel import NullCase
from nvflare.client.config import ExchangeFormat
from nvflare.fuel.flare_api.flare_api import new_secure_session
from nvflare.fuel.utils.constants import FrameworkType
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner

OPERATOR = "admin@nvidia.com"
CONNECT_S = 120.0
POLL_S = 0.1  # with FLARE's own 0.5 s at the server and 2 s at the sites a small round would be all waiting


def main() -> None:
    """Submit one job."""
    kit, jobs = sys.argv[1:]
    session = new_secure_session(OPERATOR, kit, timeout=CONNECT_S)
    case = NullCase()
    await_clients(session, case.sites)
    job = FedJob(name="null-training", min_clients=case.sites)
    job.to_server(
        NullFedAvg(num_clients=case.sites, num_rounds=case.rounds, persistor_id="", task_check_period=POLL_S)
    )
    job.to_server({"server": {"task_request_interval": POLL_S}})
    script = Path(__file__).with_name("null_client.py")
    runner = ScriptRunner(
        script=str(script), framework=FrameworkType.NUMPY, server_expected_format=ExchangeFormat.NUMPY
    )
    job.to_clients(runner)
    job.export_job(jobs)
    job_id = session.submit_job(str(Path(jobs) / "null-training"))
    print(f"submitted {job_id}", flush=True)
    print(session.monitor_job(job_id), session.get_job_meta(job_id).get("status"), flush=True)


def await_clients(session, sites: int) -> None:
    """Return when all sites are connected."""
    while len(session.get_system_info().client_info) < sites:
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
