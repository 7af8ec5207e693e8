"""Whether the launcher that started a process speaks what the container's MPI library understands.

A library that finds no launcher it knows takes its process for a job of one, or ends in MPI_Init; neither says what to
do. Which launcher it was is in the environment. Every combination in docs/mpi.md was run; of others nothing is said.

Part of launches: standard library only, a few look-ups.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hpcctr.client.environment import Variable

#: Steps that Slurm has for itself (slurm.h): the shell of salloc, a batch script, and more that is no srun of a user's.
_OWN_STEPS_FROM = 0xFFFFFFF0
_NAMES = {"mpich": "MPICH", "openmpi": "Open MPI", "mpi-abi": "MPI"}
#: Slurm's plug-ins of which nothing was run.
_OTHER_PLUGINS = (b"cray_shasta", b"openmpi")


def problem(
    variables: Mapping[bytes, Variable],
    family: str,
    version: str,
    pmi: Sequence[str],
    pmix: str,
    *,
    product: str = "",
) -> tuple[str, str] | None:
    """What does not go together, and a remedy; None where nothing is known to be wrong.

    ``variables`` are the command's. ``family``, ``version``, ``pmi`` and ``product`` are of the MPI that its programs
    load (:class:`hpcctr.image.record.MpiLibrary`), ``pmix`` is the version of the image's PMIx.
    """
    if family not in _NAMES:
        return None
    name = " ".join(word for word in (product or _NAMES[family], version) if word)
    if b"PMIX_NAMESPACE" in variables or b"PMIX_RANK" in variables:
        return _under_pmix(variables, family, version, pmi, name)
    if b"PMI_FD" in variables or (b"PMI_PORT" in variables and b"PMI_ID" in variables):
        return _under_pmi(variables, family, pmi, name, pmix)
    if _tasks(variables) > 1 and _value(variables, b"SLURM_MPI_TYPE") not in _OTHER_PLUGINS:
        word = _srun(family, pmi)
        return (
            f"srun gave its {_tasks(variables)} tasks no PMI (--mpi=none), and {name} takes each of them for a job of "
            "one" + (", or ends in MPI_Init" if family == "openmpi" else ""),
            f"srun --mpi={word} … (srun --mpi=list; MpiDefault={word} in slurm.conf)",
        )
    return None


def _under_pmix(
    variables: Mapping[bytes, Variable], family: str, version: str, pmi: Sequence[str], name: str
) -> tuple[str, str] | None:
    launcher = "srun --mpi=pmix" if _is_step(variables) else "mpirun"
    if family == "openmpi" or "pmix" in pmi:
        is_prrte = b"PRTE_LAUNCHED" in variables and launcher == "mpirun"
        if (
            family == "openmpi"
            and is_prrte
            and _major(version) in (3, 4)
            and b"OMPI_MCA_orte_local_daemon_uri" not in variables
        ):
            return (
                f"{name} takes each process of a newer Open MPI's mpirun for a job of one",
                'mpirun -x OMPI_MCA_orte_local_daemon_uri="0.0;tcp://127.0.0.1:1" … (docs/mpi.md)',
            )
        return None
    if not pmi:
        return None
    remedy = f"srun --mpi={_srun(family, pmi)}" if launcher != "mpirun" else "mpiexec of MPICH (mpiexec.hydra)"
    return (
        f"{launcher} speaks PMIx, and {name} only PMI ({_words(pmi)}): it takes each process for a job of "
        "one, or ends in MPI_Init",
        f"{remedy} …",
    )


def _under_pmi(
    variables: Mapping[bytes, Variable], family: str, pmi: Sequence[str], name: str, pmix: str
) -> tuple[str, str] | None:
    # Slurm's plug-in tells the job's name in a variable, Hydra over the wire.
    is_srun = b"PMI_JOBID" in variables
    launcher = "srun --mpi=pmi2" if is_srun else "mpiexec of MPICH (Hydra)"
    if family == "mpich" or (is_srun and ("pmi1" in pmi or "pmi2" in pmi)):
        if pmi and "pmi1" not in pmi and "pmi2" not in pmi:
            return f"{launcher} speaks PMI, and {name} only {_words(pmi)}", "srun --mpi=pmix …"
        return None
    if family != "openmpi":
        return None
    spoken = f"PMIx {pmix}" if pmix else "PMIx"
    return (
        f"{launcher} speaks PMI, and {name} only {spoken}: it takes each process for a job of one, or ends in MPI_Init",
        "srun --mpi=pmix …" if is_srun else "mpirun of Open MPI …",
    )


def _srun(family: str, pmi: Sequence[str]) -> str:
    """What srun --mpi= takes for an MPI."""
    if family == "openmpi" or (pmi and "pmi1" not in pmi and "pmi2" not in pmi):
        return "pmix"
    return "pmi2"


def _is_step(variables: Mapping[bytes, Variable]) -> bool:
    """A task of srun's; mpirun's own daemons are such tasks too, and what they start names another job to PMIx."""
    return _value(variables, b"PMIX_NAMESPACE").startswith(b"slurm.pmix.")


def _tasks(variables: Mapping[bytes, Variable]) -> int:
    """How many tasks the step of srun's has that this is one of; 0 outside of any."""
    step = _number(_value(variables, b"SLURM_STEP_ID"))
    if step is None or step >= _OWN_STEPS_FROM:
        return 0
    return _number(_value(variables, b"SLURM_STEP_NUM_TASKS")) or _number(_value(variables, b"SLURM_NTASKS")) or 0


def _value(variables: Mapping[bytes, Variable], name: bytes) -> bytes:
    return variables[name].value if name in variables else b""


def _number(text: bytes) -> int | None:
    return int(text) if text.isdigit() and len(text) < 12 else None


def _major(version: str) -> int | None:
    return _number(version.partition(".")[0].encode())


def _words(words: Sequence[str]) -> str:
    return " and ".join(words)
