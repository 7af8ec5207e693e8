"""Hooks of CDI files: NVIDIA's own are done as edits, others run only where the site names their program.

A hook runs as root, in a mount namespace whose root an image fills. What NVIDIA's do (nvidia-container-toolkit,
cmd/nvidia-cdi-hook) is links, a list of directories and a small file, so it is said in edits and nothing is run.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from hpcctr.errors import FeatureUnusable
from hpcctr.host.cdi_written import Hook
from hpcctr.host.edits import DeviceEdit, FileEdit, HookEdit, LinkEdit
from hpcctr.host.trusted import require_only_roots
from hpcctr.request import target_problem

#: Where runtimes run hooks in the host's own view (engine/README.md).
_STAGES = ("prestart", "createRuntime")
_PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
_PROFILE = "/etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf"
_GPU_NODE = re.compile(r"/dev/nvidia[0-9]+")
#: The first driver of each major version of CUDA (CUDA toolkit release notes, "CUDA toolkit and driver versions").
_FIRST_DRIVER = {11: 450, 12: 525, 13: 580}


@dataclass(kw_only=True)
class Done:
    """What hooks came to, in the order in which they are written."""

    links: list[LinkEdit] = field(default_factory=list)
    library_folders: list[str] = field(default_factory=list)
    hooks: list[HookEdit] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: Origin of the hook that asks for NVIDIA's application profile; empty: none does.
    profile_origin: str = ""


class Hooks:
    """Turns hooks of one launch into edits."""

    def __init__(self, *, allowed: Collection[str], image_env: Iterable[str], root_owned: bool) -> None:
        self._allowed = allowed
        self._cuda = next((entry[13:] for entry in image_env if entry.startswith("CUDA_VERSION=")), "")
        self._root_owned = root_owned
        self.done = Done()

    def add(self, hook: Hook, *, file: str, device: str, origin: str) -> None:
        """One more hook. Raises :class:`FeatureUnusable`."""
        command, words = _nvidias(hook)
        known: dict[str, Callable[[str, dict[str, list[str]], str], None]] = {
            "create-symlinks": self._links,
            "update-ldcache": self._folders,
            "enable-cuda-compat": self._compat,
            "update-application-profile": self._profile,
            # /dev and /proc inside are the caller's own, who can make no device nodes, nor change root's modes.
            "disable-device-node-modification": _nothing,
            "chmod": _nothing,
            "noop": _nothing,
        }
        if command not in known:
            self._run(hook, file=file, device=device, origin=origin)
            return
        known[command](file, _options(command, words, file), origin)

    def files(self, devices: Iterable[DeviceEdit]) -> tuple[FileEdit, ...]:
        """Files that hooks generate from the devices of the launch."""
        minors = {edit.minor for edit in devices if edit.kind == "c" and _GPU_NODE.fullmatch(edit.path)}
        mask = sum(1 << minor for minor in minors if 0 <= minor < 64)
        if not self.done.profile_origin or not mask:
            return ()
        # Form and key are the driver's (README of the driver, "Application profiles"): EGL shows these GPUs.
        content = (
            f'{{"profiles": [{{"name": "hpcctr", "settings": ["EGLVisibleDGPUDevices", {mask:#x}]}}],'
            ' "rules": [{"pattern": [], "profile": "hpcctr"}]}\n'
        )
        return (FileEdit(path=_PROFILE, content=content.encode(), origin=self.done.profile_origin),)

    def _links(self, file: str, options: dict[str, list[str]], origin: str) -> None:
        for word in options.get("link", []):
            target, _, path = word.partition("::")
            path = _below_root(path)
            if not target or word.count("::") != 1 or target_problem(os.fsencode(path)):
                raise FeatureUnusable(
                    f"{file}: hook create-symlinks: {word[:200]!r} is no link that can be made", hint=f"edit {file}"
                )
            self.done.links.append(LinkEdit(path=path, target=target, origin=origin))

    def _folders(self, file: str, options: dict[str, list[str]], origin: str) -> None:
        for word in options.get("folder", []):
            folder = _below_root(word)
            if target_problem(os.fsencode(folder)):
                raise FeatureUnusable(
                    f"{file}: hook update-ldcache: {word[:200]!r} is no directory for libraries", hint=f"edit {file}"
                )
            if folder not in self.done.library_folders:
                self.done.library_folders.append(folder)

    def _compat(self, file: str, options: dict[str, list[str]], origin: str) -> None:
        """Whether the image's own libcuda.so goes first is its content, which edits are not decided by; so said."""
        driver = (options.get("host-driver-version") or [""])[-1]
        where = (options.get("cuda-compat-container-root") or ["/usr/local/cuda/compat"])[-1]
        cuda = re.match(r"[0-9]{1,4}", self._cuda)
        major = re.match(r"[0-9]{1,6}", driver)
        if cuda and major and int(major[0]) < _FIRST_DRIVER.get(int(cuda[0]), 0):
            self.done.warnings.append(
                f"the image is for CUDA {self._cuda[:20]}, and this node's driver {driver[:20]} is for an older one: "
                f"if the image has libraries for that in {where}, give -e LD_LIBRARY_PATH={where}"
            )

    def _profile(self, file: str, options: dict[str, list[str]], origin: str) -> None:
        self.done.profile_origin = self.done.profile_origin or origin

    def _run(self, hook: Hook, *, file: str, device: str, origin: str) -> None:
        if hook.path not in self._allowed:
            what = " ".join((hook.path, *hook.args[1:]))
            raise FeatureUnusable(
                f"device {device}: {file} wants a program run as root: {what[:200]} ({hook.stage})",
                hint=f'hooks = ["{hook.path}"] in [cdi] of site.toml allows it',
            )
        named = f"{file}: hook {hook.path}"
        if hook.stage == "createContainer":
            raise FeatureUnusable(
                f"{named} is to run at createContainer, where runtimes work in the image's root directory",
                hint=f"another stage in {file}: {' or '.join(_STAGES)}",
            )
        if hook.stage not in _STAGES:
            raise FeatureUnusable(
                f"{named}: {hook.stage} never comes: programs start without the runtime", hint=f"edit {file}"
            )
        if hook.timeout is not None and hook.timeout <= 0:
            raise FeatureUnusable(f"{named}: timeout {hook.timeout} is no time", hint=f"edit {file}")
        self._require_program(hook.path, named)
        names = {entry.partition("=")[0] for entry in hook.env}
        self.done.hooks.append(
            HookEdit(
                stage=hook.stage,  # type: ignore[arg-type]  # one of _STAGES
                path=hook.path,
                args=hook.args or (hook.path,),
                env=hook.env if "PATH" in names else (_PATH, *hook.env),
                timeout=hook.timeout,
                origin=origin,
            )
        )

    def _require_program(self, path: str, named: str) -> None:
        if self._root_owned:
            require_only_roots(path, origin=named)
        try:
            status = os.stat(path)
        except OSError as error:
            raise FeatureUnusable(f"{named}: {error.strerror}", hint=f"namei -l {path}") from None
        if not stat.S_ISREG(status.st_mode) or not status.st_mode & stat.S_IXUSR:
            raise FeatureUnusable(f"{named} is no program", hint=f"ls -l {path}")


def _nothing(file: str, options: dict[str, list[str]], origin: str) -> None:
    """What such a hook prevents cannot happen here."""


def _nvidias(hook: Hook) -> tuple[str, tuple[str, ...]]:
    """Command and words of a hook of NVIDIA's; two empty ones for any other's."""
    program, args = os.path.basename(hook.path), hook.args[1:]
    if program == "nvidia-ctk" and args[:1] == ("hook",):
        return args[1] if len(args) > 1 else "", args[2:]
    if program == "nvidia-cdi-hook":
        return args[0] if args else "", args[1:]
    return "", ()


#: Options that take a value, by command. Of lists each value may be several with commas between (urfave/cli).
_OPTIONS: dict[str, tuple[str, ...]] = {
    "create-symlinks": ("link",),
    "update-ldcache": ("folder", "ldconfig-path"),
    "enable-cuda-compat": ("host-driver-version", "host-cuda-version", "cuda-compat-container-root"),
    "chmod": ("mode", "path"),
}
_LISTS = ("link", "folder", "path")


def _options(command: str, words: tuple[str, ...], file: str) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or name not in _OPTIONS.get(command, ()) or not (equals or rest):
            raise FeatureUnusable(f"{file}: hook {command}: {word[:200]!r} is not known", hint=f"edit {file}")
        value = value if equals else rest.pop(0)
        values.setdefault(name, []).extend(value.split(",") if name in _LISTS else [value])
    return values


def _below_root(path: str) -> str:
    """A path as the hooks take it: joined to the container's root."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))
