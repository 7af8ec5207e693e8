"""What sacct needs: slurmdbd and the database below it, both on the first host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.polling import wait_until

if TYPE_CHECKING:
    from tests.cluster.slurm import Slurm

_SLURM_CONF = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={first}
"""

# The library takes `localhost` for its default socket below /run, which is the host's own.
_SLURMDBD_CONF = """
AuthType=auth/munge
DbdHost={first}
SlurmUser=root
PidFile={root}/slurm/slurmdbd.pid
LogFile={root}/slurm/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""
_SOCKET = Path("/run/mysqld/mysqld.sock")


def start(slurm: Slurm) -> bool:
    """Start both, and make the cluster known to them. False when this machine's slurmdbd does not work at all.

    With Debian 13's MariaDB client 11.8.9 slurmdbd 24.11.5 ends at once: the library refuses the result of its first
    query.
    """
    host, data = slurm.login, slurm.root / "database"
    host.run(["mkdir", str(_SOCKET.parent)])
    options = ["--no-defaults", f"--datadir={data}", "--user=root"]
    install = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
    host.run(["mariadb-install-db", *options, *install])
    small = ["--skip-networking", "--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0"]
    slurm.start_daemon(host, "mariadbd", ["mariadbd", *options, *small, f"--socket={_SOCKET}"])
    wait_until(host.path(_SOCKET).exists, seconds=30, what="the database's socket")
    conf = slurm.root / "slurm/slurmdbd.conf"
    conf.write_text(_SLURMDBD_CONF.format(root=slurm.root, first=host.root.name))
    # It would hold a password.
    conf.chmod(0o600)
    slurm.start_daemon(host, "slurmdbd", ["slurmdbd", "-D"])
    with (slurm.root / "slurm/slurm.conf").open("a") as file:
        file.write(_SLURM_CONF.format(first=host.root.name))
    add = ["sacctmgr", "--immediate", "add", "cluster", "hpcctr"]
    said: list[bytes] = []

    def added() -> bool:
        done = slurm.run(add, check=False)
        said[:] = [done.stdout, done.stderr]
        return done.returncode == 0

    def refused() -> bool:
        log = (slurm.root / "slurm/slurmdbd.log").read_text(errors="replace")
        return slurm.daemons["slurmdbd"].poll() is not None and "_check_mysql_concat_is_sane: null result" in log

    wait_until(lambda: added() or refused(), seconds=30, what=lambda: f"the accounting daemon; {said}\n{slurm.logs()}")
    if not refused():
        return True
    text = (slurm.root / "slurm/slurm.conf").read_text()
    (slurm.root / "slurm/slurm.conf").write_text(text.removesuffix(_SLURM_CONF.format(first=host.root.name)))
    return False
