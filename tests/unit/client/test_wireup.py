"""What launchers put into the environment, as seen of real ones, against what MPI libraries speak."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hpcctr.client.environment import Variable
from hpcctr.client.wireup import problem

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
LAUNCHERS = {
    "nobody": {},
    "hydra": {"PMI_FD": "6", "PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"},
    "hydra port": {"PMI_PORT": "n1:4711", "PMI_ID": "0", "PMI_SIZE": "2"},
    "mpirun 4": {
        "PMIX_NAMESPACE": "207683585",
        "PMIX_RANK": "0",
        "PMIX_VERSION": "4.2.2rc2",
        "OMPI_MCA_orte_local_daemon_uri": "207683584.0;tcp://192.0.2.2:60473",
    },
    "mpirun 5": {
        "PMIX_NAMESPACE": "prterun-n1-24720@1",
        "PMIX_RANK": "0",
        "PMIX_VERSION": "5.0.7a1",
        "PRTE_LAUNCHED": "1",
    },
    "mpirun 5 told": {
        "PMIX_NAMESPACE": "prterun-n1-24720@1",
        "PMIX_RANK": "0",
        "PRTE_LAUNCHED": "1",
        "OMPI_MCA_orte_local_daemon_uri": "0.0;tcp://127.0.0.1:1",
    },
    "srun pmi2": {
        **STEP,
        "SLURM_MPI_TYPE": "pmi2",
        "PMI_FD": "11",
        "PMI_JOBID": "1.0",
        "PMI_RANK": "0",
        "PMI_SIZE": "4",
    },
    "srun pmix": {**STEP, "SLURM_MPI_TYPE": "pmix", "PMIX_NAMESPACE": "slurm.pmix.2.0", "PMIX_RANK": "0"},
    "srun none": STEP,
    "mpirun 4 in an allocation": {**STEP, "PMIX_NAMESPACE": "207683585", "PMIX_RANK": "0"},
    "one task": {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
    "batch script": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    "shell of salloc": {**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
    "cray": {**STEP, "SLURM_MPI_TYPE": "cray_shasta", "PMI_CONTROL_PORT": "20222"},
}
MPIS = {
    "openmpi 4": ("openmpi", "4.1.4", ("pmix",)),
    "openmpi 4 of slurm": ("openmpi", "4.1.4", ("pmi2", "pmix")),
    "openmpi 5": ("openmpi", "5.0.7", ("pmix",)),
    "mpich": ("mpich", "4.2.1", ("pmi1", "pmi2")),
    "mpich of unknown pmi": ("mpich", "4.2.1", ()),
    "mpich with pmix": ("mpich", "4.2.1", ("pmi1", "pmix")),
    "mpich only pmix": ("mpich", "4.2.1", ("pmix",)),
    "abi": ("mpi-abi", "5.0.2", ("pmi1", "pmi2")),
    "unknown": ("unknown", "", ()),
}
#: What goes wrong, and a piece of the remedy; all else goes together, or is not known.
WRONG = {
    ("hydra", "openmpi 4"): "mpirun of Open MPI",
    ("hydra", "openmpi 4 of slurm"): "mpirun of Open MPI",
    ("hydra", "openmpi 5"): "mpirun of Open MPI",
    ("hydra", "mpich only pmix"): "srun --mpi=pmix",
    ("hydra port", "openmpi 4"): "mpirun of Open MPI",
    ("hydra port", "openmpi 4 of slurm"): "mpirun of Open MPI",
    ("hydra port", "openmpi 5"): "mpirun of Open MPI",
    ("hydra port", "mpich only pmix"): "srun --mpi=pmix",
    ("mpirun 4", "mpich"): "mpiexec of MPICH",
    ("mpirun 4", "abi"): "mpiexec of MPICH",
    ("mpirun 5", "openmpi 4"): "OMPI_MCA_orte_local_daemon_uri",
    ("mpirun 5", "openmpi 4 of slurm"): "OMPI_MCA_orte_local_daemon_uri",
    ("mpirun 5", "mpich"): "mpiexec of MPICH",
    ("mpirun 5", "abi"): "mpiexec of MPICH",
    ("mpirun 5 told", "mpich"): "mpiexec of MPICH",
    ("mpirun 5 told", "abi"): "mpiexec of MPICH",
    ("srun pmi2", "openmpi 4"): "srun --mpi=pmix",
    ("srun pmi2", "openmpi 5"): "srun --mpi=pmix",
    ("srun pmi2", "mpich only pmix"): "srun --mpi=pmix",
    ("srun pmix", "mpich"): "srun --mpi=pmi2",
    ("srun pmix", "abi"): "srun --mpi=pmi2",
    ("srun none", "openmpi 4"): "srun --mpi=pmix",
    ("srun none", "openmpi 4 of slurm"): "srun --mpi=pmix",
    ("srun none", "openmpi 5"): "srun --mpi=pmix",
    ("srun none", "mpich"): "srun --mpi=pmi2",
    ("srun none", "mpich of unknown pmi"): "srun --mpi=pmi2",
    ("srun none", "mpich with pmix"): "srun --mpi=pmi2",
    ("srun none", "mpich only pmix"): "srun --mpi=pmix",
    ("srun none", "abi"): "srun --mpi=pmi2",
    ("mpirun 4 in an allocation", "mpich"): "mpiexec of MPICH",
    ("mpirun 4 in an allocation", "abi"): "mpiexec of MPICH",
}


def _variables(launcher: str) -> dict[bytes, Variable]:
    return {name.encode(): Variable(value.encode(), "caller") for name, value in LAUNCHERS[launcher].items()}


@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_launcher_and_mpi_go_together_or_the_remedy_is_named(launcher: str, mpi: str) -> None:
    family, version, pmi = MPIS[mpi]
    found = problem(_variables(launcher), family, version, pmi, "")
    wanted = WRONG.get((launcher, mpi))
    assert (found is None) == (wanted is None), found
    if found is not None and wanted is not None:
        text, hint = found
        assert wanted in hint
        assert version in text and text[0].islower() or text.startswith(("Open MPI", "MPICH"))
        assert not text.endswith(".")


def test_the_text_names_the_product_and_the_version_of_pmix() -> None:
    found = problem(_variables("srun pmix"), "mpich", "2021.16", ("pmi1",), "", product="Intel MPI")
    assert found is not None
    assert found[0].startswith("srun --mpi=pmix speaks PMIx, and Intel MPI 2021.16 only PMI (pmi1)")
    found = problem(_variables("hydra"), "openmpi", "5.0.7", ("pmix",), "5.0.7")
    assert found is not None and "only PMIx 5.0.7" in found[0]


@pytest.mark.parametrize("value", ["", "many", "-1", "9" * 40, "\udcff"])
def test_a_number_that_is_none_counts_as_not_there(value: str) -> None:
    text = value.encode(errors="surrogateescape")
    variables = {b"SLURM_STEP_ID": Variable(b"0", "caller"), b"SLURM_STEP_NUM_TASKS": Variable(text, "caller")}
    assert problem(variables, "mpich", "4.0", ("pmi1",), "") is None


def test_it_costs_no_import() -> None:
    """It is part of launches."""
    show = (
        "import sys, hpcctr.client, __future__; before = set(sys.modules)\n"
        "import hpcctr.client.wireup; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hpcctr.client.wireup"]
