from __future__ import annotations

from pathlib import Path

import pytest

from hpcctr.errors import FeatureUnusable
from hpcctr.host.profile_written import is_never, parse

SHIPPED = sorted((Path(__file__).parents[3] / "etc/profiles").glob("*.toml"))
PATH = "/etc/hpcctr/profiles.d/ib.toml"

FIVE_LINES = b"""
libraries = ["libibverbs.so.1", "librdmacm*.so.*", "/opt/cray/libfabric/*/lib64/libfabric.so.1"]
devices = ["/dev/infiniband/*"]
directories = ["/etc/libibverbs.d", "/usr/lib/x86_64-linux-gnu/libibverbs:rw"]
optional = ["librdmacm*.so.*", "/usr/lib/x86_64-linux-gnu/libibverbs:rw"]
env.FI_PROVIDER = "verbs"
"""


def test_five_lines_are_a_profile() -> None:
    profile = parse(FIVE_LINES, PATH)
    assert (profile.name, profile.path) == ("ib", PATH)
    assert profile.libraries == ("libibverbs.so.1", "librdmacm*.so.*", "/opt/cray/libfabric/*/lib64/libfabric.so.1")
    assert profile.devices == ("/dev/infiniband/*",)
    assert [(shown.path, shown.is_read_only) for shown in profile.directories] == [
        ("/etc/libibverbs.d", True),
        ("/usr/lib/x86_64-linux-gnu/libibverbs", False),
    ]
    assert profile.optional == {"librdmacm*.so.*", "/usr/lib/x86_64-linux-gnu/libibverbs"}
    assert profile.env == (("FI_PROVIDER", "verbs"),)
    assert profile.replace == () and (profile.memlock, profile.shm_bytes, profile.mpi) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("replace = true", "replace", ("*",)),
        ("replace = false", "replace", ()),
        ('replace = ["libmpi.so.12"]', "replace", ("libmpi.so.12",)),
        ('memlock = "unlimited"', "memlock", -1),
        ("memlock = 67108864", "memlock", 67108864),
        ("shm-bytes = 1073741824", "shm_bytes", 1 << 30),
        ('description = "Fabric"', "description", "Fabric"),
    ],
)
def test_a_key_has_its_meaning(text: str, field: str, value: object) -> None:
    assert getattr(parse(text.encode(), PATH), field) == value


def test_an_mpi_profile_says_whose_it_prefers() -> None:
    assert parse(b'[mpi]\nprefer = "host"', PATH).mpi is not None
    mpi = parse(b"[mpi]", PATH).mpi
    assert mpi is not None and mpi.prefer == "container"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("librarys = []", "librarys"),
        ("libraries = 'libx.so'", "libraries"),
        ("libraries = ['lib/x.so']", "libraries"),
        ("libraries = ['/opt/../x.so']", "libraries"),
        ("libraries = ['']", "libraries"),
        ("libraries = ['a\\nb']", "libraries"),
        ("devices = ['/etc/passwd']", "devices"),
        ("devices = ['/dev/../etc/passwd']", "devices"),
        ("devices = ['infiniband']", "devices"),
        ("directories = ['etc']", "directories"),
        ("directories = ['/etc/']", "directories"),
        ("directories = ['/']", "directories"),
        ("directories = ['//etc']", "directories"),
        ("directories = ['/proc']", "directories"),
        ("directories = ['/sys/class']", "directories"),
        ("directories = ['/dev/shm']", "directories"),
        ("directories = ['/run']", "directories"),
        ("directories = ['/run/hpcctr']", "directories"),
        ("directories = ['/run/hpcctr/upper']", "directories"),
        ("directories = ['/r*/hpcctr:rw']", "directories"),
        ("directories = ['/*']", "directories"),
        ("directories = ['/.hpcctr-host/lib']", "directories"),
        ("files = ['/usr/bin/srun:rw']", "files"),
        ("files = ['/proc/version']", "files"),
        ("optional = ['libx.so.1']", "optional"),
        ("replace = ['/usr/lib/libx.so']", "replace"),
        ("replace = 'libx.so'", "replace"),
        ("memlock = 'much'", "memlock"),
        ("memlock = 0", "memlock"),
        ("memlock = -5", "memlock"),
        ("shm-bytes = 'unlimited'", "shm-bytes"),
        ("env.LD_LIBRARY_PATH = '/opt/lib'", "LD_LIBRARY_PATH"),
        ("env.LD_PRELOAD = '/opt/lib'", "LD_PRELOAD"),
        ("env.'A=B' = 'x'", "env"),
        ("env.A = 'x\\ny'", "env"),
        ("env.A = 1", "env"),
        ("mpi.prefer = 'mine'", "prefer"),
        ("mpi.version = '1'", "version"),
        ("libraries = [", ""),
        ("\xff", ""),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(text: str, word: str) -> None:
    raw = text.replace("\\n", "\\n").replace("'", '"').encode("latin-1")
    with pytest.raises(FeatureUnusable) as raised:
        parse(raw, PATH)
    assert PATH in raised.value.message and word in raised.value.message and PATH in raised.value.hint


@pytest.mark.parametrize("name", ["IB", "a b", "", "-a", ".a", "a_b", "x" * 64])
def test_a_name_is_of_few_characters(name: str) -> None:
    with pytest.raises(FeatureUnusable):
        parse(b"", f"/etc/hpcctr/profiles.d/{name}.toml")


def test_a_file_or_a_list_that_is_too_long_is_refused() -> None:
    with pytest.raises(FeatureUnusable, match="bytes"):
        parse(b"#" * 300_000, PATH)
    with pytest.raises(FeatureUnusable, match="libraries"):
        parse(b"libraries = [" + b'"libx.so.1",' * 300 + b"]", PATH)


@pytest.mark.parametrize(
    "path", ["/etc", "/usr/lib", "/opt/proc", "/var/spool/slurmd", "/run/munge", "/devices", "/usr/*"]
)
def test_other_places_are_a_profiles(path: str) -> None:
    assert not is_never(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_profile_parses(path: Path) -> None:
    profile = parse(path.read_bytes(), f"/etc/hpcctr/profiles.d/{path.name}")
    assert profile.description
    assert profile.libraries or profile.devices or profile.directories


def test_what_the_documentation_names_is_shipped() -> None:
    names = {"ib", "cxi", "nvidia", "amd", "cray-mpich", "openmpi-ucx", "ucx", "slurm-client", "x11"}
    assert {path.stem for path in SHIPPED} == names
