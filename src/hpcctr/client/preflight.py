"""What is looked at before the caller goes in: launches that could only fail later, and worse.

Part of every launch: two look-ups in small tables and one name in the root directory; more only for launches that ask
for something of the node's.
"""

from __future__ import annotations

import os
import sys

from hpcctr.errors import InsideContainer, LauncherInside, MpiUnfit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hpcctr.client.environment import Variable
    from hpcctr.client.probe import Device
    from hpcctr.client.run import Wishes
    from hpcctr.wire import Frame

#: The file that every node container has in its root directory, and no host (``spec/process.py``).
ANCHOR = b"/.hpcctr-anchor"
#: Set to anything but nothing or 0: start a launcher inside an allocation all the same.
ALLOW_VARIABLE = b"HPCCTR_ALLOW_NESTED_MPI"

#: MPI launchers by the first part of their file name: ``mpirun.openmpi``, ``mpiexec.hydra``.
LAUNCHERS = (b"mpirun", b"mpiexec", b"orterun", b"prterun")
#: File names of Open MPI's, which on one node needs nothing of the scheduler; Hydra's also go by the plain ones.
OPEN_MPI_LAUNCHERS = (b"mpirun.openmpi", b"mpiexec.openmpi", b"orterun", b"prterun")
#: Variables of Slurm's with the number of nodes.
_NODE_COUNTS = (b"SLURM_JOB_NUM_NODES", b"SLURM_NNODES")
#: Schedulers under which launchers start processes by a command of the scheduler's, Hydra also on its own node.
#: The variable that tells of an allocation, the scheduler, the command.
SCHEDULERS = (
    (b"SLURM_JOB_ID", "Slurm", "srun"),
    (b"LSB_JOBID", "LSF", "blaunch"),
    (b"PE_HOSTFILE", "Grid Engine", "qrsh"),
)
#: Variables with the rank of a process in its job: PMI, PMIx, Slurm.
RANKS = (b"PMI_RANK", b"PMIX_RANK", b"SLURM_PROCID")
#: Variables and options by which one says how a launcher starts processes: Open MPI 4, Open MPI 5 (PRRTE), Hydra.
CHOICES = (
    b"OMPI_MCA_plm", b"PRTE_MCA_plm", b"HYDRA_LAUNCHER", b"HYDRA_BOOTSTRAP", b"I_MPI_HYDRA_BOOTSTRAP",
)  # fmt: skip
#: Values of theirs that mean the scheduler's command. Slurm sets Hydra's to `slurm` in every allocation (24.11).
_NO_CHOICES = (b"", b"slurm", b"lsf", b"sge")
CHOOSING_WORDS = (b"plm", b"-launcher", b"--launcher", b"-bootstrap", b"--bootstrap")


def require_outside() -> None:
    """Raise :class:`InsideContainer` in a program that hpcctr started: it has no_new_privs, and enter could not do
    its work.
    """
    if os.path.lexists(ANCHOR):
        raise InsideContainer(
            "hpcctr was started inside a container of hpcctr, where nothing can gain the right to enter another: "
            "no_new_privs is set, and the engine's socket is not here",
            hint="start both from outside, side by side; for an MPI launcher inside, see docs/mpi.md",
        )


def require_launcher_outside(command: Sequence[bytes], variables: Mapping[bytes, Variable], *, image: str) -> None:
    """Raise :class:`LauncherInside` when ``command`` is an MPI launcher that will ask for a command of the scheduler's,
    which is the host's. Who has said how processes are to be started, or that it is meant so, knows.

    ``variables`` are the command's own.
    """
    name = command[0].rpartition(b"/")[2]
    if name.partition(b".")[0] not in LAUNCHERS:
        return
    if name in OPEN_MPI_LAUNCHERS and any(
        count in variables and variables[count].value == b"1" for count in _NODE_COUNTS
    ):
        return
    found = next((entry for entry in SCHEDULERS if entry[0] in variables), None)
    if found is None or any(choice in variables and variables[choice].value not in _NO_CHOICES for choice in CHOICES):
        return
    if any(word in CHOOSING_WORDS for word in command[1:]) or _is_on(variables.get(ALLOW_VARIABLE)):
        return
    shown = os.fsdecode(name)
    raise LauncherInside(
        f"{shown} would run inside {image}, in an allocation of {found[1]} ({os.fsdecode(found[0])} is set), and start "
        f"processes by {found[2]}, which is the host's",
        hint=f"put it outside: {shown} … hpcctr run {image} -- PROGRAM, or srun hpcctr run …; on one node: "
        "hpcctr run -e OMPI_MCA_plm=^slurm -e PRTE_MCA_plm=^slurm -e HYDRA_LAUNCHER=fork IMAGE -- "
        f"{shown} …; to go on as it is: -e {os.fsdecode(ALLOW_VARIABLE)}=1 (docs/mpi.md)",
    )


def settle_devices(
    granted: Frame, wishes: Wishes, variables: dict[bytes, Variable], warnings: list[str]
) -> Sequence[Device]:
    """The devices of a launch, tried; variables for the GPUs that were chosen and warnings are added.

    Raises :class:`FeatureUnusable` for what was asked for by name and cannot be opened.
    """
    if not (granted.every("device") or granted.every("need")):
        return ()
    from hpcctr.client import probe
    from hpcctr.client.environment import Variable

    devices = probe.devices_of(granted)
    gpus = probe.gpus_of(granted, devices)
    probe.require_usable(devices, gpus, gpu=wishes.gpu, asked=wishes.devices)
    for name, value in probe.visible(gpus, wishes.gpu).items():
        if name not in variables or variables[name].origin != "-e":
            variables[name] = Variable(value, "--gpu")
    warnings += probe.lacking(granted)
    return devices


def require_wireup(granted: Frame, mpi: str, variables: Mapping[bytes, Variable], warnings: list[str]) -> None:
    """Look whether the launcher that started this process speaks what the MPI inside understands.

    Who said whose MPI it is to be has said that the command is an MPI program: raises :class:`MpiUnfit`. For others
    a warning is added, since it may be any program.
    """
    told = granted.text("mpi", "")
    if not told:
        return
    from hpcctr.client import wireup

    family, version, pmi, pmix, product = told.split("\t")
    found = wireup.problem(variables, family, version, tuple(filter(None, pmi.split(","))), pmix, product=product)
    if found is None:
        return
    text, hint = found
    if mpi in ("container", "host"):
        raise MpiUnfit(text, hint=hint)
    warnings.append(f"{text}: {hint}")


def warn(warnings: Sequence[str], variables: Mapping[bytes, Variable]) -> None:
    """Tell the warnings of a launch on stderr: of a job's ranks, the first does."""
    # With stderr closed, 2 may be the connection to the engine.
    if not warnings or sys.stderr is None or _is_further_rank(variables):
        return
    from hpcctr.client.carry import shown

    for text in warnings:
        # A closed or full stderr is the user's choice.
        try:
            os.write(2, b"hpcctr: warning: %s\n" % os.fsencode(shown(os.fsencode(text))))
        except OSError:
            return


def _is_further_rank(variables: Mapping[bytes, Variable]) -> bool:
    ranks = (variables[name].value for name in RANKS if name in variables)
    return any(rank != b"0" for rank in ranks)


def _is_on(variable: Variable | None) -> bool:
    return variable is not None and variable.value not in (b"", b"0")
