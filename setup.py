"""Package build: compiles the programs `enter` and `front` into the package. Everything else is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

SOURCE = Path(__file__).resolve().parent / "src"
# The build runs in an environment without this package.
sys.path.insert(0, str(SOURCE))

from hpcctr.enter.build import compile_enter, compile_front  # noqa: E402
from hpcctr.errors import EnterNotBuilt  # noqa: E402

ENTER = Path("hpcctr/enter/enter")
FRONT = Path("hpcctr/client/front")


class BuildWithPrograms(build_py):  # type: ignore[misc]  # setuptools carries no types
    """build_py, then the programs: into the wheel, or beside its sources for an editable installation."""

    def run(self) -> None:
        super().run()
        place = SOURCE if self.editable_mode else Path(self.build_lib)
        try:
            compile_enter(place / ENTER, cc=os.environ.get("CC"))
            compile_front(place / FRONT, cc=os.environ.get("CC"))
        except EnterNotBuilt as error:
            sys.exit(error.for_stderr())

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return [*outputs, str(Path(self.build_lib) / ENTER), str(Path(self.build_lib) / FRONT)]


class BinaryDistribution(Distribution):  # type: ignore[misc]
    """A wheel for this machine's architecture: it carries programs, though no extension module."""

    def has_ext_modules(self) -> bool:
        return True


class WheelOfMachine(bdist_wheel):  # type: ignore[misc]
    """For any Python 3 of this machine's architecture: nothing in it is compiled against Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildWithPrograms, "bdist_wheel": WheelOfMachine}, distclass=BinaryDistribution)
