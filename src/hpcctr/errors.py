"""Every way hpcctr can fail, as one tree.

A class owns its ``slug`` (stable, greppable, in ``docs/errors.md``) and its exit status; an instance carries the
message (what, why) and a hint (a command or a file to edit). The same class is raised on either side of the engine's
socket: the session sends slug, message and hint, the client looks the class up with :func:`of_slug` and raises it
again.

Exit statuses before the command has become the process: 125 hpcctr failed, 126 refused or not executable, 127 not
found.

This module imports nothing but os: it is part of every launch.
"""

from __future__ import annotations

import os

FAILED = 125
REFUSED = 126
NOT_FOUND = 127


class HpcctrError(Exception):
    """Something hpcctr can name."""

    slug = "failed"
    exit_status = FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def for_stderr(self) -> str:
        """The text a user sees, with the newline: ``hpcctr: error[slug]: message`` and, when there is one, the hint."""
        text = f"hpcctr: error[{self.slug}]: {self.message}\n"
        return text + (f"hint: {self.hint}\n" if self.hint else "")

    def tell(self) -> None:
        """Write that to descriptor 2. One that is closed or full of trouble changes nothing about the exit status."""
        try:
            os.write(2, os.fsencode(self.for_stderr()))
        except OSError:
            return


class UsageWrong(HpcctrError):
    """The command line asks for something that does not exist or contradicts itself."""

    slug = "usage"


class ProtocolBroken(HpcctrError):
    """The other side of the socket sent something that is not a message of ours."""

    slug = "protocol"


class DeadlinePassed(HpcctrError):
    """Something outside did not answer in the time it had."""

    slug = "deadline"


# engine and caller


class EngineUnreachable(HpcctrError):
    """No engine listens on the socket."""

    slug = "no-engine"


class EngineBusy(HpcctrError):
    """The engine's limit of sessions is reached."""

    slug = "engine-busy"


class CallerRefused(HpcctrError):
    """The process that asks cannot be served: who or where it is does not allow it."""

    slug = "caller-refused"
    exit_status = REFUSED


class NoNewPrivileges(CallerRefused):
    """The caller has no_new_privs set, so enter would get no capability."""

    slug = "no-new-privs"


class CallerTraced(CallerRefused):
    """A debugger traces the caller; the kernel gives a traced program no file capabilities."""

    slug = "traced"


class ProcessOutOfReach(HpcctrError):
    """The process to go to is not a program of the caller's own in a container of this node."""

    slug = "not-your-program"
    exit_status = REFUSED


class ProgramsSurvive(HpcctrError):
    """Programs of a job did not end, or nobody could say whether they did."""

    slug = "job-survives"


class CapabilitiesMissing(HpcctrError):
    """The engine was started without a capability it needs."""

    slug = "capabilities"


class EnterUnusable(HpcctrError):
    """The installed enter is missing, or has not the owner, mode or capabilities it needs."""

    slug = "enter-unusable"


class EnterNotBuilt(HpcctrError):
    """The program enter cannot be compiled on this machine."""

    slug = "enter-build"


class InsideContainer(HpcctrError):
    """hpcctr was started by a program that already is in a container of hpcctr."""

    slug = "inside-container"
    exit_status = REFUSED


class SlurmTaskWrong(HpcctrError):
    """Slurm's oci.conf started a task in a way that does not tell what to run."""

    slug = "slurm-task"


class LauncherInside(HpcctrError):
    """The command is an MPI launcher that would look for the scheduler's commands in the image."""

    slug = "launcher-inside"
    exit_status = REFUSED


class LauncherUnusable(HpcctrError):
    """The command hpcctr cannot be made to start through front, or front cannot start Python."""

    slug = "launcher"


class LaunchPlanWrong(HpcctrError):
    """enter was started with arguments that are not a launch plan."""

    slug = "plan"


class ViewUnsafe(HpcctrError):
    """enter could not make, or not confirm, the view it has to make before the command may start."""

    slug = "view"


class CommandNotExecutable(HpcctrError):
    """The command exists in the image, but the kernel does not run it for this user."""

    slug = "not-executable"
    exit_status = REFUSED


class CommandNotFound(HpcctrError):
    """No file of the image is the command."""

    slug = "command-not-found"
    exit_status = NOT_FOUND


class PolicyDenied(HpcctrError):
    """A rule of the site denies the launch."""

    slug = "policy-denied"
    exit_status = REFUSED


class PolicyUnusable(PolicyDenied):
    """A policy or site file is wrong, unreadable or not root's: everything is denied."""

    slug = "policy-unusable"


class SiteFileWrong(HpcctrError):
    """The site file cannot be used."""

    slug = "site-file"


# images and the store


class ReferenceWrong(HpcctrError):
    """An image name that cannot be parsed."""

    slug = "image-name"


class ImageNotInStore(HpcctrError):
    """The store has no image of that name."""

    slug = "image-not-in-store"


class ImageGone(ImageNotInStore):
    """What a name meant when the job started is no longer in the store."""

    slug = "image-gone"


class ImageNotYours(HpcctrError):
    """An image that another user shares is its owner's to change, share and remove."""

    slug = "not-your-image"
    exit_status = REFUSED


class NameTaken(HpcctrError):
    """A name of the site's means another image already."""

    slug = "name-taken"
    exit_status = REFUSED


class LockFileWrong(HpcctrError):
    """A lock file cannot be read or written, or is none."""

    slug = "lock-file"


class ImageNotLocked(HpcctrError):
    """A lock file has no digest for the image."""

    slug = "not-locked"


class PullRefused(HpcctrError):
    """The site does not let users fetch images, or not here."""

    slug = "pull-refused"
    exit_status = REFUSED


class NotAnImage(HpcctrError):
    """What the name leads to is not an OCI or Docker image."""

    slug = "not-an-image"


class ImageBroken(HpcctrError):
    """An image's bytes are not what its digests and formats promise."""

    slug = "image-broken"


class ImageDamaged(ImageBroken):
    """The file of a stored image is not what was published."""

    slug = "image-damaged"


class PlatformMissing(HpcctrError):
    """The image does not exist for the wanted platform."""

    slug = "platform"


class RegistryFailed(HpcctrError):
    """A registry refused or could not be reached."""

    slug = "registry"


class RegistryWantsLogin(RegistryFailed):
    """A registry gives an image to nobody without credentials, or does not say whether it has it."""

    slug = "registry-login"


class StoreUnusable(HpcctrError):
    """The store is missing, not readable, not writable, full, or writable by people it must not be."""

    slug = "store"


class ConversionFailed(HpcctrError):
    """The image file could not be written."""

    slug = "conversion"


# containerd and the node container


class ContainerdUnavailable(HpcctrError):
    """containerd does not answer on its socket."""

    slug = "no-containerd"


class ContainerdFailed(HpcctrError):
    """containerd or the OCI runtime refused a call."""

    slug = "containerd"


class ContainerNotFound(ContainerdFailed):
    """containerd has no such container or task."""

    slug = "container-not-found"


class ContainerExists(ContainerdFailed):
    """containerd has a container of that name already."""

    slug = "container-exists"


class ImageMountFailed(HpcctrError):
    """The kernel would not mount the image file."""

    slug = "image-mount"


class TargetImpossible(HpcctrError):
    """A mount target cannot be made in the image."""

    slug = "mount-target"
    exit_status = REFUSED


class SourceMissing(HpcctrError):
    """A directory or file to carry in cannot be opened by the caller."""

    slug = "mount-source"


class WorkingDirectoryMissing(HpcctrError):
    """The working directory does not exist, or not inside."""

    slug = "cwd"


class FeatureUnknown(HpcctrError):
    """The node has no such device or host feature."""

    slug = "feature"


class FeatureUnusable(HpcctrError):
    """A device or host feature of the node cannot be given as its files say: a path is gone, a file is wrong, or the
    caller may not open the device.
    """

    slug = "feature-unusable"


class LibrariesUnfit(HpcctrError):
    """Libraries of the node would not load in this image."""

    slug = "libraries-unfit"
    exit_status = REFUSED


class MpiUnfit(HpcctrError):
    """MPI of the image, of the node and of the launcher do not go together."""

    slug = "mpi-unfit"
    exit_status = REFUSED


class NoCommand(HpcctrError):
    """Neither the command line nor the image says what to run."""

    slug = "no-command"


def _classes(base: type[HpcctrError]) -> list[type[HpcctrError]]:
    found = [base]
    for sub in base.__subclasses__():
        found += _classes(sub)
    return found


def of_slug(slug: str) -> type[HpcctrError]:
    """The class that owns a slug; :class:`HpcctrError` itself for one this version does not know."""
    for cls in _classes(HpcctrError):
        if cls.slug == slug:
            return cls
    return HpcctrError
